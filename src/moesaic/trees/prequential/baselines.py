"""What a learner must beat, and classifiers of river's as learners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, MissingDependency
from moesaic.trees.experts import Row
from moesaic.trees.prequential.learner import State


class NoChange:
    """Names the label that came last, class 0 before there is one."""

    def __init__(self) -> None:
        self._last = 0

    def predict_proba(self, x: Row, classes: int) -> NDArray[np.float64]:
        return (np.arange(classes) == self._last).astype(np.float64)

    def learn(self, x: Row, y: int) -> None:
        self._last = y

    def state(self) -> State:
        return {}, {"last": self._last}

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        self._last = int(values["last"])

    def close(self) -> None:
        pass


class Majority:
    """Names the class that was the most frequent so far, the first of equals: probabilities are their shares."""

    def __init__(self) -> None:
        self._counts = np.zeros(0, np.int64)

    def predict_proba(self, x: Row, classes: int) -> NDArray[np.float64]:
        counts = np.pad(self._counts, (0, classes - self._counts.size)).astype(np.float64)
        return counts / counts.sum() if self._counts.size else np.full(classes, 1 / classes)

    def learn(self, x: Row, y: int) -> None:
        self._counts = np.pad(self._counts, (0, max(0, y + 1 - self._counts.size)))
        self._counts[y] += 1

    def state(self) -> State:
        return {"counts": self._counts.copy()}, {}

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        self._counts = arrays["counts"].copy()

    def close(self) -> None:
        pass


class RiverLearner:
    """A classifier of river's: rows are dicts in which missing values are left out, labels are the classes' indices.

    Probabilities are as river gives them, and the same for all classes where it gives none.
    """

    def __init__(self, classifier: Any, features: Sequence[str] | None = None) -> None:
        self.classifier, self.features = classifier, features

    def predict_proba(self, x: Row, classes: int) -> NDArray[np.float64]:
        found = self._probabilities(self._named(x))
        given = np.zeros(classes)
        for label, share in found.items():
            if label < classes:  # those of two classes name both before they were seen
                given[int(label)] = share  # and call them False and True
        return given if found else np.full(classes, 1 / classes)

    def _probabilities(self, row: dict[str, float]) -> dict[int, float]:
        try:
            found: dict[int, float] = self.classifier.predict_proba_one(row)
        except NotImplementedError:  # some of river's only name a class
            label = self.classifier.predict_one(row)
            found = {} if label is None else {label: 1.0}
        return {label: share for label, share in found.items() if label is not None}

    def learn(self, x: Row, y: int) -> None:
        self.classifier.learn_one(self._named(x), y)

    def _named(self, x: Row) -> dict[str, float]:
        names = (f"x{i}" for i in range(x.size)) if self.features is None else self.features
        return {name: value for name, value in zip(names, x.tolist(), strict=False) if value == value}

    def state(self) -> State:
        raise ConfigError("a classifier of river's has no state that can be written: evaluate it without folder=")

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        self.state()

    def close(self) -> None:
        pass


def from_river(classifier: Any, features: Sequence[str] | None = None) -> RiverLearner:
    """A classifier of river's, or a pipeline that ends in one, as a learner.

    Args:
        features: names of the columns; x0, x1 and so on where none are given. A stream's own list may grow.
    Raises:
        MissingDependency: without river.
        ConfigError: it is no classifier.
    """
    try:
        from river.base import Classifier
        from river.compose import Pipeline
    except ImportError:
        raise MissingDependency("river", "trees") from None
    last = [*classifier.steps.values()][-1] if isinstance(classifier, Pipeline) and classifier.steps else classifier
    if not isinstance(last, Classifier):
        raise ConfigError(f"{last!r} is no classifier of river's: give one, such as tree.HoeffdingTreeClassifier()")
    return RiverLearner(classifier, features)
