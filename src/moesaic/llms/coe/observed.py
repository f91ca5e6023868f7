"""What is fitted to: a table of recorded outcomes, or one's own logs, in which not every model saw every prompt.

Logs are lines {"prompt", "model", "score", "cost"?, "category"?}; several of one prompt and model count by their mean.
A mean that too few prompts stand behind leans on what prompts of the category and the model are like otherwise:

    s_ke = (n_ke · mean_ke + m · (a_k + b_e)) / (n_ke + m),   a, b least squares over all cells, m = 5     (ours)

Whoever chose which model saw a prompt may have known more than its category: that is left in the figures.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.data.files import read_rows
from moesaic.data.jsonl import decode, encodable
from moesaic.errors import DataError, path_of, suggest
from moesaic.llms.catalog import Catalog
from moesaic.llms.coe.problem import GENERAL, Problem
from moesaic.llms.tables import FORMATS, Floats, Table, read_table

PRIOR = 5.0
"""Prompts that the guess of a cell counts as."""


@dataclass(frozen=True)
class Observed:
    """As `Table`, and where a model did not see a prompt its score and its cost are NaN."""

    prompts: tuple[str, ...]
    categories: tuple[str, ...]
    models: tuple[str, ...]
    scores: Floats
    costs: Floats | None = None
    source: str = ""

    @classmethod
    def of_table(cls, table: Table) -> Observed:
        """Raises DataError where the table is for evaluation only."""
        if table.evaluation_only:
            raise DataError(f"{table.source or 'the table'} is for evaluation only: fit to another")
        return cls(table.prompts, table.categories, table.models, table.scores, table.costs, table.source)

    @classmethod
    def read(cls, path: str | Path, format: str | None = None) -> Observed:
        """Logs, or a table in any of its formats. Raises DataError, which names the line."""
        file = path_of(path)
        if not file.is_file():
            raise DataError(f"no such file: {file}")
        if format not in (None, "log", *FORMATS):
            raise DataError(f"no format '{format}' of outcomes; {suggest(str(format), ('log', *FORMATS))}")
        if format == "log" or (format is None and _is_log(file)):
            return _log(file)
        return cls.of_table(read_table(file, format))

    @property
    def complete(self) -> bool:
        return bool(np.isfinite(self.scores).all())

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, at: Sequence[int]) -> Observed:
        """Some of its prompts."""
        return Observed(
            tuple(self.prompts[i] for i in at), tuple(self.categories[i] for i in at), self.models,
            self.scores[list(at)], None if self.costs is None else self.costs[list(at)], self.source,
        )  # fmt: skip

    def by_category(self, catalog: Catalog) -> Problem:
        """Of its own categories; prompts of none are of `general`. Raises DataError where it has none at all."""
        if not any(self.categories):
            raise DataError(f"{self.source} has no categories: `moesaic llm fit` finds some, a mapping at a time")
        names, labels = np.unique([name or GENERAL for name in self.categories], return_inverse=True)
        return self.problem(catalog, np.eye(len(names))[labels], names.tolist())

    def problem(self, catalog: Catalog, weights: Floats, categories: Sequence[str], general: float = 0.0) -> Problem:
        """As `Problem.of_table`, of which it is the same where nothing is missing."""
        if self.complete:
            table = Table(self.prompts, self.categories, self.models, self.scores, self.costs, self.source)
            return Problem.of_table(table, catalog, weights, categories, general=general)
        names, held = list(categories), weights * (1 - general)
        if general:
            if GENERAL not in names:
                names, held = [*names, GENERAL], np.column_stack([held, np.zeros(len(self))])
            held[:, names.index(GENERAL)] += general
        found = catalog.scored(self.models, self.source)
        scores, errors = cells(held, self.scores)
        costs = None if self.costs is None else cells(held, self.costs)[0]
        shares = held.sum(axis=0) / held.sum()
        return Problem(
            tuple(names), tuple(model.name for model in found), shares, scores.clip(0, 1),
            np.array([model.size for model in found]), np.array([model.active_size for model in found]),
            None if costs is None else costs.clip(0), errors,
        )  # fmt: skip


def cells(weights: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Means (K, M) of values (N, M), NaN where missing, by weights (N, K); and their standard errors.

    Plain weighted means where nothing is missing. Errors as in `Problem.of_table`, over the prompts there are.
    """
    seen = np.isfinite(values)
    filled = np.where(seen, values, 0.0)
    total = weights.T @ seen
    count = total**2 / np.maximum((weights**2).T @ seen, 1e-12)
    means = (weights.T @ filled) / np.maximum(total, 1e-12)
    spread = (weights.T @ filled**2) / np.maximum(total, 1e-12) - means**2
    if not seen.all():
        means = (count * means + PRIOR * _additive(means, count)) / (count + PRIOR)
        count = count + 1
    return means, np.sqrt((spread.clip(0) * count + 0.25) / (count + 1) / count)


def _additive(means: Floats, count: Floats) -> Floats:
    """a_k + b_e, closest to the cells' means by their counts: (K, M)."""
    k, e = means.shape
    which = np.hstack([np.kron(np.eye(k), np.ones((e, 1))), np.kron(np.ones((k, 1)), np.eye(e))])
    root = np.sqrt(count.ravel())
    found, *_ = np.linalg.lstsq(which * root[:, None], means.ravel() * root, rcond=None)
    return np.asarray((which @ found).reshape(k, e), float)


def _is_log(file: Path) -> bool:
    first = next(islice(read_rows(file), 1), None)
    row = decode(first[1], first[0]) if first and file.suffix != ".csv" else None
    return isinstance(row, dict) and {"prompt", "model", "score"} <= row.keys()


def _log(file: Path) -> Observed:
    """Mean score, and cost, by prompt and model."""
    places: dict[str, int] = {}
    models: dict[str, int] = {}
    categories: list[str] = []
    entries: list[tuple[int, int, float, float]] = []
    for where, text in read_rows(file):
        row = decode(text, where)
        if not isinstance(row, dict):
            raise DataError(f"{where}: it is no object")
        prompt, model, category = (_text(row.get(name, "")) for name in ("prompt", "model", "category"))
        if prompt is None or not prompt.strip() or not model or category is None:
            raise DataError(f"{where}: prompt and model must be texts, and category where it is there")
        at = places.setdefault(encodable(prompt, "prompt", where), len(places))
        if at == len(categories):
            categories.append(encodable(category, "category", where))
        elif category and category != (categories[at] or category):
            raise DataError(f"{where}: its prompt was of category {categories[at][:80]!r} before")
        categories[at] = categories[at] or category
        cost = np.nan if row.get("cost") is None else _number(where, "cost", row["cost"], np.inf)
        entries.append((at, models.setdefault(model, len(models)), _number(where, "score", row.get("score"), 1), cost))
    if not entries:
        raise DataError(f"{file} holds no rows")
    rows, columns, scores, costs = (np.array(column) for column in zip(*entries, strict=True))
    order = sorted(models)
    columns = np.array([order.index(name) for name in models])[columns.astype(int)]
    shape, flat = (len(places), len(models)), rows.astype(int) * len(models) + columns
    known = np.isfinite(costs)
    return Observed(
        tuple(places), tuple(categories), tuple(order), _means(flat, scores, shape),
        _means(flat[known], costs[known], shape) if known.any() else None, str(file),
    )  # fmt: skip


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _means(flat: Any, values: Floats, shape: tuple[int, int]) -> Floats:
    """Of values at places of an array; NaN where there is none."""
    size = shape[0] * shape[1]
    count = np.bincount(flat, minlength=size)
    total = np.bincount(flat, values, size)
    return np.asarray(np.where(count, total / np.maximum(count, 1), np.nan).reshape(shape), float)


def _number(where: str, what: str, value: Any, most: float) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value <= min(most, sys.float_info.max):
        raise DataError(f"{where}: its {what} must be a number {'0 to 1' if most == 1 else 'from 0 on'}")
    return float(value)
