"""Drawing by hand: SVG elements as escaped markup, axes, and labels that keep out of each other's way.

Colours come from the page's style sheet (`.s0` to `.s7` for series, `--ink`, `--paper`), so that a drawing follows the
reader's light or dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

SERIES = 8
"""Number of series colours in the style sheet."""

DASHES = ("", "6 3", "2 3", "8 3 2 3")
"""Lines differ by these too, for readers who do not tell the colours apart."""

CHARACTER = 6.6
"""Width of a character of a label, roughly, in units of the drawing."""


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


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


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


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
