"""What a drift did to a learner: how far its accuracy fell, and after how many rows it was back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moesaic.trees.prequential.metrics import Figures
from moesaic.trees.streams.stream import Drift

TOLERANCE = 0.01
"""Accuracy that may be lacking where it counts as back: one point."""


@dataclass(frozen=True)
class Recovery:
    """A drift and what it did. What cannot be told, for want of a whole window on either side, is None.

    Attributes:
        before: mean accuracy of the windows between the drift before it and this one.
        lowest: the lowest accuracy of a window from its beginning until the learner was back.
        drop: `before` - `lowest`; below 0 where no window was as bad.
        rows: from its position to the end of the first window after the change whose accuracy is at most one point
            below `before`; None where there is none before the next drift.
    """

    position: int
    width: int
    before: float | None
    lowest: float | None
    drop: float | None
    rows: int | None


def recoveries(windows: Sequence[Figures], drifts: Sequence[Drift]) -> list[Recovery]:
    """What each drift did, by windows of one size; a shorter last one is too small to judge by."""
    size = max((w.rows for w in windows), default=0)
    judged = [w for w in windows if w.rows == size and w.accuracy is not None]
    found = []
    over_before = 0
    ordered = sorted(drifts, key=lambda drift: drift.position)
    begins = [drift.position - drift.width // 2 for drift in ordered]
    for drift, begin, next_one in zip(ordered, begins, [*begins, math.inf][1:], strict=True):
        over = drift.position + drift.width // 2
        earlier = [w for w in judged if over_before <= w.start and w.end <= begin]
        later = [w for w in judged if begin < w.end <= next_one]
        found.append(_judged(drift, over, earlier, later))
        over_before = over
    return found


def _judged(drift: Drift, over: int, earlier: Sequence[Figures], later: Sequence[Figures]) -> Recovery:
    if not earlier or not any(w.start >= over for w in later):
        return Recovery(drift.position, drift.width, _mean(earlier), None, None, None)
    before = math.fsum(map(_accuracy, earlier)) / len(earlier)
    needed = before - TOLERANCE - 1e-12  # 0.8 less 0.01 is more than 0.79 to a computer
    back = next((i for i, w in enumerate(later) if w.start >= over and _accuracy(w) >= needed), None)
    lowest = min(map(_accuracy, later if back is None else later[: back + 1]))
    rows = None if back is None else later[back].end - drift.position
    return Recovery(drift.position, drift.width, before, lowest, before - lowest, rows)


def _mean(windows: Sequence[Figures]) -> float | None:
    return math.fsum(map(_accuracy, windows)) / len(windows) if windows else None


def _accuracy(window: Figures) -> float:
    assert window.accuracy is not None
    return window.accuracy
