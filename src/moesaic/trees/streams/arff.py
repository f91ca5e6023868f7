"""ARFF files, as Weka and MOA write them: declared columns above rows of comma-separated values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.errors import DataError
from moesaic.trees.streams.columns import BadRow, Column, Labels, label_in
from moesaic.trees.streams.table import OnBadRows, Records, TableStream, lines

_FIELD = re.compile(r"""\s*(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)"|([^,'"\s][^,]*?|))\s*(,|$)""")
_ATTRIBUTE = re.compile(r"""@attribute\s+('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s{'"]+)\s*(.*)""", re.IGNORECASE)


class ArffStream(TableStream):
    """The rows of an ARFF file."""

    def __init__(
        self, path: Path, target: str | None, on_bad_rows: OnBadRows, name: str | None, drop: Sequence[str] = ()
    ) -> None:
        super().__init__(path, name, on_bad_rows, drop)
        label = self._declare(self._header(), target)
        declared = list(label.codes) if label.kind == "nominal" else None
        self._declare_labels(Labels(declared, label_in))
        self._of_numbers = label if label.kind == "number" else None

    def _header(self) -> list[Column]:
        columns = []
        number = 0
        for number, line in enumerate(lines(self.path), 1):
            text = line.strip()
            word = text.split(maxsplit=1)[0].lower() if text else ""
            if word == "@data":
                break
            if word == "@attribute":
                try:
                    columns.append(_column(text))
                except BadRow as bad:
                    raise DataError(f"{self.path}:{number}: {bad}") from None
            elif word and word[0] != "%" and word != "@relation":
                raise DataError(f"{self.path}:{number}: neither @attribute nor @data: {text[:40]}")
        else:
            raise DataError(f"{self.path} has no @data" if number else f"{self.path} is empty")
        if not columns:
            raise DataError(f"{self.path} declares no @attribute")
        return columns

    def _records(self) -> Records:
        begun = False
        for number, line in enumerate(lines(self.path), 1):
            text = line.strip()
            if not begun:
                begun = text.lower().startswith("@data")
            elif text.startswith("{"):
                raise DataError(f"{self.path}:{number}: sparse rows are not read: write them out in full")
            elif text and text[0] != "%":
                try:
                    fields: list[Any] | BadRow = _fields(text)
                except BadRow as bad:
                    fields = bad
                yield number, fields

    def _label(self, given: Any) -> int:
        if self._of_numbers is not None:
            self._of_numbers.value(given)
        return super()._label(given)


def _column(text: str) -> Column:
    found = _ATTRIBUTE.match(text)
    if found is None:
        raise BadRow(f"a name and a type are to follow: {text[:40]}")
    name, kind = _fields(found[1])[0], found[2].strip()
    declared = re.fullmatch(r"\{(.*)\}\s*(%.*)?", kind)
    if declared:
        texts = _fields(declared[1])
        if len(set(texts)) < len(texts):
            raise BadRow(f"'{name}' declares a value twice")
        return Column(name, "nominal", texts)
    word = kind.split(maxsplit=1)[0].lower() if kind else ""
    if word in ("numeric", "real", "integer"):
        return Column(name, "number")
    if word == "string":
        return Column(name, "text")
    if word == "date":
        return Column(name, "date")
    raise BadRow(
        f"'{name}' is of type '{kind[:40]}': numeric, real, integer, string or {{values}} on one line are read"
    )


def _fields(text: str) -> list[str]:
    """What stands between commas, without quotes. Raises BadRow where a quote does not end."""
    if "'" not in text and '"' not in text:
        return [field.strip() for field in text.split(",")]
    fields, place = [], 0
    while True:
        found = _FIELD.match(text, place)
        if found is None:
            raise BadRow("a quote that does not end, or something behind its end")
        single, double, plain, comma = found.groups()
        fields.append(plain if plain is not None else re.sub(r"\\(.)", r"\1", single if double is None else double))
        if not comma:
            return fields
        place = found.end()
