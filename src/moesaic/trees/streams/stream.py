"""What a data stream is: rows of numbers in order, a label each, read in chunks; memory does not grow with length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError


@dataclass(frozen=True)
class Drift:
    """A place where the concept of a stream changes.

    Attributes:
        position: the first row of the new concept; of a gradual change, the row at which both are as likely.
        width: rows that the change takes; 1 is abrupt.
    """

    position: int
    width: int = 1


class Chunk(NamedTuple):
    """Rows that follow each other.

    Attributes:
        x: features (n, d), float64; NaN where a value is missing.
        y: places (n,) in the stream's classes, int64; -1 where the label is missing.
    """

    x: NDArray[np.float64]
    y: NDArray[np.int64]


SHOWN = 5
"""So many reasons of skipped rows are kept."""


@dataclass
class Skipped:
    """Rows that could not be used: how many, and why the first few."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, reason: str) -> None:
        self.count += 1
        if len(self.reasons) < SHOWN:
            self.reasons.append(reason)


class Stream(ABC):
    """Rows in order, which can be read again and again.

    Attributes:
        name: for tables and messages.
        features: names of the columns of x. Some streams find more while they are read; none is ever dropped.
        classes: labels by their index; may grow while it is read.
        labelled: the column of the labels, where rows have columns.
        drifts: where the concept is known to change, in order.
        length: rows, or None where that is not known.
    """

    name: str
    features: list[str]
    classes: list[Any]
    labelled: str | None = None
    drifts: tuple[Drift, ...] = ()
    length: int | None = None

    @property
    def skipped(self) -> Skipped:
        """Rows that the latest reading left out, of streams that may."""
        return Skipped()

    def chunks(self, size: int = 1000, start: int = 0) -> Iterator[Chunk]:
        """The rows from `start` on, `size` at a time and fewer at the end; each call reads anew, and the same rows.

        Raises:
            ConfigError: `size` is below 1, or `start` below 0.
        """
        if size < 1 or start < 0:
            raise ConfigError(f"chunks of {size} rows from row {start} on: size must be 1 or more, start 0 or more")
        return self._read(size, start, None)

    def head(self, rows: int) -> Stream:
        """The first rows of this stream, as a stream; no row behind them is asked for.

        Raises:
            ConfigError: `rows` is below 1.
        """
        return Head(self, rows)

    @abstractmethod
    def _read(self, size: int, start: int, stop: int | None) -> Iterator[Chunk]:
        """Rows `start` to `stop` (left out; None: to the end) in chunks."""

    def __repr__(self) -> str:
        length = "?" if self.length is None else f"{self.length:,}"
        found = f"features={len(self.features)}, classes={len(self.classes)}, drifts={len(self.drifts)}"
        return f"{type(self).__name__}({self.name}, rows={length}, {found})"


class Head(Stream):
    """The first rows of a stream; features and classes are the stream's own lists."""

    def __init__(self, source: Stream, rows: int) -> None:
        if rows < 1:
            raise ConfigError(f"the first {rows} rows of {source.name}: ask for 1 or more")
        self.source, self.rows = source, rows
        self.name, self.features, self.classes = source.name, source.features, source.classes
        self.drifts = tuple(drift for drift in source.drifts if drift.position < rows)
        self.length = None if source.length is None else min(rows, source.length)

    @property
    def skipped(self) -> Skipped:
        return self.source.skipped

    def _read(self, size: int, start: int, stop: int | None) -> Iterator[Chunk]:
        return self.source._read(size, start, self.rows if stop is None else min(stop, self.rows))


class Gathered:
    """Rows that come one by one, and the chunk that they make; the first `start` of them are dropped."""

    def __init__(self, size: int, start: int, stop: int | None) -> None:
        self.size, self.start, self.stop = size, start, stop
        self.seen = 0
        self._x: list[list[float]] = []
        self._y: list[int] = []

    @property
    def done(self) -> bool:
        """Whether no more rows are wanted."""
        return self.stop is not None and self.seen >= self.stop

    @property
    def width(self) -> int:
        """Of the rows that have come; 0 where none has."""
        return len(self._x[-1]) if self._x else 0

    @property
    def full(self) -> bool:
        return len(self._y) >= self.size

    def add(self, values: list[float], label: int) -> None:
        self.seen += 1
        if self.seen > self.start:
            self._x.append(values)
            self._y.append(label)

    def take(self, width: int) -> Iterator[Chunk]:
        """What has come since, in one chunk (n, width), if anything has; shorter rows end with NaN."""
        if not self._y:
            return
        rows, labels = self._x, self._y
        self._x, self._y = [], []
        if any(len(row) < width for row in rows):
            rows = [row + [np.nan] * (width - len(row)) for row in rows]
        yield Chunk(np.array(rows, dtype=np.float64).reshape(len(rows), width), np.array(labels, dtype=np.int64))
