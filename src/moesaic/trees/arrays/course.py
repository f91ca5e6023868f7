"""Many rows in one compiled loop: each is answered, then learned, before the next, as `DriftMoE` does it row by row.

It covers what `fidelity="best"` is made of: trees in arrays that all learn every row, and a mixture that answers. What
a row does to the state is bit for bit what the calls for one row do.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from moesaic.trees import rows
from moesaic.trees.arrays import adwin, hoeffding


class Bank(NamedTuple):
    """A bank of trees, as `ArrayTrees.lent` gives it: its state, its settings, and what the kernels write into."""

    forest: Any
    roots: Any
    beside: Any
    nodes: Any
    by_count: Any
    by_bayes: Any
    votes: Any
    work: Any
    stack: Any
    x: Any
    """A row (d,) of the bank's."""
    room: int
    """Free nodes and leaves that a row may need."""
    grace: int
    delta: float
    tau: float
    features: int
    share: int
    most: int


class Kept(NamedTuple):
    """What else rows change: K experts, d features, h last labels."""

    accuracy: Any
    trained: Any
    last: Any
    resets: Any
    chosen: Any
    """(K,) of the ledger."""
    labels: Any
    """(h,)"""
    mean: Any
    square: Any
    seen: Any
    """(d,) of the features."""


class Rule(NamedTuple):
    """The settings that a row needs; `trust` is 0 where there is no router."""

    trust: float
    recency: float
    rate: float
    scale: bool
    detect: bool


def _compiled(sources: str) -> Any:
    @njit(cache=True)
    def course(
        x: Any, y: Any, lessons: Any, row: int, banks: Any, kept: Any, watches: Any, weights: Any, biases: Any,
        units: Any, rule: Any, reads: Any, targets: Any, predicted: Any,
    ) -> int:  # fmt: skip
        """Rows x (n, d) of classes y (n,), until one needs more room than there is; how many were done.

        Args:
            lessons: (n, K) how often each expert learns each row.
            row: rows that were learned before.
            watches: two ADWINs, of warnings and of drifts.
            weights, biases, units: of the router's layers; what it computes is written into `units`.
            reads, targets, predicted: (n, d), (n, K) and (n,), written: what the router reads and is to say, classes.
        """
        assert len(sources) > 0
        experts, classes = lessons.shape[1], banks[0].votes.shape[1]
        mixed, found = np.zeros(experts), np.zeros(classes)
        errors, right = np.zeros(experts), np.zeros(experts, np.bool_)
        risen = np.zeros((2, experts), np.bool_)
        for i in range(len(y)):
            for bank in banks:
                if min(bank.forest.tops[0], bank.forest.tops[1]) < bank.room:
                    return i
            if rule.scale:
                rows.standardised(x[i], kept.mean, kept.square, kept.seen, reads[i])
            else:
                rows.clipped(x[i], reads[i])
            rows.layer(reads[i], weights[0], biases[0], len(weights) > 1, units[0])
            for n in range(1, len(weights)):
                rows.layer(units[n - 1], weights[n], biases[n], n < len(weights) - 1, units[n])
            rows.mixture(units[len(units) - 1], kept.accuracy, rule.trust, rule.recency, mixed)
            found[:] = 0.0
            start, nearest, most = 0, 0, -1.0
            none = True
            for b in range(len(banks)):
                bank = banks[b]
                past = len(bank.x) - x.shape[1]
                bank.x[:past], bank.x[past:] = kept.labels[:past], x[i]
                hoeffding.answer_all(
                    bank.forest, bank.x, bank.roots, bank.votes, bank.nodes, bank.by_count, bank.by_bayes
                )
                rows.blend(mixed[start : start + len(bank.roots)], bank.votes, found)
                for k in range(len(bank.roots)):
                    said = bank.votes[k].argmax()
                    right[start + k] = said == y[i]
                    none = none and said != y[i]
                    if bank.votes[k, y[i]] > most:
                        nearest, most = start + k, bank.votes[k, y[i]]
                start += len(bank.roots)
            rows.normalise(found)
            predicted[i] = found.argmax()
            for k in range(experts):
                targets[i, k] = 1.0 if right[k] else 0.0
                errors[k] = 0.0 if right[k] else 1.0
            if none:
                targets[i, nearest] = 1.0
            start = 0
            for b in range(len(banks)):
                bank = banks[b]
                end = start + len(bank.roots)
                hoeffding.learn(
                    bank.forest, bank.x, y[i], lessons[i, start:end], bank.roots, bank.beside, bank.nodes,
                    bank.by_count, bank.by_bayes, bank.grace, bank.delta, bank.tau, bank.features, bank.share,
                    bank.most, bank.work,
                )  # fmt: skip
                start = end
            rows.follow(right, lessons[i], rule.rate, row + i, kept.accuracy, kept.trained, kept.last)
            if rule.detect:
                adwin.add_twice(errors, watches[0], watches[1], risen)
                for turn in range(2):
                    start = 0
                    for b in range(len(banks)):
                        bank = banks[b]
                        for k in range(len(bank.roots)):
                            if risen[turn, start + k] and turn == 0:
                                hoeffding.begin(
                                    bank.forest, bank.beside, len(bank.roots) + k, bank.features, bank.share,
                                    bank.stack, k,
                                )  # fmt: skip
                            elif risen[turn, start + k]:
                                hoeffding.replace(
                                    bank.forest, bank.roots, bank.beside, k, bank.features, bank.share, bank.stack
                                )
                                kept.resets[start + k] += 1
                        start += len(bank.roots)
            for k in range(experts):
                kept.chosen[k] += mixed[k]
            if rule.scale:
                rows.watch(x[i], kept.mean, kept.square, kept.seen)
            for n in range(len(kept.labels) - 1, 0, -1):
                kept.labels[n] = kept.labels[n - 1]
            if len(kept.labels):
                kept.labels[0] = y[i]
        return len(y)

    return course


course = _compiled(
    hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in (rows, adwin, hoeffding))).hexdigest()
)
"""Its cache on disk is keyed by the sources of all that it calls: numba looks at this file alone."""
