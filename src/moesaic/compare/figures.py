"""The figures of `moesaic compare`: finished cells in, scores, intervals and verdicts out.

Scores and differences are shares (0 to 1) here, and percent where they are shown. A difference to the baseline pairs
seeds and rows: its interval redraws the scored rows, its standard deviation is over seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.compare.finished import Cell, Run, read_files
from moesaic.compare.verdicts import verdicts
from moesaic.errors import ConfigError, first_line
from moesaic.evaluation import metrics
from moesaic.report.tables import ROUTING
from moesaic.runs.folder import write_text

if TYPE_CHECKING:
    from rich.console import RenderableType

DOMINATED = 0.6
"""A task with a class this common is shown with its Matthews correlation: accuracy rewards naming that class."""

CURVE_POINTS = 60


def summarise(cells: Sequence[Cell], *, baseline: str, split: str, settings: dict[str, Any]) -> dict[str, Any]:
    """All figures of a comparison as plain JSON.

    A cell that is done but lacks a file counts as failed, with the reason.

    Args:
        baseline: the arm that the others are compared with.
        split: which `eval-<split>.json` and `predictions-<split>.jsonl` to read.
        settings: what was asked for, kept as it is.
    Raises:
        ConfigError: two cells were scored on different rows.
    """
    runs: list[Run] = []
    missed = [_reason(cell, cell.error) for cell in cells if cell.status != "done"]
    for cell in cells:
        if cell.status == "done":
            try:
                runs.append(read_run(cell, split))
            except ConfigError as error:
                why = f"{error}; remove {cell.folder} to run it again"
                missed.append(_reason(cell, why) | {"status": "failed"})
    _require_same_rows(runs)
    return _summary(cells, runs, missed, baseline, split, settings)


def _summary(
    cells: Sequence[Cell],
    runs: Sequence[Run],
    missed: list[dict[str, Any]],
    baseline: str,
    split: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    names = list(dict.fromkeys(cell.arm for cell in cells))
    groups = {name: [r for r in runs if r.cell.arm == name] for name in names}
    arms = [_arm([c for c in cells if c.arm == name], groups[name], groups.get(baseline, [])) for name in names]
    tasks = _tasks(runs)
    row = max((1 / task["n"] / len(tasks) for task in tasks.values()), default=0.0)
    return {
        "baseline": baseline,
        "split": split,
        "settings": settings,
        "seeds": sorted({cell.seed for cell in cells}),
        "tasks": tasks,
        "base_mean": _average([r.scores.get("base_mean") for r in runs]),
        "arms": arms,
        "missing": missed,
        "verdicts": verdicts(arms, baseline, row=row),
        "versions": _versions(runs),
        "device": _distinct([r.results.get("device") for r in runs]),
    }


def read_run(cell: Cell, split: str) -> Run:
    """Read a finished cell's files. Raises ConfigError for one that is missing or damaged."""
    run = read_files(cell, split)
    try:
        summary = _summary([cell], [run], [], cell.arm, split, {})
        _tables(summary)
        _check_drawn(summary)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{cell.folder} holds figures that no run writes: {first_line(error)}") from None
    return run


def write(out: Path, summary: dict[str, Any]) -> None:
    """Write comparison.json, table.md, table.csv and report.html into `out`, each whole or not at all."""
    for name, text in _rendered(summary).items():
        write_text(out / name, text)


def _rendered(summary: dict[str, Any]) -> dict[str, str]:
    """The text of each file of figures."""
    from moesaic.report import html

    return {**_tables(summary), "report.html": html(summary)}


def _tables(summary: dict[str, Any]) -> dict[str, str]:
    from moesaic.report import csv, markdown

    figures = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    return {"comparison.json": figures + "\n", "table.md": markdown(summary), "table.csv": csv(summary)}


def _check_drawn(summary: dict[str, Any]) -> None:
    """Raise TypeError, ValueError or AttributeError where a figure of routing or a curve could not be drawn."""
    for arm in summary["arms"]:
        routing = arm["routing"] or {}
        layers = [row for rows in routing.get("by_layer_and_task", {}).values() for row in rows.values()]
        entropy = [(float(layer), value) for layer, value in routing.get("entropy_by_layer", {}).items()]
        for values in (*layers, *entropy, *arm["curve"]):
            if not all(map(math.isfinite, values)):
                raise ValueError("a figure is not finite")


def table(summary: dict[str, Any]) -> RenderableType:
    """Scores, costs, routing and verdicts for a terminal."""
    from moesaic.report import rich_table

    return rich_table(summary)


def _reason(cell: Cell, error: str | None) -> dict[str, Any]:
    return {"arm": cell.arm, "seed": cell.seed, "status": cell.status, "error": error}


def _require_same_rows(runs: Sequence[Run]) -> None:
    for run in runs[1:]:
        if run.scores.get("data_sha256") != runs[0].scores.get("data_sha256"):
            raise ConfigError(
                f"{runs[0].cell.folder} and {run.cell.folder} were scored on different rows: "
                "run `moesaic eval` on both again, with the same data, tasks and limit"
            )


def _tasks(runs: Sequence[Run]) -> dict[str, Any]:
    """What is true of a task whatever the arm; the untrained base averaged over the runs that scored it."""
    found = {}
    for task, first in runs[0].scores["tasks"].items() if runs else ():
        scores = [r.scores["tasks"][task] for r in runs]
        found[task] = {
            "metric": first["metric"],
            "n": first["n"],
            "majority": first.get("majority"),
            "dominated": first.get("majority", 0.0) >= DOMINATED,
            "base_score": _average([s.get("base_score") for s in scores]),
            "base_matthews": _average([s.get("base_matthews") for s in scores]),
        }
    return found


def _arm(cells: Sequence[Cell], runs: Sequence[Run], baseline: Sequence[Run]) -> dict[str, Any]:
    states = {c.status for c in cells if c.folder not in {r.cell.folder for r in runs}} - {"done"}
    status = "done" if len(runs) == len(cells) else "partial" if runs else "failed"
    if not runs and states == {"pending"}:
        status = "pending"
    arm: dict[str, Any] = {
        "arm": cells[0].arm,
        "method": cells[0].method,
        "kind": cells[0].kind,
        "modules": cells[0].modules,
        "lr": cells[0].lr,
        "status": status,
        "seeds": [r.cell.seed for r in runs],
    }
    if not runs:
        return arm
    is_baseline = bool(baseline) and runs[0] is baseline[0]
    speed = _average([r.results.get("tokens_per_second") for r in runs])
    base_speed = _average([r.results.get("tokens_per_second") for r in baseline])
    return arm | {
        "scores": {task: _scores(runs, task) for task in runs[0].scores["tasks"]},
        **_spread([r.mean for r in runs]),
        "difference": None if is_baseline else _difference(runs, baseline),
        "mean_relative_difference": None if is_baseline else _relative(runs, baseline),
        "trainable_parameters": runs[0].results.get("trainable_parameters"),
        "tokens_per_second": speed,
        "overhead": base_speed / speed - 1 if speed and base_speed else None,
        "train_seconds": _average([r.results.get("train_seconds") for r in runs]),
        "peak_memory_mib": _average([r.results.get("peak_memory_mib") for r in runs]),
        "routing": _routing(runs),
        "curve": _curve(runs),
    }


def _scores(runs: Sequence[Run], task: str) -> dict[str, Any]:
    scores = [r.scores["tasks"][task] for r in runs]
    found: dict[str, Any] = _spread([s["score"] for s in scores])
    if "matthews" in scores[0]:
        found["matthews"] = _spread([s["matthews"] for s in scores])
    return found


def _spread(values: Sequence[float]) -> dict[str, Any]:
    mean, deviation = metrics.spread(values)
    return {"mean": mean, "sd": deviation, "values": list(values)}


def _difference(runs: Sequence[Run], baseline: Sequence[Run]) -> dict[str, Any] | None:
    """To the baseline, over the seeds that both have: of the mean, and by task; None where they share no seed."""
    own, other = ({r.cell.seed: r for r in group} for group in (runs, baseline))
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return None
    rows = {
        task: [
            sum(own[s].correct[task][i] - other[s].correct[task][i] for s in seeds) / len(seeds)
            for i in range(len(row))
        ]
        for task, row in runs[0].correct.items()
    }
    return {
        "seeds": seeds,
        **_spread([own[s].mean - other[s].mean for s in seeds]),
        "interval": metrics.paired_bootstrap(list(rows.values())),
        "by_task": {
            task: {"mean": sum(row) / len(row), "interval": metrics.paired_bootstrap([row])}
            for task, row in rows.items()
        },
    }


def _relative(runs: Sequence[Run], baseline: Sequence[Run]) -> float | None:
    """Over the seeds that both have; None where they share no seed."""
    seeds = {r.cell.seed for r in runs} & {r.cell.seed for r in baseline}
    if not seeds:
        return None
    own, other = (
        {
            task: _spread([r.scores["tasks"][task]["score"] for r in group if r.cell.seed in seeds])["mean"]
            for task in runs[0].correct
        }
        for group in (runs, baseline)
    )
    return metrics.mean_relative_difference(own, other)


def _routing(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Averages over seeds; shares by layer and task of the first seed alone, as experts are numbered anew in each."""
    found = [r.scores["routing"] for r in runs if r.scores.get("routing")]
    if not found:
        return None
    layers = list(found[0].get("entropy_by_layer", {}))
    return {
        **{figure.key: _average([f.get(figure.key) for f in found]) for figure in ROUTING},
        "entropy_by_layer": {layer: _average([f["entropy_by_layer"].get(layer) for f in found]) for layer in layers},
        "by_layer_and_task": found[0].get("by_layer_and_task", {}),
    }


def _curve(runs: Sequence[Run]) -> list[tuple[float, float]]:
    """(step, task loss) averaged over seeds and over stretches of steps."""
    points = [point for r in runs for point in r.losses]
    last = max((step for step, _ in points), default=0)
    bins: dict[int, list[tuple[int, float]]] = {}
    for step, loss in points:
        bins.setdefault((step - 1) * CURVE_POINTS // last, []).append((step, loss))
    return [(sum(s for s, _ in b) / len(b), sum(v for _, v in b) / len(b)) for _, b in sorted(bins.items())]


def _versions(runs: Sequence[Run]) -> dict[str, str | None]:
    """Each package's version in the runs; all of them where they differ."""
    names = dict.fromkeys(name for r in runs for name in r.results.get("versions", {}))
    return {name: _distinct([r.results.get("versions", {}).get(name) for r in runs]) for name in names}


def _distinct(values: Sequence[str | None]) -> str | None:
    return "; ".join(dict.fromkeys(v for v in values if v)) or None


def _average(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
