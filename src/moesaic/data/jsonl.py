"""JSONL files: a value a line, with the place of each for messages about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesaic.errors import DataError, first_line


def lines(file: Path) -> Iterator[tuple[str, str]]:
    """Each line of a JSONL file that is not empty, behind "file:line"; `decode` reads it.

    Raises:
        DataError: it cannot be read, or is no text.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {first_line(error)}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{file}:{number}", line


def decode(row: Any, where: str) -> Any:
    """The value of a line, or what is one already. Raises DataError, which opens with `where`."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, str):
        return row
    try:
        return json.loads(row, object_pairs_hook=_without_doubles)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        detail = getattr(error, "msg", first_line(error))
        raise DataError(f"{where}: not valid JSON: {detail}") from None


def encodable(text: str, key: str, where: str) -> str:
    """A text that can be written as UTF-8. Raises DataError for any other."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: '{key}' holds half of a surrogate pair (\\ud800 to \\udfff): no text") from None
    return text


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [key for key, _ in pairs]
        double = next(key for key in names if names.count(key) > 1)
        raise DataError(f"'{double}' is there twice in one object: keep one")
    return entries
