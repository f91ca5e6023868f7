"""The pictures of a comparison. An axis leaves out what lies far outside the others: an arrow and its number stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from moesaic.report.svg import (
    DASHES,
    SERIES,
    Box,
    apart,
    arrow,
    beside,
    circle,
    drawing,
    fences,
    label_width,
    line,
    scale,
    shorten,
    tag,
    text,
    ticks,
)
from moesaic.report.tables import number
from moesaic.report.text import percent, points

WIDTH = 1100.0
ROW = 26.0


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
    left, right, top = label_width(d.label for d in dots) + 24, WIDTH - 24, 34.0
    low, high = _reach([(d.value, *d.interval, *d.parts) for d in dots], (0.0,), share=0.06, least=0.01)
    bottom = top + ROW * len(dots)
    x, marks = scale(low, high, left, right), [t / 100 for t in ticks(100 * low, 100 * high, 9)]
    parts = [line(x(t), top, x(t), bottom, "zero" if t == 0 else "grid") for t in marks]
    parts += [
        text(x(t), bottom + 16, number(100 * t, "{:+.10g}" if t else "0"), anchor="middle", class_="tick")
        for t in marks
    ]
    parts.append(text(x(0), top - 10, zero, anchor="middle", class_="tick"))
    parts.append(text((left + right) / 2, bottom + 34, across, anchor="middle", class_="axis"))
    for i, dot in enumerate(dots):
        y, (first, last) = top + ROW * (i + 0.5), dot.interval
        figures = f"{points(dot.value)} [{points(first)}, {points(last)}]"
        if low <= dot.value <= high:
            shown = [line(x(first), y, x(last), y, "whisker")]
            shown += [circle(x(v), y, 3.0, "ring") for v in dot.parts]
            shown.append(circle(x(dot.value), y, 5.5, "dot"))
        else:
            side = 1 if dot.value > high else -1
            edge, anchor = (right, "end") if side > 0 else (left, "start")
            shown = [arrow(edge, y, (side, 0)), text(edge - 18 * side, y + 4, figures, anchor=anchor)]
        parts.append(text(left - 12, y + 4, shorten(dot.label), anchor="end"))
        parts.append(_series(dot.series, f"{dot.label}: {figures}", shown))
    clipped = not all(low <= d.value <= high for d in dots)
    return drawing(WIDTH, bottom + 44, title, description, parts), clipped


def heat(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], *, title: str, description: str
) -> tuple[Markup, bool]:
    """Signed shares in cells: one hue below 0, another above, never so strong as to hide the points in each.

    And whether shares beyond the largest that the colours tell apart have its colour.
    """
    left, top = label_width(rows) + 24, 22 + 0.55 * label_width(columns)
    cell = max(54.0, min(110.0, (WIDTH - left - 40) / len(columns)))
    sizes = [abs(v) for row in values for v in row]
    largest = _reach([(size,) for size in sizes], (0.0,))[1] or 1.0
    parts = []
    for j, column in enumerate(columns):
        place = f"translate({left + cell * (j + 0.5):.1f} {top - 8:.1f}) rotate(-32)"
        parts.append(tag("text", shorten(column), transform=place))
    for i, row in enumerate(rows):
        y = top + ROW * i
        parts.append(text(left - 10, y + 17, shorten(row), anchor="end"))
        for j, value in enumerate(values[i]):
            share = min(1.0, abs(value) / largest)
            label = text(left + cell * (j + 0.5) - 1, y + 16.5, points(value), anchor="middle")
            at = {"x": left + cell * j, "y": y, "width": cell - 2, "height": ROW - 2}
            box = tag("rect", **at, rx=3, style=_fill(0.75 * share, "above" if value > 0 else "below"))
            parts.append(tag("g", tag("title", f"{row}, {columns[j]}: {points(value)}"), box, label))
    made = drawing(left + cell * len(columns) + 50, top + ROW * len(rows) + 6, title, description, parts)
    return made, max(sizes) > largest


def shares(
    layers: Mapping[str, Mapping[str, Sequence[float]]], *, title: str, description: str, over: str = "layer",
    of: str = "expert", names: Sequence[str] = (), strongest: float = 0.0,
) -> Markup:  # fmt: skip
    """Experts' shares, a row for each task and a block of columns (`of`) for each layer (or what `over` names).

    Columns are numbered, or called by `names`, every fourth where they are many.

    The strongest tone is the largest share, or twice an equal share among the fewest experts if that is larger; or
    `strongest`, where several drawings are to have one scale.
    """
    tasks = list(dict.fromkeys(task for rows in layers.values() for task in rows))
    left, top, size, gap = label_width(tasks) + 22, 34.0, 18.0, 10.0
    every = [row for rows in layers.values() for row in rows.values()]
    largest = strongest or max(max(share, 2 / len(row)) for row in every for share in row)
    parts, x = [text(left - 10, top - 21, over, anchor="end", class_="tick")], left
    parts.append(text(left - 10, top - 6, of, anchor="end", class_="tick"))
    parts += [text(left - 10, top + size * i + 13, shorten(task), anchor="end") for i, task in enumerate(tasks)]
    for layer, rows in layers.items():
        experts = max((len(row) for row in rows.values()), default=0)
        parts.append(text(x + size * experts / 2, top - 21, layer, anchor="middle", class_="tick"))
        for e in range(experts):
            if experts <= 16 or e % 4 == 0:
                parts.append(
                    text(x + size * (e + 0.5), top - 6, names[e] if names else str(e), anchor="middle", class_="tiny")
                )
            for i, task in enumerate(tasks):
                if task not in rows or e >= len(rows[task]):
                    continue
                share = rows[task][e]
                said = tag("title", f"{over} {layer}, {task}, {of} {e}: {100 * share:.0f} %".lstrip(" ,"))
                box = {"x": x + size * e, "y": top + size * i, "width": size - 1.5, "height": size - 1.5, "rx": 2}
                parts.append(tag("rect", said, style=_fill(share / largest, "above"), **box))
        x += size * experts + gap
    key = f"faintest 0 %, strongest {100 * largest:.0f} % of the weight"
    bottom = top + size * len(tasks)
    parts.append(text(left, bottom + 16, key, class_="tick"))
    return drawing(max(x - gap + 2, left + 250), bottom + 24, title, description, parts)


def scatter(dots: Sequence[Point], *, across: str, up: str, title: str, description: str) -> tuple[Markup, bool]:
    """Points with vertical spreads, each with its name beside it. And whether there are arrows."""
    left, right, top, bottom = frame = (64.0, WIDTH - 24, 16.0, 380.0)
    x_low, x_high = _padded([p.x for p in dots])
    y_low, y_high = _reach([(p.y, p.y - p.spread, p.y + p.spread) for p in dots], share=0.08, least=0.5)
    x, y = scale(x_low, x_high, left, right), scale(y_low, y_high, bottom, top)
    parts = _axes(x, y, ticks(x_low, x_high, 8), ticks(y_low, y_high), frame, across, up)
    away = [i for i, p in enumerate(dots) if not y_low <= p.y <= y_high]
    aside = dict(zip(away, apart([x(dots[i].x) for i in away], 13.0, left, right), strict=True))
    there = [(aside.get(i, x(p.x)), min(max(y(p.y), top), bottom)) for i, p in enumerate(dots)]
    bars = [(a - 3, y(p.y + p.spread), a + 3, y(p.y - p.spread)) for p, (a, _) in zip(dots, there, strict=True)]
    names = [f"{shorten(p.label)} {p.y:.1f}" if i in aside else shorten(p.label) for i, p in enumerate(dots)]
    inner: Box = (left, top, right, bottom)
    places = beside(there, names, inner, taken=bars, size=12.5)
    for point, (px, py), bar, name, (a, b, anchor) in zip(dots, there, bars, names, places, strict=True):
        if y_low <= point.y <= y_high:
            shown = [line(px, bar[1], px, bar[3], "whisker"), circle(px, py, 5.5, "dot")]
        else:
            shown = [arrow(px, py, (0, 1 if point.y < y_low else -1))]
        said = f"{point.label}: {percent(point.y / 100, point.spread / 100)} at {number(point.x, '{:,.4g}')}"
        parts.append(_series(point.series, said, [*shown, text(a, b, name, anchor=anchor)]))
    return drawing(WIDTH, bottom + 46, title, description, parts), bool(away)


def lines(
    series: Sequence[Line],
    *,
    across: str,
    up: str,
    title: str,
    description: str,
    logarithmic: bool = False,
    marks: Sequence[float] = (),
) -> Markup:
    """Lines named at their right ends; `logarithmic` where values are positive and span more than one power of 2.

    Args:
        marks: where along the axis something happened: dashed.
    """
    left, right, top, bottom = frame = (64.0, WIDTH - label_width(s.label for s in series) - 40, 16.0, 340.0)
    values = [v for s in series for _, v in s.points]
    steps = [t for s in series for t, _ in s.points]
    logarithmic = logarithmic and min(values) > 0 and max(values) > 2 * min(values)
    on = math.log10 if logarithmic else float
    y_low, y_high = _padded([on(v) for v in values])
    x_low, x_high = min(steps), max(steps)
    x, y = scale(x_low, x_high, left, right), scale(y_low, y_high, bottom, top)
    heights = _powers(y_low, y_high) if logarithmic else ticks(y_low, y_high)
    parts = _axes(x, lambda v: y(on(v)), ticks(x_low, x_high, least=1.0), heights, frame, across, up)
    parts += [line(x(at), top, x(at), bottom, "zero", stroke_dasharray="3 4") for at in marks if x_low <= at <= x_high]
    names = apart([y(on(s.points[-1][1])) for s in series], 15.0, top + 6, bottom - 4)
    for s, name in zip(series, names, strict=True):
        path = [(x(t), y(on(v))) for t, v in s.points]
        d = " ".join(f"{'L' if i else 'M'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(path))
        shown = [
            tag(
                "path",
                d=d,
                class_="line",
                stroke_dasharray=DASHES[(s.series + s.series // SERIES) % len(DASHES)] or None,
            )
        ]
        shown += [circle(a, b, 3.0, "dot") for a, b in path if len(path) <= 16]
        leader = f"M{path[-1][0]:.1f} {path[-1][1]:.1f} L{right + 8:.1f} {name:.1f}"
        shown += [tag("path", d=leader, class_="leader"), text(right + 12, name + 4, shorten(s.label))]
        parts.append(_series(s.series, s.label, shown))
    return drawing(WIDTH, bottom + 46, title, description, parts)


def _series(number: int, said: str, parts: Sequence[Markup]) -> Markup:
    """Parts in a series' colour, with what is said of them under the pointer."""
    return tag("g", tag("title", said), *parts, class_=f"s{number % SERIES}")


def _fill(share: float, hue: str) -> str:
    return f"fill:color-mix(in oklab, var(--{hue}) {100 * share:.0f}%, var(--cell))"


def _axes(
    x: Callable[[float], float],
    y: Callable[[float], float],
    across: Sequence[float],
    up: Sequence[float],
    frame: tuple[float, float, float, float],
    x_name: str,
    y_name: str,
) -> list[Markup]:
    left, right, top, bottom = frame
    parts = [line(left, y(v), right, y(v), "grid") for v in up]
    parts += [text(left - 8, y(v) + 4, f"{v:g}", anchor="end", class_="tick") for v in up]
    parts += [text(x(v), bottom + 18, number(v, "{:,.10g}"), anchor="middle", class_="tick") for v in across]
    parts.append(line(left, bottom, right, bottom, "zero"))
    parts.append(text((left + right) / 2, bottom + 38, x_name, anchor="middle", class_="axis"))
    place = f"translate(16 {(top + bottom) / 2:.1f}) rotate(-90)"
    parts.append(tag("text", y_name, transform=place, text_anchor="middle", class_="axis"))
    return parts


def _reach(
    marks: Sequence[Sequence[float]], always: Sequence[float] = (), *, share: float = 0.0, least: float = 0.0
) -> tuple[float, float]:
    """Ends of an axis for marks, each a value and the ends of what is drawn about it, and for what is `always` on it.

    All of a mark fits where its value lies within the fences or between the ends; the others lie beyond an end.
    """
    low, high = fences([mark[0] for mark in marks])
    shown: list[Sequence[float]] = []
    while len(within := [mark for mark in marks if low <= mark[0] <= high]) > len(shown):
        shown = within
        low, high = _padded([*always, *(v for mark in shown for v in mark)], share, least)
    return low, high


def _padded(values: Sequence[float], share: float = 0.08, least: float = 0.5) -> tuple[float, float]:
    """The range of the values and a `share` of it more to each side; `least` where it is empty."""
    pad = share * (max(values) - min(values)) or least
    return min(values) - pad, max(values) + pad


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between 10^low and 10^high."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= math.log10(m * 10.0**p) <= high]
