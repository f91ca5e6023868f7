"""Rows out of files, with the place of each for messages about it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesaic.data.jsonl import lines
from moesaic.errors import DataError, MissingDependency, first_line

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Each row behind its place, "file:line": a value, the text of a line of JSON, or what is wrong with it.

    Raises:
        DataError: the file cannot be read, or is none of `SUFFIXES`.
        MissingDependency: pyarrow is not installed, and the file is Parquet.
    """
    if file.suffix == ".parquet":
        return _parquet(file)
    if file.suffix == ".csv":
        return _csv(file)
    if file.suffix == ".json" and (listed := _whole(file)) is not None:
        return ((f"{file}, row {number}", row) for number, row in enumerate(listed, 1))
    return lines(file)


def _whole(file: Path) -> list[Any] | None:
    """The list that a JSON file holds; None where it holds a value a line."""
    text = "\n".join(line for _, line in lines(file))
    if not text.lstrip().startswith("["):
        return None
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON: {first_line(error)}") from None
    assert isinstance(listed, list)
    return listed


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a table whose first line names its columns; an empty cell is none."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, strict=True)
            names = [name.strip() for name in reader.fieldnames or ()]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(f"{file}: two columns are called '{twice}'")
            for row in reader:
                where = f"{file}:{reader.line_num}"
                if None in row or None in row.values():
                    yield where, DataError(f"{where}: it has another number of fields than the first line has names")
                else:
                    yield where, {name.strip(): value for name, value in row.items() if value}
    except csv.Error as error:
        raise DataError(f"{file}: no CSV: {error} (a quote that does not end?)") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {first_line(error)}") from None


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingDependency("pyarrow", "train") from None
    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", {name: value for name, value in row.items() if value is not None}
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: no Parquet file that can be read: {first_line(error)}") from None
