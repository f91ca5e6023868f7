"""What is kept of each expert: how right it was lately, what it learned, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.trees.rows import follow
from moesaic.trees.settings import Settings


class Ledger:
    """Of K experts, which may become more.

    Args:
        rate: how fast recent accuracies move.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.accuracy = np.zeros(0)
        """Recent accuracies (K,)."""
        self.bias = np.zeros(0, np.float32)
        """What is added to router scores where it is chosen who learns (K,)."""
        self.chosen = np.zeros(0)
        """Sums of weights in answers (K,)."""
        self.trained, self.resets, self.last, self.nursed = np.zeros((4, 0), np.int64)
        """Rows learned, times begun anew, the last row learned, and the row until which it is taught (K,)."""

    @property
    def size(self) -> int:
        return len(self.accuracy)

    def grow(self, size: int, row: int) -> None:
        """Room for K experts, at a row."""
        more = size - self.size
        born: dict[str, Any] = {"accuracy": 0.5, "last": row}
        for name, values in self.arrays().items():
            setattr(self, name, np.append(values, np.full(more, born.get(name, 0), values.dtype)))

    def follow(self, right: NDArray[np.bool_], lessons: NDArray[np.float64], row: int) -> None:
        """A row was answered rightly by some, and learned by some, (K,) each."""
        follow(right, lessons, self.rate, row, self.accuracy, self.trained, self.last)

    def begun(self, which: int, row: int, until: int) -> None:
        """An expert that nobody taught begins anew, and is taught for a while."""
        self.resets[which] += 1
        self.last[which], self.nursed[which] = row, until

    def lessons(
        self, s: Settings, random: np.random.Generator, row: int, scores: NDArray[np.float32],
        targets: NDArray[np.bool_],
    ) -> NDArray[np.float64]:  # fmt: skip
        """How often each expert learns a row (K,).

        Args:
            random: what is drawn is drawn from it.
            row: rows that were learned before.
            scores: the router's (K,).
            targets: which experts were right, or nearest (K,).
        """
        if s.has_inert_experts:
            return np.zeros(self.size)
        if s.variant == "task" or s.train == "all" or row < s.warmup:
            taught = np.ones(self.size)
        elif s.train == "correct":
            taught = targets.astype(np.float64)
        else:
            taught = np.zeros(self.size)
            taught[self.taken(scores, s.top_k)] = 1.0
        if s.explore and random.random() < s.explore:
            taught[random.integers(self.size)] = 1.0
        if s.reset_after:
            taught[row < self.nursed] = 1.0
        if s.balance:
            self.favour(taught, s.balance)
        if s.poisson:
            taught = taught * random.poisson(s.poisson, self.size)
        return taught

    def taken(self, scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        """The experts that learn a row by the router's scores (K,)."""
        return np.argsort(-(scores + self.bias), kind="stable")[:count]

    def favour(self, taught: NDArray[np.float64], step: float) -> None:
        """Raise the bias of those that learned less than their share of a row, lower the others'."""
        self.bias += step * np.sign(taught.mean() - taught).astype(np.float32)

    def arrays(self) -> dict[str, NDArray[Any]]:
        names = ("accuracy", "bias", "chosen", "trained", "resets", "last", "nursed")
        return {name: getattr(self, name) for name in names}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Become what `arrays` told of, of as many experts. Raises ValueError for anything else."""
        for name, own in self.arrays().items():
            setattr(self, name, same_kind(name, arrays[name], own))
        if not ((self.accuracy >= 0) & (self.accuracy <= 1)).all():
            raise ValueError("an accuracy is not between 0 and 1")


def same_kind(name: str, given: NDArray[Any], own: NDArray[Any]) -> NDArray[Any]:
    """A copy of an array that stands for another. Raises ValueError where it is of another shape, or infinite."""
    if given.shape != own.shape or given.dtype != own.dtype:
        raise ValueError(f"{name} is {given.dtype} {given.shape}, and must be {own.dtype} {own.shape}")
    if own.dtype.kind == "f" and np.isinf(given).any():
        raise ValueError(f"{name} is infinite")
    return np.array(given)


def whole(name: str, given: Any, end: int) -> int:
    """A whole number from 0 and below `end`. Raises ValueError for anything else."""
    if type(given) is not int or not 0 <= given < end:
        raise ValueError(f"{name} is {given!r}")
    return given
