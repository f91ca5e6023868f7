"""`moesaic train`."""

from __future__ import annotations

from pathlib import Path

from moesaic.cli.show import print_json
from moesaic.cli.verbs import Section, verb
from moesaic.runs.recipe import Recipe, adapter_config, as_used, dump, load_recipe, packaged
from moesaic.runs.results import trained


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
    for line in trained(results):
        print(f"{folder}: {line}")
    rows = "" if Path(wanted.data).is_dir() else " data=HELD_OUT_ROWS"
    print(f"next: moesaic eval {folder}{rows}")


def _resolved(recipe: Recipe) -> Recipe:
    """As it would be trained, its rank solved where that is asked."""
    from moesaic.training.wrapping import check_teacher

    check_teacher(adapter_config(recipe))
    if not recipe.match:
        return recipe
    from moesaic.training.prepared import resolved

    return resolved(recipe)
