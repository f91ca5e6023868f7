"""Running a comparison: plan, tune, run every cell, sum up."""

import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesaic.compare import cells
from moesaic.compare import figures as comparison
from moesaic.compare.arms import Plan, plan
from moesaic.compare.cells import Job, Outcome, Status
from moesaic.compare.finished import Cell
from moesaic.compare.folder import check_folder, check_same, claimed, command, pinned, resolved
from moesaic.compare.settings import CompareSettings, load
from moesaic.compare.show import Report, progress, show_plan
from moesaic.errors import path_of


def run(arguments: Sequence[str], *, dry_run: bool = False, as_json: bool = False) -> int:
    """Run or continue a comparison and show it; returns the exit code, 1 if any cell is not done.

    Args:
        arguments: [a file of settings, or a comparison's folder] and key=value on top.
        dry_run: show the arms and what there is to run, and write nothing.
    Raises:
        MoesaicError: settings, data or a folder that cannot be used: nothing was written; or, later, a cell's folder
            that holds something else, and what was trained until then stays.
        KeyboardInterrupt: when interrupted, after the running cells wrote checkpoints.
    """
    settings, shared = load(arguments)
    out = path_of(settings.out)
    check_folder(out)
    planned = plan(settings, shared)
    if not settings.overwrite:
        check_same(out, planned)
    if dry_run:
        show_plan(planned, as_json)
        return 0
    with claimed(out, planned):
        ended, trials = _run(planned, out)
        summary = comparison.summarise(
            ended, baseline=settings.baseline, split=settings.split, settings=_described(planned, out, trials)
        )
        comparison.write(out, summary)
    left = summary["missing"]
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return 1 if left else 0
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(comparison.table(summary))
    for cell in left:
        print(f"{cell['status']}: {cell['arm']} s{cell['seed']}: {cell['error']}")
    print(f"{out}: {len(ended) - len(left)} of {len(ended)} cells; figures in report.html, table.md, comparison.json")
    if left:
        print("the same command goes on with the others, and tries again what failed")
    return 1 if left else 0


@dataclass
class Trials:
    """What tuning found: `scores` by arm and learning rate, and the chosen rate by arm, or how it came to none."""

    scores: dict[str, dict[float, float | None]]
    chosen: dict[str, float]
    without: dict[str, tuple[Status, str | None]]


def _run(planned: Plan, out: Path) -> tuple[list[Cell], Trials]:
    """Tune where there are rates to choose from, then run every cell."""
    settings = planned.settings
    rates = settings.lrs if settings.tuned else []
    with progress(planned) as report:
        trials = _tune(planned, out, rates, report)
        places = {(arm, seed): out / "cells" / f"{arm}-s{seed}" for seed in settings.seeds for arm in planned.arms}
        jobs = {
            (arm, seed): _job(planned, arm, place, trial=False, lr=trials.chosen[arm], seed=seed)
            for (arm, seed), place in places.items()
            if arm in trials.chosen
        }
        outcomes = dict(zip(jobs, _outcomes(list(jobs.values()), "runs", settings, report), strict=True))
    found = []
    for (arm, seed), place in places.items():
        outcome, of = outcomes.get((arm, seed)), planned.arms[arm]
        lr, how = planned.shared.lr, trials.without.get(arm)
        if outcome:
            lr, how = outcome.job.recipe.lr, (outcome.status, outcome.error)
        assert how, "an arm without a rate has a reason"
        found.append(Cell(arm, of.recipe.method, of.kind, of.modules, seed, lr, *how, place))
    return found, trials


def _tune(planned: Plan, out: Path, rates: Sequence[float], report: Report) -> Trials:
    """Every arm with every rate, equally long, on validation rows: the best mean score, the lower rate among equals."""
    settings, arms = planned.settings, planned.arms
    if not rates:
        lr = settings.lrs[0] if settings.lrs else planned.shared.lr
        return Trials({}, dict.fromkeys(arms, lr), {})
    own = {"seed": settings.tune_seed, "steps": settings.trial_steps(planned.shared.steps)}
    jobs = {
        (arm, lr): _job(planned, arm, out / "tuning" / f"{arm}-lr{lr:g}", trial=True, lr=lr, **own)
        for arm in arms
        for lr in rates
    }
    outcomes = dict(zip(jobs, _outcomes(list(jobs.values()), "trials", settings, report), strict=True))
    found = Trials({arm: {lr: outcomes[arm, lr].score for lr in rates} for arm in arms}, {}, {})
    for arm, scores in found.scores.items():
        good = [(-score, lr) for lr, score in scores.items() if score is not None]
        open_ = next((outcomes[arm, lr] for lr in rates if outcomes[arm, lr].status == "pending"), None)
        if open_:
            found.without[arm] = "pending", f"its trial {open_.job.name} is not done: {open_.error}"
        elif good:
            found.chosen[arm] = min(good)[1]
        else:
            found.without[arm] = "failed", f"no rate of lrs could be trained: {outcomes[arm, rates[0]].error}"
    return found


def _job(planned: Plan, arm: str, place: Path, *, trial: bool, **own: Any) -> Job:
    """A run in `place`: the arm's recipe with settings of its own. The untrained base is scored once a seed."""
    settings = planned.settings
    told = os.environ.get("OMP_NUM_THREADS", "")
    shared = int(told) if told.isdigit() and int(told) else max(1, (os.cpu_count() or 1) // settings.workers)
    alone = 1 if settings.engine == "ray" else shared
    split, limit = ("validation", settings.limit) if trial else (settings.split, settings.eval_limit)
    return Job(
        name=place.name,
        recipe=replace(planned.arms[arm].recipe, out=str(place), **own),
        split=split,
        limit=limit,
        base=arm == settings.baseline and not trial,
        threads=settings.threads or alone,
        rows_sha256=planned.rows_sha256[split, limit],
    )


def _outcomes(jobs: Sequence[Job], what: str, settings: CompareSettings, report: Report) -> list[Outcome]:
    """How all jobs, which are `what`, end, in their order; those that are done already are not run."""
    found = {job.name: cells.state(job) for job in jobs}
    for outcome in found.values():
        if outcome.status == "done":
            report(outcome, quietly=True)
    left = [job for job in jobs if found[job.name].status != "done"]
    on_ray = settings.engine == "ray"
    engine = cells.ray_cluster(left, gpus=settings.gpus) if on_ray else cells.local(left, workers=settings.workers)
    try:
        with closing(engine):
            for outcome in engine:
                found[outcome.job.name] = outcome
                report(outcome)
    except KeyboardInterrupt:
        done = sum(cells.state(job).status == "done" for job in jobs)
        raise KeyboardInterrupt(f"stopped with {done} of {len(jobs)} {what} done; the same command goes on") from None
    return [found[job.name] for job in jobs]


def _described(planned: Plan, out: Path, trials: Trials) -> dict[str, Any]:
    """What goes into the figures: what was asked for, what it came to, what tuning found."""
    tuning = {arm: {f"{lr:g}": score for lr, score in scores.items()} for arm, scores in trials.scores.items()}
    asked = {key: str(value) if value == math.inf else value for key, value in pinned(planned).items()}  # as JSON can
    return {**asked, **resolved(planned), "tuning": tuning, "command": command(out)}
