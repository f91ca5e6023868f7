"""What a comparison shows while it runs, and of its plan."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from moesaic.compare.arms import Plan
from moesaic.compare.cells import Outcome
from moesaic.compare.folder import pinned, resolved


class Report(Protocol):
    """Told of each run that ended; quietly of those that had ended before."""

    def __call__(self, outcome: Outcome, *, quietly: bool = False) -> None: ...


@contextmanager
def progress(planned: Plan) -> Iterator[Report]:
    """On stderr what there is to run, a line for each run that ends, and a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr, highlight=False)  # as it is now: what runs meanwhile may redirect it
    total = planned.trials + planned.runs
    console.print(f"{planned.settings.out}: {extent(planned)}", markup=False, soft_wrap=True)
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task, ended = bar.add_task("runs", total=total), 0

        def report(outcome: Outcome, *, quietly: bool = False) -> None:
            nonlocal ended
            ended += 1
            bar.advance(task)
            if quietly:
                return
            said = f"{100 * outcome.score:.1f}" if outcome.score is not None else f"{outcome.status}: {outcome.error}"
            console.print(
                f"[{ended}/{total}] {outcome.job.name}: {said} ({outcome.seconds:.0f} s)", markup=False, soft_wrap=True
            )

        yield report


def extent(planned: Plan) -> str:
    """How much there is to run: `4 trials of 100 steps, then 6 runs of 400 steps (2 arms x 3 seeds)`."""
    settings = planned.settings
    trials = f"{planned.trials} trials of {settings.trial_steps(planned.shared.steps)} steps, then "
    size = f"{len(planned.arms)} arms x {len(settings.seeds)} seeds"
    return f"{trials if settings.tuned else ''}{planned.runs} runs of {planned.shared.steps} steps ({size})"


def show_plan(planned: Plan, as_json: bool) -> None:
    """The arms with their ranks and counts, and how much there is to run; on stdout."""
    settings = planned.settings
    if as_json:
        size = {"trials": planned.trials, "cells": planned.runs}
        found = {**pinned(planned), **resolved(planned), **size, "scored": planned.scored}
        print(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    title = f"{planned.shared.model}: {', '.join(planned.tasks)}"
    off_what = "total rank off" if settings.match == "rank" else "off the budget"
    table = Table("arm", "method", "experts", "rank", "trainable", off_what, title=title)
    for column in table.columns[2:]:
        column.justify = "right"
    for name, arm in planned.arms.items():
        rank = f"{arm.rank}" + (f" (+1 in {arm.raised} modules)" if arm.raised else "")
        off = ""
        if planned.budget:
            has = arm.trainable if settings.match == "trainable_params" else arm.experts * arm.rank
            off = "not matched" if name == "bound" else f"{has / planned.budget - 1:+.2%}"
        table.add_row(name, arm.recipe.method, str(arm.experts), rank, f"{arm.trainable:,}", off)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(extent(planned))
    for what, rows in planned.scored.items():
        print(f"{what}: scored on {', '.join(f'{n:,} of {task}' for task, n in rows.items())}")
