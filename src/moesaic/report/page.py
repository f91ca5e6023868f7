"""report.html: one file that asks the network for nothing and needs no script."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moesaic.report import charts
from moesaic.report.text import grids, missing

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Figure:
    heading: str
    drawing: Markup
    caption: str


def html(summary: dict[str, Any]) -> str:
    """The page of a summary."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    done = [arm for arm in summary["arms"] if "scores" in arm]
    return environment.get_template("page.html.j2").render(
        title=f"{len(summary['arms'])} arms on {len(summary['tasks'])} tasks",
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        facts=_facts(summary),
        verdicts=summary["verdicts"],
        missing=missing(summary),
        grids=grids(summary) if done else [],
        figures=figures(summary),
        settings=json.dumps(summary["settings"], indent=2, ensure_ascii=False, default=str),
        versions=summary["versions"],
    )


def figures(summary: dict[str, Any]) -> list[Figure]:
    """Those that the figures at hand allow."""
    made = [_differences(summary), _by_task(summary), _against_parameters(summary), _curves(summary), _entropy(summary)]
    return [figure for figure in (*made, *_utilisation(summary)) if figure is not None]


def _arms(summary: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Arms with results, each with the number of its colour."""
    return [(i, arm) for i, arm in enumerate(summary["arms"]) if "scores" in arm]


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    settings, seeds = summary["settings"], summary["seeds"]
    facts = [
        ("model", str(settings.get("model", ""))),
        ("data", str(settings.get("data", ""))),
        ("split", summary["split"]),
        ("seeds", ", ".join(map(str, seeds))),
        ("baseline", summary["baseline"]),
        ("steps", str(settings.get("steps", ""))),
        ("device", summary["device"] or ""),
        ("moesaic", summary["versions"].get("moesaic", "")),
    ]
    return [(name, value) for name, value in facts if value]


def _differences(summary: dict[str, Any]) -> Figure | None:
    dots = []
    for i, arm in _arms(summary):
        gap = arm["difference"]
        if gap is not None:
            low, high = gap["interval"]
            seeds = [100 * value for value in gap["values"]]
            dots.append(charts.Dot(arm["arm"], 100 * gap["mean"], 100 * low, 100 * high, seeds, i))
    if not dots:
        return None
    baseline = summary["baseline"]
    said = "; ".join(f"{d.label} {d.value:+.1f}" for d in dots)
    return Figure(
        f"Difference to {baseline}",
        charts.intervals(
            dots, zero=baseline, title=f"Difference of the mean score to {baseline}", description=f"In points: {said}."
        ),
        "Dot: the mean over tasks and seeds. Ring: one seed. Bar: 95 % of 10,000 bootstrap draws of the test rows, "
        "paired by row; another training would move the dot about as far as the rings lie apart.",
    )


def _by_task(summary: dict[str, Any]) -> Figure | None:
    arms = [arm for _, arm in _arms(summary) if arm["difference"] is not None]
    if not arms:
        return None
    tasks = list(summary["tasks"])
    values = [[100 * arm["difference"]["by_task"][task]["mean"] for task in tasks] for arm in arms]
    baseline = summary["baseline"]
    return Figure(
        "Where the difference is made",
        charts.heat(
            [arm["arm"] for arm in arms],
            tasks,
            values,
            title=f"Difference to {baseline} by task",
            description="Percentage points, one row an arm and one column a task; the score table has the scores.",
        ),
        f"Percentage points to {baseline}, by task. Blue is above it, orange below.",
    )


def _against_parameters(summary: dict[str, Any]) -> Figure | None:
    points = [
        charts.Point(arm["arm"], arm["trainable_parameters"], 100 * arm["mean"], 100 * (arm["sd"] or 0.0), i)
        for i, arm in _arms(summary)
        if arm["trainable_parameters"]
    ]
    if not points:
        return None
    said = "; ".join(f"{p.label}: {p.x:,.0f} parameters, {p.y:.1f} %" for p in points)
    return Figure(
        "Score and trainable parameters",
        charts.scatter(
            points,
            across="trainable parameters",
            up="mean score, %",
            title="Mean score against trainable parameters",
            description=f"{said}.",
        ),
        "Bar: one standard deviation over seeds, to each side.",
    )


def _curves(summary: dict[str, Any]) -> Figure | None:
    series = [charts.Line(arm["arm"], arm["curve"], i) for i, arm in _arms(summary) if arm["curve"]]
    if not series:
        return None
    said = "; ".join(f"{s.label} ends at {s.points[-1][1]:.3g}" for s in series)
    return Figure(
        "Training loss",
        charts.lines(
            series,
            across="step",
            up="task loss",
            title="Training loss by step",
            description=f"{said}.",
            logarithmic=True,
        ),
        "Task loss alone, without the routers' auxiliary loss; each point averages seeds and neighbouring steps.",
    )


def _entropy(summary: dict[str, Any]) -> Figure | None:
    series = []
    for i, arm in _arms(summary):
        layers = (arm["routing"] or {}).get("entropy_by_layer", {})
        if layers:
            series.append(charts.Line(arm["arm"], [(float(layer), value) for layer, value in layers.items()], i))
    if not series:
        return None
    said = "; ".join(f"{s.label} from {s.points[0][1]:.2f} to {s.points[-1][1]:.2f}" for s in series)
    return Figure(
        "How certain the routers are",
        charts.lines(
            series,
            across="layer",
            up="entropy over log E",
            title="Router entropy by layer",
            description=f"First to last layer: {said}.",
        ),
        "Mean entropy of a token's probabilities, before experts are selected: 0 is certain, 1 is uniform.",
    )


def _utilisation(summary: dict[str, Any]) -> list[Figure]:
    made = []
    for _, arm in _arms(summary):
        layers = {k: v for k, v in (arm["routing"] or {}).get("by_layer_and_task", {}).items() if v}
        if layers:
            made.append(
                Figure(
                    f"Who does what: {arm['arm']}",
                    charts.shares(
                        layers,
                        title=f"Experts' share of the weight by layer and task, {arm['arm']}",
                        description="One row a task, one block of columns a layer, one column an expert.",
                    ),
                    "Share of the weight that each expert got, averaged over a layer's modules, "
                    f"seed {arm['seeds'][0]}. Rows that look alike mean that tasks are not told apart.",
                )
            )
    return made
