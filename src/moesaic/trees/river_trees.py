"""River's classifiers as a bank of experts: Hoeffding trees (Domingos & Hulten 2000) as in DriftMoE, or any other.

An expert sees a row as river has it, {number of the feature: value}, without the missing ones. One dict is made a row
and all experts look at it: no estimator of river's changes what it is given.

Of the time of twelve trees that all predict and three that learn, over nine tenths go into river's trees; who needs
few of the answers should ask for those alone (`which`). A leaf of theirs works out naive Bayes to answer a row, and
once more to learn it, to see whether that would have been right: here it is told the answer that it gave.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import AdapterError, ConfigError, DataError, MissingDependency
from moesaic.trees.experts import Row, Votes
from moesaic.trees.graph import decode, encode


class RiverTrees:
    """`size` clones of a classifier of river's.

    Args:
        size: K.
        expert: what is cloned, before it has learned anything; DriftMoE's Hoeffding tree where none is given. One
            whose `learn_one` takes no weight learns a row of weight w round(w) times.
        share: of the features that each expert sees, drawn at random; all of them by 1.
        seed: where the classifier takes a seed, expert k has `seed` + k.
    Raises:
        MissingDependency: river is not installed.
        ConfigError: `size` is no whole number, 0 or more, or `expert` no classifier of river's.
    """

    def __init__(self, size: int, *, expert: Any = None, share: float = 1.0, seed: int = 0) -> None:
        try:
            from river import base, tree
            from river.tree.nodes.htc_nodes import LeafNaiveBayesAdaptive
        except ImportError:
            raise MissingDependency("river", "trees") from None
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ConfigError(f"size must be a whole number, 0 or more, and is {size!r}")
        if expert is None:
            expert = tree.HoeffdingTreeClassifier(grace_period=50, delta=1e-7)
        if not isinstance(expert, base.Classifier):
            kind = type(expert).__name__
            raise ConfigError(f"expert={kind} is no classifier of river's: give one, as tree.HoeffdingTreeClassifier()")
        self.size, self.seed, self.expert = 0, seed, expert.clone()
        self._weighs = "w" in inspect.signature(expert.learn_one).parameters
        self._seeded = "seed" in inspect.signature(type(expert)).parameters
        self.share, self._width = share, -1
        self._views: list[list[int]] = []
        self.experts: list[Any] = []
        self.beside: dict[int, Any] = {}
        """Those that grow beside an expert, to take its place."""
        self._last: tuple[bytes, dict[int, float]] = (b"", {})
        self._naive = tree.HoeffdingTreeClassifier, LeafNaiveBayesAdaptive
        self._said: dict[int, tuple[dict[int, float], Any, dict[int, float]]] = {}
        """By expert, the row that a leaf answered last by naive Bayes, the leaf, and its answer."""
        self.add(size)

    def predict(self, x: Row, classes: int, which: Sequence[int] | None = None) -> Votes:
        """Probabilities (K, classes) of a row (d,), or (len(which), classes) of some experts; nothing changes by it."""
        chosen = range(self.size) if which is None else which
        given = [[0.0] * classes for _ in chosen]  # a list's items are set several times faster than an array's
        for own, k, row in zip(given, chosen, self._rows(x, chosen), strict=True):
            for label, share in self._answer(k, row).items():
                if label < classes:
                    own[label] = share
        votes = np.array(given).reshape(len(chosen), classes)
        total = votes.sum(1, keepdims=True)
        known = np.isfinite(total) & (total > 0)
        return np.where(known, votes / np.where(known, total, 1.0), 1.0 / classes)

    def learn(self, x: Row, y: int, weights: NDArray[np.float64]) -> None:
        """Learn that a row (d,) is of class `y`, each expert with its weight (K,).

        Raises:
            DataError: a class below 0, or above 1 where the classifier knows two; not a weight for each expert.
        """
        if len(weights) != self.size:
            raise DataError(f"there are {len(weights)} weights and {self.size} experts: give each its own")
        if y < 0:
            raise DataError(f"a class is a whole number from 0, and is {y!r}")
        if y > 1 and not self.expert._multiclass:  # river's name for what subclasses say of themselves
            name = type(self.expert).__name__
            raise DataError(f"{name} knows two classes: wrap it in river's multiclass.OneVsRestClassifier")
        label, taught = int(y), np.flatnonzero(weights > 0).tolist()
        for k, row in zip(taught, self._rows(x, taught), strict=True):
            with self._told(k, row):
                self._teach(self.experts[k], row, label, float(weights[k]))
            if k in self.beside:
                self._teach(self.beside[k], row, label, float(weights[k]))

    def _rows(self, x: Row, which: Sequence[int]) -> list[dict[int, float]]:
        """What each of some experts sees of a row."""
        if self._last[0] != (written := x.tobytes()):
            self._last = written, _dict(x)
        row = self._last[1]
        if self.share == 1.0:
            return [row] * len(which)
        if len(self._views) < self.size or self._width != len(x):
            self._views, self._width = [self._view(k, len(x)) for k in range(self.size)], len(x)
        return [{j: row[j] for j in self._views[k] if j in row} for k in which]

    def _view(self, k: int, features: int) -> list[int]:
        """The features that an expert sees: those that are drawn stay so when more come."""
        drawn = np.random.default_rng([self.seed, k]).random(features)
        seen: list[int] = np.flatnonzero(drawn < self.share).tolist()
        return seen or [int(drawn.argmin())] * (features > 0)

    def _answer(self, k: int, row: dict[int, float]) -> dict[int, float]:
        expert, (plain, adaptive) = self.experts[k], self._naive
        if type(expert) is not plain:
            return _answer(expert, row)
        root: Any = expert._root
        leaf: Any = root.traverse(row, until_leaf=True) if hasattr(root, "traverse") else root
        found: dict[int, float] = {} if leaf is None else leaf.prediction(row, tree=expert)
        if type(leaf) is adaptive and leaf.is_active() and leaf._nb_correct_weight >= leaf._mc_correct_weight:
            self._said[k] = row, leaf, found
        return found

    @contextmanager
    def _told(self, k: int, row: dict[int, float]) -> Iterator[None]:
        """Let a leaf that answered this row, and learns it now, know what it said."""
        known = self._said.pop(k, None)
        if known is None or known[0] is not row:
            yield
            return
        _, leaf, said = known
        leaf.learn_one = partial(_learn_known, super(self._naive[1], leaf), leaf, said)
        try:
            yield
        finally:
            del leaf.learn_one

    def _teach(self, expert: Any, row: dict[int, float], label: int, weight: float) -> None:
        if self._weighs:
            expert.learn_one(row, label, w=weight)
        else:
            for _ in range(round(weight)):
                expert.learn_one(row, label)

    def reset(self, which: int) -> None:
        """Let an expert begin anew, or as the one that was prepared. Raises DataError where there is no such expert."""
        k = self._number(which)
        self.experts[k] = self.beside.pop(k) if k in self.beside else self._fresh(k)

    def prepare(self, which: int) -> None:
        """Let a new expert learn what `which` learns, until a `reset` puts it in its place.

        It replaces one that was prepared before. Raises DataError where there is no such expert.
        """
        k = self._number(which)
        self.beside[k] = self._fresh(k)

    def add(self, count: int) -> None:
        """New experts, behind those that are there."""
        self.experts += [self._fresh(k) for k in range(self.size, self.size + count)]
        self.size = len(self.experts)

    def _fresh(self, k: int) -> Any:
        return self.expert.clone({"seed": self.seed + k}) if self._seeded else self.expert.clone()

    def _number(self, which: int) -> int:
        if not 0 <= which < self.size:
            raise DataError(f"there is no expert {which}: they are 0 to {self.size - 1}")
        return int(which)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """All that was learned. Raises AdapterError where the classifier holds what `graph.encode` cannot write."""
        tables, arrays = encode([self.expert, self.experts, self.beside])
        return arrays, {"bank": "river", "size": self.size, "graph": tables}

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        """Become what `state` told of, settings of the classifier included.

        Raises:
            AdapterError: that is damaged, of another number or class of experts, or of another release of river.
        """
        if values.get("bank") != "river" or values.get("size") != self.size:
            raise AdapterError(f"these are no experts of a bank of {self.size} of river's")
        found = decode(values.get("graph", {}), arrays)
        match found:
            case [expert, [*experts], dict(beside)] if len(experts) == self.size:
                pass
            case _:
                raise AdapterError("the experts of a bank of river's are damaged")
        kind = type(self.expert)
        if other := {type(e).__name__ for e in (expert, *experts, *beside.values()) if type(e) is not kind}:
            raise AdapterError(f"these experts are {', '.join(sorted(other))}, and those of this bank {kind.__name__}")
        if not all(type(k) is int and 0 <= k < self.size for k in beside):
            raise AdapterError("the experts of a bank of river's are damaged: some grow beside none")
        self.expert, self.experts, self.beside, self._said = expert, experts, beside, {}

    def close(self) -> None:
        """Nothing is held outside of this object."""


def _learn_known(
    plain: Any, leaf: Any, naive: dict[int, float], x: dict[int, float], y: int, *, w: float, tree: Any
) -> None:
    """`LeafNaiveBayesAdaptive.learn_one` with the answer that it would work out; `plain` is the leaf as its parent."""
    majority = plain.prediction(x)
    if not leaf.stats or max(majority, key=majority.get) == y:
        leaf._mc_correct_weight += w
    if naive and max(naive, key=naive.__getitem__) == y:
        leaf._nb_correct_weight += w
    plain.learn_one(x, y, w=w, tree=tree)


def _answer(expert: Any, row: dict[int, float]) -> dict[int, float]:
    try:
        found: dict[int, float] = expert.predict_proba_one(row)
    except NotImplementedError:  # it only names a class
        label = expert.predict_one(row)
        return {} if label is None else {label: 1.0}
    return found


def _dict(x: Row) -> dict[int, float]:
    """A row as river has it."""
    return {number: value for number, value in enumerate(x.tolist()) if value == value}
