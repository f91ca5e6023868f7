"""The experts of a mixture: one bank, or two of which the second sees the last labels too, and what watches them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import MissingDependency
from moesaic.trees.experts import Experts, Row, Votes
from moesaic.trees.ledger import same_kind
from moesaic.trees.settings import Settings

SIGHTED = 3
"""One expert in so many sees the last labels, where any does."""


class Banks:
    """K experts in all.

    Args:
        settings: `backend`, `history`, `detect`, `warning`, `drift` and `seed` of them.
        size: K.
    """

    def __init__(self, settings: Settings, size: int) -> None:
        self.settings, self.size = settings, 0
        seeing = size // SIGHTED if settings.history else 0
        self.banks: list[Experts] = [
            bank(settings, count, settings.seed + 1000 * number)
            for number, count in enumerate((size - seeing, seeing))
            if count or not number
        ]
        self.size = size
        self.watch = Watch(size, settings.warning, settings.drift) if settings.detect else None

    def predict(self, x: Row, classes: int, past: NDArray[np.float64], which: Sequence[int] | None = None) -> Votes:
        """Each expert's probabilities (K, classes), or those of `which`, where there is one bank."""
        if len(self.banks) == 1:
            return self.banks[0].predict(x, classes, which)
        return np.concatenate([self.banks[0].predict(x, classes), self.banks[1].predict(_joined(past, x), classes)])

    def learn(self, x: Row, y: int, weights: NDArray[np.float64], past: NDArray[np.float64]) -> None:
        start = 0
        for number, held in enumerate(self.banks):
            held.learn(_joined(past, x) if number else x, y, weights[start : start + held.size])
            start += held.size

    def drifted(self, errors: NDArray[np.float64]) -> list[int]:
        """Watch the experts' errors (K,); those that became worse begin anew, and are returned."""
        assert self.watch is not None
        warned, drifted = self.watch.add(errors)
        for k in warned:
            held, own = self._of(k)
            if hasattr(held, "prepare"):
                held.prepare(own)
        for k in drifted:
            self.reset(k)
        return drifted

    def windows(self) -> tuple[Any, Any]:
        """Of the two ADWINs; of none where nothing is watched."""
        watch = self.watch or Watch(0, 0.5, 0.5)
        return watch.warning.windows, watch.drift.windows

    def reset(self, which: int) -> None:
        held, own = self._of(which)
        held.reset(own)

    def _of(self, which: int) -> tuple[Any, int]:
        for held in self.banks:
            if which < held.size:
                return held, which
            which -= held.size
        raise IndexError(which)

    def add(self, count: int) -> None:
        """More experts, in the only bank there is."""
        held: Any = self.banks[0]
        held.add(count)
        self.size += count
        if self.watch is not None:
            self.watch.grow(self.size)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        said: list[dict[str, Any]] = []
        for number, held in enumerate(self.banks):
            found, values = held.state()
            arrays |= {f"{number}.{name}": value for name, value in found.items()}
            said.append(values)
        if self.watch is not None:
            arrays |= {f"watch.{name}": value for name, value in self.watch.state().items()}
        return arrays, {"banks": said}

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        for number, (held, said) in enumerate(zip(self.banks, values["banks"], strict=True)):
            mark = f"{number}."
            held.restore({k.removeprefix(mark): v for k, v in arrays.items() if k.startswith(mark)}, said)
        if self.watch is not None:
            mark = "watch."
            self.watch.restore({k.removeprefix(mark): v for k, v in arrays.items() if k.startswith(mark)})

    def cpu_seconds(self) -> float:
        """CPU seconds of processes beside this one."""
        return sum(held.cpu_seconds() for held in self.banks if hasattr(held, "cpu_seconds"))

    def peak_memory(self) -> float:
        """MiB that those processes held at most."""
        return sum(held.peak_memory() for held in self.banks if hasattr(held, "peak_memory"))

    def close(self) -> None:
        for held in self.banks:
            held.close()


class Watch:
    """Two ADWINs an expert: the first to change lets another grow beside it, the second puts it in its place."""

    def __init__(self, size: int, warning: float, drift: float) -> None:
        from moesaic.trees.arrays.adwin import Adwin, add_twice

        self.warning, self.drift, self._add = Adwin(size, warning), Adwin(size, drift), add_twice

    def add(self, errors: NDArray[np.float64]) -> tuple[list[int], list[int]]:
        """Of errors (K,): who is warned of, and who has drifted."""
        risen = np.zeros((2, len(errors)), np.bool_)
        self._add(errors, self.warning.windows, self.drift.windows, risen)
        return np.flatnonzero(risen[0]).tolist(), np.flatnonzero(risen[1]).tolist()

    def grow(self, size: int) -> None:
        self.warning.grow(size)
        self.drift.grow(size)

    def state(self) -> dict[str, NDArray[Any]]:
        pairs = (("warning", self.warning), ("drift", self.drift))
        return {f"{name}.{key}": values.copy() for name, held in pairs for key, values in held.arrays().items()}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        for name, held in (("warning", self.warning), ("drift", self.drift)):
            for key, values in held.arrays().items():
                setattr(held, key, same_kind(f"{name}.{key}", arrays[f"{name}.{key}"], values))
            if not 0 <= held.filled.min() <= held.filled.max() <= held.sums.shape[-1] - 1:
                raise ValueError(f"{name}.filled is out of range")


def bank(settings: Settings, size: int, seed: int) -> Experts:
    """A bank of the backend that is asked for. Raises MissingDependency where its package is not installed."""
    if settings.backend == "arrays":
        try:
            from moesaic.trees.arrays.pool import ArrayTrees
        except ImportError:
            raise MissingDependency("numba", "trees") from None
        return ArrayTrees(size, share=settings.share, max_leaves=settings.max_leaves, seed=seed)
    from moesaic.trees.capymoa_trees import CapyMOATrees
    from moesaic.trees.river_trees import RiverTrees

    if settings.backend == "river":
        return RiverTrees(size, share=settings.share, seed=seed)
    if not isinstance(settings.backend, str):
        return RiverTrees(size, expert=settings.backend, share=settings.share, seed=seed)
    return CapyMOATrees(size, seed=seed)


def _joined(past: NDArray[np.float64], x: Row) -> Row:
    return np.concatenate([past, x])
