"""MOA's Hoeffding trees (Domingos & Hulten 2000) as a bank of experts, in a child process with its own JVM.

The child is watched. Whatever ends it (a signal, memory), another is started, is given the trees as they were last
saved, and learns again the rows that came since: nothing is lost, and what follows is bit for bit what would have
followed. MOA's Hoeffding trees draw no random numbers, so the same rows make the same tree.

Settings are those of DriftMoE's experts: information gain, ties below 0.05, adaptive naive Bayes in the leaves,
Gaussians over numbers, no pre-pruning. All features are numbers; NaN is a missing one. Rows and classes may grow: a
tree goes on with wider rows, and counts a new feature from its first row on. Beside a tree another may grow, to take
its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import AdapterError, ConfigError, DataError, TrainingError
from moesaic.trees.experts import Row, Votes
from moesaic.trees.jvm import HEAP, Refused, Worker, WorkerDied
from moesaic.trees.jvm_worker import ADD, COURSE, LEARN, LOAD, PREDICT, PREPARE, RESET, SAVE

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

FAILURES = 3
"""So many times in a row a child may end before the row is given up."""
JOURNAL = 64 << 20
"""Bytes of rows that are kept between two times of saving."""
WIDEST = 1_000_000
"""So many features a state may speak of, and so many classes there may be."""


Frame = tuple[int, int, int, bytes]
"""An operation, a, b and its payload."""


@dataclass
class _Kept:
    """What another child begins from: the trees as they were saved, and what was done since; changed as one."""

    trees: dict[int, bytes] = field(default_factory=dict)
    """Trees as Java writes them, by slot: 2k is tree k's, 2k + 1 that of the one beside it. Empty: a new one."""
    done: list[Frame] = field(default_factory=list)
    """Rows that were learned, trees that were prepared and reset."""
    features: int = 0
    """How wide rows were when the trees were saved."""
    size: int = 0
    """Bytes of rows."""
    changed: set[int] = field(default_factory=set)
    """Slots of trees that changed since they were saved."""

    def beside(self) -> set[int]:
        """Slots of the trees that grow beside others."""
        found = {slot for slot in self.trees if slot % 2}
        for operation, tree, _, _ in self.done:
            if operation == PREPARE:
                found.add(2 * tree + 1)
            elif operation == RESET:
                found.discard(2 * tree + 1)
        return found


class CapyMOATrees:
    """`size` Hoeffding trees of MOA's.

    Args:
        size: K, the number of trees, 0 or more.
        seed: MOA's Hoeffding trees draw nothing; they are only told it.
        grace_period: rows (by weight) a leaf sees between two tries to split it.
        confidence: the chance to split by mistake that is allowed.
        heap: MiB that Java's objects may take, at most three quarters of the memory that is free.
        every: learned rows after which trees are saved. More: a restart takes longer. Fewer: saving takes longer.
    Raises:
        MissingDependency: capymoa is not installed.
        ConfigError: a setting is impossible, or there is no Java.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        grace_period: int = 50,
        confidence: float = 1e-7,
        heap: int = HEAP,
        every: int = 10_000,
    ) -> None:
        whole = {"size": size, "grace_period": grace_period, "heap": heap, "every": every}
        for name, value in whole.items():
            least = 0 if name == "size" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number, {least} or more, and is {value!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**31) <= seed < 2**31:
            raise ConfigError(f"seed must be a whole number of 32 bits, and is {seed!r}")
        if not 0 < confidence < 1:
            raise ConfigError(f"confidence must be between 0 and 1, and is {confidence!r}")
        self.size, self.seed, self.grace_period, self.confidence = size, seed, grace_period, float(confidence)
        self.heap, self.every = heap, every
        self._features = 0  # of the widest row that was learned
        self._kept = _Kept()
        self._closed = False
        self._worker: Worker | None = None
        self._versions: dict[str, str] = {}
        self._spent: list[float] = []
        """CPU seconds of children that have ended."""
        self._do(lambda worker: None)

    def predict(self, x: Row, classes: int, which: Sequence[int] | None = None) -> Votes:
        """Probabilities (K, classes) of a row (d,), or (len(which), classes) of some trees; nothing changes by it.

        Each tree's votes are divided by their sum; where that is 0 or not finite, all classes get the same.

        Raises:
            TrainingError: the child ends again and again.
        """
        if not (self.size if which is None else len(which)):
            return np.empty((0, classes))
        row = self._row(x)
        chosen = [] if which is None else [self._tree(i) for i in which]
        payload = row.tobytes() + np.array(chosen, np.int64).tobytes() if chosen else row.tobytes()
        rows, width, votes = self._do(lambda worker: worker.ask(PREDICT, classes, len(chosen), payload))
        return shares(np.frombuffer(votes).reshape(rows, width)[:, :classes])

    def learn(self, x: Row, y: int, weights: NDArray[np.float64]) -> None:
        """Learn that a row (d,) is of class `y`, each tree with its weight (K,); returns before that is done.

        Raises:
            DataError: a class below 0, or not a weight for each tree.
            TrainingError: the child ends again and again, or an earlier row could not be learned.
        """
        row, weights = self._row(x), np.ascontiguousarray(weights, dtype=np.float64)
        if weights.shape != (self.size,):
            raise DataError(f"weights are {weights.shape}, and there are {self.size} trees: give each its own")
        if not 0 <= y < WIDEST:
            raise DataError(f"a class is a whole number from 0, and is {y!r}")
        learners = np.flatnonzero(weights > 0).tolist()
        if not learners:
            return
        self._change(LEARN, int(y), self.size, weights.tobytes() + row.tobytes(), _slots(learners), row.size)

    def course(
        self, x: NDArray[np.float64], y: NDArray[np.int64], weights: NDArray[np.float64], classes: int
    ) -> NDArray[np.float64]:
        """Probabilities (n, K, classes) of rows (n, d), each answered before it is learned as of y (n,), in one go.

        Args:
            weights: (n, K) with which the trees learn.
        Raises:
            TrainingError: the child ends again and again; nothing of it was learned then.
        """
        rows, own = np.ascontiguousarray([self._row(row) for row in x]), np.ascontiguousarray(weights, np.float64)
        if self._is_full:
            self._save()
        frames = [
            (LEARN, int(label), self.size, lessons.tobytes() + row.tobytes())
            for row, label, lessons in zip(rows, y, own, strict=True)
        ]
        learners = np.flatnonzero((own > 0).any(axis=0)).tolist()
        payload = own.tobytes() + rows.tobytes() + np.ascontiguousarray(y, np.int64).tobytes()

        def ask(worker: Worker) -> tuple[int, int, bytes]:
            told = worker.ask(COURSE, classes, len(y), payload)
            self._note(frames, _slots(learners), rows.shape[1])
            return told

        count, width, votes = self._do(ask)
        return shares(np.frombuffer(votes).reshape(count, width)[:, :classes]).reshape(len(y), self.size, classes)

    def reset(self, which: int) -> None:
        """Let a tree begin anew, or as the one that was prepared. Raises DataError where there is no such tree."""
        tree = self._tree(which)
        self._change(RESET, tree, changed={2 * tree})

    def prepare(self, which: int) -> None:
        """Let a new tree learn what `which` learns, with the same weights, until a `reset` puts it in its place.

        It replaces one that was prepared before. Raises DataError where there is no such tree.
        """
        tree = self._tree(which)
        self._change(PREPARE, tree, changed={2 * tree + 1})

    def add(self, count: int) -> None:
        """New trees, behind those that are there. Raises DataError for fewer than 0."""
        if count < 0:
            raise DataError(f"a bank has no room for {count} more trees: give 0 or more")
        if not count:
            return
        worker = self._take()
        self.size += count  # another child begins with so many, and the rows that it learns again are not theirs
        self._tell(worker, ADD, count)

    def cpu_seconds(self) -> float:
        """CPU seconds that its child, and those before it, used since they were started; all rows are learned then."""
        worker, self._worker = self._worker, None
        living = 0.0
        if worker is not None:
            try:
                living = worker.cpu_seconds()
                self._worker = worker
            except WorkerDied:
                pass  # what it used is among those that have ended; who asks for more starts another
        return sum(self._spent) + living

    def peak_memory(self) -> float:
        """MiB that its child held at most; 0 where there is none, or the system does not tell."""
        return 0.0 if self._worker is None else self._worker.peak_memory()

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Each tree as Java writes it, uint8, empty where it is new; and the settings they grew with.

        `tree_0`, `tree_1`, …, and `beside_0`, … of those that were prepared.
        """
        kept = self._save()
        slots = sorted({2 * k for k in range(self.size)} | kept.beside())
        arrays: dict[str, NDArray[Any]] = {
            _name(slot): np.frombuffer(kept.trees.get(slot, b""), np.uint8).copy() for slot in slots
        }
        return arrays, self._settings() | {"features": self._features} | self._versions

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        """Become what `state` told of; where that fails, nothing has changed.

        Java reads the trees through a list of the classes that trees are made of, so that a state from elsewhere
        cannot run code.

        Raises:
            AdapterError: the state is damaged, of another bank or of other settings, or holds what is no tree.
        """
        for name, mine in self._settings().items():
            if values.get(name) != mine:
                raise AdapterError(f"the state's {name} is {values.get(name)!r}, and this bank's {mine!r}")
        features = values.get("features")
        if isinstance(features, bool) or not isinstance(features, int) or not 0 <= features <= WIDEST:
            raise AdapterError(f"the state's features must be a whole number up to {WIDEST:,}, and are {features!r}")
        slots = {_name(slot): slot for slot in range(2 * self.size)}
        if {name for name, slot in slots.items() if slot % 2 == 0} - set(arrays) or set(arrays) - set(slots):
            raise AdapterError(
                f"the state holds {', '.join(sorted(arrays)) or 'no arrays'} instead of {self.size} trees"
            )
        for name in arrays:
            if arrays[name].dtype != np.uint8 or arrays[name].ndim != 1:
                raise AdapterError(f"{name} must be a row of bytes, and is {arrays[name].dtype} {arrays[name].shape}")
        if sum(array.nbytes for array in arrays.values()) > self.heap << 20:
            raise AdapterError(f"the state is larger than the heap of {self.heap} MiB: give more")
        kept = _Kept({slots[name]: array.tobytes() for name, array in arrays.items()}, features=features)

        def replace(worker: Worker) -> None:
            self._load(worker, kept)
            self._kept, self._features = kept, features

        try:
            self._do(replace)
        except TrainingError as error:
            raise AdapterError(f"the state of the trees cannot be read: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        """For `copy` and `pickle`: the trees as they are saved. A copy starts a child of its own when it is asked."""
        self._check_open()
        kept = self._save()
        own = _Kept(dict(kept.trees), features=kept.features)
        return self.__dict__ | {"_worker": None, "_spent": [], "_kept": own}

    def close(self) -> None:
        """End the child; once is enough."""
        self._closed = True
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def __repr__(self) -> str:
        return f"CapyMOATrees(size={self.size}, grace_period={self.grace_period}, confidence={self.confidence})"

    def _settings(self) -> dict[str, Any]:
        ours = ("size", "seed", "grace_period", "confidence")
        return {"bank": "capymoa"} | {name: getattr(self, name) for name in ours}

    def _row(self, x: Row) -> Row:
        """A row as wide as those that were learned, or wider: what it lacks is missing."""
        row = np.ascontiguousarray(x, dtype=np.float64)
        return row if row.size >= self._features else np.append(row, np.full(self._features - row.size, np.nan))

    def _tree(self, which: int) -> int:
        if not 0 <= which < self.size:
            raise DataError(f"there is no tree {which}: there are {self.size}, from 0")
        return int(which)

    def _change(
        self,
        operation: int,
        a: int,
        b: int = 0,
        payload: bytes = b"",
        changed: Set[int] = frozenset(),
        features: int | None = None,
    ) -> None:
        """Let the child do what another one would have to do again.

        Args:
            changed: slots of the trees that are not what they were.
            features: how wide rows are from now on.
        """
        if self._is_full:
            self._save()
        worker = self._take()
        self._note([(operation, a, b, payload)], changed, features)
        self._tell(worker, operation, a, b, payload)

    @property
    def _is_full(self) -> bool:
        """Whether so much was done since the trees were saved that it is time to do that again."""
        return len(self._kept.done) >= self.every or self._kept.size >= JOURNAL

    def _note(self, frames: list[Frame], changed: Set[int], features: int | None) -> None:
        """What another child would have to do again."""
        self._features = self._features if features is None else features
        self._kept.changed.update(changed)
        self._kept.size += sum(len(payload) for *_, payload in frames)
        self._kept.done += frames

    def _save(self) -> _Kept:
        """Have the trees that changed written, and forget what was done."""
        kept = self._kept
        if kept.done or kept.changed:
            beside = kept.beside()
            changed = sorted(slot for slot in kept.changed if slot % 2 == 0 or slot in beside)
            wanted = np.array(changed, np.int64).tobytes()
            _, _, told = self._do(lambda worker: worker.ask(SAVE, payload=wanted))
            trees = {slot: data for slot, data in kept.trees.items() if slot % 2 == 0 or slot in beside}
            end = 8 * len(changed)
            for slot, size in zip(changed, np.frombuffer(told[:end], np.int64).tolist(), strict=True):
                trees[slot] = told[end : end + size]
                end += size
            kept = self._kept = _Kept(trees, features=self._features)
        return kept

    def _load(self, worker: Worker, kept: _Kept) -> None:
        """Give a child the trees that were saved and let it do what was done since."""
        slots = np.array([*kept.trees], np.int64)
        sizes = np.array([len(data) for data in kept.trees.values()], np.int64)
        worker.ask(LOAD, kept.features, len(slots), b"".join([slots.tobytes(), sizes.tobytes(), *kept.trees.values()]))
        for frame in kept.done:
            worker.send(*frame)
        if kept.done:
            worker.ask(SAVE)  # of no tree: the answer says that all of it was done

    def _start(self) -> Worker:
        settings = {"size": self.size, "seed": self.seed, "options": self._options()}
        worker = Worker(settings, heap=self.heap, spent=self._spent)
        self._versions = worker.versions
        try:
            self._load(worker, self._kept)
        except BaseException:
            worker.close()
            raise
        return worker

    def _take(self) -> Worker | None:
        """The child, which is nobody's until it is put back: where that is interrupted, another takes its place."""
        self._check_open()
        worker, self._worker = self._worker, None
        return worker

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("the trees are closed: make others, and save or copy these before close()")

    def _tell(self, worker: Worker | None, operation: int, a: int, b: int = 0, payload: bytes = b"") -> None:
        """Let a child do what is noted here already; one that has to be started does it from there."""
        died = None
        try:
            if worker is not None:
                worker.send(operation, a, b, payload)
                self._worker = worker
                return
        except WorkerDied as ended:
            died = ended
        self._do(lambda worker: None, died)

    def _options(self) -> str:
        return f"-g {self.grace_period} -c {self.confidence} -t 0.05 -l NBAdaptive -q 0 -p"

    def _do(self, ask: Callable[[Worker], Answer], died: WorkerDied | None = None) -> Answer:
        """What a child answers; another is started where there is none, or where it ends over it.

        Args:
            died: how the child ended, where that is known already.
        """
        failures = 0
        while True:
            if died is not None:
                failures += 1
                if failures >= FAILURES:
                    more = ": give more heap" if "OutOfMemory" in str(died) else ""
                    raise TrainingError(f"the child of the trees ended {failures} times in a row ({died}){more}")
                logger.warning(
                    "the child process of the trees ended (%s): starting another, with %d rows to learn again",
                    died,
                    sum(operation == LEARN for operation, *_ in self._kept.done),
                )
                died = None
            worker = self._take()
            try:
                worker = worker or self._start()
                told = ask(worker)
            except WorkerDied as ended:
                died = ended
                continue
            except Refused as refused:
                self._worker = worker
                raise TrainingError(f"MOA's trees cannot go on: {refused}") from None
            self._worker = worker
            return told


def _slots(trees: Sequence[int]) -> set[int]:
    """Their own, and those of the trees beside."""
    return {slot for k in trees for slot in (2 * k, 2 * k + 1)}


def _name(slot: int) -> str:
    return f"{'beside' if slot % 2 else 'tree'}_{slot // 2}"


def shares(votes: Votes) -> Votes:
    """Votes (n, classes) as probabilities: each row by its sum, all the same where that is 0 or not finite."""
    total = votes.sum(axis=1, keepdims=True)
    known = np.isfinite(total) & (total > 0)
    if known.all():
        return votes / total
    return np.where(known, votes / np.where(known, total, 1.0), 1 / votes.shape[1])
