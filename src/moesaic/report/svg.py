"""Drawing by hand: SVG elements as escaped markup, axes, and labels that keep out of each other's way.

Colours come from the style sheet around a drawing (`.s0` to `.s7` for series, `--ink`, `--paper`), so that it follows
the reader's light or dark mode.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

SERIES = 8
"""Number of series colours in the style sheet."""

DASHES = ("", "6 3", "2 3", "8 3 2 3")
"""Lines differ by these too, for readers who do not tell the colours apart."""

CHARACTER = 6.6
"""Width of a character of a label, roughly, in units of the drawing."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element. `class_` is `class`, `text_anchor` is `text-anchor`; attributes that are None are left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{''.join(escape(c) for c in children)}</{name}>")


def drawing(width: float, height: float, title: str, description: str, parts: Iterable[Markup]) -> Markup:
    """A whole drawing, with what a screen reader says of it."""
    return tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_plain(width)} {_plain(height)}",
        width=_plain(width),
        role="img",
        aria_label=f"{title}. {description}",
    )


def text(x: float, y: float, content: str, *, anchor: str = "start", class_: str | None = None) -> Markup:
    return tag("text", content, x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str, **attributes: object) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_, **attributes)


def circle(x: float, y: float, radius: float, class_: str, *children: object, **attributes: object) -> Markup:
    return tag("circle", *children, cx=x, cy=y, r=radius, class_=class_, **attributes)


def arrow(x: float, y: float, towards: tuple[int, int]) -> Markup:
    """A triangle whose tip is at (x, y), pointing along one axis."""
    across, down = towards
    corners = [(x - 11 * across + side * 6 * down, y - 11 * down + side * 6 * across) for side in (-1, 1)]
    d = f"M{x:.1f} {y:.1f} " + " ".join(f"L{a:.1f} {b:.1f}" for a, b in corners) + " Z"
    return tag("path", d=d, class_="dot")


def shorten(label: str, longest: int = 28) -> str:
    return label if len(label) <= longest else label[: longest - 1] + "…"


def label_width(labels: Iterable[str]) -> float:
    return CHARACTER * max((len(shorten(label)) for label in labels), default=0)


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The linear map of [low, high] to [start, end]; everything to the middle where low equals high."""
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def ticks(low: float, high: float, most: int = 6, *, least: float = 0.0) -> list[float]:
    """Round values within [low, high]: 1, 2 or 5 times a power of ten apart, and at least `least`."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(least, next(m * power for m in (1, 2, 5, 10) if m * power >= raw))
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def fences(values: Sequence[float]) -> tuple[float, float]:
    """Tukey's outer fences, three quartile distances beyond the quartiles: an axis need not reach what lies outside."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (0.0, 0.0, 0.0)
    reach = 3 * (third - first) or math.inf
    return first - reach, third + reach


def apart(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the given ones, at least `gap` apart and, room permitting, within [low, high]."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    placed = [min(max(positions[i], low), high) for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    if placed and placed[-1] > high:
        placed[-1] = high
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - gap)
    found = [0.0] * len(positions)
    for place, i in zip(placed, order, strict=True):
        found[i] = place
    return found


def beside(
    points: Sequence[tuple[float, float]], labels: Sequence[str], frame: Box, *, taken: Sequence[Box] = (), size: float
) -> list[tuple[float, float, str]]:
    """(x, y, anchor) of each point's label: on the side of it where it covers least.

    Labels are placed in turn, and then twice more, now that the others have their places.

    Args:
        frame: what labels must stay within. taken: boxes that they should not cover, beside the points themselves.
        size: of the font.
    """
    dots = [(x - 7, y - 7, x + 7, y + 7) for x, y in points]
    options = [
        [_label(point, label, side, size) for side in _SIDES] for point, label in zip(points, labels, strict=True)
    ]
    placed: dict[int, tuple[Box, tuple[float, float, str]]] = {}
    for i in [*range(len(points))] * 3:
        others = [*dots[:i], *dots[i + 1 :], *taken, *(box for j, (box, _) in placed.items() if j != i)]
        costs = [
            10 * (_area(box) - _common(box, frame)) + sum(_common(box, other) for other in others)
            for box, _ in options[i]
        ]
        placed[i] = options[i][costs.index(min(costs))]
    return [placed[i][1] for i in range(len(points))]


_SIDES = ((0, -1), (0, 1), (1, 0), (-1, 0), (1, -1), (-1, -1), (1, 1), (-1, 1))
"""Above, below, right, left, and the corners; the first of equals is taken."""


def _label(
    point: tuple[float, float], label: str, side: tuple[int, int], size: float
) -> tuple[Box, tuple[float, float, str]]:
    """A label beside a point: its box with some air, and (x, y, anchor)."""
    across, down = side
    x = point[0] + across * (7 if down else 10)
    y = point[1] + down * (10 + size / 2) + 0.35 * size
    length = CHARACTER * size / 12.5 * len(label)
    start = x - length * (1 - across) / 2
    return (start - 4, y - 0.9 * size, start + length + 4, y + 0.3 * size), (
        x,
        y,
        ("end", "middle", "start")[across + 1],
    )


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _common(a: Box, b: Box) -> float:
    """Area of the overlap."""
    return _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
