"""Figures of a stream of predictions: accuracy and three kappas, over all rows and window by window.

    kappa   = (p0 - pc) / (1 - pc)          pc: agreement by chance, from both marginals
    kappa_m = (p0 - p_maj) / (1 - p_maj)    p_maj: accuracy of naming the most frequent class
    kappa_t = (p0 - p_nc) / (1 - p_nc)      p_nc: accuracy of naming the label before

They equal those of MOA and CapyMOA on the same predictions, baselines included: on each row the majority is the class
most frequent up to it and with it, the first of equals; for windows, in as many rows up to it as a window has. Class 0
stands before the first label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.trees.prequential.learner import State, ensure, whole

Labels = NDArray[np.int64]
"""Classes by index (n,); -1 where a label is missing."""

METRICS = ("accuracy", "kappa", "kappa_m", "kappa_t")
_PIECE = 4096
"""Rows that are counted at once: counts of classes up to each take (rows, classes) numbers."""
_MAJORITY = 2
"""The place of `majority` in a vector of counts."""
_MOST = 2**40
"""Rows that a state may tell of: sums of them are exact."""


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


@dataclass(frozen=True)
class ClassFigures:
    """What predictions of one class are worth, over rows that have a label.

    Attributes:
        came: rows of this class.
        predicted: rows of which it was said.
        right: rows of which it was said rightly.
    """

    came: int
    predicted: int
    right: int

    @property
    def recall(self) -> float | None:
        """The share of its rows that were named so, 0 to 1; None where it never came."""
        return _ratio(self.right, self.came)

    @property
    def precision(self) -> float | None:
        """The share of the rows named so that are its own, 0 to 1; None where it was never named."""
        return _ratio(self.right, self.predicted)


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
        right: rows by label whose prediction is right (classes,).
    """

    rows: int = 0
    scored: int = 0
    majority: int = 0
    unchanged: int = 0
    true: Labels = field(default_factory=_none)
    predicted: Labels = field(default_factory=_none)
    right: Labels = field(default_factory=_none)

    def __add__(self, other: Counts) -> Counts:
        first, second = self.vector(other.true.size), other.vector(self.true.size)
        return Counts.of(first + second)

    def vector(self, classes: int = 0) -> Labels:
        """All of it in one array (4 + 3C,), C at least `classes`."""
        wide = max(classes, self.true.size)
        single = [self.rows, self.scored, self.majority, self.unchanged]
        return np.concatenate([single, *(_widened(of, wide) for of in (self.true, self.predicted, self.right))])

    @classmethod
    def of(cls, vector: Labels) -> Counts:
        """The counts that an array tells of."""
        rows, scored, majority, unchanged = vector[:4].tolist()
        true, predicted, right = np.split(vector[4:].copy(), 3)
        return cls(rows, scored, majority, unchanged, true, predicted, right)

    def agree(self) -> bool:
        """Whether predictions of so many rows can have these counts."""
        sums = int(self.true.sum()) == int(self.predicted.sum()) == self.scored <= self.rows
        right = bool((self.right <= np.minimum(self.true, self.predicted)).all())
        return sums and right and max(self.majority, self.unchanged) <= self.scored

    def figures(self, start: int = 0) -> Figures:
        # whole numbers up to the one division: figures do not depend on the order of sums
        n, right = self.scored, int(self.right.sum())
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

    def classes_but(self, late: Labels) -> int:
        """The same without some labels (n,). Raises AdapterError where it has not counted those."""
        size = self._overall.true.size
        ensure(bool(((late >= -1) & (late < size)).all()), "its outstanding labels are out of range")
        left = self._overall.true - np.bincount(late[late >= 0], minlength=size)
        ensure(bool((left >= 0).all()), "its outstanding labels are not among those that it counted")
        return int(np.trim_zeros(left, "b").size)

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
            majority=int((lately[scored].argmax(axis=1) == labels).sum()),
            unchanged=int((before[:-1] == labels).sum()),
            true=np.bincount(labels, minlength=classes),
            predicted=np.bincount(named, minlength=classes),
            right=np.bincount(labels[labels == named], minlength=classes),
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

    def by_class(self, classes: int) -> list[ClassFigures]:
        """Over all rows, of so many classes; those of more than there were are 0."""
        counts = (self._overall.true, self._overall.predicted, self._overall.right)
        columns = [_widened(of, classes)[:classes].tolist() for of in counts]
        return [ClassFigures(*of) for of in zip(*columns, strict=True)]

    def baselines(self) -> dict[str, float | None]:
        """Accuracy over all rows of naming the label before, and the most frequent class: what kappa_t and _m count."""
        counts = self._overall
        named = {"nochange": counts.unchanged, "majority": counts.majority}
        return {name: _ratio(right, counts.scored) for name, right in named.items()}

    def windows(self) -> list[Figures]:
        """Window by window; the last one may be shorter."""
        return [counts.figures(i * self.window) for i, counts in enumerate(self._counted())]

    def state(self) -> State:
        classes = self._overall.true.size
        counted = [counts.vector(classes) for counts in (*self._closed, self._open, self._overall)]
        return {"counted": np.stack(counted), "recent": self._recent.copy()}, {"last": self._last}

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        """Become what `state` told of. Raises AdapterError, and nothing has changed, where that cannot be."""
        counted, recent = arrays["counted"], arrays["recent"]
        shaped = counted.dtype == np.int64 and counted.ndim == 2 and counted.shape[1] >= 4 and counted.shape[1] % 3 == 1
        ensure(shaped and len(counted) >= 2, f"its counts are {counted.dtype} {counted.shape}")
        ensure(bool((counted >= 0).all() and (counted <= _MOST).all()), "its counts are out of range")
        every = [*map(Counts.of, counted)]
        ensure(all(counts.agree() for counts in every), "its counts contradict each other")
        *closed, rest, overall = every
        full = all(counts.rows == self.window for counts in closed) and rest.rows < self.window
        summed = np.delete(counted[:-1].sum(axis=0) == counted[-1], _MAJORITY)  # over windows it is another's
        ensure(full and bool(summed.all()), "its windows do not add up to its rows")
        told = recent.dtype == np.int64 and recent.shape == (self.window,)
        ensure(told and _are_recent(recent, closed, rest), "its recent labels are not those that it counted")
        last = whole(values, "last", most=max(overall.true.size - 1, 0))
        in_order = np.concatenate([recent[rest.rows :], recent[: rest.rows]])
        known = in_order[in_order >= 0][-1:].tolist()
        seen = overall.true[last] > 0 if overall.scored else last == 0
        ensure(bool(seen) and known in ([], [last]), f"its last label was not {last}")
        self._closed, self._open, self._overall = closed, rest, overall
        self._recent, self._last = recent.copy(), last


def _are_recent(recent: Labels, closed: Sequence[Counts], rest: Counts) -> bool:
    """Whether labels are those of the window that is open, and behind them what is left of the one before."""
    classes = rest.true.size
    if not bool(((recent >= -1) & (recent < classes)).all()):
        return False
    new, old = (np.bincount(part[part >= 0], minlength=classes) for part in np.split(recent, [rest.rows]))
    before = closed[-1].true if closed else np.zeros(classes, np.int64)
    return bool((new == rest.true).all() and (old <= before).all() and (rest.rows > 0 or (old == before).all()))
