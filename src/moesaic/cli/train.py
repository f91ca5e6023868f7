"""`moesaic train`."""

from __future__ import annotations

from pathlib import Path

from moesaic.cli.show import print_json
from moesaic.cli.verbs import Section, verb
from moesaic.runs.recipe import Recipe, as_used, dump, load_recipe, packaged


@verb(
    "train",
    "fine-tune a model by a recipe, or continue an interrupted run",
    group="mixtures",
    place=30,
    settings=[Section(Recipe)],
    operands={"recipe": "a packaged recipe's name, or the path of a .yaml file"},
    dry_run="print the resolved recipe and stop",
    about=lambda: f"packaged recipes: {', '.join(packaged())}",
)
def run(recipe: str, arguments: list[str], *, dry_run: bool = False, as_json: bool = False) -> None:
    wanted = load_recipe(recipe, arguments)
    if dry_run:
        print(dump(as_used(_resolved(wanted))), end="")
        return
    from moesaic.training.run import train

    results, folder = train(wanted), wanted.run_folder()
    if as_json:
        print_json({"run": str(folder), **results})
        return
    if results["steps"]:
        loss = results["final_loss"]
        print(
            f"{folder}: {results['steps']} steps in {results['train_seconds']:.0f} s "
            f"({results['tokens_per_second']:.0f} tokens/s), {results['trainable_parameters']:,} trainable parameters, "
            f"last loss {'unknown' if loss is None else f'{loss:.3f}'}"
        )
    if results.get("found"):
        print(f"{folder}: {results['found']}")
    rows = "" if Path(wanted.data).is_dir() else " data=HELD_OUT_ROWS"
    print(f"next: moesaic eval {folder}{rows}")


def _resolved(recipe: Recipe) -> Recipe:
    """As it would be trained, its rank solved where that is asked."""
    from moesaic.training.wrapping import check_teacher

    check_teacher(recipe)
    if not recipe.match:
        return recipe
    from moesaic.training.run import resolved

    return resolved(recipe)
