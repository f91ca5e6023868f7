"""Values as they are written to numbers: the columns of a table, and its labels."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from datetime import date, time
from decimal import Decimal
from numbers import Real
from typing import Any, Literal

from moesaic.errors import DataError

MISSING = frozenset({
    "", "?", "NA", "N/A", "n/a", "<NA>", "#NA", "#N/A", "#N/A N/A", "NULL", "null", "None", "NaN", "NAN", "nan", "-NaN",
    "-nan", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN",
})  # fmt: skip
"""Texts that stand for a missing value, of a feature or a label alike: ARFF's sign, and what pandas reads as one."""
TRUTH = {"true": 1.0, "True": 1.0, "TRUE": 1.0, "false": 0.0, "False": 0.0, "FALSE": 0.0}
MAX_CODES = 100_000
"""Different texts that a column may have: they are kept in memory."""
MAX_CLASSES = 10_000
DROP = "source.drop="
"""How a column is left out on the command line; in Python it is `drop=[name]`."""
_DATE = re.compile(r"(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4})([T ].*)?")
_COMMA = re.compile(r"[-+]?\d[\d.]*(,\d+)+(\.\d+)?")


class BadRow(Exception):
    """Why a row cannot be used; whoever knows where it stands says so or counts it."""


class Column:
    """How the values of one column become numbers.

    Without a `kind`, the first value that is not missing decides it: numbers stay as they are, true and false are 1 and
    0, other texts are numbered as they appear. `nominal` has its texts from a declaration.
    """

    def __init__(
        self,
        name: str,
        kind: Literal["number", "truth", "text", "nominal", "date"] | None = None,
        texts: Sequence[str] = (),
    ) -> None:
        self.name, self.kind = name, kind
        self.codes = {text: float(code) for code, text in enumerate(texts)}

    def value(self, given: Any) -> float:
        """NaN where it is missing: None, NaN or a text of `MISSING` that is not declared.

        Raises:
            BadRow: it does not fit what the column holds.
            DataError: the column is one of dates, or has too many different texts.
        """
        if isinstance(given, str):
            return self._of_text(given.strip())
        if _is_none(given):
            return math.nan
        if isinstance(given, (date, time)):
            raise DataError(self._dates(given))
        if not isinstance(given, (Real, Decimal)) and type(given).__name__ not in ("bool", "bool_"):
            raise BadRow(f"'{self.name}' is {given!r}: neither a number nor a text")
        if self.kind == "text" and given == given:
            return self._of_text(str(given))
        try:
            return self._finite(float(given), given)
        except OverflowError:
            return self._finite(math.inf, "too large a number")

    def _of_text(self, text: str) -> float:
        if text in self.codes:
            return self.codes[text]
        if text in MISSING:
            return math.nan
        if self.kind is None:
            self.kind = self._kind_of(text)
        if self.kind == "number":
            number = number_in(text)
            if number is None:
                raise BadRow(f"'{self.name}' is '{text}', which is no number")
            return self._finite(number, text)
        if self.kind == "truth":
            if text not in TRUTH:
                raise BadRow(f"'{self.name}' is '{text}', which is neither true nor false")
            return TRUTH[text]
        if self.kind == "nominal":
            raise BadRow(f"'{self.name}' is '{text}', which is not among its declared values")
        if len(self.codes) >= MAX_CODES:
            raise DataError(
                f"column '{self.name}' has over {MAX_CODES:,} different texts: leave it out, {DROP}{self.name}"
            )
        return self.codes.setdefault(text, float(len(self.codes)))

    def _kind_of(self, text: str) -> Literal["number", "truth", "text"]:
        if number_in(text) is not None:
            return "number"
        if text in TRUTH:
            return "truth"
        if _DATE.fullmatch(text):
            raise DataError(self._dates(text))
        if _COMMA.fullmatch(text):
            raise DataError(f"column '{self.name}' holds numbers with commas ({text}): write 1234.5 for 1.234,5")
        return "text"

    def _finite(self, number: float, given: Any) -> float:
        if math.isinf(number):
            raise BadRow(f"'{self.name}' is {given}, which is not finite")
        self.kind = self.kind or (None if math.isnan(number) else "number")
        return number

    def _dates(self, given: Any) -> str:
        return f"column '{self.name}' holds dates ({given}): turn them into numbers, or leave it out: {DROP}{self.name}"


class Labels:
    """Labels by their index, in the order in which they appear.

    Args:
        declared: those that are known beforehand; others are then bad.
        written: how a label stands for what was written: `label_in` for files.
    """

    def __init__(self, declared: Sequence[str] | None = None, written: Callable[[Any], Any] = lambda label: label):
        self.written, self.closed = written, declared is not None
        self.classes: list[Any] = list(map(written, declared or ()))
        if len(set(self.classes)) < len(self.classes):
            self.classes = list(declared or ())
        self._index: dict[Any, int] = {text: place for place, text in enumerate(declared or ())}

    def index(self, given: Any) -> int:
        """Its place; -1 where it is missing: None, NaN or a text of `MISSING` that is not declared.

        Raises:
            BadRow: it is not among the declared ones, or is no text and no number.
            DataError: there are too many different ones.
        """
        try:
            found = self._index.get(given)
        except TypeError:
            raise BadRow(f"the label is {given!r}: neither a number nor a text") from None
        return self._new(given) if found is None else found

    def _new(self, given: Any) -> int:
        if isinstance(given, str):
            text = given.strip()
            if text in self._index:
                return self._index[text]
            if text in MISSING:
                return -1
            given = text
        elif _is_none(given) or given != given:
            return -1
        if self.closed:
            raise BadRow(f"the label is '{given}', which is not among its declared values")
        if len(self.classes) >= MAX_CLASSES:
            raise DataError(f"over {MAX_CLASSES:,} different labels: name the column of the classes as the target")
        label = self.written(given)
        if label not in self._index:
            self._index[label] = len(self.classes)
            self.classes.append(label)
        return self._index.setdefault(given, self._index[label])


def _is_none(given: Any) -> bool:
    """None, or one of pandas' own signs."""
    return given is None or type(given).__name__ in ("NAType", "NaTType")


def number_in(text: str) -> float | None:
    """The number that a text writes out in the usual way, or None."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def label_in(text: str) -> Any:
    """A label of a file: a whole number, another number, or the text as it is (007 too)."""
    number = number_in(text)
    if number is None or not math.isfinite(number) or re.match(r"[+-]?0\d|\+", text):
        return text
    return int(text) if re.fullmatch(r"-?\d+", text) else number
