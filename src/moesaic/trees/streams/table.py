"""Tables in files, row by row: what CSV, ARFF and Parquet have in common."""

from __future__ import annotations

import gzip
import logging
import math
import re
import zlib
from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from moesaic.errors import ConfigError, DataError, first_line, suggest
from moesaic.trees.streams.columns import DROP, BadRow, Column, Labels
from moesaic.trees.streams.stream import Chunk, Gathered, Skipped, Stream

OnBadRows = Literal["stop", "skip"]
Records = Generator[tuple[int, list[Any] | BadRow], None, None]
logger = logging.getLogger(__name__)

MANY = 100
"""Classes at which it is asked whether a column holds labels at all."""
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


class TableStream(Stream):
    """A table whose columns but one are features. Whoever derives from it declares them, then its labels."""

    def __init__(self, path: Path, name: str | None, on_bad_rows: OnBadRows, drop: Sequence[str] = ()) -> None:
        self.path, self.on_bad_rows, self.drop = path, on_bad_rows, {*drop}
        self.name = name or path.name.split(".")[0] or path.name
        self._skipped = Skipped()
        self._plain = self._told = False

    @property
    def skipped(self) -> Skipped:
        return self._skipped

    def _declare(self, columns: Sequence[Column], target: str | None) -> Column:
        """Take the columns of the file, all but the target's, which is returned.

        Raises:
            ConfigError: there is no such target.
            DataError: names are missing or double, or nothing but the target is there.
        """
        names = [column.name for column in columns]
        if "" in names:
            raise DataError(f"{self.path}: column {names.index('') + 1} has no name: give it one, or leave it out")
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise DataError(f"{self.path}: two columns are called '{double}' (are there names in the first line?)")
        if target is not None and target not in names:
            near = get_close_matches(target, names, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ConfigError(
                f"{self.path} has no column '{target}'; {hint}source.target= names one of {', '.join(names)}"
            )
        if unknown := self.drop - {*names}:
            raise ConfigError(f"{self.path} has no column '{min(unknown)}' to drop: {suggest(min(unknown), names)}")
        self.target = len(names) - 1 if target is None else names.index(target)
        if names[self.target] in self.drop:
            raise ConfigError(f"{names[self.target]} is the target: it cannot be dropped; target= names another")
        self.labelled = names[self.target]
        self._wide = len(names)
        self._dropped = [place for place in reversed(range(len(names))) if names[place] in self.drop]
        away = {self.target, *self._dropped}
        self.columns = [column for place, column in enumerate(columns) if place not in away]
        if not self.columns:
            raise DataError(f"{self.path} has one column: there must be a label and a feature")
        if dates := [column.name for column in self.columns if column.kind == "date"]:
            how = f"turn them into numbers, or leave it out: {DROP}{dates[0]}"
            raise DataError(f"{self.path}: column '{dates[0]}' holds dates: {how}")
        self.features = [column.name for column in self.columns]
        return columns[self.target]

    def _declare_labels(self, labels: Labels) -> None:
        self.labels, self.classes = labels, labels.classes

    @abstractmethod
    def _records(self) -> Records:
        """Line by line, its number (from 1 on) and its fields, of all columns.

        Raises:
            DataError: the file is damaged; what comes before the damage has been given.
        """

    def _values(self, fields: list[Any]) -> list[float]:
        """Features, of fields without the label: texts, here. Raises BadRow."""
        if self._plain and "_" not in "".join(fields):  # float() takes 1_000 for a number
            try:
                values = list(map(float, fields))
            except ValueError:
                values = [math.nan]
            if math.isfinite(sum(values)):
                return values
        values = [column.value(given) for column, given in zip(self.columns, fields, strict=True)]
        self._plain = self._plain or all(column.kind == "number" for column in self.columns)
        return values

    def _label(self, given: Any) -> int:
        """The label's place in the classes. Raises BadRow."""
        return self.labels.index(given)

    def _read(self, size: int, start: int, stop: int | None) -> Iterator[Chunk]:
        self._skipped = Skipped()
        gathered = Gathered(size, start, stop)
        with closing(self._records()) as records:
            try:
                for line, fields in records:
                    self._take(gathered, line, fields)
                    if gathered.full:
                        yield from gathered.take(len(self.columns))
                    if gathered.done:
                        break
            except DataError:
                yield from gathered.take(len(self.columns))
                raise
        yield from gathered.take(len(self.columns))
        if not gathered.seen:
            why = f"; of {self.skipped.count} the first: {self.skipped.reasons[0]}" if self.skipped.count else ""
            raise DataError(f"{self.path} holds no rows{' that can be used' if why else ''}{why}")

    def _take(self, gathered: Gathered, line: int, fields: list[Any] | BadRow) -> None:
        try:
            if isinstance(fields, BadRow):
                raise fields
            if len(fields) != self._wide:
                raise BadRow(f"it has {len(fields)} fields, where there are {self._wide} columns")
            label = fields[self.target]
            for place in sorted((self.target, *self._dropped), reverse=True):
                del fields[place]
            gathered.add(self._values(fields), self._label(label))
            if len(self.classes) == MANY and not self._told:
                self._told = True
                said = (
                    "%s: column '%s' has %d classes already: are those its labels? source.target= names another column"
                )
                logger.warning(said, self.path, self.labelled, MANY)
        except BadRow as bad:
            where = f"{self.path}:{line}: {bad}"
            if self.on_bad_rows == "stop":
                raise DataError(f"{where}; mend it, or source.on_bad_rows=skip leaves such rows out") from None
            self._skipped.add(where)
        except DataError as error:
            raise DataError(f"{self.path}:{line}: {error}") from None


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file, or of one that gzip has packed (.gz), with their ends.

    Raises:
        DataError: it cannot be read, is cut off or is no UTF-8 text; the lines before have been given.
    """
    number = 0
    how: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    try:
        with gzip.open(path, "rt", **how) if path.suffix == ".gz" else open(path, **how) as file:
            for line in file:
                number += 1
                if not line.isascii() and _NOT_UTF8.search(line):
                    raise DataError(f"{path}:{number}: not UTF-8 text: write it anew as UTF-8")
                yield line
    except EOFError:
        raise DataError(f"{path} is cut off behind line {number}: fetch it anew") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged behind line {number} ({first_line(error)}): fetch it anew") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or first_line(error)}") from None
