"""Parquet files, through pyarrow, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.errors import DataError, MissingDependency, first_line
from moesaic.trees.streams.columns import BadRow, Column, Labels
from moesaic.trees.streams.table import OnBadRows, Records, TableStream

BATCH = 1024
"""Rows that are decoded at a time."""


class ParquetStream(TableStream):
    """The rows of a Parquet file; the line in a message is the row's number, from 1 on."""

    def __init__(
        self, path: Path, target: str | None, on_bad_rows: OnBadRows, name: str | None, drop: Sequence[str] = ()
    ) -> None:
        super().__init__(path, name, on_bad_rows, drop)
        with self._open() as file:
            schema = file.schema_arrow
            rows = file.metadata.num_rows
        label = self._declare([self._column(field) for field in schema], target)
        self._texts = [place for place, column in enumerate(self.columns) if column.kind != "number"]
        self._numbers = {column.name for column in self.columns if column.kind == "number"} - {label.name}
        self._declare_labels(Labels())
        self.length = rows if on_bad_rows == "stop" else None

    def _open(self) -> Any:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise MissingDependency("pyarrow", "trees") from None
        try:
            return parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path} is no Parquet file, or damaged: {first_line(error)}") from None

    def _column(self, field: Any) -> Column:
        from pyarrow import types

        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_boolean(kind):
            return Column(field.name, "number")
        if types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind):
            return Column(field.name)
        if types.is_temporal(kind) or field.name in self.drop:
            return Column(field.name, "date")
        raise DataError(
            f"{self.path}: column '{field.name}' is of type {kind}: numbers, truth values and texts are read"
        )

    def _records(self) -> Records:
        import pyarrow

        number = 0
        try:
            with self._open() as file:
                for batch in file.iter_batches(batch_size=BATCH):
                    columns = [self._listed(name, batch.column(name)) for name in batch.schema.names]
                    for row in zip(*columns, strict=True):
                        number += 1
                        yield number, list(row)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path} is damaged behind row {number}: {first_line(error)}") from None

    def _listed(self, name: str, values: Any) -> list[Any]:
        if name in self._numbers:
            from pyarrow import float64

            return list(values.cast(float64(), safe=False).to_numpy(zero_copy_only=False).tolist())
        return list(values.to_pylist())

    def _values(self, fields: list[Any]) -> list[float]:
        for place in self._texts:
            fields[place] = self.columns[place].value(fields[place])
        if math.inf in fields or -math.inf in fields:
            place = next(place for place, value in enumerate(fields) if math.isinf(value))
            raise BadRow(f"'{self.columns[place].name}' is {fields[place]}, which is not finite")
        return fields
