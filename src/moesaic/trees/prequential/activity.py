"""What each expert did in each window, from counts that a learner keeps since its beginning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.trees.prequential.learner import Learner, State, Watched, ensure, whole

Counts = dict[str, NDArray[Any]]
"""By what was done: how often, or with how much weight in sum, by each expert (K,)."""


class Activity:
    """The counts of windows that are closed; nothing of a learner that keeps none."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._before = self._now()
        self._windows: list[Counts] = []

    def close(self) -> None:
        """End a window here."""
        now = self._now()
        self._windows.append(_joined(now, self._before, -1))
        self._before = now

    def finish(self, windows: int) -> None:
        """End the last of so many windows here, with what was done after its last row."""
        self.close()
        if len(self._windows) > windows:
            after = self._windows.pop()
            self._windows[-1] = _joined(self._windows[-1], after)

    def windows(self) -> list[Counts]:
        """Window by window; an empty list where the learner keeps no counts."""
        return [dict(counts) for counts in self._windows] if self._before else []

    @property
    def closed(self) -> int | None:
        """Windows that have ended; None where the learner keeps no counts."""
        return len(self._windows) if self._before else None

    def state(self) -> State:
        arrays = {f"before.{name}": counts for name, counts in self._before.items()}
        arrays |= {f"{i}.{name}": counts for i, window in enumerate(self._windows) for name, counts in window.items()}
        return arrays, {"windows": len(self._windows)}

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        """Become what `state` told of. Raises AdapterError, and nothing has changed, where that cannot be."""
        count, names = whole(values, "windows"), [*self._before]
        ensure(len(arrays) == (count + 1) * len(names), "it lacks counts of what experts did, or has more of them")
        if not names:
            return
        windows = [_named(arrays, f"{i}.") for i in range(count)]
        before = _named(arrays, "before.")
        for name, own in self._before.items():
            size = 0
            for counts in (*windows, before):
                found = counts.get(name, _LACKING)
                shaped = found.dtype == own.dtype and found.ndim == 1 and found.size >= size
                good = shaped and bool((np.isfinite(found) & (found >= 0)).all())
                ensure(good, f"its counts of {name} are damaged")
                size = found.size
        self._windows, self._before = windows, before

    def _now(self) -> Counts:
        if not isinstance(self._learner, Watched):
            return {}
        return {name: counts.copy() for name, counts in self._learner.activity().items()}


def _named(arrays: Mapping[str, NDArray[Any]], start: str) -> Counts:
    return {name.removeprefix(start): counts for name, counts in arrays.items() if name.startswith(start)}


def _joined(first: Counts, second: Counts, sign: int = 1) -> Counts:
    """The sums, or with a sign of -1 the differences; experts that one of them lacks did nothing there."""
    found = {}
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name, _NONE), second.get(name, _NONE)
        size = max(a.size, b.size)
        found[name] = np.pad(a, (0, size - a.size)) + sign * np.pad(b, (0, size - b.size))
    return found


_NONE = np.zeros(0, np.int64)
_LACKING = np.zeros((0, 0))
"""No counts at all: those are of one dimension."""
