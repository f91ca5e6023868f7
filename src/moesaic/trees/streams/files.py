"""Streams out of files: CSV, ARFF (both also packed with gzip) and Parquet, read in constant memory."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from moesaic.errors import ConfigError, DataError, path_of
from moesaic.trees.streams.arff import ArffStream
from moesaic.trees.streams.columns import MISSING, BadRow, Column, Labels, label_in, number_in
from moesaic.trees.streams.parquet import ParquetStream
from moesaic.trees.streams.table import OnBadRows, Records, TableStream, lines

SUFFIXES = (".csv", ".csv.gz", ".arff", ".arff.gz", ".parquet")


def file_stream(
    path: str | Path,
    target: str | None = None,
    on_bad_rows: OnBadRows = "stop",
    name: str | None = None,
    drop: Sequence[str] | str = (),
) -> TableStream:
    """A stream of the rows of a file.

    Numbers stay as they are; values that an ARFF file declares become their index; true and false become 1 and 0; other
    texts are numbered as they appear in their column, whose first value says what it holds. Labels are numbers or
    texts, in the order that an ARFF file declares, else as they appear. Missing, as features and as labels, are null
    (Parquet) and the texts that pandas reads so: nothing, NA, N/A, NULL, None, nan … (`columns.MISSING`), and `?`; but
    a value that an ARFF file declares is one. A CSV file whose first line is all numbers has no names: they are x0, x1,
    …; fields end with a comma, a semicolon or a tab.

    Args:
        target: the column of the labels; the last one where none is named.
        on_bad_rows: whether a row that does not fit ends the reading or is counted in the stream's `skipped`.
        name: the stream's; else the file's.
        drop: columns that are left out.
    Raises:
        ConfigError: there is no such target or column to drop, or the file's name ends otherwise than in `SUFFIXES`.
        DataError: there is no such file, it is empty or damaged, or has columns of dates; while it is read: a row does
            not fit (with file:line; the rows before it have been given), there are no rows, or the file is cut off.
        MissingDependency: pyarrow is not installed, and the file is Parquet.
    """
    if on_bad_rows not in get_args(OnBadRows):
        raise ConfigError(f"on_bad_rows is {on_bad_rows!r}: choose one of {', '.join(get_args(OnBadRows))}")
    left_out = [drop] if isinstance(drop, str) else [str(column) for column in drop]
    place = path_of(path)
    if place.is_dir():
        raise DataError(f"{place} is a folder: name a file in it")
    if not place.exists():
        raise DataError(f"there is no file {place}")
    kind = Path(place.stem).suffix if place.suffix == ".gz" else place.suffix
    if kind.lower() == ".csv":
        return CsvStream(place, target, on_bad_rows, name, left_out)
    if kind.lower() == ".arff":
        return ArffStream(place, target, on_bad_rows, name, left_out)
    if place.suffix.lower() == ".parquet":
        return ParquetStream(place, target, on_bad_rows, name, left_out)
    raise ConfigError(f"{place}: a stream's file ends in {', '.join(SUFFIXES)}")


class CsvStream(TableStream):
    """The rows of a CSV file."""

    def __init__(
        self, path: Path, target: str | None, on_bad_rows: OnBadRows, name: str | None, drop: Sequence[str] = ()
    ) -> None:
        super().__init__(path, name, on_bad_rows, drop)
        first = next((line for line in lines(path) if line.strip()), None)
        if first is None:
            raise DataError(f"{path} is empty")
        self._delimiter = max(",;\t", key=first.count)
        self._named = False
        number, fields = next(self._records())
        if isinstance(fields, BadRow):
            raise DataError(f"{path}:{number}: {fields}")
        names = [field.strip() for field in fields]
        numeric = [number_in(name) is not None for name in names]
        if any(numeric) and all(is_one or name in MISSING for is_one, name in zip(numeric, names, strict=True)):
            names = [f"x{place}" for place in range(len(names))]
        elif any(
            is_one and name not in (str(i), str(i + 1))
            for i, (is_one, name) in enumerate(zip(numeric, names, strict=True))
        ):
            raise DataError(f"{path}:{number}: a row, or the names of columns? put a line of names above the rows")
        else:
            self._named = True
        self._declare([Column(name) for name in names], target)
        self._declare_labels(Labels(written=label_in))

    def _records(self) -> Records:
        reader = csv.reader(lines(self.path), delimiter=self._delimiter, strict=True)
        named = self._named
        while True:
            begun = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield begun, BadRow(f"{error} (up to line {reader.line_num}: a quote that does not end?)")
                continue
            if fields is None:
                return
            if fields and named:
                named = False
            elif fields:
                yield reader.line_num, fields
