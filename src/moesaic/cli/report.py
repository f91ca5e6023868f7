"""`moesaic report`: the page of a run, out of what lies in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli.show import print_json
from moesaic.cli.verbs import verb
from moesaic.errors import ConfigError, path_of

if TYPE_CHECKING:
    from moesaic.evaluation.opening import Opened

_ABOUT = """writes FOLDER/report.html, one file that asks the network for nothing: scores beside the base model's, how
the loss and the routing went, which expert does what in which layer and module, and answers with their tokens in the
colours of their experts; as much of it as the folder holds. `moesaic train`, `eval` and `compose` write it too."""


@verb(
    "report",
    "write the page of a run, a composition, an adapter or a comparison",
    group="mixtures",
    place=42,
    takes="FOLDER",
    about=lambda: _ABOUT,
)
def run(arguments: Sequence[str], *, as_json: bool = False) -> None:
    """Write report.html of each folder. Raises MoesaicError of the kind that fits."""
    from moesaic.evaluation.opening import open_adapter

    if not arguments:
        raise ConfigError("name at least one run folder, such as runs/hotmoe-minilm-s0")
    written = []
    for folder in arguments:
        if (path_of(folder) / "comparison.json").is_file():
            written.append(_of_comparison(path_of(folder)))
        else:
            written.append(of_adapter(open_adapter(folder)))
    if as_json:
        print_json([str(file) for file in written])
        return
    for file in written:
        print(f"written: {file}")


def of_adapter(opened: Opened) -> Path:
    """Write the page of an adapter that was opened; returns where it is."""
    from dataclasses import asdict

    from moesaic.runs.report import write_report

    settings: dict[str, Any] = asdict(opened.recipe)
    return write_report(
        opened.place, method=opened.recipe.method, model=opened.recipe.model, settings=settings, adapter=opened.adapter
    )


def _of_comparison(folder: Path) -> Path:
    """A comparison's page anew, out of its figures."""
    from moesaic.errors import first_line
    from moesaic.report import html
    from moesaic.runs.folder import read_json, write_text

    try:
        text = html(read_json(folder / "comparison.json"))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{folder / 'comparison.json'} is damaged: {first_line(error)}") from None
    write_text(folder / "report.html", text)
    return folder / "report.html"
