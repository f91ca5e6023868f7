"""The pictures of a comparison. An axis leaves out what lies far outside the others: an arrow and its number stay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from moesaic.report.labels import Box, apart, beside, padded, reach
from moesaic.report.sheet import SERIES, SIZE, SMALL, Sheet, drawn, mixed, ticks, tone, widest, width
from moesaic.report.tables import number
from moesaic.report.text import percent, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 26.0
CELL = 18.0
GAP = 10.0
"""Between the blocks of columns of `shares`."""

DASHES = ("-", (0, (6, 3)), (0, (2, 3)), (0, (8, 3, 2, 3)))
"""Lines differ by these too, for readers who do not tell the colours apart."""


Layers = Mapping[str, Mapping[str, Sequence[float]]]
"""Shares by layer and task, one an expert."""


@dataclass(frozen=True)
class Dot:
    """A difference with its interval and what it was averaged from, all shares."""

    label: str
    value: float
    interval: tuple[float, float]
    parts: Sequence[float]
    series: int


@dataclass(frozen=True)
class Point:
    """A score and its spread, both percent, at `x`."""

    label: str
    x: float
    y: float
    spread: float
    series: int


@dataclass(frozen=True)
class Line:
    label: str
    points: Sequence[tuple[float, float]]
    series: int


def intervals(
    dots: Sequence[Dot], *, zero: str, title: str, description: str, across: str = "percentage points"
) -> tuple[Markup, bool]:
    """Dots with intervals about a line at 0, named `zero`; small rings are the parts. And whether there are arrows."""
    low, high = reach([(d.value, *d.interval, *d.parts) for d in dots], (0.0,), share=0.06, least=0.01)

    def draw(sheet: Sheet) -> None:
        names = [sheet.short(d.label) for d in dots]
        left, right, top, bottom = widest(names) + 14, sheet.width - 24, 26.0, 26 + ROW * len(dots)
        sheet.resize(sheet.width, bottom + 44)
        axes = sheet.axes(left, top, right, bottom)
        axes.set(xlim=(100 * low, 100 * high), ylim=(len(dots) - 0.5, -0.5))
        axes.set_yticks([])
        axes.spines["bottom"].set_visible(False)
        ticks(axes.xaxis, "{:+.10g}", room=right - left)
        axes.axvline(0, color=sheet.paint("soft"), linewidth=1, clip_on=False, **sheet.mark("zero"))
        sheet.centred(sheet.place(axes, 0, 0)[0], top - 12, zero)
        sheet.centred((left + right) / 2, bottom + 36, across)
        for i, (dot, name) in enumerate(zip(dots, names, strict=True)):
            figures = f"{points(dot.value)} [{points(dot.interval[0])}, {points(dot.interval[1])}]"
            said, y, paint = f"{dot.label}: {figures}", top + ROW * (i + 0.5), f"c{dot.series % SERIES}"
            sheet.text(left - 12, y, name, ha="right")
            if low <= dot.value <= high:
                ends = [sheet.place(axes, 100 * v, i) for v in dot.interval]
                sheet.line(ends, paint, "whisker", said, linewidth=2.5, alpha=0.55)
                for part in dot.parts:
                    sheet.dot(*sheet.place(axes, 100 * part, i), paint, 6, kind="ring")
                sheet.dot(*sheet.place(axes, 100 * dot.value, i), paint, 11, said)
            else:
                edge, inside, anchor, marker = (right, -18, "right", 5) if dot.value > high else (left, 18, "left", 4)
                sheet.dot(edge, y, paint, 14, said, "arrow", marker)
                sheet.text(edge + inside, y, figures, ha=anchor, kind="name")

    return drawn(draw, title, description), not all(low <= d.value <= high for d in dots)


def heat(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], *, title: str, description: str
) -> tuple[Markup, bool]:
    """Signed shares in cells: one hue below 0, another above, never so strong as to hide the points in each.

    And whether shares beyond the largest that the colours tell apart have its colour.
    """
    sizes = [abs(v) for row in values for v in row]
    largest = reach([(size,) for size in sizes], (0.0,))[1] or 1.0

    def draw(sheet: Sheet) -> None:
        names, heads = [sheet.short(r) for r in rows], [sheet.short(c) for c in columns]
        left, head = widest(names) + 14, widest(heads)
        rooms = [sheet.width - left, sheet.width - left - max(0.0, 0.77 * head - 24)]
        fitting = [max(1, rooms[0] // max(48.0, head + 6)), max(1, rooms[1] // 48)]
        lines, aslant = min((math.ceil(len(columns) / each), way) for way, each in enumerate(fitting))
        room = rooms[aslant]
        each = math.ceil(len(columns) / lines)
        cell, top = min(110.0 if aslant else max(110.0, head + 6), room / each), 12 + 0.64 * head if aslant else 26.0
        block = top + ROW * len(rows) + 12
        sheet.resize(left + cell * each + sheet.width - left - room, block * lines)
        for j, column in enumerate(columns):
            x, y = left + cell * (j % each), top + block * (j // each)
            how = {"ha": "left", "rotation": 40} if aslant else {"ha": "center"}
            sheet.text(x + cell / 2, y - (10 if aslant else 14), heads[j], **how)
            for i, row in enumerate(rows):
                if not j % each:
                    sheet.text(left - 10, y + ROW * (i + 0.5), names[i], ha="right")
                value = values[i][j]
                said = f"{row}, {column}: {points(value)}"
                shade = mixed("above" if value > 0 else "below", 0.75 * min(1.0, abs(value) / largest), "cell")
                sheet.box(x + 1, y + ROW * i + 1, cell - 2, ROW - 2, shade, said)
                sheet.text(x + cell / 2, y + ROW * (i + 0.5), points(value), ha="center")

    return drawn(draw, title, description), max(sizes) > largest


def largest(tables: Iterable[Layers], equal: float = 0.0) -> float:
    """Of all shares; or twice an equal share among the fewest experts, if that is larger."""
    every = [row for layers in tables for rows in layers.values() for row in rows.values() if row]
    return max((max(*row, 2 * (equal or 1 / len(row))) for row in every), default=1.0)


def shares(
    layers: Layers, *, title: str, description: str, over: str = "layer", of: str = "expert",
    names: Sequence[str] = (), strongest: float = 0.0, equal: float = 0.0,
) -> Markup:  # fmt: skip
    """Experts' shares, a row for each task and a block of columns (`of`) for each layer (or what `over` names).

    An equal share is a pale grey, less fades to the paper, and more takes on the strong tone; so a router that is
    uniform looks pale, however few its experts are.

    Args:
        names: of the columns, which are numbered otherwise; some are left out where they lack the room.
        strongest: the share that has the strongest tone: the `largest` of all drawings that are to have one scale.
        equal: where a row's columns do not share among them: what an equal share is.
    """
    strongest = strongest or largest([layers], equal)
    tasks = list(dict.fromkeys(task for rows in layers.values() for task in rows))
    key = (("paper", "none"), ("cell", "an equal share"), ("above", f"strongest tone: {100 * strongest:.0f} %"))

    def draw(sheet: Sheet) -> None:
        shown = [sheet.short(task) for task in tasks]
        left = max(widest(shown), widest((over, of), SMALL)) + 14
        top, fit = 40.0 if over else 22.0, int((sheet.width - left - 2) // CELL)
        placed, x, line = [], left, 0
        for layer, rows in layers.items():
            experts = max((len(row) for row in rows.values()), default=0)
            each = math.ceil(experts / math.ceil(experts / fit)) if experts else 0
            for first in range(0, experts, each or 1):
                last = min(first + each, experts)
                if x > left and x + CELL * (last - first) > sheet.width - 2:
                    x, line = left, line + 1
                placed.append((layer, rows, range(first, last), x, line))
                x += CELL * (last - first) + GAP
        block = top + CELL * len(tasks) + 12
        across = max(x + CELL * len(cols) for *_, cols, x, _ in placed)
        bottom, long = block * (line + 1), sum(width(said, SMALL) + 40 for _, said in key) - 18
        at = min(left, max(0.0, sheet.width - long))
        sheet.resize(max(across + 2, at + long), bottom + 24)
        for y in (top + block * n for n in range(line + 1)):
            sheet.text(left - 10, y - 27, over, ha="right", size=SMALL, paint="soft")
            sheet.text(left - 10, y - 10, of, ha="right", size=SMALL, paint="soft")
            for i, task in enumerate(shown):
                sheet.text(left - 10, y + CELL * (i + 0.5), task, ha="right")
        for layer, rows, cols, x, line in placed:
            y = top + block * line
            sheet.text(x + CELL * len(cols) / 2, y - 27, layer, ha="center", size=SMALL, paint="soft")
            heads = {e: names[e] if names else str(e) for e in cols}
            every = math.ceil((widest(heads.values(), 10) + 4) / CELL)
            for k, e in enumerate(cols):
                if not e % every:
                    sheet.text(x + CELL * (k + 0.5), y - 10, heads[e], ha="center", size=10, paint="soft")
                for i, task in enumerate(tasks):
                    if e < len(row := rows.get(task, ())):
                        said = f"{over} {layer}, {task}, {of} {heads[e]}: {100 * row[e]:.0f} %".lstrip(" ,")
                        paint = tone(row[e], equal or 1 / len(row), strongest)
                        sheet.box(x + CELL * k, y + CELL * i, CELL, CELL, paint, said)
        for paint, said in key:
            sheet.box(at, bottom + 3, 13, 13, paint)
            sheet.text(at + 20, bottom + 9.5, said, size=SMALL, paint="soft")
            at += width(said, SMALL) + 40

    return drawn(draw, title, description)


def scatter(dots: Sequence[Point], *, across: str, up: str, title: str, description: str) -> tuple[Markup, bool]:
    """Points with vertical spreads, each with its name beside it. And whether there are arrows."""
    low, high = reach([(p.y, p.y - p.spread, p.y + p.spread) for p in dots], share=0.08, least=0.5)
    away = [i for i, p in enumerate(dots) if not low <= p.y <= high]

    def draw(sheet: Sheet) -> None:
        axes, (left, top, right, bottom) = _frame(sheet, across, up, sheet.width - 24, 420.0)
        axes.set(xlim=padded([p.x for p in dots]), ylim=(low, high))
        ticks(axes.xaxis, "{:,.10g}", room=right - left)
        ticks(axes.yaxis, "{:.10g}")
        there = [sheet.place(axes, p.x, p.y) for p in dots]
        aside = dict(zip(away, apart([there[i][0] for i in away], 13.0, left, right), strict=True))
        there = [(aside.get(i, x), min(max(y, top), bottom)) for i, (x, y) in enumerate(there)]
        ends = [[sheet.place(axes, p.x, p.y + side * p.spread) for side in (1, -1)] for p in dots]
        names = [sheet.short(p.label) + f" {p.y:.1f}" * (i in aside) for i, p in enumerate(dots)]
        places = beside(
            there, [width(name) for name in names], (left, top, right, bottom), size=SIZE, steps=(0.0, 12.0, 24.0),
            taken=[
                (x - 6, y - 12, x + 6, y + 12) if i in aside else (x - 3, up, x + 3, down)
                for i, ((x, y), ((_, up), (_, down))) in enumerate(zip(there, ends, strict=True))
            ],
        )  # fmt: skip
        for i, (p, (x, y), (a, b, anchor)) in enumerate(zip(dots, there, places, strict=True)):
            said = f"{p.label}: {percent(p.y / 100, p.spread / 100)} at {number(p.x, '{:,.4g}')}"
            paint = f"c{p.series % SERIES}"
            if i in aside:
                sheet.dot(x, y, paint, 14, said, "arrow", 7 if p.y < low else 6)
            else:
                sheet.line(ends[i], paint, "whisker", said, linewidth=2.5, alpha=0.55)
                sheet.dot(x, y, paint, 11, said)
            if abs(b - y) > 20 or abs(a - x) > 11:
                sheet.line([(x, y), (a, b)], paint, "leader", linewidth=0.75, alpha=0.5)
            sheet.text(a, b, names[i], ha=anchor, kind="name")

    return drawn(draw, title, description), bool(away)


def lines(
    series: Sequence[Line], *, across: str, up: str, title: str, description: str, logarithmic: bool = False,
    marks: Sequence[float] = (), stairs: bool = False,
) -> Markup:  # fmt: skip
    """Lines named at their right ends; `logarithmic` where values are positive and span more than one power of 2.

    Args:
        marks: where along the axis something happened: dashed.
        stairs: a value holds until the next, the last to the right edge.
    """
    values, steps = [v for s in series for _, v in s.points], [t for s in series for t, _ in s.points]
    logarithmic = logarithmic and min(values) > 0 and max(values) > 2 * min(values)
    low, high = padded([math.log10(v) if logarithmic else v for v in values])
    up += ", log scale" if logarithmic else ""

    def draw(sheet: Sheet) -> None:
        names = [sheet.short(s.label) for s in series]
        height = max(300.0 if sheet.narrow else 380.0, 74 + 15.0 * len(names))
        axes, (left, top, right, bottom) = _frame(sheet, across, up, sheet.width - widest(names) - 40, height)
        axes.set(xlim=(min(steps), max(steps)), ylim=(10**low, 10**high) if logarithmic else (low, high))
        ticks(axes.xaxis, "{:,.10g}", room=right - left, whole=not stairs)
        ticks(axes.yaxis, "{:.10g}", logarithmic=logarithmic)
        for x in (x for x in marks if min(steps) <= x <= max(steps)):
            axes.axvline(x, color=sheet.paint("soft"), linewidth=1, linestyle=(0, (3, 4)), **sheet.mark("mark"))
        ends = [(right, y) if stairs else (x, y) for x, y in (sheet.place(axes, *s.points[-1]) for s in series)]
        heights = apart([y for _, y in ends], 15.0, top + 6, bottom - 4)
        for s, name, end, y in zip(series, names, ends, heights, strict=True):
            paint, dashes = f"c{s.series % SERIES}", (s.series + s.series // SERIES) % len(DASHES)
            how: dict[str, Any] = {"linewidth": 2, "linestyle": DASHES[dashes], "zorder": 2 + dashes / 10}
            path = [sheet.place(axes, *p) for p in s.points]
            held = [p for (_, y), (x, z) in pairwise([*path, end]) for p in ((x, y), (x, z))] if stairs else []
            sheet.line([path[0], *held] if stairs else path, paint, "line", s.label, **how)
            for at in path * (len(path) <= 16):
                sheet.dot(*at, paint, 6)
            sheet.line([end, (right + 12, y)], paint, "leader", linewidth=0.75, alpha=0.6)
            sheet.line([(right + 12, y), (right + 32, y)], paint, "leader", **how)
            sheet.text(right + 38, y, name)

    return drawn(draw, title, description)


def _frame(sheet: Sheet, across: str, up: str, right: float, height: float) -> tuple[Axes, Box]:
    """Axes with their names, the upright one's above it, and where they are: left, top, right, bottom."""
    sheet.resize(sheet.width, height)
    box = (52.0, 28.0, right, height - 46)
    sheet.text(0, 9, up, size=SMALL, paint="soft")
    sheet.centred((52 + right) / 2, height - 9, across)
    axes = sheet.axes(*box)
    axes.grid(visible=False, axis="x")
    return axes, box
