"""The pictures of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from moesaic.report.svg import (
    DASHES,
    SERIES,
    apart,
    drawing,
    label_width,
    line,
    scale,
    shorten,
    tag,
    text,
    ticks,
)

WIDTH = 920.0
ROW = 26.0


@dataclass(frozen=True)
class Dot:
    """A value with its interval and what it was averaged from."""

    label: str
    value: float
    low: float
    high: float
    parts: Sequence[float] = ()
    series: int = 0


@dataclass(frozen=True)
class Point:
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


def intervals(dots: Sequence[Dot], *, zero: str, title: str, description: str) -> Markup:
    """Dots with intervals about a line at 0, named `zero`; small rings are the parts."""
    left, right, top = label_width(d.label for d in dots) + 24, WIDTH - 24, 34.0
    ends = [v for d in dots for v in (d.low, d.high, *d.parts)] + [0.0]
    pad = 0.06 * (max(ends) - min(ends)) or 1.0
    low, high, bottom = min(ends) - pad, max(ends) + pad, top + ROW * len(dots)
    x = scale(low, high, left, right)
    parts = [line(x(t), top, x(t), bottom, "zero" if t == 0 else "grid") for t in ticks(low, high, 9)]
    parts += [text(x(t), bottom + 16, _signed(t), anchor="middle", class_="tick") for t in ticks(low, high, 9)]
    parts.append(text(x(0), top - 10, zero, anchor="middle", class_="tick"))
    parts.append(text((left + right) / 2, bottom + 34, "percentage points", anchor="middle", class_="axis"))
    for i, dot in enumerate(dots):
        y, series = top + ROW * (i + 0.5), f"s{dot.series % SERIES}"
        said = f"{dot.label}: {dot.value:+.1f}, 95 % of redrawn test rows between {dot.low:+.1f} and {dot.high:+.1f}"
        parts += [
            text(left - 12, y + 4, shorten(dot.label), anchor="end"),
            tag(
                "g",
                tag("title", said),
                line(x(dot.low), y, x(dot.high), y, "whisker"),
                *[tag("circle", cx=x(v), cy=y, r=3.0, class_="ring") for v in dot.parts],
                tag("circle", cx=x(dot.value), cy=y, r=5.5, class_="dot"),
                class_=series,
            ),
        ]
    return drawing(WIDTH, bottom + 44, title, description, parts)


def heat(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    description: str,
) -> Markup:
    """Signed values in cells: one hue below 0, another above, and the number in each."""
    left, top = label_width(rows) + 24, 22 + 0.55 * label_width(columns)
    cell = max(54.0, min(110.0, (WIDTH - left - 40) / max(len(columns), 1)))
    largest = max((abs(v) for row in values for v in row if v is not None), default=0.0) or 1.0
    parts = []
    for j, column in enumerate(columns):
        place = f"translate({left + cell * (j + 0.5):.1f} {top - 8:.1f}) rotate(-32)"
        parts.append(tag("text", shorten(column), transform=place))
    for i, row in enumerate(rows):
        y = top + ROW * i
        parts.append(text(left - 10, y + 17, shorten(row), anchor="end"))
        for j, value in enumerate(values[i]):
            if value is None:
                continue
            share = abs(value) / largest
            fill = f"color-mix(in oklab, var(--{'above' if value > 0 else 'below'}) {100 * share:.0f}%, var(--cell))"
            label = text(left + cell * (j + 0.5), y + 17, _signed(value, 1), anchor="middle", class_=_on(share))
            box = tag("rect", x=left + cell * j, y=y, width=cell - 2, height=ROW - 2, rx=3, style=f"fill:{fill}")
            parts.append(tag("g", tag("title", f"{row}, {columns[j]}: {_signed(value, 1)}"), box, label))
    return drawing(left + cell * len(columns) + 50, top + ROW * len(rows) + 6, title, description, parts)


def shares(layers: Mapping[str, Mapping[str, Sequence[float]]], *, title: str, description: str) -> Markup:
    """Experts' shares, a row for each task and a block of columns for each layer; equal shares are of middle tone."""
    tasks = list(dict.fromkeys(task for rows in layers.values() for task in rows))
    left, top, size, gap = label_width(tasks) + 22, 44.0, 18.0, 10.0
    every = [row for rows in layers.values() for row in rows.values()]
    largest = max(max(share, 2 / len(row)) for row in every for share in row)
    parts, x = [text(left - 10, top - 24, "layer", anchor="end", class_="tick")], left
    parts.append(text(left - 10, top - 8, "expert", anchor="end", class_="tick"))
    parts += [text(left - 10, top + size * i + 13, shorten(task), anchor="end") for i, task in enumerate(tasks)]
    for layer, rows in layers.items():
        experts = max((len(row) for row in rows.values()), default=0)
        parts.append(text(x + size * experts / 2, top - 24, layer, anchor="middle", class_="tick"))
        for e in range(experts):
            if experts <= 16 or e % 4 == 0:
                parts.append(text(x + size * (e + 0.5), top - 8, str(e), anchor="middle", class_="tiny"))
            for i, task in enumerate(tasks):
                if task not in rows or e >= len(rows[task]):
                    continue
                share = rows[task][e]
                fill = f"color-mix(in oklab, var(--above) {100 * share / largest:.0f}%, var(--cell))"
                said = tag("title", f"layer {layer}, {task}, expert {e}: {100 * share:.0f} %")
                box = {"x": x + size * e, "y": top + size * i, "width": size - 1.5, "height": size - 1.5, "rx": 2}
                parts.append(tag("rect", said, style=f"fill:{fill}", **box))
        x += size * experts + gap
    key = f"palest 0 %, darkest {100 * largest:.0f} % of the weight"
    bottom = top + size * len(tasks)
    parts.append(text(left, bottom + 18, key, class_="tick"))
    return drawing(max(x + 10, left + 300), bottom + 28, title, description, parts)


def scatter(points: Sequence[Point], *, across: str, up: str, title: str, description: str) -> Markup:
    """Points with vertical spreads, named in the right margin."""
    right, left, top, bottom = WIDTH - label_width(p.label for p in points) - 40, 64.0, 16.0, 300.0
    x_low, x_high = _padded([p.x for p in points], 0.05)
    y_low, y_high = _padded([p.y + side * p.spread for p in points for side in (-1, 1)], 0.0)
    x, y = scale(x_low, x_high, left, right), scale(y_low, y_high, bottom, top)
    parts = _axes(
        x, y, ticks(x_low, x_high, 5, least=1.0), ticks(y_low, y_high), (left, right, top, bottom), across, up
    )
    names = apart([y(p.y) for p in points], 15.0, top + 6, bottom - 4)
    for point, name in zip(points, names, strict=True):
        px, py = x(point.x), y(point.y)
        parts.append(
            tag(
                "g",
                tag("title", f"{point.label}: {point.x:,.0f} parameters, {point.y:.1f} ± {point.spread:.1f}"),
                tag("path", d=f"M{px:.1f} {py:.1f} L{right + 8:.1f} {name:.1f}", class_="leader"),
                line(px, y(point.y - point.spread), px, y(point.y + point.spread), "whisker"),
                tag("circle", cx=px, cy=py, r=5.5, class_="dot"),
                text(right + 12, name + 4, shorten(point.label)),
                class_=f"s{point.series % SERIES}",
            )
        )
    return drawing(WIDTH, bottom + 46, title, description, parts)


def lines(
    series: Sequence[Line], *, across: str, up: str, title: str, description: str, logarithmic: bool = False
) -> Markup:
    """Lines named at their right ends; `logarithmic` where values are positive and span more than one power of 2."""
    right, left, top, bottom = WIDTH - label_width(s.label for s in series) - 40, 64.0, 16.0, 300.0
    values = [v for s in series for _, v in s.points]
    steps = [t for s in series for t, _ in s.points]
    logarithmic = logarithmic and min(values) > 0 and max(values) > 2 * min(values)
    on = math.log10 if logarithmic else float
    y_low, y_high = _padded([on(v) for v in values], 0.0)
    x_low, x_high = min(steps), max(steps)
    x, y = scale(x_low, x_high, left, right), scale(y_low, y_high, bottom, top)
    marks = _powers(y_low, y_high) if logarithmic else ticks(y_low, y_high)
    across_marks = ticks(x_low, x_high, least=1.0)
    parts = _axes(x, lambda v: y(on(v)), across_marks, marks, (left, right, top, bottom), across, up)
    names = apart([y(on(s.points[-1][1])) for s in series], 15.0, top + 6, bottom - 4)
    for s, name in zip(series, names, strict=True):
        path = " ".join(f"{'L' if i else 'M'}{x(t):.1f} {y(on(v)):.1f}" for i, (t, v) in enumerate(s.points))
        end = x(s.points[-1][0]), y(on(s.points[-1][1]))
        parts.append(
            tag(
                "g",
                tag("title", s.label),
                tag("path", d=path, class_="line", stroke_dasharray=DASHES[s.series % len(DASHES)] or None),
                *[tag("circle", cx=x(t), cy=y(on(v)), r=3.0, class_="dot") for t, v in s.points if len(s.points) <= 16],
                tag("path", d=f"M{end[0]:.1f} {end[1]:.1f} L{right + 8:.1f} {name:.1f}", class_="leader"),
                text(right + 12, name + 4, shorten(s.label)),
                class_=f"s{s.series % SERIES}",
            )
        )
    return drawing(WIDTH, bottom + 46, title, description, parts)


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
    parts += [text(x(v), bottom + 18, f"{v:,.10g}", anchor="middle", class_="tick") for v in across]
    parts.append(line(left, bottom, right, bottom, "zero"))
    parts.append(text((left + right) / 2, bottom + 38, x_name, anchor="middle", class_="axis"))
    place = f"translate(16 {(top + bottom) / 2:.1f}) rotate(-90)"
    parts.append(tag("text", y_name, transform=place, text_anchor="middle", class_="axis"))
    return parts


def _padded(values: Sequence[float], least: float) -> tuple[float, float]:
    """The range of the values and a little more; at least the share `least` of the middle to each side."""
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), least * abs(low + high) / 2) or 0.5
    return low - pad, high + pad


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between 10^low and 10^high."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= math.log10(m * 10.0**p) <= high]


def _signed(value: float, digits: int | None = None) -> str:
    shown = f"{value:+g}" if digits is None else f"{value:+.{digits}f}"
    return "0" if value == 0 and digits is None else shown.replace("-", "\N{MINUS SIGN}")


def _on(share: float) -> str | None:
    """The class of a number on a strongly coloured cell."""
    return "on" if share > 0.6 else None
