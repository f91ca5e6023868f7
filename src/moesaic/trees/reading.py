"""What the router reads of a row: its values, or how many standard deviations they are above their running means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.trees.experts import Row
from moesaic.trees.ledger import same_kind
from moesaic.trees.rows import clipped, standardised, watch


class Reading:
    """Of d features, which may become more.

    Args:
        is_scaled: whether values are read by their running means and deviations.
    """

    def __init__(self, is_scaled: bool) -> None:
        self.is_scaled = is_scaled
        self.mean, self.square, self.seen = np.zeros((3, 0))
        """Running means, sums of squared differences to them, and rows that have the feature (d,)."""

    def __call__(self, x: Row) -> NDArray[np.float32]:
        """A row (d,) as the router reads it; a missing value is a mean one's, or 0."""
        read = np.zeros(len(self.mean), np.float32)
        if self.is_scaled:
            standardised(x, self.mean, self.square, self.seen, read)
        else:
            clipped(x, read)
        return read

    def learn(self, x: Row) -> None:
        if self.is_scaled:
            watch(x, self.mean, self.square, self.seen)

    def grow(self, features: int) -> None:
        for name, values in self.arrays().items():
            setattr(self, name, np.append(values, np.zeros(features - len(values))))

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"mean": self.mean, "square": self.square, "seen": self.seen}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Become what `arrays` told of, of as many features. Raises ValueError for anything else."""
        for name, own in self.arrays().items():
            setattr(self, name, same_kind(name, arrays[name], own))
        if not ((self.square >= 0) & ((self.seen >= 1) | ((self.seen == 0) & (self.square == 0)))).all():
            raise ValueError("a mean is of no rows")
