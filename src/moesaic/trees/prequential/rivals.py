"""CapyMOA's classifiers as learners, each in a child process with its own JVM: what a mixture is compared with.

| name | classifier | `members` is its |
| --- | --- | --- |
| `ht` | HoeffdingTree | |
| `arf` | AdaptiveRandomForestClassifier | ensemble_size |
| `levbag` | LeveragingBagging | ensemble_size |
| `srp` | StreamingRandomPatches | ensemble_size |
| `sgbt` | StreamingGradientBoostedTrees | boosting_iterations |
| `dems` | DynamicEnsembleMemberSelection | ensemble_size |
| `ozabag` | OnlineBagging | ensemble_size |
| `ozaboost` | OzaBoost | boosting_iterations |
| `smoothboost` | OnlineSmoothBoost | boosting_iterations |

All else is as CapyMOA has it by default. All of them are MOA's, so that chunks of rows go through MOA's own loop, in
Java, and nothing of ours slows them. `prequential.NoChange` and `Majority` are the same as CapyMOA's. Missing values
are too much for sgbt's default trees (a NullPointerException of MOA's), whoever runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, DataError, TrainingError, suggest
from moesaic.trees.experts import Row
from moesaic.trees.jvm import HEAP, Refused, Worker, WorkerDied
from moesaic.trees.prequential.learner import State
from moesaic.trees.prequential.rivals_worker import LEARN, PREDICT, TEST

Answer = TypeVar("Answer")

WORKER = Path(__file__).with_name("rivals_worker.py")
MEMBERS = 10
RIVALS: dict[str, tuple[str, str | None]] = {
    "ht": ("HoeffdingTree", None),
    "arf": ("AdaptiveRandomForestClassifier", "ensemble_size"),
    "levbag": ("LeveragingBagging", "ensemble_size"),
    "srp": ("StreamingRandomPatches", "ensemble_size"),
    "sgbt": ("StreamingGradientBoostedTrees", "boosting_iterations"),
    "dems": ("DynamicEnsembleMemberSelection", "ensemble_size"),
    "ozabag": ("OnlineBagging", "ensemble_size"),
    "ozaboost": ("OzaBoost", "boosting_iterations"),
    "smoothboost": ("OnlineSmoothBoost", "boosting_iterations"),
}
"""By name: the class, and which of its settings tells how many members it has."""


def rival(
    name: str,
    stream_classes: Sequence[Any],
    features: Sequence[str],
    seed: int = 0,
    *,
    members: int | None = None,
    heap: int = HEAP,
    **settings: Any,
) -> Rival:
    """One of CapyMOA's classifiers.

    Args:
        name: see `RIVALS`.
        stream_classes: all that there will be; MOA has to know their number beforehand.
        features: the columns; all of them are numbers, NaN is a missing one.
        seed: of the classifier.
        members: of an ensemble; 10 by default.
        heap: MiB that Java's objects may take, at most three quarters of the memory that is free.
        settings: of the class's constructor.
    Raises:
        ConfigError: there is no such rival, or none in that CapyMOA, a setting is impossible, or there is no Java.
        MissingDependency: capymoa is not installed.
        TrainingError: the child ends while it starts.
    """
    if name not in RIVALS:
        raise ConfigError(f"CapyMOA has no rival {name!r} here; {suggest(name, RIVALS)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**31) <= seed < 2**31:
        raise ConfigError(f"seed must be a whole number of 32 bits, and is {seed!r}")
    kind, size = RIVALS[name]
    if size is None and members is not None:
        raise ConfigError(f"{name} has no members: leave members={members!r} out")
    members = MEMBERS if members is None else members
    if isinstance(members, bool) or not isinstance(members, int) or members < 1:
        raise ConfigError(f"members must be a whole number above 0, and is {members!r}")
    if not stream_classes:
        raise ConfigError(f"{name} has to know all classes before the first row, and none is named: are there labels?")
    own = {"random_seed": seed} | ({} if size is None else {size: members})
    return Rival(name, kind, len(stream_classes), len(features), own | settings, heap=heap)


class Rival:
    """A classifier of CapyMOA's in its child. `rival` makes it.

    Attributes:
        name: see `RIVALS`.
        versions: of CapyMOA and Java.
    """

    def __init__(
        self, name: str, kind: str, classes: int, features: int, settings: Mapping[str, Any], *, heap: int = HEAP
    ) -> None:
        self.name, self.settings, self.classes, self.features = name, dict(settings), classes, features
        held = {"kind": kind, "features": features, "classes": classes, "given": self.settings}
        self._spent: list[float] = []
        try:
            self._worker = Worker(held, heap=heap, script=WORKER, spent=self._spent)
            self._begun = self._worker.cpu_seconds()
        except WorkerDied as died:
            raise self._dead(died) from None
        self.versions = self._worker.versions

    def test_then_train(self, x: NDArray[np.float64], y: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
        """Predict each row of x (n, d), then learn it with its label in y (n,), before the next; predictions (n,).

        Raises:
            DataError: rows are wider than the features that it was made for, or of a class that it does not know.
            TrainingError: the child has ended, or MOA cannot go on.
        """
        rows, y = self._fitting(x), np.ascontiguousarray(y, np.int64)
        if not len(y):
            return np.zeros(0, np.int64)
        self._check(int(y.min()), int(y.max()))
        payload = y.tobytes() + rows.tobytes()
        return np.frombuffer(self._do(lambda worker: worker.ask(TEST, len(y), payload=payload))[2], np.int64)

    def predict_proba(self, x: Row, classes: int) -> NDArray[np.float64]:
        """Probabilities (classes,) of a row (d,), the same for all where the classifier does not tell."""
        payload = self._fitting(x[None]).tobytes()
        found = np.frombuffer(self._do(lambda worker: worker.ask(PREDICT, payload=payload))[2])[:classes]
        if not found.sum() > 0:
            return np.full(classes, 1 / classes)
        return np.pad(found / found.sum(), (0, classes - len(found)))

    def learn(self, x: Row, y: int) -> None:
        """Learn that a row (d,) is of class `y`. Raises as `test_then_train` does."""
        self._check(y, y)
        payload = self._fitting(x[None]).tobytes()
        self._do(lambda worker: worker.send(LEARN, y, payload=payload))

    def cpu_seconds(self) -> float:
        """CPU seconds that the child used, with all that Java does beside, but without what its start took."""
        try:
            used = self._worker.cpu_seconds()
        except WorkerDied:
            used = sum(self._spent)
        return max(0.0, used - self._begun)

    def peak_memory(self) -> float:
        """MiB that the child held at most; 0 where the system does not tell."""
        return self._worker.peak_memory()

    def state(self) -> State:
        raise ConfigError("a classifier of CapyMOA's has no state that can be written: evaluate it without folder=")

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        self.state()

    def close(self) -> None:
        """End the child; once is enough."""
        self._worker.close()

    def _fitting(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rows (n, d) as wide as the classifier knows them: what they lack is missing."""
        lacking = self.features - x.shape[1]
        if lacking < 0:
            raise DataError(f"a row has {x.shape[1]} features, and {self.name} was made for {self.features}: name all")
        rows = np.ascontiguousarray(x, np.float64)
        return np.pad(rows, ((0, 0), (0, lacking)), constant_values=np.nan) if lacking else rows

    def _check(self, least: int, most: int) -> None:
        if least < 0 or most >= self.classes:
            wrong = least if least < 0 else most
            raise DataError(f"class {wrong} is none of the {self.classes} that {self.name} was made for: name all")

    def _do(self, ask: Callable[[Worker], Answer]) -> Answer:
        try:
            return ask(self._worker)
        except WorkerDied as died:
            raise self._dead(died) from None
        except Refused as refused:
            more = "; its trees take no missing values: fill them in" if "FIMTDD" in str(refused) else ""
            raise TrainingError(f"CapyMOA's {self.name} cannot go on: {refused}{more}") from None

    def _dead(self, died: WorkerDied) -> TrainingError:
        more = ": give more heap" if "OutOfMemory" in str(died) else ""
        return TrainingError(f"the child of CapyMOA's {self.name} has ended ({died}){more}")

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"Rival({self.name}, {given})"
