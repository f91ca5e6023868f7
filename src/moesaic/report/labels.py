"""Labels that keep out of each other's way, and the ends of axes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

_SIDES = ((0, -1), (0, 1), (1, 0), (-1, 0), (1, -1), (-1, -1), (1, 1), (-1, 1))
"""Above, below, right, left, and the corners; the first of equals is taken."""


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
    points: Sequence[tuple[float, float]], widths: Sequence[float], frame: Box, *, taken: Sequence[Box] = (),
    size: float, steps: Sequence[float] = (0.0,),
) -> list[tuple[float, float, str]]:  # fmt: skip
    """(x, y, anchor) of each point's label, whose middle is at y: where it covers least.

    Labels are placed in turn, and then twice more, now that the others have their places.

    Args:
        frame: what labels must stay within. taken: boxes that they should not cover, beside the points themselves.
        size: of the font. steps: how far from its point a label may stand; nearer is better.
    """
    dots = [(x - 7, y - 7, x + 7, y + 7) for x, y in points]
    options = [
        [(*_label(point, width, side, size, step), step) for step in steps for side in _SIDES]
        for point, width in zip(points, widths, strict=True)
    ]
    placed: dict[int, tuple[Box, tuple[float, float, str], float]] = {}
    for i in [*range(len(points))] * 3:
        others = [*dots[:i], *dots[i + 1 :], *taken, *(box for j, (box, _, _) in placed.items() if j != i)]
        costs = [
            10 * (_area(box) - _common(box, frame)) + sum(_common(box, other) for other in others) + 2 * step
            for box, _, step in options[i]
        ]
        placed[i] = options[i][costs.index(min(costs))]
    return [placed[i][1] for i in range(len(points))]


def reach(
    marks: Sequence[Sequence[float]], always: Sequence[float] = (), *, share: float = 0.0, least: float = 0.0
) -> tuple[float, float]:
    """Ends of an axis for marks, each a value and the ends of what is drawn about it, and for what is `always` on it.

    All of a mark fits where its value lies within the fences or between the ends; the others lie beyond an end.
    """
    low, high = fences([mark[0] for mark in marks])
    shown: list[Sequence[float]] = []
    while len(within := [mark for mark in marks if low <= mark[0] <= high]) > len(shown):
        shown = within
        low, high = padded([*always, *(v for mark in shown for v in mark)], share, least)
    return low, high


def fences(values: Sequence[float]) -> tuple[float, float]:
    """Tukey's outer fences, three quartile distances beyond the quartiles: an axis need not reach what lies outside."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (0.0, 0.0, 0.0)
    far = 3 * (third - first) or math.inf
    return first - far, third + far


def padded(values: Sequence[float], share: float = 0.08, least: float = 0.5) -> tuple[float, float]:
    """The range of the values and a `share` of it more to each side; `least` where it is empty."""
    pad = share * (max(values) - min(values)) or least
    return min(values) - pad, max(values) + pad


def _label(
    point: tuple[float, float], width: float, side: tuple[int, int], size: float, step: float
) -> tuple[Box, tuple[float, float, str]]:
    """A label beside a point: its box with some air, and (x, y, anchor)."""
    across, down = side
    x, y = point[0] + across * (step + (7 if down else 10)), point[1] + down * (step + 7 + size / 2)
    start = x - width * (1 - across) / 2
    box = (start - 4, y - 0.65 * size, start + width + 4, y + 0.65 * size)
    return box, (x, y, ("right", "center", "left")[across + 1])


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _common(a: Box, b: Box) -> float:
    """Area of the overlap."""
    return _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
