"""Recorded outcomes: what every model scored, and cost, on every prompt.

All that is computed from such a table is *replayed*: nothing was asked while it was computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import DataError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """Scores of M models on N prompts.

    Attributes:
        prompts: N texts. categories: N names, empty texts where none is known.
        models: M names, as a catalog has them.
        scores: (N, M), 0 to 1. costs: (N, M) USD; None where none was recorded.
        source: where it was read. evaluation_only: nothing may be fitted to it.
    """

    prompts: tuple[str, ...]
    categories: tuple[str, ...]
    models: tuple[str, ...]
    scores: Floats
    costs: Floats | None = None
    source: str = ""
    evaluation_only: bool = False

    def __post_init__(self) -> None:
        shape = (len(self.prompts), len(self.models))
        if not self.prompts or not self.models:
            raise DataError(f"{self.source or 'a table'} holds no prompts or no models")
        if len(self.categories) != shape[0] or len(set(self.models)) != shape[1]:
            raise DataError(f"{self.source or 'a table'}: a category a prompt, and each model once")
        for name, held in (("scores", self.scores), ("costs", self.costs)):
            if held is not None and (held.shape != shape or not np.isfinite(held).all() or (held < 0).any()):
                raise DataError(f"{self.source or 'a table'}: {name} must be {shape[0]} x {shape[1]} numbers from 0 on")
        if (self.scores > 1).any():
            raise DataError(f"{self.source or 'a table'}: a score lies above 1")

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> Table:
        """Some of its prompts."""
        at = np.arange(len(self))[np.asarray(index)]
        return Table(
            tuple(self.prompts[i] for i in at), tuple(self.categories[i] for i in at), self.models, self.scores[at],
            None if self.costs is None else self.costs[at], self.source, self.evaluation_only,
        )  # fmt: skip
