"""ADWIN (Bifet & Gavaldà, SDM 2007) for many experts at once: has the mean of a window of errors risen?

    cut W into W0 W1 where |mean(W0) - mean(W1)| > eps,     1/m = 1/(n0 - 4) + 1/(n1 - 4),  d = ln(2 ln n / delta)
    eps = sqrt(2/m var(W) d) + 2/3 d / m

The window is an exponential histogram of at most `MOST` buckets for each power of two.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

ROWS, MOST = 32, 5
EVERY = 32
"""Values between two looks at the window."""
LEAST = 5
"""Values on either side of a cut."""


class Windows(NamedTuple):
    """What K detectors keep, R rows of buckets each."""

    delta: float
    sums: Any
    spread: Any
    """(K, R, buckets) of errors, and of squared differences to their mean."""
    filled: Any
    """(K, R) buckets in use."""
    whole: Any
    """(K, 4) of each window: its length, sum, sum of squared differences to the mean, and the values so far."""


class Adwin:
    """K detectors.

    Args:
        size: K.
        delta: the chance of a false alarm; smaller is slower to see a change.
    """

    def __init__(self, size: int, delta: float) -> None:
        self.delta = delta
        self.sums = np.zeros((size, ROWS, MOST + 2))
        self.spread = np.zeros((size, ROWS, MOST + 2))
        self.filled = np.zeros((size, ROWS), np.int64)
        self.whole = np.zeros((size, 4))

    @property
    def windows(self) -> Windows:
        """What kernels take."""
        return Windows(self.delta, self.sums, self.spread, self.filled, self.whole)

    def add(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """A value (K,) for each; returns whose mean has risen (K,)."""
        risen = np.zeros(len(values), np.bool_)
        add(values, self.windows, risen)
        return risen

    def reset(self, which: int) -> None:
        _clear(self.windows, which)

    def grow(self, size: int) -> None:
        for name, values in self.arrays().items():
            more = np.zeros((size - len(values), *values.shape[1:]), values.dtype)
            setattr(self, name, np.concatenate([values, more]))

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"sums": self.sums, "spread": self.spread, "filled": self.filled, "whole": self.whole}


@njit(cache=True)
def add(values: Any, w: Windows, risen: Any) -> None:
    for k in range(len(values)):
        _insert(values[k], w.sums[k], w.spread[k], w.filled[k], w.whole[k])
        risen[k] = False
        if w.whole[k, 3] % EVERY == 0 and w.whole[k, 0] > 2 * LEAST:
            risen[k] = _shrink(w.delta, w.sums[k], w.spread[k], w.filled[k], w.whole[k])


@njit(cache=True)
def add_twice(values: Any, warning: Windows, drift: Windows, risen: Any) -> None:
    """Values (K,) to two detectors each; which of either have risen into `risen` (2, K), and begin anew.

    A drift ends the warning, too.
    """
    add(values, warning, risen[0])
    add(values, drift, risen[1])
    for k in range(len(values)):
        if risen[0, k] or risen[1, k]:
            _clear(warning, k)
        if risen[1, k]:
            _clear(drift, k)


@njit(cache=True)
def _clear(w: Windows, k: int) -> None:
    w.sums[k], w.spread[k], w.filled[k], w.whole[k] = 0.0, 0.0, 0, 0.0


@njit(cache=True)
def _insert(value: float, sums: Any, spread: Any, filled: Any, whole: Any) -> None:
    length, total = whole[0], whole[1]
    if length > 0:
        whole[2] += length * (value - total / length) ** 2 / (length + 1)
    whole[0], whole[1], whole[3] = length + 1, total + value, whole[3] + 1
    sums[0, filled[0]], spread[0, filled[0]] = value, 0.0
    filled[0] += 1
    row = 0
    while row < ROWS - 1 and filled[row] > MOST:
        size, at = 2.0**row, filled[row + 1]
        apart = (sums[row, 0] - sums[row, 1]) / size
        sums[row + 1, at] = sums[row, 0] + sums[row, 1]
        spread[row + 1, at] = spread[row, 0] + spread[row, 1] + size * apart * apart / 2
        filled[row + 1] += 1
        _drop(row, 2, sums, spread, filled)
        row += 1


@njit(cache=True)
def _drop(row: int, count: int, sums: Any, spread: Any, filled: Any) -> None:
    """The oldest buckets of a row away."""
    for i in range(filled[row] - count):
        sums[row, i], spread[row, i] = sums[row, i + count], spread[row, i + count]
    filled[row] -= count


@njit(cache=True)
def _shrink(delta: float, sums: Any, spread: Any, filled: Any, whole: Any) -> bool:
    """Drop the oldest buckets as long as some cut parts two different means; whether the newer one was higher."""
    risen = False
    while True:
        cut, higher = _cut(delta, sums, filled, whole)
        if not cut:
            return risen
        risen = risen or higher
        row = ROWS - 1
        while filled[row] == 0:
            row -= 1
        size, total = 2.0**row, sums[row, 0]
        whole[0] -= size
        whole[1] -= total
        apart = total / size - whole[1] / whole[0]
        whole[2] = max(0.0, whole[2] - spread[row, 0] - size * whole[0] * apart * apart / (size + whole[0]))
        _drop(row, 1, sums, spread, filled)


@njit(cache=True)
def _cut(delta: float, sums: Any, filled: Any, whole: Any) -> tuple[bool, bool]:
    """Whether some cut parts two different means, and whether the newer is higher there; from the oldest on."""
    if whole[0] < 2 * LEAST:
        return False, False
    reach = math.log(2.0 * math.log(whole[0]) / delta)
    variance = whole[2] / whole[0]
    old, old_sum = 0.0, 0.0
    for row in range(ROWS - 1, -1, -1):
        for i in range(filled[row]):
            old += 2.0**row
            old_sum += sums[row, i]
            new = whole[0] - old
            if new < LEAST:
                return False, False
            if old < LEAST:
                continue
            spare = 1.0 / (old - LEAST + 1) + 1.0 / (new - LEAST + 1)
            apart = (whole[1] - old_sum) / new - old_sum / old
            if abs(apart) > math.sqrt(2.0 * spare * variance * reach) + 2.0 / 3.0 * reach * spare:
                return True, apart > 0
    return False, False
