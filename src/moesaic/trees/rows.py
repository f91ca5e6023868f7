"""What is done for every row, compiled: numpy's calls cost more than their work on a handful of numbers."""

from __future__ import annotations

import math
from typing import Any

from numba import njit

LARGEST_READ = 1e9
"""Of what the router reads where it does not scale: beyond, float32 cannot hold its gradient's square."""


@njit(cache=True)
def layer(x: Any, weight: Any, bias: Any, relu: bool, out: Any) -> None:
    """out (b,) = x (a,) W (a, b) + bias, and no less than 0 with `relu`."""
    out[:] = bias
    for i in range(len(x)):
        value = x[i]
        if value != 0.0:
            for j in range(len(out)):
                out[j] += value * weight[i, j]
    if relu:
        for j in range(len(out)):
            out[j] = max(out[j], out.dtype.type(0))


@njit(cache=True)
def standardised(x: Any, mean: Any, square: Any, seen: Any, out: Any) -> None:
    """How many standard deviations a row's values are above their means, at most ten; a missing one is a mean."""
    for i in range(len(out)):
        out[i] = 0.0
        deviation = math.sqrt(square[i] / seen[i]) if square[i] > 0.0 else 0.0
        if i < len(x) and deviation > 0.0 and math.isfinite(x[i]):
            out[i] = min(max((x[i] - mean[i]) / deviation, -10.0), 10.0)


@njit(cache=True)
def clipped(x: Any, out: Any) -> None:
    """A row's values as they are, at most `LARGEST_READ`; a missing one is 0."""
    for i in range(len(out)):
        out[i] = 0.0
        if i < len(x) and x[i] == x[i]:
            out[i] = min(max(x[i], -LARGEST_READ), LARGEST_READ)


@njit(cache=True)
def watch(x: Any, mean: Any, square: Any, seen: Any) -> None:
    """Add a row to running means, sums of squared differences to them, and counts of the rows that have a feature."""
    for i in range(len(x)):
        if math.isfinite(x[i]):
            seen[i] += 1.0
            apart = x[i] - mean[i]
            mean[i] += apart / seen[i]
            square[i] += apart * (x[i] - mean[i])


@njit(cache=True)
def mixture(scores: Any, accuracy: Any, trust: float, recency: float, out: Any) -> None:
    """w_i = sigmoid(z_i)^trust a_i^recency, summing to 1."""
    most = 1e-9
    for i in range(len(out)):
        most = max(most, accuracy[i])
    total = 0.0
    for i in range(len(out)):
        out[i] = max(accuracy[i] / most, 1e-9) ** recency * (1.0 + math.exp(-scores[i])) ** -trust
        total += out[i]
    for i in range(len(out)):
        out[i] = out[i] / total if total > 0.0 else 1.0 / len(out)


@njit(cache=True)
def blend(weights: Any, votes: Any, out: Any) -> None:
    """out (C,) += weights (K,) votes (K, C); votes that are NaN were not asked for."""
    for k in range(len(votes)):
        for c in range(len(out)):
            if votes[k, c] == votes[k, c]:
                out[c] += weights[k] * votes[k, c]


@njit(cache=True)
def normalise(out: Any) -> None:
    """Make weights (C,) sum to 1; all alike where there are none."""
    total = 0.0
    for value in out:
        total += value
    for c in range(len(out)):
        out[c] = out[c] / total if total > 0.0 else 1.0 / len(out)


@njit(cache=True)
def follow(right: Any, weights: Any, rate: float, row: int, accuracy: Any, trained: Any, last: Any) -> None:
    """Recent accuracies, and which experts have learned the row."""
    for i in range(len(right)):
        accuracy[i] += rate * ((1.0 if right[i] else 0.0) - accuracy[i])
        if weights[i] > 0.0:
            trained[i] += 1
            last[i] = row
