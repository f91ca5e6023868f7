"""`moesaic eval`."""

from __future__ import annotations

import sys

from moesaic.cli.report import of_adapter
from moesaic.cli.show import print_json, show
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError
from moesaic.evaluation.settings import EvalSettings


@verb(
    "eval",
    "score runs, and adapters that others trained, on held-out rows",
    group="mixtures",
    place=40,
    settings=[Section(EvalSettings, "settings (key=value), the run's own where left out:")],
    takes="FOLDER | key=value",
    about=lambda: (
        "takes folders of runs and of adapters (what PEFT, Trainer and SFTTrainer save, and checkpoints), then settings"
    ),
)
def run(arguments: list[str], *, as_json: bool = False) -> None:
    from moesaic.runs.recipe import parse_settings

    runs = [a for a in arguments if "=" not in a]
    if not runs:
        raise ConfigError("name at least one run folder, such as runs/hotmoe-minilm-s0")
    settings = parse_settings(EvalSettings, [a for a in arguments if "=" in a])
    from moesaic.evaluation.opening import open_adapter
    from moesaic.evaluation.run import evaluate_run
    from moesaic.runs.report import check_report

    opened = [open_adapter(folder, model=settings.model, prompts=settings.prompts) for folder in runs]
    for adapter in opened:
        check_report(adapter.place)
    results = []
    for adapter in opened:
        results.append(evaluate_run(adapter, settings, progress=sys.stderr.isatty(), looked_at=True))
        of_adapter(adapter)
    if as_json:
        print_json(results)
        return
    from moesaic.report.tables import eval_table, routing_table

    show(*filter(None, [eval_table(results), routing_table(results)]))
    print("\n".join(f"pictures and answers: {adapter.place / 'report.html'}" for adapter in opened))
