"""Pages of learners on streams: accuracy over windows with the drifts marked, and what each expert did when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.report import charts
from moesaic.report.page import Figure, of_run
from moesaic.report.text import Grid

BINS = 20
"""Parts of a stream whose expert activity is shown."""
_METRICS = {
    "accuracy": "of rows whose class was named before it was learned",
    "kappa": "above chance, by the classes' frequencies; 0 is chance, 100 perfect",
    "kappa_m": "above naming the most frequent class so far",
    "kappa_t": "above naming the class that came last",
}
_COUNTS = {"chosen": "weight in answers", "trained": "rows learned"}


def page(results: Sequence[dict[str, Any]]) -> str:
    """The page of runs, side by side where they are several."""
    first = results[0]
    facts = [
        ("rows", ", ".join(dict.fromkeys(f"{r['rows']:,}" for r in results))),
        ("classes", ", ".join(first["classes"][:12]) + (" …" if len(first["classes"]) > 12 else "")),
        ("labels come", ", ".join(dict.fromkeys(map(_late, results)))),
        ("without a label", f"{first['unlabelled']:,}" if first["unlabelled"] else ""),
        ("left out as malformed", f"{first['skipped']:,}" if first.get("skipped") else ""),
        *(("command", r["command"]) for r in results),
    ]
    facts = [(name, said) for name, said in facts if said]
    streams = list(dict.fromkeys(r["stream"] for r in results))
    figures = [_curves(results), _begun(results)]
    figures += [made for r in results for made in _activity(r)]
    return of_run(
        "moesaic stream", f"{', '.join(dict.fromkeys(r['learner'] for r in results))} on "
        f"{', '.join(map(_short, streams))}", facts=facts,
        grids=[_figures(results), *_drifts(results)], figures=[f for f in figures if f is not None],
        settings={name: r["settings"] for name, r in zip(_names(results), results, strict=True)},
        versions=first["versions"],
    )  # fmt: skip


def comparison_page(summary: dict[str, Any]) -> str:
    """The page of a comparison."""
    drawn = []
    for stream, of in summary["curves"].items():
        series = [
            charts.Line(name, [(x, 100 * y) for x, y in points], i)
            for i, (name, points) in enumerate(of.items())
            if len(points) > 1
        ]
        if series:
            drawn.append((_short(stream), _lines(series, summary["drifts"].get(stream, ()), _short(stream))))
    caption = "Accuracy of each window, first seed; dashed where a drift has its middle."
    facts = [
        ("seeds", ", ".join(map(str, summary["seeds"]))),
        ("command", summary["command"]),
    ]
    return of_run(
        "moesaic stream compare",
        f"{_counted(len(summary['learners']), 'learner')} on {_counted(len(summary['streams']), 'stream')}",
        facts=facts, grids=comparison_grids(summary),
        figures=[Figure("Accuracy over the stream", drawn, caption)] if drawn else [],
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
        header = ["learner", *map(_short, summary["streams"]), *(["mean rank"] if ranked else [])]
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


def _short(stream: str) -> str:
    return Path(stream).name.removesuffix(".gz").rpartition(".")[0] or Path(stream).name if "." in stream else stream


def _names(results: Sequence[dict[str, Any]]) -> list[str]:
    """Of each run, as short as tells them apart."""
    ways = (
        lambda r: str(r["learner"]),
        lambda r: f"{r['learner']}, seed {r['seed']}",
        lambda r: f"{r['learner']}, {_short(r['stream'])}, seed {r['seed']}",
        lambda r: f"{r['learner']}, {_other(r, results)}",
    )
    for way in ways:
        names = [way(r) for r in results]
        if len({*names}) == len(names):
            return names
    return [f"{name}, {number}" for number, name in enumerate(names, 1)]


def _other(result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """The settings in which it differs from some other."""
    of = result["settings"]
    differ = [key for key in of if any(of[key] != r["settings"].get(key) for r in results)]
    return ", ".join(f"{key}={of[key]}" for key in differ)


def _late(result: Mapping[str, Any]) -> str:
    return f"{result['delay']:,} rows late" if result["delay"] else "before the next row"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _figures(results: Sequence[dict[str, Any]]) -> Grid:
    names = _names(results)
    rows = [[metric, *(_percent(r[metric]) for r in results)] for metric in _METRICS]
    rows = [[f"{row[0]}, %", *row[1:]] for row in rows]
    rows.append(["rows a CPU second", *(f"{r['rows_per_second']:,.0f}" for r in results)])
    rows.append(["peak memory, MiB", *(f"{r['peak_memory_mib']:,.0f}" for r in results)])
    return Grid("Over all rows", ["figure", *names], rows, list(_METRICS.items()))


def _drifts(results: Sequence[dict[str, Any]]) -> list[Grid]:
    rows = [
        [
            name, f"{drift['position']:,}", f"{drift['width']:,}", _percent(drift["before"]), _percent(drift["lowest"]),
            "not yet" if drift["rows"] is None else f"{drift['rows']:,}",
        ]
        for name, r in zip(_names(results), results, strict=True)
        for drift in r["drifts"]
    ]  # fmt: skip
    legend = [("back after", "rows until a window is within a point of what it was before")]
    header = ["learner", "drift at row", "over rows", "accuracy before", "lowest", "back after"]
    return [Grid("Drifts", header, rows, legend)] if rows else []


def _curves(results: Sequence[dict[str, Any]]) -> Figure | None:
    series = [
        charts.Line(
            name,
            [(w["start"] + w["rows"], 100 * w["accuracy"]) for w in r["windows"] if w["accuracy"] is not None],
            i,
        )
        for i, (name, r) in enumerate(zip(_names(results), results, strict=True))
    ]
    series = [line for line in series if len(line.points) > 1]
    if not series:
        return None
    where = sorted({drift["position"] for r in results for drift in r["drifts"]})
    drawn = _lines(series, where, "Accuracy by window")
    rows = f"{results[0]['window']:,}"
    dashed = "; dashed where a drift has its middle" if where else ""
    return Figure("Accuracy over the stream", [("", drawn)], f"Windows of {rows} rows{dashed}.")


def _lines(series: Sequence[charts.Line], drifts: Sequence[float], title: str) -> Any:
    said = "; ".join(f"{s.label} from {s.points[0][1]:.1f} to {s.points[-1][1]:.1f}" for s in series)
    return charts.lines(
        series, across="row", up="accuracy, %", title=title, description=f"First to last: {said}.", marks=drifts
    )


def _activity(result: dict[str, Any]) -> list[Figure]:
    """What each expert did, in `BINS` parts of the stream."""
    windows, starts = result["activity"], result["windows"]
    drawn = []
    for what, said in _COUNTS.items():
        parts = [part for part in _parts(windows, what) if any(part[1])]
        if parts and any(max(counts) > 1.1 * min(counts) for _, counts in parts):
            rows = {f"to row {_end(starts, last):,}": [v / sum(counts) for v in counts] for last, counts in parts}
            title = f"Experts' share of {said} over the stream"
            drawn.append(
                (said, charts.shares({"": rows}, title=title, description="One row a part of the stream.", over=""))
            )
    if not drawn:
        return []
    begun = sum(sum(window.get("reset", ())) for window in windows)
    caption = f"Each row sums to 1. Experts begun anew: {begun:,}." if begun else "Each row sums to 1."
    return [Figure(f"Who does what, {result['learner']}", drawn, caption)]


def _begun(results: Sequence[dict[str, Any]]) -> Figure | None:
    """When experts were begun anew, which is when a drift was noticed."""
    series = []
    for i, (name, r) in enumerate(zip(_names(results), results, strict=True)):
        points = [(_end(r["windows"], k), sum(w.get("reset", ()))) for k, w in enumerate(r["activity"])]
        if len(points) > 1 and any(count for _, count in points):
            series.append(charts.Line(name, points, i))
    if not series:
        return None
    where = sorted({drift["position"] for r in results for drift in r["drifts"]})
    said = "; ".join(f"{s.label} {sum(count for _, count in s.points):,} in all" for s in series)
    drawn = charts.lines(
        series,
        across="row",
        up="experts begun anew",
        title="Experts begun anew, by window",
        description=said,
        marks=where,
    )
    return Figure(
        "When drifts were noticed", [("", drawn)], "Experts whose errors rose, and that were replaced, by window."
    )


def _parts(windows: Sequence[Mapping[str, Sequence[float]]], what: str) -> list[tuple[int, list[float]]]:
    """Sums over neighbouring windows: the last window of each, and a figure for each expert."""
    size = -(-len(windows) // BINS) or 1
    width = max((len(window.get(what, ())) for window in windows), default=0)
    found = []
    for start in range(0, len(windows), size):
        part = windows[start : start + size]
        sums = [sum(w[what][k] for w in part if k < len(w.get(what, ()))) for k in range(width)]
        found.append((start + len(part) - 1, sums))
    return found


def _end(windows: Sequence[Mapping[str, Any]], number: int) -> int:
    return int(windows[number]["start"] + windows[number]["rows"])
