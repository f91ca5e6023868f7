"""DriftMoE (Aspis et al., SYNDAiTE at ECML-PKDD 2025, arXiv 2507.18464): trees as experts, and a router that learns
beside them which of them is right about what.

    z = r(x) (K,),   m_i = [argmax p_i(x) = y]; where none is right, the one that was nearest       (K,)
    L = mean over rows and experts of BCE(sigmoid(z_i), m_i)                     a step of Adam every `batch_size` rows

`variant="data"`: K experts of all classes; a row is answered by one or several and learned by the `top_k` that the
router would take. `variant="task"`: an expert for each class, which says whether a row is of it, and learns all rows.

| | answers | learns |
| --- | --- | --- |
| `top1` | p of the expert with the largest z | |
| `topk` | mean of the `top_k` experts' p, by softmax(z) | the `top_k` with the largest z |
| `mixture` | sum_i w_i p_i, w_i = sigmoid(z_i)^trust a_i^recency | |
| `correct` | | those that are right |
| `all` | | all, each a Poisson(`poisson`) number of times |

a_i is the expert's recent accuracy. `docs/driftmoe.md` has what of this is the paper's, what the released code does,
and what is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import AdapterError, DataError
from moesaic.trees import bulk
from moesaic.trees.banks import Banks
from moesaic.trees.experts import Row
from moesaic.trees.ledger import Ledger, same_kind, whole
from moesaic.trees.reading import Reading
from moesaic.trees.router import Scores, sigmoid
from moesaic.trees.rows import blend, mixture, normalise
from moesaic.trees.settings import Settings


class Look(NamedTuple):
    """What is known of a row before its class is."""

    votes: NDArray[np.float64]
    """(K, C)"""
    scores: NDArray[np.float32]
    """z (K,)"""
    weights: NDArray[np.float64]
    """w (K,)"""
    read: NDArray[np.float32]
    """What the router reads (d,)."""
    kept: NDArray[np.float32] | None
    """Of the router's hidden units, where dropout is on when it answers."""


class DriftMoE:
    """A mixture over rows of numbers; classes are whole numbers from 0. Both may become more while it learns.

    Raises:
        MissingDependency: what the backend needs is not installed.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = s = settings
        self._bulk = bulk.way(s)
        self.is_task, self.inert = s.variant == "task", s.has_inert_experts
        self.banks = Banks(s, 0 if self.is_task else s.n_experts)
        self.router: Scores | None = None
        self.random = np.random.default_rng(s.seed)
        self.classes, self.features, self.rows = 0, 0, 0
        self.labels = np.full(s.history + s.label_delay if s.history else 0, np.nan)
        """The last labels, the newest first."""
        self.reading = Reading(s.scale)
        self._look: Look | None = None
        self._asked = b""
        self.ledger = Ledger(s.rate)
        self.ledger.grow(self.banks.size, 0)

    # -- answering -----------------------------------------------------------------------------------------------

    def predict_proba(self, x: Row, classes: int | None = None) -> NDArray[np.float64]:
        """Probabilities (C,) of a row; all alike before any row was learned. Nothing changes by it."""
        classes = max(self.classes, classes or 0)
        if not self.rows:
            return np.full(classes, 1 / max(classes, 1))
        look = self._seen(self._wide(_plain(x)))
        found = np.zeros(classes)
        found[: self.classes] = self.combined(look)
        return found

    def weights(self, x: Row) -> NDArray[np.float64]:
        """How much each expert counts for a row (K,), summing to 1."""
        return self._seen(self._wide(_plain(x))).weights.copy()

    def _wide(self, x: Row) -> Row:
        """A row of the features that were learned (d,): what it lacks is missing, what else it has is not known yet."""
        if len(x) == self.features:
            return x
        return np.append(x[: self.features], np.full(max(self.features - len(x), 0), np.nan))

    def _weights(self, z: NDArray[np.float32]) -> NDArray[np.float64]:
        s = self.settings
        made = np.zeros(self.experts)
        if s.combine == "top1":
            made[z.argmax()] = 1.0
        elif s.combine == "topk":
            chosen = np.argsort(-z, kind="stable")[: s.top_k]
            made[chosen] = np.exp(z[chosen] - z.max())
        else:
            mixture(z, self.ledger.accuracy, s.trust if s.router else 0.0, s.recency, made)
            return made
        return made / made.sum()

    def combined(self, look: Look) -> NDArray[np.float64]:
        if self.inert:
            return _softmax(look.scores)
        if self.is_task:
            found = (sigmoid(look.scores) if self.settings.router else 1.0) * look.votes[:, 1]
            if self.settings.combine == "mixture":
                found = found * self.ledger.accuracy
        else:
            found = np.zeros(self.classes)
            blend(look.weights, look.votes, found)
        normalise(found)
        return found

    def _seen(self, x: Row) -> Look:
        written = x.tobytes()
        if self._look is None or self._asked != written:
            self._look, self._asked = self._made(x, self._past(0)), written
        return self._look

    def _made(self, x: Row, past: NDArray[np.float64]) -> Look:
        kept = self._dropped()
        read, scores = self.scored(x, kept)
        weights, classes = self._weights(scores), 2 if self.is_task else self.classes
        if self.settings.lazy is None:
            return Look(self.banks.predict(x, classes, past), scores, weights, read, kept)
        votes = np.full((self.experts, classes), np.nan)
        look = Look(votes, scores, weights, read, kept)
        self._ask(look, x, np.flatnonzero(weights))
        return look

    def scored(
        self, x: Row, kept: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What the router reads of a row, and its scores (K,)."""
        read = self.reading(x)
        return read, np.zeros(self.experts, np.float32) if self.router is None else self.router(read, kept)

    def looked(self, votes: NDArray[np.float64], read: NDArray[np.float32], scores: NDArray[np.float32]) -> Look:
        """A row whose votes are there already."""
        return Look(votes, scores, self._weights(scores), read, None)

    def _ask(self, look: Look, x: Row, which: NDArray[np.int64]) -> None:
        """Experts that were not asked yet."""
        new = which[np.isnan(look.votes[which, 0])]
        if len(new):
            look.votes[new] = self.banks.predict(x, self.classes, self.labels, new.tolist())

    def _dropped(self) -> NDArray[np.float32] | None:
        """Hidden units that are left out while it answers: in the released code's task variant, and the same ones
        whenever it is asked before the next row is learned."""
        if not self.inert:
            return None
        draw = np.random.default_rng([self.settings.seed, self.rows]).random(self.settings.hidden[0])
        return ((draw >= RELEASED_DROPOUT) / (1 - RELEASED_DROPOUT)).astype(np.float32)

    def _past(self, late: int) -> NDArray[np.float64]:
        """The labels that were known when a row was answered whose own comes `late` rows later, the last one first."""
        return self.labels[late : late + self.settings.history]

    # -- learning ------------------------------------------------------------------------------------------------

    def learn(self, x: Row, y: int) -> None:
        """Learn that a row is of class `y`."""
        x = _plain(x)
        self._grow(len(x), y + 1)
        x, s = self._wide(x), self.settings
        past = self._past(s.label_delay)
        look = self._made(x, past) if s.label_delay else self._seen(x)
        if s.lazy is not None:
            drawn = self.random.choice(self.experts, min(s.lazy, self.experts), replace=False)
            self._ask(look, x, np.union1d(self.ledger.taken(look.scores, s.top_k), drawn))
        right, targets = self.judged(look, y)
        weights = self.lessons(look.scores, targets)
        self._teach(x, y, weights, past)
        self.noted(x, y, look, right, targets, weights)

    def noted(
        self, x: Row, y: int, look: Look, right: NDArray[np.bool_], targets: NDArray[np.bool_],
        weights: NDArray[np.float64],
    ) -> None:  # fmt: skip
        """What else comes of a row that the experts have learned, with weights (K,)."""
        self._follow(right, weights)
        self.ledger.chosen += look.weights
        if self.router is not None:
            wanted = targets.astype(np.float32)
            if self.settings.lazy is not None:
                wanted[np.isnan(look.votes[:, 0])] = np.nan
            self.router.take(look.read, wanted, look.kept)
        self.reading.learn(x)
        self._remember(y)
        self.rows += 1
        self._look = None

    def test_then_train(self, x: NDArray[np.float64], y: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
        """Predict each row of x (n, d) among `classes`, then learn it with its class in y (n,); predictions (n,)."""
        if len(x) != len(y) or y.min(initial=0) < 0:
            raise DataError(f"there are {len(x)} rows and {len(y)} classes: give each row its own, from 0 on")
        predicted = np.empty(len(y), np.int64)
        x, at = np.array(_plain(x)), 0
        while at < len(y):
            done = 0 if self._bulk is None else self._bulk(self, x[at:], y[at:], predicted[at:])
            if not done:
                predicted[at] = self.predict_proba(x[at], classes).argmax()
                self.learn(x[at], int(y[at]))
            at += done or 1
        return predicted

    def learned(self, count: int, reads: NDArray[np.float32], targets: NDArray[np.float32]) -> None:
        """Rows were learned in bulk: what the router read of them (n, d), and what it is to say (n, K)."""
        self.rows += count
        self._look = None
        if self.router is not None:
            for read, wanted in zip(reads, targets, strict=True):
                self.router.take(read, wanted)

    def skip(self) -> None:
        """A row whose label never came: those behind it were answered without it."""
        self._remember(np.nan)
        self._look = None

    def _remember(self, label: float) -> None:
        if len(self.labels):
            self.labels[1:] = self.labels[:-1]
            self.labels[0] = label

    def _right(self, look: Look, y: int) -> NDArray[np.bool_]:
        """m before its fallback. Of the task variant: whether an expert's yes or no is right; in the released code,
        whether it said yes to its own class, so that one at most can be."""
        if not self.is_task:
            right: NDArray[np.bool_] = look.votes.argmax(axis=1) == y
            return right
        own = np.arange(self.experts) == y
        said = look.votes[:, 1] > look.votes[:, 0]
        return own if self.inert else said == own

    def judged(self, look: Look, y: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which experts were right (K,), and m: where none was, the one that was nearest."""
        right = self._right(look, y)
        targets = right.copy()
        if not right.any():
            targets[y if self.is_task else int(np.nanargmax(look.votes[:, y]))] = True
        return right, targets

    def lessons(self, scores: NDArray[np.float32], targets: NDArray[np.bool_]) -> NDArray[np.float64]:
        """How often each expert learns the row (K,), by the router's scores and by who was right."""
        return self.ledger.lessons(self.settings, self.random, self.rows, scores, targets)

    def _teach(self, x: Row, y: int, weights: NDArray[np.float64], past: NDArray[np.float64]) -> None:
        if not self.is_task:
            self.banks.learn(x, y, weights, past)
            return
        own = np.arange(self.experts) == y
        for is_own, label in ((own, 1), (~own, 0)):
            if weights[is_own].any():
                self.banks.learn(x, label, weights * is_own, past)

    def _follow(self, right: NDArray[np.bool_], weights: NDArray[np.float64]) -> None:
        """Recent accuracies, drifts, and experts that nobody teaches."""
        s = self.settings
        self.ledger.follow(right, weights, self.rows)
        if s.detect and not self.inert:
            self.ledger.resets[self.banks.drifted(1.0 - right.astype(np.float64))] += 1
        if s.reset_after and not self.inert:
            for k in np.flatnonzero(self.rows - self.ledger.last >= s.reset_after).tolist():
                self.banks.reset(k)
                self.ledger.begun(k, self.rows, until=self.rows + max(s.reset_after // 10, 1))

    # -- growing -------------------------------------------------------------------------------------------------

    def _grow(self, features: int, classes: int) -> None:
        if features <= self.features and classes <= self.classes:
            return
        self.features, self.classes = max(features, self.features), max(classes, self.classes)
        self.reading.grow(self.features)
        if self.is_task:
            if not self.inert:
                self.banks.add(self.classes - self.experts)
            self.ledger.grow(self.classes, self.rows)
        if self.settings.router:
            if self.router is None:
                s = self.settings
                self.router = Scores(
                    self.features, self.experts, hidden=s.hidden, lr=s.lr, dropout=s.dropout, random=self.random,
                    batch_size=1 if self.inert else s.batch_size, seed=s.seed,
                )  # fmt: skip
            self.router.grow(self.features, self.experts)
        self._look = None

    # -- what a report and a checkpoint ask for ------------------------------------------------------------------

    def activity(self) -> dict[str, NDArray[Any]]:
        """Since the start, by expert: the weight it had, the rows it learned, how often it began anew."""
        ledger = self.ledger
        return {"chosen": ledger.chosen.copy(), "trained": ledger.trained.copy(), "reset": ledger.resets.copy()}

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.ledger.size

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        arrays = {"labels": self.labels.copy()}
        for name, held in (("ledger", self.ledger.arrays()), ("reading", self.reading.arrays())):
            arrays |= {f"{name}.{key}": values.copy() for key, values in held.items()}
        values: dict[str, Any] = {
            "settings": self.settings.describes(), "rows": self.rows, "classes": self.classes,
            "features": self.features, "random": self.random.bit_generator.state, "router": None,
        }  # fmt: skip
        parts: list[tuple[str, Any]] = [("banks", self.banks)]
        if self.router is not None:
            parts.append(("router", self.router))
        for name, part in parts:
            held, said = part.state()
            arrays |= {f"{name}.{key}": value for key, value in held.items()}
            values[name] = said
        return arrays, values

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        """Become what `state` told of. Raises AdapterError where that is damaged, or of other settings."""
        try:
            self._restore(arrays, values)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, AdapterError):
                raise
            raise AdapterError(f"this is no state of a DriftMoE: {type(error).__name__} {error}") from None

    def _restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        own, theirs = self.settings.describes(), values["settings"]
        if other := [name for name in own if own[name] != theirs.get(name)]:
            raise AdapterError(f"{other[0]} is {own[other[0]]}, and was {theirs.get(other[0])} when this was saved")
        self.rows = 0
        self._grow(whole("features", values["features"], MOST), whole("classes", values["classes"], MOST))
        self.ledger.restore(_part(arrays, "ledger"))
        self.reading.restore(_part(arrays, "reading"))
        self.labels = same_kind("labels", arrays["labels"], self.labels)
        self.rows = whole("rows", values["rows"], 2**63)
        self.random.bit_generator.state = values["random"]
        for name, part in (("banks", self.banks), ("router", self.router)):
            if part is not None:
                part.restore(_part(arrays, name), values[name])
        self._look = None

    def cpu_seconds(self) -> float:
        """CPU seconds of processes that experts run in, beside this one."""
        return self.banks.cpu_seconds()

    def peak_memory(self) -> float:
        """MiB that those processes held at most."""
        return self.banks.peak_memory()

    def close(self) -> None:
        """End what experts hold outside of this process."""
        self.banks.close()


RELEASED_DROPOUT = 0.2
LARGEST = 1e100
"""Values beyond are taken for missing, and below 1 / `LARGEST` for 0: their squares could not be counted."""
MOST = 1_000_000
"""Features or classes of a state."""


def _plain(x: Row) -> Row:
    """Rows in one layout, for another would be compiled anew; what is beyond `LARGEST` is missing, next to 0 is 0."""
    x = np.ascontiguousarray(x, np.float64)
    size = np.abs(x)
    if (size > LARGEST).any():
        x = np.where(size > LARGEST, np.nan, x)
    if ((size < 1 / LARGEST) & (x != 0)).any():
        x = np.where(size < 1 / LARGEST, 0.0, x)
    return x


def _part(arrays: Mapping[str, NDArray[Any]], name: str) -> dict[str, NDArray[Any]]:
    """Those arrays whose names begin so."""
    return {key.removeprefix(f"{name}."): held for key, held in arrays.items() if key.startswith(f"{name}.")}


def _softmax(z: NDArray[np.float32]) -> NDArray[np.float64]:
    found = np.exp(z.astype(np.float64) - z.max())
    return found / found.sum()
