"""What a mapping of categories to experts is chosen from, within what, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, DataError, suggest
from moesaic.llms.catalog import Catalog
from moesaic.llms.tables import Floats, Table

GENERAL = "general"
"""The category of what is of no other, or not surely."""
SLACK = 1e-9
"""What rounding may do, of a limit."""
UNITS = {
    "resident": "billions of resident parameters",
    "active": "billions of active parameters on an average prompt",
    "cost": "USD on an average prompt",
    "experts": "models",
}
"""What each limit of a budget counts."""


@dataclass(frozen=True)
class Budget:
    """What a mapping may take; None is no limit.

    Attributes:
        resident: billions of parameters of all models that answer anything.
        active: billions of active parameters, and cost: USD, both of an average prompt.
        experts: how many models.
        pins: by category and model: True, it answers it; False, it must not (policy, licence).

    Raises:
        ConfigError: a limit below 0 or no number.
    """

    resident: float | None = None
    active: float | None = None
    cost: float | None = None
    experts: int | None = None
    pins: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, limit in ((name, getattr(self, name)) for name in UNITS):
            if limit is not None and not limit >= 0:
                raise ConfigError(f"{name}={limit} must be at least 0 ({UNITS[name]})")

    def limits(self) -> dict[str, float]:
        """Those that there are."""
        found = {name: getattr(self, name) for name in UNITS}
        return {name: float(limit) for name, limit in found.items() if limit is not None and limit < math.inf}


class InfeasibleBudget(ConfigError):
    """No mapping fits; without the constraints that `binding` names, the others can be met.

    Attributes:
        binding: one constraint, or the fewest that must give way together: "resident", "active and pins".
        least: by constraint, the least limit that can be met beside all that are not binding.
    """

    def __init__(self, message: str, binding: str, least: Mapping[str, float]) -> None:
        super().__init__(message)
        self.binding, self.least = binding, dict(least)

    def __reduce__(self) -> tuple[type, tuple[str, str, dict[str, float]]]:
        return type(self), (str(self), self.binding, self.least)


@dataclass(frozen=True)
class Solution:
    """Which model answers which category.

    Attributes:
        expert: model by category. resident: the models that answer any, in the problem's order.
        score: mean over prompts, expected. average_active: billions a prompt. average_cost: USD a prompt.
        resident_size: billions.
        gap: by how much of its objective a better mapping could be better; 0 where it is optimal.
    """

    expert: Mapping[str, str]
    resident: tuple[str, ...]
    score: float
    average_active: float
    average_cost: float | None
    resident_size: float
    gap: float = 0.0
    status: Literal["optimal", "time limit"] = "optimal"


@dataclass(frozen=True, eq=False)
class Problem:
    """K categories of prompts and E models.

    Attributes:
        shares: (K,) of prompts, above 0, sum 1. scores: (K, E) means. errors: (K, E) their standard errors.
        sizes: (E,) billions resident. active: (E,) billions a token passes. costs: (K, E) USD a prompt.

    Raises:
        ConfigError: names that are there twice, shapes that do not fit, figures that are none.
    """

    categories: tuple[str, ...]
    models: tuple[str, ...]
    shares: Floats
    scores: Floats
    sizes: Floats
    active: Floats
    costs: Floats | None = None
    errors: Floats | None = None

    def __post_init__(self) -> None:
        k, e = len(self.categories), len(self.models)
        if not k or not e or len({*self.categories}) < k or len({*self.models}) < e:
            raise ConfigError("a mapping needs categories and models, each of them once")
        shapes = {"shares": (k,), "scores": (k, e), "sizes": (e,), "active": (e,), "costs": (k, e), "errors": (k, e)}
        for name, shape in shapes.items():
            held, signed = getattr(self, name), name == "scores"
            if held is None:
                continue
            if held.shape != shape or not np.isfinite(held).all() or not (signed or (held >= 0).all()):
                raise ConfigError(
                    f"{name} must be {' x '.join(map(str, shape))} numbers{'' if signed else ' from 0 on'}"
                )
        if (self.shares <= 0).any() or abs(self.shares.sum() - 1) > 1e-6:
            raise ConfigError("shares must be above 0 and sum to 1; leave out a category that no prompt is of")
        if (self.sizes <= 0).any():
            raise ConfigError("sizes must be above 0 (billions of parameters)")

    @classmethod
    def of_table(
        cls,
        table: Table,
        catalog: Catalog,
        weights: Floats | None = None,
        categories: Sequence[str] | None = None,
        *,
        general: float = 0.0,
    ) -> Problem:
        """Means by category of what was recorded.

        Standard errors are of weighted means, over Kish's effective number n of prompts, with one prompt more that has
        the largest variance a score can have, 1/4: a category of few prompts is never sure (ours).

        Args:
            weights: (N, K) how much of each prompt is of each category, such as a router's probabilities; the table's
                own categories where None.
            categories: K names; the table's, sorted, where None.
            general: the share of prompts, whichever they are, that the category `general` gets beside its own.
        Raises:
            DataError: the table is for evaluation only, or a category has no prompt. ConfigError: a model that the
                catalog lacks, weights that do not fit.
        """
        if table.evaluation_only:
            raise DataError(f"{table.source or 'the table'} is for evaluation only: fit to another")
        if not 0 <= general < 1:
            raise ConfigError(f"general={general} must be a share of prompts, from 0 to below 1")
        known = sorted({*table.categories}) if categories is None else list(categories)
        held = _weights(table, weights, known) * (1 - general)
        if general:
            if GENERAL not in known:
                known, held = [*known, GENERAL], np.column_stack([held, np.zeros(len(table))])
            held[:, known.index(GENERAL)] += general
        total = held.sum(axis=0)
        if not total.all():
            raise DataError(f"no prompt of {table.source or 'the table'} is of {known[int(total.argmin())]!r}")
        each = held / total
        scores = each.T @ table.scores
        count = 1 / np.square(each).sum(axis=0)[:, None]
        spread = each.T @ np.square(table.scores) - np.square(scores)
        found = catalog.scored(table.models, table.source)
        return cls(
            tuple(known), tuple(model.name for model in found), total / total.sum(), scores,
            np.array([model.size for model in found]), np.array([model.active_size for model in found]),
            None if table.costs is None else each.T @ table.costs,
            np.sqrt((spread.clip(0) * count + 0.25) / (count + 1) / count),
        )  # fmt: skip

    def solution(
        self, choice: NDArray[np.int64], gap: float = 0.0, status: Literal["optimal", "time limit"] = "optimal"
    ) -> Solution:
        """Of a model's number for each category: (K,)."""
        spent, rows = self.spent(choice), np.arange(len(choice))
        return Solution(
            {name: self.models[e] for name, e in zip(self.categories, choice, strict=True)},
            tuple(self.models[e] for e in sorted({*choice.tolist()})), float(self.shares @ self.scores[rows, choice]),
            spent["active"], spent.get("cost"), spent["resident"], gap, status,
        )  # fmt: skip

    def spent(self, choice: NDArray[np.int64]) -> dict[str, float]:
        """What a mapping takes of each limit; of cost only where that is known."""
        used, rows = np.unique(choice), np.arange(len(choice))
        spent = {
            "resident": self.sizes[used].sum(), "active": self.shares @ self.active[choice], "experts": len(used),
            **({} if self.costs is None else {"cost": self.shares @ self.costs[rows, choice]}),
        }  # fmt: skip
        return {name: float(value) for name, value in spent.items()}

    def allowed(self, budget: Budget) -> NDArray[np.bool_]:
        """(K, E): what the budget's pins leave. Raises ConfigError where they name nothing, or leave nothing."""
        left = np.ones(self.scores.shape, bool)
        for category, pins in budget.pins.items():
            if category not in self.categories:
                raise ConfigError(f"pins: no category '{category}'; {suggest(category, self.categories)}")
            if unknown := [model for model in pins if model not in self.models]:
                raise ConfigError(f"pins: no model '{unknown[0]}'; {suggest(unknown[0], self.models)}")
            named = np.array([pins.get(model) is True for model in self.models])
            row = named if named.any() else np.array([pins.get(model, True) for model in self.models])
            if named.sum() > 1 or not row.any():
                raise ConfigError(
                    f"pins: {category} needs one model that answers it: at most one true, and not all false"
                )
            left[self.categories.index(category)] = row
        return left


def _weights(table: Table, weights: Floats | None, categories: Sequence[str]) -> Floats:
    """(N, K) how much of each prompt is of each category; rows that are of none count for none."""
    if weights is None:
        return (np.array(table.categories)[:, None] == np.array(categories)).astype(float)
    if weights.shape != (len(table), len(categories)) or not np.isfinite(weights).all() or (weights < 0).any():
        raise ConfigError(f"weights must be {len(table)} x {len(categories)} numbers from 0 on: prompts by categories")
    return np.asarray(weights, float)
