"""Prequential evaluation: each row of a stream is predicted first and learned then, in the stream's order."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, DataError, path_of
from moesaic.runs.folder import locked
from moesaic.runs.results import peak_memory
from moesaic.trees.prequential.activity import Activity
from moesaic.trees.prequential.baselines import faced
from moesaic.trees.prequential.checkpoint import END, Checkpoints
from moesaic.trees.prequential.learner import Forked, Learner, Quick, Skipping, State, Stateful, ensure, whole
from moesaic.trees.prequential.metrics import Evaluator, Labels
from moesaic.trees.prequential.recovery import recoveries
from moesaic.trees.prequential.result import Result
from moesaic.trees.prequential.watching import Interrupts, Progress, told
from moesaic.trees.streams.stream import Chunk, Stream

logger = logging.getLogger(__name__)


def prequential(
    stream: Stream,
    learner: Any,
    *,
    rows: int | None = None,
    window: int = 1000,
    delay: int = 0,
    chunk: int = 1000,
    progress: bool | None = None,
    folder: str | Path | None = None,
    every: int = 10_000,
    settings: Mapping[str, Any] | None = None,
) -> Result:
    """Evaluate a learner, or a classifier of river's interface, on a stream, strictly test-then-train.

    It is left as it is at the end, and open.

    A row without a label is predicted, not scored and not learned. Classes that a row is predicted among are those
    that the stream named before it was read and those of the labels that have come.

    Args:
        rows: at most so many; all by default.
        window: rows of a window, over which figures are given beside those over all rows.
        delay: the label of row t comes after row t + delay was predicted. Labels that are outstanding when the rows
            end are learned then.
        chunk: rows that are read at once; makes no difference to any figure.
        progress: whether to show a bar; by default in a terminal. Elsewhere a line is written now and then.
        folder: where to keep a checkpoint, from which the same call goes on, exactly; a finished run is read from it.
        every: rows from one checkpoint to the next.
        settings: what else makes it the same run, such as those of the learner and its seed; what JSON can hold.
    Raises:
        ConfigError: a setting is impossible, the folder is of a run with other settings, or the learner cannot be kept.
        DataError: the stream has no rows.
        AdapterError: the checkpoint is damaged.
        KeyboardInterrupt: after a checkpoint, when interrupted.
    """
    given = {"rows": rows, "window": window, "delay": delay, "chunk": chunk, "every": every}
    for name, value in given.items():
        least = 0 if name == "delay" else 1
        if value is not None and not least <= value <= MOST:
            raise ConfigError(f"{name}={value} must be {least} or more, and at most {MOST:,}")
    if not hasattr(learner, "learn") and hasattr(learner, "learn_one"):
        learner = faced(learner, stream)
    source = stream if rows is None else stream.head(rows)
    total = source.length if source.length is not None else rows
    course = _Course(source, learner, window, delay)
    shown = sys.stderr.isatty() if progress is None else progress
    with ExitStack() as stack:
        kept = None
        if folder is not None:
            described = {
                "stream": stream.name, "length": stream.length, "stream's seed": getattr(stream, "seed", None),
                "learner": type(learner).__name__, "rows": rows, "window": window,
            }  # fmt: skip
            kept = Checkpoints(path_of(folder), {**described, "delay": delay, **(settings or {})})
            stack.enter_context(locked(kept.folder))
            if _went_on(course, kept):
                return course.result()
        bar = stack.enter_context(Progress(stream.name, total, course.row, shown=shown))
        interrupts = stack.enter_context(Interrupts())
        for piece in course.pieces(chunk, every):
            course.take(piece)
            bar.advance(course.row, course.evaluator.overall())
            saved = kept is not None and (interrupts.asked or course.row % every == 0)
            if kept is not None and saved:
                kept.save(course.parts, course.row)
            if interrupts.asked:
                how = "saved; the same command goes on from there" if saved else "and nothing is kept"
                raise KeyboardInterrupt(f"stopped at row {told(course.row, total)}, {how}")
        course.finish()
        if not course.evaluator.overall().scored:
            logger.warning("no row of %s has a label: nothing was scored or learned", stream.name)
        if kept is not None:
            kept.save(course.parts, course.row, finished=True)
    return course.result()


def _went_on(course: _Course, kept: Checkpoints) -> bool:
    """Let a run go on from its checkpoint, if there is one; whether it is finished already."""
    if kept.newest is None:
        for part in course.parts.values():
            part.state()  # one that cannot be kept says so now, and not after hours
        return False
    course.finished = kept.newest.name == END
    kept.load(course.parts)
    if course.finished:
        logger.warning("%s holds the finished run: nothing is run again", kept.folder)
        return True
    logger.warning("going on from row %s", f"{course.row:,}")
    return False


MOST = 10**12
"""Rows of anything."""


class _Course:
    """A learner on its way through a stream.

    Attributes:
        row: rows that were predicted.
        parts: what a checkpoint consists of; the learner last, so that it is as it was where others are damaged.
        finished: whether all rows were predicted and learned.
    """

    def __init__(self, stream: Stream, learner: Learner, window: int, delay: int) -> None:
        self.stream, self.learner, self.delay = stream, learner, delay
        self.evaluator, self.activity = Evaluator(window), Activity(learner)
        self.parts: dict[str, Stateful] = {
            "evaluator": self.evaluator,
            "activity": self.activity,
            "course": self,
            "learner": learner,
        }
        self.row, self.finished = 0, False
        self._known = len(stream.classes)
        self._outstanding: deque[tuple[NDArray[np.float64], int]] = deque()
        self._cpu_seconds = self._peak = 0.0
        self._expected: dict[str, list[str]] = {}  # names of a checkpoint, and the classes that were there by then
        self._labels = 0

    def pieces(self, chunk: int, every: int) -> Iterator[Chunk]:
        """The rows that are left, cut where a window or what a checkpoint holds ends."""
        for x, y in self.stream.chunks(chunk, self.row):
            self._check_names()
            while len(y):
                size = min(step - self.row % step for step in (self.evaluator.window, every))
                yield Chunk(x[:size], y[:size])
                x, y = x[size:], y[size:]

    def take(self, piece: Chunk) -> None:
        """Predict and learn rows of one window."""
        before = self._clock()
        if self.delay == 0 and isinstance(self.learner, Quick):
            predicted = self._quickly(self.learner, *piece)
        else:
            predicted = self._one_by_one(*piece)
        self._cpu_seconds += self._clock() - before
        self.evaluator.update(piece.y, predicted)
        self.row += len(piece.y)
        if self.row % self.evaluator.window == 0:
            self.activity.close()

    def finish(self) -> None:
        """Learn what is outstanding."""
        if not self.row:
            raise DataError(f"the stream {self.stream.name} has no rows")
        before = self._clock()
        while self._outstanding:
            self._learn(*self._outstanding.popleft())
        self._cpu_seconds += self._clock() - before
        self.activity.finish(len(self.evaluator.windows()))
        self._check_names()

    def _one_by_one(self, x: NDArray[np.float64], y: Labels) -> Labels:
        predicted = np.empty(len(y), np.int64)
        for i, label in enumerate(y.tolist()):
            predicted[i] = self._predict(x[i])
            self._outstanding.append((x[i], label))
            if len(self._outstanding) > self.delay:
                self._learn(*self._outstanding.popleft())
        return predicted

    def _quickly(self, learner: Quick, x: NDArray[np.float64], y: Labels) -> Labels:
        """The same, in runs of rows that have a label and are predicted among the same classes."""
        known = np.maximum.accumulate(np.append(self._known, y + 1))[:-1]
        labelled = y >= 0
        cuts = np.flatnonzero((np.diff(known) > 0) | (np.diff(labelled))) + 1
        predicted = np.empty(len(y), np.int64)
        for start, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(y)], strict=True):
            if labelled[start]:
                predicted[start:end] = learner.test_then_train(x[start:end], y[start:end], max(1, int(known[start])))
                self._known = max(self._known, int(y[end - 1]) + 1)
            else:
                for i in range(start, end):
                    predicted[i] = self._predict(x[i])
                    self._learn(x[i], -1)
        return predicted

    def _predict(self, x: NDArray[np.float64]) -> int:
        return int(self.learner.predict_proba(x, max(1, self._known)).argmax())

    def _learn(self, x: NDArray[np.float64], y: int) -> None:
        if y >= 0:
            self.learner.learn(x, y)
            self._known = max(self._known, y + 1)
        elif isinstance(self.learner, Skipping):
            self.learner.skip()

    def _clock(self) -> float:
        """CPU seconds, of the learner's processes too."""
        return time.process_time() + (self.learner.cpu_seconds() if isinstance(self.learner, Forked) else 0.0)

    def _peak_memory(self) -> float:
        """MiB at most, of the learner's processes too, over all that the run was cut into."""
        own = float(peak_memory(SimpleNamespace(type="cpu"))["peak_memory_mib"])
        return max(self._peak, own + (self.learner.peak_memory() if isinstance(self.learner, Forked) else 0.0))

    def _names(self) -> dict[str, list[str]]:
        return {"features": [*map(str, self.stream.features)], "classes": [*map(str, self.stream.classes)]}

    def _check_names(self) -> None:
        """Raise ConfigError where the stream, read to where the checkpoint was made, is not the one it was made on."""
        now, least = self._names(), {"features": 0, "classes": self._labels}
        for what, before in self._expected.items():
            compared = max(least[what], min(len(before), len(now[what])))  # the last chunk may have told of more
            lost = [name for i, name in enumerate(before[:compared]) if now[what][i : i + 1] != [name]]
            if lost:
                raise ConfigError(
                    f"{what} of {self.stream.name} are no longer those of the checkpoint, such as {lost[0]}: "
                    "restore the stream, or name another folder"
                )
        self._expected = {}

    def result(self) -> Result:
        windows = self.evaluator.windows()
        classes = self._expected.get("classes") or self._names()["classes"]
        return Result(
            stream=self.stream.name,
            learner=type(self.learner).__name__,
            classes=classes,
            window=self.evaluator.window,
            delay=self.delay,
            overall=self.evaluator.overall(),
            by_class=self.evaluator.by_class(len(classes)),
            baselines=self.evaluator.baselines(),
            windows=windows,
            drifts=recoveries(windows, self.stream.drifts),
            activity=self.activity.windows(),
            cpu_seconds=self._cpu_seconds,
            peak_memory_mib=self._peak_memory(),
        )

    def state(self) -> State:
        rows = [x for x, _ in self._outstanding]
        arrays = {"x": _stacked(rows), "y": np.array([y for _, y in self._outstanding], np.int64)}
        figures = {"row": self.row, "known": self._known, "cpu_seconds": self._cpu_seconds}
        return arrays, {**figures, "peak_memory_mib": self._peak_memory(), "names": self._names()}

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        """Become what `state` told of, after the figures. Raises AdapterError where it cannot be, or is not of them."""
        row, names = whole(values, "row"), _checked_names(values.get("names"))
        ensure(row == self.evaluator.rows, f"its figures are of other rows than {row:,}")
        windows = len(self.evaluator.windows()) if self.finished else row // self.evaluator.window
        ensure(self.activity.closed in (None, windows), "its windows are not those of what experts did")
        ensure(self.evaluator.classes <= len(names["classes"]), "it lacks names of classes that it counted")
        known, (x, y) = whole(values, "known", most=len(names["classes"])), (arrays["x"], arrays["y"])
        late = 0 if self.finished else min(self.delay, row)
        ensure(
            x.dtype == np.float64 and x.ndim == 2 and len(x) == late, f"its outstanding rows are {x.dtype} {x.shape}"
        )
        ensure(x.shape[1] <= len(names["features"]), "its outstanding rows are wider than there are features")
        ensure(y.dtype == np.int64 and y.shape == (late,), f"its outstanding labels are {y.dtype} {y.shape}")
        learned = self.evaluator.classes_but(y)
        ensure(learned <= known, f"its known is {known}, and it has learned {learned} classes")
        for name in ("cpu_seconds", "peak_memory_mib"):
            spent: Any = values.get(name)
            good = type(spent) in (int, float) and 0 <= spent < math.inf
            ensure(good, f"its {name} is {str(spent)[:40]!r}, and must be a number from 0 on")
        self.row, self._known, self._outstanding = row, known, deque(zip(x, y.tolist(), strict=True))
        self._cpu_seconds, self._peak = values["cpu_seconds"], values["peak_memory_mib"]
        self._expected, self._labels = names, self.evaluator.classes


def _checked_names(given: Any) -> dict[str, list[str]]:
    """Names of features and classes, as a state has them. Raises AdapterError for anything else."""
    kinds = given.values() if isinstance(given, dict) and given.keys() == {"features", "classes"} else [None]
    good = all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in kinds)
    ensure(good, "its names are not two lists of texts, features and classes")
    return dict(given)


def _stacked(rows: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Rows (n, d) as wide as the widest; NaN where others end."""
    stacked = np.full((len(rows), max((row.size for row in rows), default=0)), np.nan)
    for place, row in zip(stacked, rows, strict=True):
        place[: row.size] = row
    return stacked
