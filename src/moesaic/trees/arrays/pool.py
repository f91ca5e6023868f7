"""A bank of Hoeffding trees in arrays; each may have another that grows beside it, to take its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import AdapterError
from moesaic.trees.arrays import hoeffding
from moesaic.trees.arrays.course import Bank
from moesaic.trees.arrays.forest import NONE, Forest, check, empty, fill
from moesaic.trees.experts import Row, Votes

FEW = 3
"""Features of which a leaf looks at all."""


class ArrayTrees:
    """K Hoeffding trees.

    Args:
        size: K.
        seed: of each leaf's features.
        share: of the features that a leaf looks at; all of them by 1.
        grace_period: rows, by weight, between two tries to split a leaf.
        delta: of the Hoeffding bound, the chance of another split than more rows would lead to.
        tau: the bound from which on a split is made among equals.
        max_leaves: of a tree, which then goes on learning in those that it has.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        share: float = 0.8,
        grace_period: int = 50,
        delta: float = 0.05,
        tau: float = 0.05,
        max_leaves: int = 100,
    ) -> None:
        self.size, self.share, self.max_leaves = 0, share, max_leaves
        self.grace_period, self.delta, self.tau = grace_period, delta, tau
        self.roots, self.beside = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.forest = empty(0, 0, 0, 1, 1, seed)
        self.features = 0
        self._known: bytes | None = None
        self.add(size)

    @property
    def classes(self) -> int:
        """That were learned."""
        return int(self.forest.counts.shape[1])

    # -- what the protocol asks for ------------------------------------------------------------------------------

    def predict(self, x: Row, classes: int, which: Sequence[int] | None = None) -> Votes:
        known, count = self.forest.counts.shape[1], self.size if which is None else len(which)
        if not known or not self.features:
            return np.full((count, classes), 1 / max(classes, 1))
        x = self._fitted(x)
        if which is None:
            self._look(x)
            votes, nodes = self.votes, self.nodes
        else:
            votes, nodes = np.empty((count, known)), np.zeros(count, np.int64)
            roots = self.roots[list(which)]
            hoeffding.answer_all(self.forest, x, roots, votes, nodes, *np.zeros((2, count), np.int64))
        if classes <= known:
            return votes[:, :classes].copy()
        found = np.concatenate([votes, np.zeros((count, classes - known))], axis=1)
        found[self.forest.counts[self.forest.leaf[nodes]].sum(axis=1) == 0] = 1 / classes
        return found

    def learn(self, x: Row, y: int, weights: NDArray[np.float64]) -> None:
        if len(x) > self.features or y >= self.forest.counts.shape[1]:
            self._widen(max(len(x), self.features), max(y + 1, self.forest.counts.shape[1]))
        self.make_room()
        x = self._fitted(x)
        self._look(x)
        self._known = None
        hoeffding.learn(
            self.forest, x, y, weights, self.roots, self.beside, self.nodes, self.by_count, self.by_bayes,
            self.grace_period, self.delta, self.tau, self.features, self._share, self.max_leaves, self._work,
        )  # fmt: skip

    def reset(self, which: int) -> None:
        """The tree beside takes its place; a new one where there is none."""
        self._known = None
        hoeffding.replace(self.forest, self.roots, self.beside, which, self.features, self._share, self._stack)

    def prepare(self, which: int) -> None:
        """Let another tree begin beside an expert's own, in the place of one that did before."""
        hoeffding.begin(self.forest, self.beside, self.size + which, self.features, self._share, self._stack, which)

    def add(self, count: int) -> None:
        """More experts, behind those that there are."""
        self._known = None
        before = self.size
        self.size += count
        self._widen(self.features, self.forest.counts.shape[1])
        for k in range(before, self.size):
            self.roots[k] = hoeffding.plant(self.forest, self.features, self._share)
            self.forest.leaves[k] = 1

    def close(self) -> None:
        pass

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        held = {name: values.copy() for name, values in self.forest._asdict().items()}
        held |= {"roots": self.roots.copy(), "beside": self.beside.copy()}
        return held, {"bank": "arrays", "size": self.size, "features": self.features}

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        wanted = {*Forest._fields, "roots", "beside"}
        if values.get("bank") != "arrays" or values.get("size") != self.size or wanted - arrays.keys():
            raise AdapterError(f"these are no trees of a bank of {self.size} in arrays")
        forest = Forest(**{name: np.array(arrays[name]) for name in Forest._fields})
        check(forest, arrays["roots"], arrays["beside"], self.size, values.get("features"))
        self.forest, self.features = forest, int(values["features"])
        self.roots, self.beside = (np.array(arrays[name]) for name in ("roots", "beside"))
        self._known = None
        self._scratch()

    def _fitted(self, x: Row) -> Row:
        """A row as wide as those that were learned: compiled loops would read past the end of a narrower one."""
        if len(x) == self.features:
            return x
        return np.append(x[: self.features], np.full(max(self.features - len(x), 0), np.nan))

    def lent(self) -> Bank:
        """All of it, for a compiled loop that answers and learns rows by itself, until there is too little room."""
        self._known = None
        return Bank(
            self.forest, self.roots, self.beside, self.nodes, self.by_count, self.by_bayes, self.votes, self._work,
            self._stack, np.zeros(self.features), self._room, self.grace_period, self.delta, self.tau, self.features,
            self._share, self.max_leaves,
        )  # fmt: skip

    # -- room ----------------------------------------------------------------------------------------------------

    @property
    def _share(self) -> int:
        """Features of a leaf."""
        return max(min(self.features, FEW), round(self.share * self.features), 1)

    @property
    def _room(self) -> int:
        """Nodes and leaves that one row may need: a split of each tree and of those beside, and a new tree each."""
        return 6 * self.size + 6

    def _look(self, x: Row) -> None:
        """Every expert's answer to a row, unless it is the one that was looked at last."""
        written = x.tobytes()
        if self._known != written:
            hoeffding.answer_all(self.forest, x, self.roots, self.votes, self.nodes, self.by_count, self.by_bayes)
            self._known = written

    def _widen(self, features: int, classes: int) -> None:
        """Room for more features, classes or experts; leaves that are there look at more features, too."""
        self.features = features
        f = self.forest
        nodes, leaves = len(f.feature), len(f.counts)
        made = empty(nodes, leaves, features, max(self._share, f.used.shape[1]), classes, 0, roots=2 * self.size)
        before = len(self.roots)
        fill(made, f)
        made.leaves[before:] = 0  # those of the trees beside stand behind all experts, of whom there may be more
        made.leaves[self.size : self.size + before] = f.leaves[before:]
        hoeffding.choose_all(made, features, self._share)
        self.forest, self._known = made, None
        more = np.full(self.size - len(self.roots), NONE)
        self.roots, self.beside = np.concatenate([self.roots, more]), np.concatenate([self.beside, more])
        self._enlarge()

    def make_room(self) -> None:
        """Have as many nodes and leaves free as one row may need."""
        if self.forest.tops.min() < self._room:
            self._enlarge()

    def _enlarge(self) -> None:
        """Twice as many nodes and leaves as long as too few of either are free."""
        least = 8 * self.size + 8
        while self.forest.tops.min() < least:
            f = self.forest
            nodes, leaves = len(f.feature), len(f.counts)
            made = empty(
                max(2 * nodes, least), max(2 * leaves, least), self.features, f.used.shape[1], f.counts.shape[1], 0,
                roots=len(f.leaves),
            )  # fmt: skip
            fill(made, f)
            for stack, top, total, before in (
                (made.free_nodes, 0, len(made.feature), nodes),
                (made.free_leaves, 1, len(made.counts), leaves),
            ):
                stack[f.tops[top] : f.tops[top] + total - before] = np.arange(total - 1, before - 1, -1)
                made.tops[top] = f.tops[top] + total - before
            self.forest = made
        self._known = None
        self._scratch()

    def _scratch(self) -> None:
        """What the kernels write into."""
        classes = self.forest.counts.shape[1]
        self.votes = np.full((self.size, classes), 1 / classes)
        self.nodes, self.by_count, self.by_bayes = np.zeros((3, self.size), np.int64)
        self._work = np.zeros((5, classes))
        self._stack = np.zeros(len(self.forest.feature), np.int64)
