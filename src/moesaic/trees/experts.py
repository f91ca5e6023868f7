"""What an expert bank of a stream is: K incremental classifiers over rows of numbers, behind three methods.

| bank | experts | needs |
| --- | --- | --- |
| `arrays` | our own Hoeffding trees, all of them in a few arrays | numba |
| `river` | river's Hoeffding trees, or any classifier of river's | river |
| `capymoa` | MOA's Hoeffding trees, in a child process with its own JVM | capymoa, Java |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]
"""A row's features (d,); NaN where a value is missing."""
Votes = NDArray[np.float64]
"""Each expert's probabilities of the classes, (K, C); rows sum to 1."""


class Experts(Protocol):
    """K classifiers that learn row by row. Rows and classes may grow; they never shrink."""

    size: int
    """K."""

    def predict(self, x: Row, classes: int, which: Sequence[int] | None = None) -> Votes:
        """Probabilities (K, classes) of a row, of the experts `which` alone where given; nothing changes by it.

        An expert that knows nothing yet gives every class the same.
        """

    def learn(self, x: Row, y: int, weights: NDArray[np.float64]) -> None:
        """Learn that a row is of class `y`, each expert with its weight (K,); 0 leaves it as it is."""

    def reset(self, which: int) -> None:
        """Let an expert begin anew."""

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """All that it has learned: arrays, and what JSON can hold. Nothing is aliased."""

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        """Become what `state` told of. Raises AdapterError where that is damaged or of another bank."""

    def close(self) -> None:
        """End what it holds outside of this object: a process, a file."""
