"""What a learner must beat, and classifiers of river's as learners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import AdapterError, ConfigError, MissingDependency
from moesaic.trees.experts import Row
from moesaic.trees.graph import decode, encode
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
        try:
            tables, arrays = encode(self.classifier)
        except AdapterError as error:
            raise ConfigError(f"this classifier's state cannot be written ({error}): it is not kept") from None
        return arrays, {"graph": tables}

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        found = decode(values["graph"], arrays)
        if type(found) is not type(self.classifier):
            raise AdapterError(f"this is the state of a {type(found).__name__}")
        self.classifier = found

    def close(self) -> None:
        pass


class Faced(RiverLearner):
    """A `DriftMoEClassifier`, by its core; it knows the stream's features and classes by name afterwards."""

    def __init__(self, classifier: Any, stream: Any) -> None:
        super().__init__(classifier, stream.features)
        self.stream = stream

    def predict_proba(self, x: Row, classes: int) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.classifier.core.predict_proba(x, classes)
        return found

    def learn(self, x: Row, y: int) -> None:
        self.classifier.core.learn(x, y)
        self.classifier.known(self.stream.features, self.stream.classes)

    def skip(self) -> None:
        self.classifier.core.skip()

    def activity(self) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = self.classifier.core.activity()
        return found

    def cpu_seconds(self) -> float:
        return float(self.classifier.core.cpu_seconds())

    def state(self) -> State:
        found: State = self.classifier.core.state()
        return found

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        self.classifier.core.restore(arrays, values)


def faced(classifier: Any, stream: Any) -> RiverLearner:
    """A classifier of river's interface as a learner for a stream. Raises ConfigError where it has learned before."""
    if not hasattr(classifier, "core"):
        return from_river(classifier, stream.features)
    if classifier.labels:
        raise ConfigError("this classifier has learned rows of its own: evaluate a new one, or a clone")
    return Faced(classifier, stream)


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
    steps = [*classifier.steps.values()] if type(classifier) is Pipeline else [classifier]
    if not steps or not isinstance(steps[-1], Classifier):
        last = repr(steps[-1]) if steps else "an empty pipeline"
        raise ConfigError(f"{last} is no classifier of river's: give one, such as tree.HoeffdingTreeClassifier()")
    return RiverLearner(classifier, features)
