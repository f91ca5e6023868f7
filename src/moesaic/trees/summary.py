"""What the cells of a comparison come to: means over seeds, ranks, curves, and what drifts did."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from moesaic.runs.results import versions
from moesaic.trees.comparison import StreamComparison
from moesaic.trees.running import PACKAGES

METRICS = ("accuracy", "kappa_m", "kappa_t")


def summarised(results: Sequence[dict[str, Any]], wanted: StreamComparison, *, command: str) -> dict[str, Any]:
    """By stream and learner, mean and standard deviation over seeds; mean ranks over the streams that all have."""
    table: dict[str, dict[str, Any]] = {}
    for stream in wanted.streams:
        for name in wanted.learners:
            own = [r for r in results if (r.get("stream"), r.get("learner")) == (stream, name)]
            of, failed = [r for r in own if "failed" not in r], [r["failed"] for r in own if "failed" in r]
            table.setdefault(stream, {})[name] = _cell(of) | ({"failed": failed[0]} if failed else {})
    return {
        "streams": wanted.streams, "learners": wanted.learners, "seeds": wanted.seeds,
        "settings": wanted.describes(), "table": table, "ranks": ranks(table, wanted.learners),
        "curves": _curves(results, wanted), "drifts": _drifts(results),
        "recovery": _recovery(results), "command": command,
        "versions": versions(PACKAGES),
    }  # fmt: skip


def _cell(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not results:
        return {}
    found: dict[str, Any] = {"seeds": [r["seed"] for r in results], "rows": results[0]["rows"]}
    for metric in (*METRICS, "cpu_seconds", "rows_per_second"):
        values = [r[metric] for r in results if r.get(metric) is not None]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            found[metric] = {"mean": statistics.fmean(values), "sd": spread}
    return found


def ranks(table: dict[str, dict[str, Any]], learners: Sequence[str]) -> dict[str, float]:
    """Mean rank of each learner by accuracy, 1 the best, over the streams that all were run on; equals share ranks."""
    whole = [of for of in table.values() if all("accuracy" in of.get(name, {}) for name in learners)]
    found: dict[str, list[float]] = {name: [] for name in learners}
    for of in whole:
        scores = {name: of[name]["accuracy"]["mean"] for name in learners}
        for name in learners:
            above = sum(score > scores[name] for score in scores.values())
            equal = sum(score == scores[name] for score in scores.values())
            found[name].append(above + (equal + 1) / 2)
    return {name: statistics.fmean(values) for name, values in found.items() if values}


def _curves(results: Sequence[dict[str, Any]], wanted: StreamComparison) -> dict[str, dict[str, list[list[float]]]]:
    """By stream and learner, accuracy over windows with the first seed."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for r in results:
        if "failed" not in r and r["seed"] == wanted.seeds[0]:
            points = [[w["start"] + w["rows"], w["accuracy"]] for w in r["windows"] if w["accuracy"] is not None]
            found.setdefault(r["stream"], {})[r["learner"]] = points
    return found


def _drifts(results: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    return {r["stream"]: [d["position"] for d in r["drifts"]] for r in results if "failed" not in r}


def _recovery(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By stream and learner, what each drift did: means over `seeds`, of rows over those that came `back`."""
    found: dict[str, dict[str, list[Any]]] = {}
    for r in results:
        if "failed" not in r:
            found.setdefault(r["stream"], {}).setdefault(r["learner"], []).append(r["drifts"])
    return {
        stream: {name: [_recovered(same) for same in zip(*seeds, strict=True)] for name, seeds in of.items()}
        for stream, of in found.items()
    }


def _recovered(drifts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    means = {}
    for figure in ("before", "lowest", "rows"):
        values = [drift[figure] for drift in drifts if drift[figure] is not None]
        means[figure] = statistics.fmean(values) if values else None
    back = sum(drift["rows"] is not None for drift in drifts)
    return {"position": drifts[0]["position"], **means, "back": back, "seeds": len(drifts)}
