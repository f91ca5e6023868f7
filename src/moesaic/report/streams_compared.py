"""The page of a comparison on streams: tables of learners by stream, curves, and what experts did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.report import charts
from moesaic.report.page import Figure, of_run
from moesaic.report.streams import activity, lines_of, short
from moesaic.report.text import Grid

BINS = 10
"""Parts of a stream whose expert activity is shown."""


def comparison_page(summary: dict[str, Any], results: Sequence[dict[str, Any]] = ()) -> str:
    """The page of a comparison; of `results`, cells of one seed, what their experts did is shown."""
    facts = [
        ("seeds", ", ".join(map(str, summary["seeds"]))),
        ("command", summary["command"]),
    ]
    first, *others = comparison_grids(summary)
    return of_run(
        "moesaic stream compare",
        f"{_counted(len(summary['learners']), 'learner')} on {_counted(len(summary['streams']), 'stream')}",
        facts=facts, grids=[first, *_recovery(summary), *others],
        figures=[*_curves(summary), *_activity(results)],
        settings=summary["settings"], versions=summary["versions"],
    )  # fmt: skip


def comparison_grids(summary: dict[str, Any]) -> list[Grid]:
    """Accuracy with mean ranks, the kappas, and CPU seconds: a row a learner, a column a stream."""
    made = []
    for metric, title in (
        ("accuracy", "Accuracy, percent"), ("kappa_m", "Kappa M, percent"), ("kappa_t", "Kappa T, percent"),
        ("cpu_seconds", "CPU seconds"),
    ):  # fmt: skip
        ranked = metric == "accuracy" and bool(summary["ranks"])
        rows = []
        for name in summary["learners"]:
            row = [name, *(_shown(summary["table"][s].get(name, {}), metric) for s in summary["streams"])]
            rows.append(row + ([f"{summary['ranks'][name]:.2f}"] if ranked else []))
        header = ["learner", *map(short, summary["streams"]), *(["mean rank"] if ranked else [])]
        legend = [("a ± b", "mean and standard deviation over seeds")] if len(summary["seeds"]) > 1 else []
        if ranked:
            legend.append(("mean rank", "by accuracy, 1 is best, over the streams that all learners were run on"))
        made.append(Grid(title, header, rows, legend))
    failed = [
        [s, name, of["failed"]] for s, row in summary["table"].items() for name, of in row.items() if "failed" in of
    ]
    return [*made, *([Grid("What failed", ["stream", "learner", "why"], failed, [])] if failed else [])]


def _shown(cell: Mapping[str, Any], metric: str) -> str:
    if metric not in cell:
        return "–"
    scale, digits = (1, 1) if metric == "cpu_seconds" else (100, 2)
    mean, sd = cell[metric]["mean"], cell[metric]["sd"]
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * sd:.{digits}f}" if sd is not None else "")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _recovery(summary: dict[str, Any]) -> list[Grid]:
    """A table for each stream that drifts: a row a learner, a column a drift."""
    legend = [
        ("a → b", "accuracy before the drift, percent, and the lowest of a window behind it"),
        ("rows", "until a window is within a point of what it was before"),
    ]
    if len(summary["seeds"]) > 1:
        legend.append(("seeds", "means over all; rows over those that came back, which are counted where some did not"))
    if any(
        drift["lowest"] is None for of in summary["recovery"].values() for drifts in of.values() for drift in drifts
    ):
        legend.append(("–", "no whole window between this drift and the next, or the end: a smaller window= shows it"))
    made: list[Grid] = []
    for stream, of in summary["recovery"].items():
        drifts = next(iter(of.values()))
        header = ["learner", *(f"drift at row {drift['position']:,}" for drift in drifts)]
        rows = [[name, *map(_back, of[name])] for name in summary["learners"] if name in of]
        if drifts:
            made.append(Grid(f"Recovery on {short(stream)}", header, rows, [] if made else legend))
    return made


def _back(drift: Mapping[str, Any]) -> str:
    if drift["lowest"] is None:
        return "–"
    rows = "not back" if drift["rows"] is None else f"{drift['rows']:,.0f} rows"
    some = f", {drift['back']} of {drift['seeds']} seeds" if 0 < drift["back"] < drift["seeds"] else ""
    return f"{100 * drift['before']:.1f} → {100 * drift['lowest']:.1f}\n{rows}{some}"


def _curves(summary: dict[str, Any]) -> list[Figure]:
    drawn = []
    for stream, of in summary["curves"].items():
        series = [
            charts.Line(name, [(x, 100 * y) for x, y in points], i)
            for i, (name, points) in enumerate(of.items())
            if len(points) > 1
        ]
        if series:
            drawn.append((short(stream), lines_of(series, summary["drifts"].get(stream, ()), short(stream))))
    caption = "Accuracy of each window, first seed; dashed where a drift has its middle."
    return [Figure("Accuracy over the stream", drawn, caption)] if drawn else []


def _activity(results: Sequence[dict[str, Any]]) -> list[Figure]:
    """What experts did, stream by stream, folded."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for r in results:
        found.setdefault(r["stream"], []).append((r["learner"], r))
    caption = "First seed; each row sums to 1."
    drawn = {stream: activity(runs, BINS) for stream, runs in found.items()}
    return [Figure(f"Who does what on {short(s)}", made, caption, folded=True) for s, made in drawn.items() if made]
