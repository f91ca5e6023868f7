"""What is evaluated: anything that predicts a row and learns it, and what more it may offer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import AdapterError
from moesaic.trees.experts import Row

State = tuple[dict[str, NDArray[Any]], dict[str, Any]]
"""Arrays, and what JSON can hold."""


class Stateful(Protocol):
    """What can be kept in a checkpoint."""

    def state(self) -> State:
        """All that it knows. Nothing is aliased."""

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        """Become what `state` told of. Raises AdapterError where that is damaged or of something else."""


class Learner(Stateful, Protocol):
    """A classifier that learns row by row. Rows and classes may grow; they never shrink."""

    def predict_proba(self, x: Row, classes: int) -> NDArray[np.float64]:
        """Probabilities (classes,) of a row (d,); nothing changes by it. Of equal ones the first is predicted."""

    def learn(self, x: Row, y: int) -> None:
        """Learn that a row is of class `y`, which may be one that was not known."""

    def close(self) -> None:
        """End what it holds outside of this object: a process, a file."""


@runtime_checkable
class Quick(Protocol):
    """A learner that has a faster way over many rows than a call for each."""

    def test_then_train(self, x: NDArray[np.float64], y: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
        """Predict each row of x (n, d), then learn it with its label in y (n,), before the next; predictions (n,).

        No label is missing. The last may be of a class that was not known, as in `learn`; the others are below
        `classes`.
        """


@runtime_checkable
class Watched(Protocol):
    """A learner of several experts that counts what each did."""

    def activity(self) -> dict[str, NDArray[Any]]:
        """By name (`chosen`, `trained`, `reset`), counts or sums (K,) of each expert since the learner's beginning."""


@runtime_checkable
class Forked(Protocol):
    """A learner with processes of its own."""

    def cpu_seconds(self) -> float:
        """CPU seconds that they used since they began."""

    def peak_memory(self) -> float:
        """MiB that they held at most, 0 where the system does not tell."""


@runtime_checkable
class Skipping(Protocol):
    """A learner that wants to know of rows whose label never came."""

    def skip(self) -> None:
        """A row's label is missing: it is not learned."""


def ensure(good: bool, wrong: str) -> None:
    """Raise AdapterError, with what is wrong of a state, unless it is good."""
    if not good:
        raise AdapterError(wrong)


def whole(values: Mapping[str, Any], name: str, most: int = 2**53) -> int:
    """A whole number of a state, from 0 on. Raises AdapterError for anything else."""
    found: Any = values.get(name)
    good = type(found) is int and 0 <= found <= most
    ensure(good, f"its {name} is {str(found)[:40]!r}, and must be a whole number from 0 to {most:,}")
    return int(found)
