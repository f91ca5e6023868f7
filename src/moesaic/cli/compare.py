"""`moesaic compare`."""

from __future__ import annotations

from moesaic.cli.verbs import Section, verb
from moesaic.compare.settings import BY_CELL, CompareSettings
from moesaic.runs.recipe import Recipe


@verb(
    "compare",
    "compare methods at equal budget over seeds",
    group="mixtures",
    place=50,
    settings=[
        Section(CompareSettings),
        Section(Recipe, "settings of every run, as for `moesaic train`:", but=BY_CELL, brief=True),
    ],
    takes="FILE | FOLDER | key=value",
    dry_run="print the arms, their ranks and counts, and stop",
    about=lambda: "takes a .yaml file, or a comparison's folder to go on with; settings on top",
)
def run(arguments: list[str], *, dry_run: bool = False, as_json: bool = False) -> int:
    from moesaic.compare import run as comparison

    return comparison.run(arguments, dry_run=dry_run, as_json=as_json)
