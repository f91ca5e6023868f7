"""Random numbers of many environments, each from a stream of its own: what one draws never changes what another does.

A number is a hash of its stream's seed and of how many were drawn before (SplitMix64, Steele et al., OOPSLA 2014), so a
stream is two integers, which is all that a checkpoint keeps, and an environment does the same alone or among thousands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Words = NDArray[np.uint64]
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11 = (np.uint64(n) for n in (30, 27, 31, 11))


class Chance:
    """A stream for each of the given seeds."""

    def __init__(self, seeds: Sequence[int]) -> None:
        with np.errstate(over="ignore"):
            self.seeds = _mixed(np.array([seed % 2**64 for seed in seeds], dtype=np.uint64) * _STEP + _STEP)
        self.drawn = np.zeros(len(seeds), dtype=np.uint64)

    def uniform(self, rows: Rows, count: int, low: float = 0.0, high: float = 1.0) -> Floats:
        """Of each of `rows` (n,) the next `count` numbers (n, count), from `low` up to `high`."""
        first = self.drawn[rows]
        self.drawn[rows] = first + np.uint64(count)
        with np.errstate(over="ignore"):
            counted: Words = np.arange(1, count + 1, dtype=np.uint64)
            places: Words = (first[:, None] + counted) * _STEP
            whole: Words = _mixed(self.seeds[rows][:, None] + places)
        share = np.asarray((whole >> _11) * 2.0**-53, dtype=np.float64)
        return low + (high - low) * share

    def normal(self, rows: Rows, count: int) -> Floats:
        """The same from a standard normal distribution (Box and Muller's pairs)."""
        half = (count + 1) // 2
        drawn = self.uniform(rows, 2 * half)
        radius, angle = np.sqrt(-2 * np.log1p(-drawn[:, :half])), 2 * np.pi * drawn[:, half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :count]


def seeds_of(given: Any, count: int) -> list[int]:
    """A seed for each environment: of one number the next ones, of a list its own; None is a fresh one.

    Raises:
        ConfigError: a seed is no whole number, or there are not as many as environments.
    """
    if given is None or np.ndim(given) == 0:
        first = _seed(given)
        return [first + row for row in range(count)]
    if len(given) != count:
        raise ConfigError(f"seed has {len(given)} entries for {count} environments")
    return [_seed(own) for own in given]


def _seed(given: Any) -> int:
    if given is None:
        return int(np.random.SeedSequence().entropy % 2**63)  # type: ignore[operator]
    if isinstance(given, bool) or not isinstance(given, int | np.integer):
        raise ConfigError(f"seed={given} must be a whole number")
    return int(given)


def _mixed(z: Words) -> Words:
    z = (z ^ (z >> _30)) * _FIRST
    z = (z ^ (z >> _27)) * _SECOND
    return z ^ (z >> _31)
