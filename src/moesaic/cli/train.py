"""`moesaic train`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from moesaic.cli.show import print_json, show
from moesaic.cli.verbs import Section, verb
from moesaic.runs.pretraining import Pretraining, is_pretraining, load_pretraining
from moesaic.runs.recipe import Recipe, adapter_config, as_used, dump, load_recipe, packaged, packaged_pretrainings
from moesaic.runs.results import trained

_SHARED = {f.name for f in fields(Recipe)} - {"method", "steps", "lr", "schedule"}


@verb(
    "train",
    "fine-tune a model by a recipe, or continue an interrupted run",
    group="mixtures",
    place=30,
    settings=[
        Section(Recipe),
        Section(Pretraining, "settings of language models from nothing, beside those above:", but=_SHARED),
    ],
    operands={"recipe": "a packaged recipe's name, or the path of a .yaml file"},
    dry_run="print the resolved recipe and what it trains, and stop",
    about=lambda: (
        f"packaged recipes: {', '.join(packaged())}\n\n"
        f"language models from nothing: {', '.join(packaged_pretrainings())}\n\n"
        "--dry-run prints a recipe with all its values"
    ),
)
def run(recipe: str, arguments: list[str], *, dry_run: bool = False, as_json: bool = False) -> None:
    if is_pretraining(recipe):
        _pretrain(recipe, arguments, dry_run=dry_run, as_json=as_json)
        return
    wanted = load_recipe(recipe, arguments)
    if dry_run:
        _plan(wanted)
        return
    from moesaic.cli.report import of_adapter
    from moesaic.evaluation.opening import open_adapter
    from moesaic.training.run import train

    results, folder = train(wanted), wanted.run_folder()
    if as_json:
        print_json({"run": str(folder), **results})
        return
    for line in trained(results):
        print(f"{folder}: {line}")
    print(f"how it went: {of_adapter(open_adapter(folder))}")
    rows = "" if Path(wanted.data).is_dir() else " data=HELD_OUT_ROWS"
    print(f"next: moesaic eval {folder}{rows}")


def _pretrain(name: str, arguments: list[str], *, dry_run: bool, as_json: bool) -> None:
    wanted = load_pretraining(name, arguments)
    if dry_run:
        print(dump(wanted), end="")
        return
    from moesaic.report.tables import perplexity_table
    from moesaic.training.pretrain import pretrain

    results, folder = pretrain(wanted), wanted.run_folder()
    if as_json:
        print_json({"run": str(folder), **results})
        return
    show(perplexity_table({folder.name: results["held_out"]}))
    for line in trained({**results, "final_loss": results["mean_loss"]}):
        print(f"{folder}: {line.replace('last loss', 'held-out loss')}")
    print(f"what it learned: {folder}/report.html")
    print(f"next: moesaic perplexity {folder}{_several(wanted)}")


def _several(wanted: Pretraining) -> str:
    """The k to look at of a model that can be slimmed: powers of two, up to those that it was trained with."""
    return f" top_k={','.join(str(2**i) for i in range(wanted.k_max.bit_length()))}" if wanted.k_schedule else ""


def _plan(recipe: Recipe) -> None:
    """Print it as it would be trained, its rank solved where that is asked, and its size, for which data is needed."""
    from moesaic.training.reporting import check_reports
    from moesaic.training.wrapping import check_teacher

    check_teacher(adapter_config(recipe))
    check_reports(recipe.report_to)
    said = ["trainable parameters: data=… tells"]
    if recipe.data or recipe.match:
        from moesaic.runs.results import count_total, count_trainable
        from moesaic.training.prepared import planned, size_told

        recipe, model = planned(recipe)
        said = [f"trainable parameters: {count_trainable(model):,} of {count_total(model):,}"]
        said += filter(None, [size_told(recipe, model)])
    print(dump(as_used(recipe)), end="")
    for line in said:
        print(f"# {line}")
