"""Pages of runs on streams: accuracy over windows with the drifts marked, classes, and what each expert did when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moesaic.report import charts
from moesaic.report.page import Figure, of_run
from moesaic.report.text import Grid

BINS = 20
"""Parts of a stream whose expert activity is shown."""
CLASSES = 20
"""Classes that have a line each."""
_BASELINES = {"nochange": "NoChange", "majority": "the majority class"}
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
        ("labels", ", ".join(dict.fromkeys(f"column {r['labelled']}" for r in results if r.get("labelled")))),
        ("classes", ", ".join(first["classes"][:12]) + (" …" if len(first["classes"]) > 12 else "")),
        ("labels come", ", ".join(dict.fromkeys(map(_late, results)))),
        ("without a label", f"{first['unlabelled']:,}" if first["unlabelled"] else ""),
        ("left out as malformed", f"{first['skipped']:,}" if first.get("skipped") else ""),
        *(("command", r["command"]) for r in results),
    ]
    streams = list(dict.fromkeys(r["stream"] for r in results))
    facts = [(name, said) for name, said in facts if said and (name != "classes" or len(streams) == 1)]
    figures = [_curves(results), _begun(results)]
    figures += [made for name, r in zip(_names(results), results, strict=True) for made in _activity(name, r)]
    return of_run(
        "moesaic stream", f"{', '.join(dict.fromkeys(r['learner'] for r in results))} on "
        f"{', '.join(map(short, streams))}", facts=facts,
        grids=[_figures(results), *_classes(results), *_drifts(results)], figures=[f for f in figures if f is not None],
        settings={name: r["settings"] for name, r in zip(_names(results), results, strict=True)},
        versions=first["versions"],
    )  # fmt: skip


def short(stream: str) -> str:
    """A stream's name, or its file's without folder and ending."""
    return Path(stream).name.removesuffix(".gz").rpartition(".")[0] or Path(stream).name if "." in stream else stream


def _names(results: Sequence[dict[str, Any]]) -> list[str]:
    """Of each run, as short as tells them apart."""
    ways = (
        lambda r: str(r["learner"]),
        lambda r: f"{r['learner']}, seed {r['seed']}",
        lambda r: f"{r['learner']}, {short(r['stream'])}, seed {r['seed']}",
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


def percent(value: float | None) -> str:
    """A share from 0 to 1, as percent."""
    return "–" if value is None else f"{100 * value:.2f}"


def _figures(results: Sequence[dict[str, Any]]) -> Grid:
    names = _names(results)
    rows = [[metric, *(percent(r[metric]) for r in results)] for metric in _METRICS]
    rows[1:1] = [
        [f"accuracy of {name}", *(percent(r.get("baselines", {}).get(key)) for r in results)]
        for key, name in _BASELINES.items()
    ]
    rows = [[f"{row[0]}, %", *row[1:]] for row in rows]
    rows.append(["rows a CPU second", *(f"{r['rows_per_second']:,.0f}" for r in results)])
    rows.append(["peak memory, MiB", *(f"{r['peak_memory_mib']:,.0f}" for r in results)])
    legend = [*_METRICS.items(), ("NoChange, the majority class", "as kappa_t and kappa_m count them on the same rows")]
    return Grid("Over all rows", ["figure", *names], rows, legend)


def _classes(results: Sequence[dict[str, Any]]) -> list[Grid]:
    """How often each class came and was named, and how rightly; nothing of runs that do not tell."""
    legend = [("recall", "of the rows of the class, named so"), ("precision", "of the rows named so, of the class")]
    header = ["class", "rows", "of all rows, %", "named", "recall, %", "precision, %"]
    made = []
    for name, r in zip(_names(results), results, strict=True):
        ordered = sorted(r.get("by_class", ()), key=lambda of: of["came"], reverse=True)
        rows = [
            [
                of["class"], f"{of['came']:,}", percent(of["came"] / r["scored"] if r["scored"] else None),
                f"{of['predicted']:,}", percent(of["recall"]), percent(of["precision"]),
            ]
            for of in ordered[:CLASSES]
        ]  # fmt: skip
        title = "Classes" if len(results) == 1 else f"Classes by {name}"
        cut = f", the {CLASSES} most frequent of {len(ordered):,}" if len(ordered) > CLASSES else ""
        made += [Grid(title + cut, header, rows, legend)] if rows else []
    return made


def _drifts(results: Sequence[dict[str, Any]]) -> list[Grid]:
    rows = [
        [
            name, f"{drift['position']:,}", f"{drift['width']:,}", percent(drift["before"]), percent(drift["lowest"]),
            "not yet" if drift["rows"] is None else f"{drift['rows']:,}",
        ]
        for name, r in zip(_names(results), results, strict=True)
        for drift in r["drifts"]
    ]  # fmt: skip
    legend = [("back after", "rows until a window is within a point of what it was before")]
    header = ["learner", "drift at row", "over rows", "accuracy before", "lowest", "back after"]
    return [Grid("Drifts", header, rows, legend)] if rows else []


def _curves(results: Sequence[dict[str, Any]]) -> Figure | None:
    named, drawn = list(zip(_names(results), results, strict=True)), []
    streams = list(dict.fromkeys(r["stream"] for r in results))
    for stream in streams:
        series = [
            charts.Line(
                name,
                [(w["start"] + w["rows"], 100 * w["accuracy"]) for w in r["windows"] if w["accuracy"] is not None],
                i,
            )
            for i, (name, r) in enumerate(named)
            if r["stream"] == stream
        ]
        series = [line for line in series if len(line.points) > 1]
        where = sorted({drift["position"] for r in results if r["stream"] == stream for drift in r["drifts"]})
        if series:
            drawn.append((short(stream) * (len(streams) > 1), lines_of(series, where, "Accuracy by window")))
    rows = ", ".join(dict.fromkeys(f"{r['window']:,}" for r in results))
    dashed = "; dashed where a drift has its middle" if any(r["drifts"] for r in results) else ""
    return Figure("Accuracy over the stream", drawn, f"Windows of {rows} rows{dashed}.") if drawn else None


def lines_of(series: Sequence[charts.Line], drifts: Sequence[float], title: str) -> Markup:
    """Accuracy in percent over rows, with drifts marked."""
    said = "; ".join(f"{s.label} from {s.points[0][1]:.1f} to {s.points[-1][1]:.1f}" for s in series)
    return charts.lines(
        series, across="row", up="accuracy, %", title=title, description=f"First to last: {said}.", marks=drifts
    )


def _activity(name: str, result: dict[str, Any]) -> list[Figure]:
    drawn = activity([("", result)], BINS)
    if not drawn:
        return []
    begun = sum(sum(window.get("reset", ())) for window in result["activity"])
    caption = f"Each row sums to 1. Experts begun anew: {begun:,}." if begun else "Each row sums to 1."
    return [Figure(f"Who does what, {name}", drawn, caption)]


def activity(results: Sequence[tuple[str, dict[str, Any]]], bins: int) -> list[tuple[str, Markup]]:
    """What each expert of named runs did in so many parts of the stream, in one scale: names and drawings."""
    tables = [(name, said, rows) for name, result in results for said, rows in _shares_over(result, bins)]
    strongest = charts.largest({"": rows} for *_, rows in tables)
    return [
        (
            f"{name}: {said}" if name else said,
            charts.shares(
                {"": rows}, title=f"Experts' share of {said} over the stream", over="", strongest=strongest,
                description="One row a part of the stream.",
            ),
        )
        for name, said, rows in tables
    ]  # fmt: skip


def _shares_over(result: dict[str, Any], bins: int) -> list[tuple[str, dict[str, list[float]]]]:
    """What is shared, and each expert's share by part of the stream; of what differs between experts."""
    windows, starts = result["activity"], result["windows"]
    found = []
    for what, said in _COUNTS.items():
        parts = [part for part in _parts(windows, what, bins) if any(part[1])]
        if parts and any(max(counts) > 1.1 * min(counts) for _, counts in parts):
            rows = {f"to row {_end(starts, last):,}": [v / sum(counts) for v in counts] for last, counts in parts}
            found.append((said, rows))
    return found


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


def _parts(windows: Sequence[Mapping[str, Sequence[float]]], what: str, bins: int) -> list[tuple[int, list[float]]]:
    """Sums over neighbouring windows: the last window of each, and a figure for each expert."""
    size = -(-len(windows) // bins) or 1
    width = max((len(window.get(what, ())) for window in windows), default=0)
    found = []
    for start in range(0, len(windows), size):
        part = windows[start : start + size]
        sums = [sum(w[what][k] for w in part if k < len(w.get(what, ()))) for k in range(width)]
        found.append((start + len(part) - 1, sums))
    return found


def _end(windows: Sequence[Mapping[str, Any]], number: int) -> int:
    return int(windows[number]["start"] + windows[number]["rows"])
