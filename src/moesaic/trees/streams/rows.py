"""A stream out of anything that gives rows: a list, a generator, a queue's consumer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

from moesaic.errors import ConfigError, DataError
from moesaic.trees.streams.columns import BadRow, Column, Labels
from moesaic.trees.streams.stream import Chunk, Gathered, Stream

_END = object()
Source = Iterable[Any] | Callable[[], Iterator[Any]]


def rows_stream(source: Source, target: str | None = None, name: str = "rows") -> Stream:
    """A stream of rows that are dictionaries of features.

    Features are in the order in which they appear, by their names; one that appears late makes x wider from its chunk
    on, and one that a row lacks is NaN in it. Values are numbers, truth values (1 and 0) or texts: those that write
    out a number are one, others are numbered as they appear; None, NaN and what files call missing are NaN. Labels
    stay what they are, without spaces around them; those are missing that would be missing features.

    Args:
        source: an iterable, or a function that gives an iterator each time; of an iterator rows are read once only. Its
            rows are pairs of a dictionary and a label, or dictionaries that hold the label.
        target: the label's key, where it is in the dictionary.
    Raises:
        ConfigError: the source is neither.
        DataError: while it is read: a row is no such row (the rows before it have been given), or the source was an
            iterator that has been read before. What the source itself raises passes through, behind its rows.
    """
    if not callable(source) and not isinstance(source, Iterable):
        raise ConfigError(
            f"a stream's source is {type(source).__name__}: give an iterable, or a function that gives one"
        )
    return RowsStream(source, target, name)


class RowsStream(Stream):
    """The rows of a source."""

    def __init__(self, source: Source, target: str | None, name: str, length: int | None = None) -> None:
        self.source, self.target, self.name = source, target, name
        self.length = len(source) if length is None and isinstance(source, Sized) else length
        self.features = []
        self._columns: dict[Any, tuple[int, Column]] = {}
        self._labels = Labels()
        self.classes = self._labels.classes
        self._spent = False

    def _begin(self) -> Iterator[Any]:
        if self._spent:
            raise DataError(
                f"{self.name} is an iterator, which can be read only once: give a function that returns a new one"
            )
        if not isinstance(self.source, Iterable):
            return iter(self.source())
        self._spent = iter(self.source) is self.source
        return iter(self.source)

    def _read(self, size: int, start: int, stop: int | None) -> Iterator[Chunk]:
        gathered = Gathered(size, start, stop)
        rows = self._begin()
        while not gathered.done:
            try:
                row = next(rows, _END)
            except Exception:
                yield from gathered.take(len(self.features))
                raise
            if row is _END:
                break
            try:
                values, label = self._parsed(row)
            except (BadRow, DataError) as bad:
                yield from gathered.take(len(self.features))
                raise DataError(f"{self.name}, row {gathered.seen + 1}: {bad}") from None
            if len(values) > gathered.width:  # rows before do not know of features that come later
                yield from gathered.take(gathered.width)
            gathered.add(values, label)
            if gathered.full:
                yield from gathered.take(len(self.features))
        yield from gathered.take(len(self.features))

    def _parsed(self, row: Any) -> tuple[list[float], int]:
        label = None
        if self.target is None and isinstance(row, tuple) and len(row) == 2:
            row, label = row
        elif self.target is None:
            raise BadRow("not a pair of a dictionary and a label; name the label's key as the target if it is in there")
        if not isinstance(row, Mapping):
            raise BadRow(f"{type(row).__name__} where a dictionary of features belongs")
        found: list[tuple[int, float]] = []
        for key, given in row.items():
            if self.target is not None and key == self.target:
                label = given
                continue
            if key not in self._columns:
                name = str(key) if str(key) not in self.features else repr(key)
                self._columns[key] = len(self.features), Column(name)
                self.features.append(name)
            place, column = self._columns[key]
            found.append((place, column.value(given)))
        values = [float("nan")] * len(self.features)
        for place, value in found:
            values[place] = value
        return values, self._labels.index(label)
