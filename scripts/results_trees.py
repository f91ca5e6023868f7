"""What learners on streams came to: a block of docs/driftmoe.md and a picture. `scripts/results.py` puts both there."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import streams
from pages import Blocks, Pictures, seeds, spread, table

from moesaic.report import charts
from moesaic.report.page import alone
from moesaic.trees.summary import ranks

OURS = "best"
RIVALS = ("ARF-10", "LevBag-10", "SRP-10")
STRONGEST = "DEMS-10"
SHOWN = {"best": "best", "paper": "paper", "ARF-10": "ARF-10", "SRP-10": "SRP-10", "DEMS-10": "DEMS-10"}
DRAWN = "led_a"
TOGETHER = 4
"""Windows that a point of the picture averages."""
Cells = dict[str, dict[str, list[dict[str, Any]]]]
"""By stream and arm, a cell a seed."""


def cells(results: Path, table: str) -> Cells:
    """Of a table, the seeds that every arm has on a stream; streams and arms in their order.

    Those that are run last may have fewer.
    """
    file = results / "streams.jsonl"
    found: Cells = defaultdict(lambda: defaultdict(list))
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        cell = json.loads(line)
        if cell["table"] == table:
            found[cell["stream"]][cell["arm"]].append(cell)
    arms, names = streams.TABLES[table]
    made: Cells = {}
    for name in names:
        of = found.get(name, {})
        common = set.intersection(*({c["seed"] for c in of.get(arm, ())} for arm in arms if arm not in streams.SLOW))
        if common:
            made[name] = {
                arm: sorted((c for c in of.get(arm, ()) if c["seed"] in common), key=lambda c: c["seed"])
                for arm in arms
            }
    return made


def figures(found: Cells, value: Callable[[dict[str, Any]], float | None], digits: int = 1) -> list[list[str]]:
    """A row an arm, a column a stream."""
    arms = list(next(iter(found.values())))
    rows = []
    for arm in arms:
        row = [f"**{arm}**" if arm == OURS else arm]
        for of in found.values():
            values = [value(cell) for cell in of[arm]]
            known = [v for v in values if v is not None]
            row.append(spread(known, digits) if known else "–")
        rows.append(row)
    return rows


def whole(found: Cells, arm: str) -> bool:
    """Whether an arm has as many seeds as any other, on each stream."""
    return all(len(of[arm]) == max(map(len, of.values())) for of in found.values())


def mean_ranks(found: Cells) -> dict[str, float]:
    """Of the arms that are whole."""
    arms = [arm for arm in next(iter(found.values())) if whole(found, arm)]
    scores = {
        stream: {arm: {"accuracy": {"mean": statistics.mean(c["accuracy"] for c in of[arm])}} for arm in arms}
        for stream, of in found.items()
    }
    return ranks(scores, arms)


def seeds_of(found: Cells) -> str:
    few = [arm for arm in next(iter(found.values())) if not whole(found, arm)]
    said = seeds(max(map(len, of.values())) for of in found.values())
    return f"{said}{f' ({few[0]}, which is slow: fewer)' if few else ''}"


def ten(results: Path) -> list[str]:
    found = cells(results, "ten")
    if not found:
        return []
    ranked = mean_ranks(found)
    rows = [
        [*row, f"{ranked[name]:.2f}" if (name := row[0].strip("*")) in ranked else "–"]
        for row in figures(found, lambda c: 100 * c["accuracy"])
    ]
    lines = [
        f"**{len(found)} stream{'s' * (len(found) > 1)}, ten members each**: accuracy in percent, cumulative, strictly "
        "test-then-train; "
        f"{seeds_of(found)}, of generator and learner (a file is the same for all); 100,000 rows of each "
        "generator, whole files (Electricity 45,312 rows, Weather 18,159, SEA's file 40,000). All but ours and the two "
        "controls run in CapyMOA 0.15.1 with its defaults, on the same rows. `paper` and `code` have MOA's trees. "
        "Settings of `best` were chosen on the first 40,000 rows of four generators, Electricity and Weather, seed 0. "
        "Command: `python scripts/streams.py ten`.", "",
        *table(["learner", *found, "mean rank"], rows), "", *verdict(found, ranked), "",
    ]  # fmt: skip
    for title, key in (("kappa M", "kappa_m"), ("kappa T", "kappa_t")):
        lines += [f"{title}, percent:", ""]
        lines += table(["learner", *found], figures(found, lambda c, k=key: None if c[k] is None else 100 * c[k]))
        lines.append("")
    lines += [
        "CPU seconds, JVM's start left out, on machines that were not idle; what is compared closely was measured in "
        "turn, below:", "",
    ]  # fmt: skip
    lines += table(["learner", *found], figures(found, lambda c: c["cpu_seconds"], 0))
    return [*lines, ""]


def verdict(found: Cells, ranked: Mapping[str, float]) -> list[str]:
    """What was asked of `best`, and what it gives."""

    def mean(stream: str, arm: str) -> float:
        return statistics.mean(cell["accuracy"] for cell in found[stream][arm])

    members = [arm for arm in (*RIVALS, STRONGEST, "SGBT-10") if whole(found, arm)]
    behind = {s: 100 * (max(mean(s, arm) for arm in members) - mean(s, OURS)) for s in found}
    worst = max(behind, key=behind.__getitem__)
    beaten = [s for s in found if any(mean(s, arm) > mean(s, "NoChange") for arm in members)]
    below = [s for s in beaten if mean(s, OURS) <= mean(s, "NoChange")]
    others = ", ".join(f"{arm} {ranked[arm]:.2f}" for arm in (STRONGEST, *RIVALS))
    far = (
        f"furthest behind the best ten-member ensemble on {worst}, by {behind[worst]:.2f} points"
        if behind[worst] > 0
        else f"ahead of every ten-member ensemble on each stream, least on {worst}, by {-behind[worst]:.2f} points"
    )
    return [
        f"Mean rank of `best` {ranked[OURS]:.2f} ({others}); {far}; "
        + (f"below NoChange on {', '.join(below)}." if below else "above NoChange wherever any ensemble is.")
    ]


def hundred(results: Path) -> list[str]:
    found = cells(results, "hundred")
    if not found:
        return []
    header = ["learner", *(f"{s}, {what}" for s in found for what in ("accuracy", "CPU s"))]
    accuracies, seconds = (
        figures(found, lambda c: 100 * c["accuracy"], 2),
        figures(found, lambda c: c["cpu_seconds"], 0),
    )
    rows = [
        [a[0], *(cell for pair in zip(a[1:], b[1:], strict=True) for cell in pair)]
        for a, b in zip(accuracies, seconds, strict=True)
    ]
    said = f"**Against a hundred members**, {seeds_of(found)}. Command: `python scripts/streams.py hundred`."
    return [said, "", *table(header, rows), ""]


def ablations(results: Path) -> list[str]:
    found = cells(results, "ablations")
    if not found:
        return []
    base = {"best": "best", "paper": "paper"}
    rows = []
    for arm in next(iter(found.values())):
        of = base["paper" if arm.startswith("paper") else "best"]
        row = [f"**{arm}**" if arm in base else arm]
        for by in found.values():
            own = [100 * c["accuracy"] for c in by[arm]]
            gaps = [a - 100 * c["accuracy"] for a, c in zip(own, by[of], strict=True)]
            row.append(spread(own, 2) if arm in base else f"{statistics.mean(gaps):+.2f}"
                       + (f" ± {statistics.stdev(gaps):.2f}" if len(gaps) > 1 else ""))  # fmt: skip
        rows.append(row)
    said = (
        f"**What each option gives**: accuracy, and the difference to it, paired by seed, {seeds_of(found)}. "
        "`paper` has compiled trees here. Command: `python scripts/streams.py ablations`."
    )
    return [said, "", *table(["", *found], rows), ""]


AGAINST = {
    "best": "CapyMOA ARF-10", "best without router": "best", "paper, MOA's trees": "CapyMOA ARF-10",
    "CapyMOA LevBag-10": "CapyMOA ARF-10", "CapyMOA SRP-10": "CapyMOA ARF-10", "CapyMOA DEMS-10": "CapyMOA ARF-10",
    "CapyMOA SGBT-10": "CapyMOA ARF-10",
    "paper, river's trees": "river ARF-10", "paper, river's trees, lazy": "river ARF-10",
}  # fmt: skip
"""Whose rows a second a learner's are compared with."""


def speed(results: Path) -> list[str]:
    """What a row costs, by learner, number of experts and length of the stream."""
    file = results / "stream-speed.json"
    if not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    arms, rows = found["arms"], []
    for arm in found["rows"]:
        row = [f"{arm}, {found['rows'][arm]:,} rows"]
        for of in arms.values():
            own = of[arm]["us"]["all"]
            said = spread(own, 0)
            if arm in AGAINST:
                ratios = [theirs / ours for ours, theirs in zip(own, of[AGAINST[arm]]["us"]["all"], strict=True)]
                said += f" ({spread(ratios, 2)} ×)"
            row.append(f"{said}; {spread([100 * a for a in of[arm]['accuracy']['all']])} %")
        rows.append(row)
    lines = [
        "**What a row costs**: microseconds of CPU (and how many times as many rows a second as the learner that it is "
        f"compared with), and accuracy; {found['rounds']} round{'s' * (found['rounds'] > 1)} in turn, each with a "
        f"seed of its own, each learner in its own process. {'; '.join(f'{a}: to {b}' for a, b in AGAINST.items())}. "
        "Lazily two more experts are asked than the router's three. Command: `python scripts/stream_speed.py`.", "",
        *table(["learner", *arms], rows), "",
    ]  # fmt: skip
    for title, key, what in (("experts", "by_experts", ""), ("rows", "by_length", " of led_a")):
        of = found[key]
        costs = [[name, *(f"{cell[unit]:,.0f}" for cell in of.values())]
                 for name, unit in (("µs a row", "us"), ("MiB at the peak", "mib"))]  # fmt: skip
        lines += [*table([f"`best` by {title}{what}", *(f"{int(n):,}" for n in of)], costs), ""]
    return lines


def block(results: Path) -> str:
    """What stands between the marks of the page."""
    return "\n".join([*ten(results), *hundred(results), *ablations(results), *speed(results)]).rstrip()


def over_time(results: Path) -> str:
    of = cells(results, "ten").get(DRAWN)
    if not of:
        return ""
    series = []
    for number, (arm, label) in enumerate(SHOWN.items()):
        windows = of[arm][0]["windows"]
        points = [
            (1000.0 * (i + TOGETHER), 100 * statistics.mean(windows[i : i + TOGETHER]))
            for i in range(0, len(windows), TOGETHER)
        ]
        series.append(charts.Line(label, points, number))
    said = "; ".join(f"{line.label} from {line.points[0][1]:.1f} to {line.points[-1][1]:.1f}" for line in series)
    where = [drift["position"] for drift in of[OURS][0]["drifts"]]
    drawn = charts.lines(
        series, across="row", up="accuracy, %", title="Accuracy on LED with three abrupt drifts, windows of 4,000 rows",
        description=f"First to last: {said}.", marks=where,
    )  # fmt: skip
    return alone(drawn)


BLOCKS: Blocks = {"driftmoe.md": {"streams": ("streams.jsonl", block)}}
PICTURES: Pictures = {"streams.svg": ("streams.jsonl", over_time)}
