"""Figures of a stream of predictions: accuracy and three kappas, over all rows and window by window.

    kappa   = (p0 - pc) / (1 - pc)          pc: agreement by chance, from both marginals
    kappa_m = (p0 - p_maj) / (1 - p_maj)    p_maj: accuracy of naming the most frequent class
    kappa_t = (p0 - p_nc) / (1 - p_nc)      p_nc: accuracy of naming the label before

They equal those of MOA and CapyMOA on the same predictions, baselines included: on each row the majority is the class
most frequent up to it and with it, the first of equals; for windows, in as many rows up to it as a window has. Class 0
stands before the first label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import AdapterError
from moesaic.trees.prequential.learner import State

Labels = NDArray[np.int64]
"""Classes by index (n,); -1 where a label is missing."""

METRICS = ("accuracy", "kappa", "kappa_m", "kappa_t")
_PIECE = 4096
"""Rows that are counted at once: counts of classes up to each take (rows, classes) numbers."""


@dataclass(frozen=True)
class Figures:
    """What predictions of some rows are worth; None where it is not defined: without labels, or with one class alone.

    Attributes:
        start: the first row.
        rows: how many; `scored` of them have a label.
        accuracy: 0 to 1.
        kappa: -1 to 1, as the others at most 1.
    """

    start: int
    rows: int
    scored: int
    accuracy: float | None
    kappa: float | None
    kappa_m: float | None
    kappa_t: float | None

    @property
    def end(self) -> int:
        return self.start + self.rows


def _none() -> Labels:
    return np.zeros(0, np.int64)


@dataclass
class Counts:
    """What figures are made of. Those of more rows are the sums.

    Attributes:
        majority: rows on which naming the most frequent class is right.
        unchanged: rows whose label is that of the one before.
        true: rows by label (classes,).
        predicted: labelled rows by prediction (classes,).
    """

    rows: int = 0
    scored: int = 0
    correct: int = 0
    majority: int = 0
    unchanged: int = 0
    true: Labels = field(default_factory=_none)
    predicted: Labels = field(default_factory=_none)

    def __add__(self, other: Counts) -> Counts:
        first, second = self.vector(other.true.size), other.vector(self.true.size)
        return Counts.of(first + second)

    def vector(self, classes: int = 0) -> Labels:
        """All of it in one array (5 + 2C,), C at least `classes`."""
        wide = max(classes, self.true.size)
        single = [self.rows, self.scored, self.correct, self.majority, self.unchanged]
        return np.concatenate([single, _widened(self.true, wide), _widened(self.predicted, wide)])

    @classmethod
    def of(cls, vector: Labels) -> Counts:
        """The counts that an array tells of."""
        rows, scored, correct, majority, unchanged = vector[:5].tolist()
        true, predicted = np.split(vector[5:].copy(), 2)
        return cls(rows, scored, correct, majority, unchanged, true, predicted)

    def figures(self, start: int = 0) -> Figures:
        # whole numbers up to the one division: figures do not depend on the order of sums
        n, right = self.scored, self.correct
        chance = sum(a * b for a, b in zip(self.true.tolist(), self.predicted.tolist(), strict=True))
        return Figures(
            start,
            self.rows,
            n,
            accuracy=_ratio(right, n),
            kappa=_ratio(n * right - chance, n * n - chance),
            kappa_m=_ratio(right - self.majority, n - self.majority),
            kappa_t=_ratio(right - self.unchanged, n - self.unchanged),
        )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _widened(counts: Labels, classes: int) -> Labels:
    return np.pad(counts, (0, max(0, classes - counts.size)))


def _marked(labels: Labels, classes: int) -> Labels:
    """A 1 in the label's column, (n, classes); a missing one has none."""
    return (labels[:, None] == np.arange(classes)).astype(np.int64)


class Evaluator:
    """Counts what predictions are worth, row by row, in windows of so many rows that do not overlap.

    How the rows are cut into calls makes no difference.
    """

    def __init__(self, window: int = 1000) -> None:
        self.window = window
        self._closed: list[Counts] = []
        self._open = Counts()
        self._overall = Counts()
        self._last = 0
        self._recent = np.full(window, -1, np.int64)  # labels of this window so far, then the one before's

    @property
    def rows(self) -> int:
        return self._overall.rows

    @property
    def classes(self) -> int:
        """One more than the highest label so far."""
        return int(np.trim_zeros(self._overall.true, "b").size)

    def update(self, y: Labels, predicted: Labels) -> None:
        """Count rows with their labels (n,) and what was predicted of them (n,)."""
        while y.size:
            size = min(self.window - self._open.rows, _PIECE)
            self._count(y[:size], predicted[:size])
            y, predicted = y[size:], predicted[size:]

    def _count(self, y: Labels, predicted: Labels) -> None:
        """Rows of one window."""
        classes = int(max(self._overall.true.size, y.max() + 1, predicted.max() + 1))
        scored = y >= 0
        labels, named = y[scored], predicted[scored]
        before = np.append(self._last, labels)
        place = slice(self._open.rows, self._open.rows + y.size)
        recent = np.bincount(self._recent[self._recent >= 0], minlength=classes)
        lately = recent + np.cumsum(_marked(y, classes) - _marked(self._recent[place], classes), axis=0)
        ever = _widened(self._overall.true, classes) + np.cumsum(_marked(labels, classes), axis=0)
        found = Counts(
            rows=y.size,
            scored=labels.size,
            correct=int((labels == named).sum()),
            majority=int((lately[scored].argmax(axis=1) == labels).sum()),
            unchanged=int((before[:-1] == labels).sum()),
            true=np.bincount(labels, minlength=classes),
            predicted=np.bincount(named, minlength=classes),
        )
        self._recent[place] = y
        self._last = int(before[-1])
        self._open += found
        found.majority = int((ever.argmax(axis=1) == labels).sum())
        self._overall += found
        if self._open.rows == self.window:
            self._closed.append(self._open)
            self._open = Counts()

    def _counted(self) -> list[Counts]:
        return [*self._closed, *([self._open] if self._open.rows else [])]

    def overall(self) -> Figures:
        """Over all rows."""
        return self._overall.figures()

    def windows(self) -> list[Figures]:
        """Window by window; the last one may be shorter."""
        return [counts.figures(i * self.window) for i, counts in enumerate(self._counted())]

    def state(self) -> State:
        classes = self._overall.true.size
        counted = [counts.vector(classes) for counts in (*self._closed, self._open, self._overall)]
        return {"counted": np.stack(counted), "recent": self._recent.copy()}, {"last": self._last}

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        *closed, self._open, self._overall = map(Counts.of, arrays["counted"])
        self._closed, self._recent, self._last = closed, arrays["recent"].copy(), int(values["last"])
        if self._recent.shape != (self.window,) or _rows([*closed, self._open]) != self.rows:
            raise AdapterError("its windows do not add up to its rows")


def _rows(counts: Iterable[Counts]) -> int:
    return sum(c.rows for c in counts)
