"""Category to expert, solved exactly: which models stand ready, and which of them answers each category.

    max  sum_k w_k s_ke x_ke                        w_k share of prompts, s_ke mean score (less z standard errors)
    s.t. sum_e x_ke = 1,  x_ke <= y_e               an expert a category, that stands ready
         sum_e p_e y_e <= B                         resident parameters
         sum_ke w_k a_e x_ke <= A                   active parameters, of an average prompt
         sum_ke w_k c_ke x_ke <= C                  USD, of an average prompt
         sum_e y_e <= N,  x_ke pinned to 0 or 1     x, y all 0 or 1

A reconstruction of Composition of Experts (arXiv 2412.01868), whose formulas are not public; standard errors and ties
are ours. Ties: the least resident parameters, then the least active, then in the order of the categories' names the
expert whose name comes first. Solved by HiGHS (`scipy.optimize.milp`), one objective after another, each holding what
those before it reached. What it returns is rounded and checked again: it has returned points that break a constraint
(scipy#22812).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, MissingDependency, MoesaicError, suggest
from moesaic.llms.coe.problem import SLACK, UNITS, Budget, InfeasibleBudget, Problem, Solution
from moesaic.llms.tables import Floats

__all__ = ["Budget", "InfeasibleBudget", "Problem", "Solution", "SolverFailure", "solve"]

_OBJECTIVE, _LIMIT = 1e4, 1e2
"""To what the largest coefficient of an objective, and a limit, are scaled. HiGHS stops within 1e-6 of the optimum and
lets each row be broken by 1e-6; with rows of 1e3 and more it prints a line about repairs now and then (HiGHS#2783)."""
_CUTS = 20
"""How many points that break a constraint are cut off before the solver is given up."""
_DIGITS = 1e5
"""Up to which expert's names, as digits of a number, make one objective."""

Choice = NDArray[np.int64]
Rows = list[tuple[Floats, float]]
"""Upper bounds: coefficients of x (K x E, by category) and y (E), and the limit."""


class SolverFailure(MoesaicError):
    """The solver found no mapping in time, or returned what breaks a constraint."""


@dataclass(frozen=True)
class _Found:
    """A model for each category (K,), if any was found; what no mapping's objective can fall below; whether proved."""

    choice: Choice | None
    bound: float
    proved: bool

    @property
    def mapping(self) -> Choice:
        """Of what is proved."""
        assert self.choice is not None
        return self.choice


def solve(
    problem: Problem,
    budget: Budget | None = None,
    *,
    z: float = 0.0,
    time_limit: float | None = None,
    ties: Sequence[str] = ("resident", "active"),
) -> Solution:
    """The best mapping within a budget.

    Args:
        z: standard errors that are taken off each score, so that luck in few prompts does not win (ours).
        time_limit: seconds; the best mapping until then, with its gap. Ties may be left as they are.
        ties: of what the least is taken among equals, in this order, before names decide: keys of `UNITS`.
    Raises:
        InfeasibleBudget: no mapping fits; names the constraint that binds. ConfigError: pins or z that cannot be.
        SolverFailure: nothing was found in time, or nothing that holds. MissingDependency: scipy is not installed.
    """
    program = _Program(problem, budget or Budget(), z)
    if unknown := [name for name in ties if name not in program.vectors]:
        raise ConfigError(f"{unknown[0]} cannot be made least: {suggest(unknown[0], program.vectors)}")
    until = math.inf if time_limit is None else monotonic() + time_limit
    best = program.least(program.loss, until=until)
    if best is None:
        raise program.explained()
    if not best.proved:
        return program.incumbent(best)
    choice, reached, rows = best.mapping, program.loss, Rows()
    for name in ties:
        rows.append(_loosened(reached, program.value(reached, choice)))
        found = program.least(program.vectors[name], rows, until=until)
        if found is None or not found.proved:
            return problem.solution(choice)
        choice, reached = found.mapping, program.vectors[name]
    return problem.solution(program.first(choice, [*rows, _loosened(reached, program.value(reached, choice))], until))


class _Program:
    """The mixed-integer program of a problem and a budget."""

    def __init__(self, problem: Problem, budget: Budget, z: float) -> None:
        if not 0 <= z < math.inf or (z and problem.errors is None):
            raise ConfigError(f"z={z} must be a number from 0 on, and 0 where scores have no standard errors")
        if budget.cost is not None and problem.costs is None:
            raise ConfigError("cost= needs a table with costs: this one has none")
        self.problem, self.budget = problem, budget
        self.allowed = problem.allowed(budget)
        k, e = problem.scores.shape
        share, none = problem.shares[:, None], np.zeros(e)
        scores = problem.scores - (z * problem.errors if problem.errors is not None and z else 0.0)
        self.loss = np.append(-share * scores, none)
        self.vectors = {
            "resident": np.append(np.zeros(k * e), problem.sizes),
            "active": np.append(share * problem.active, none),
            "experts": np.append(np.zeros(k * e), np.ones(e)),
        }
        if problem.costs is not None:
            self.vectors["cost"] = np.append(share * problem.costs, none)

    def rows(self, without: Iterable[str] = ()) -> Rows:
        """The budget's limits, or some of them."""
        limits = {name: limit for name, limit in self.budget.limits().items() if name not in without}
        return [_loosened(self.vectors[name], limit) for name, limit in limits.items()]

    def first(self, choice: Choice, rows: Rows, until: float) -> Choice:
        """Of the mappings that keep to `rows`, as `choice` does, the first by names: as far as there is time."""
        k, e = self.problem.scores.shape
        rank, left = np.argsort(np.argsort(np.array(self.problem.models))), self.allowed.copy()
        order, together = np.argsort(np.array(self.problem.categories)), max(1, int(math.log(_DIGITS, max(e, 2))))
        for block in (order[at : at + together] for at in range(0, k, together)):
            digits = np.zeros((k, e))
            digits[block] = rank * float(e) ** np.arange(len(block))[::-1, None]
            found = self.least(np.append(digits, np.zeros(e)), rows, allowed=left, until=until)
            if found is None or not found.proved:
                break
            choice = found.mapping
            left[block] = np.arange(e) == choice[block, None]
        return choice

    def value(self, vector: Floats, choice: Choice) -> float:
        """Of a row or an objective, where the models that are used stand ready and no others."""
        k, e = self.problem.scores.shape
        return float(vector[np.arange(k) * e + choice].sum() + vector[k * e + np.unique(choice)].sum())

    def holds(self, choice: Choice, rows: Rows, allowed: NDArray[np.bool_]) -> bool:
        """Whether a mapping, as it is rounded, keeps to every constraint."""
        pinned = allowed[np.arange(len(choice)), choice].all()
        return bool(pinned) and all(self.value(vector, choice) <= limit for vector, limit in rows)

    def least(
        self,
        objective: Floats,
        more: Rows | None = None,
        *,
        allowed: NDArray[np.bool_] | None = None,
        without: Iterable[str] = (),
        until: float = math.inf,
    ) -> _Found | None:
        """The mapping of the least objective; None where none keeps to all constraints but those left out.

        Args:
            allowed: (K, E) which experts a category may have; what the pins leave where None.
        Raises:
            SolverFailure: what the solver returns breaks constraints again and again.
        """
        k, e = self.problem.scores.shape
        rows, without = [*self.rows(without), *(more or [])], {*without}
        allowed = self.allowed if allowed is None else allowed
        allowed = np.ones_like(allowed) if "pins" in without else allowed
        cuts: Rows = []
        for _ in range(_CUTS):
            result = self._milp(objective, [*rows, *cuts], allowed, until)
            if result.status == 2:
                return None
            if result.status not in (0, 1):
                raise SolverFailure(f"the solver gave up: {' '.join(str(result.message).split())[:200]}")
            bound = (result.mip_dual_bound or -math.inf) * _largest(objective) / _OBJECTIVE
            if result.x is None:
                return _Found(None, bound, False)
            choice = np.asarray(result.x)[: k * e].reshape(k, e).argmax(axis=1)
            if self.holds(choice, rows, allowed):
                return _Found(choice, bound, result.status == 0)
            cut = np.zeros(k * e + e)
            cut[np.arange(k) * e + choice] = 1.0
            cuts.append((cut, k - 1.0))
        raise SolverFailure(
            f"what the solver returned broke a constraint {_CUTS} times over: loosen the budget a little"
        )

    @cached_property
    def _shape(self) -> Any:
        """One expert a category, and each of them ready: a sparse matrix over x and y, and its limits."""
        try:
            from scipy import optimize, sparse
        except ImportError:
            raise MissingDependency("scipy", "llms") from None
        k, e = self.problem.scores.shape
        x = np.arange(k * e)
        row = np.concatenate([x // e, k + x, k + x])
        column = np.concatenate([x, x, k * e + x % e])
        value = np.concatenate([np.ones(2 * k * e), -np.ones(k * e)])
        matrix = sparse.csc_array((value, (row, column)), shape=(k + k * e, k * e + e))
        one, none = np.ones(k), np.zeros(k * e)
        return optimize.LinearConstraint(matrix, np.append(one, none - np.inf), np.append(one, none))

    def _milp(self, objective: Floats, rows: Rows, allowed: NDArray[np.bool_], until: float) -> Any:
        held = [self._shape]
        from scipy import optimize

        if rows:
            size = np.array([_size(vector, limit) for vector, limit in rows])
            left = np.array([np.minimum(vector, 2 * most) for (vector, _), most in zip(rows, size, strict=True)])
            upper = [_LIMIT * limit / most for (_, limit), most in zip(rows, size, strict=True)]
            held.append(optimize.LinearConstraint(_LIMIT / size[:, None] * left, -np.inf, upper))
        options: dict[str, float] = {"mip_rel_gap": 0.0}
        if until < math.inf:
            options["time_limit"] = max(until - monotonic(), 0.0)
        return optimize.milp(
            objective * (_OBJECTIVE / _largest(objective)), integrality=1, constraints=held, options=options,
            bounds=optimize.Bounds(0, np.append(allowed, np.ones(allowed.shape[1]))),
        )  # fmt: skip

    def incumbent(self, found: _Found) -> Solution:
        """The better of what was found in time and any one model for all that is not pinned elsewhere."""
        forced = self.allowed.sum(axis=1) == 1
        single = [np.where(forced, self.allowed.argmax(axis=1), e) for e in range(len(self.problem.models))]
        choices = [choice for choice in (found.choice, *single) if choice is not None]
        fitting = [choice for choice in choices if self.holds(choice, self.rows(), self.allowed)]
        if not fitting:
            raise SolverFailure("no mapping was found in time: a longer time_limit")
        best = min(fitting, key=lambda choice: self.value(self.loss, choice))
        k, e = self.problem.scores.shape
        loss, each = self.value(self.loss, best), self.loss[: k * e].reshape(k, e)
        bound = max(found.bound, float(np.where(self.allowed, each, np.inf).min(axis=1).sum()))
        gap = max(0.0, loss - bound) / max(abs(loss), SLACK)
        return self.problem.solution(best, gap, "time limit")

    def explained(self) -> InfeasibleBudget:
        """Why nothing fits: the fewest constraints without which something would, and what they would have to be."""
        limits = self.budget.limits()
        names = [*limits, *(["pins"] if self.budget.pins else [])]
        every = (drop for count in range(1, len(names) + 1) for drop in combinations(names, count))
        drop = next(drop for drop in every if self.least(self.loss, without=drop) is not None)
        least = {}
        for name in (name for name in drop if name != "pins"):
            found = self.least(self.vectors[name], without=drop)
            assert found is not None
            least[name] = self.value(self.vectors[name], found.mapping)
        said = [f"{name}={limits[name]:g}, where {_up(v)} is the least ({UNITS[name]})" for name, v in least.items()]
        said += ["the pins"] * ("pins" in drop)
        beside = [name for name in names if name not in drop]
        kept = f", beside {' and '.join(beside)}" if beside else ""
        return InfeasibleBudget(f"no mapping fits {'; and '.join(said)}{kept}", " and ".join(drop), least)


def _largest(vector: Floats) -> float:
    """Coefficient; 1 where all are 0."""
    return float(np.abs(vector).max()) or 1.0


def _size(vector: Floats, limit: float) -> float:
    """What a row is measured by: its limit, since what is above it cannot be taken, however far above it is."""
    return limit if limit > 0 and vector.min() >= 0 else max(_largest(vector), abs(limit))


def _loosened(vector: Floats, limit: float) -> tuple[Floats, float]:
    """A row, with what rounding may do."""
    return vector, limit + SLACK * _size(vector, limit)


def _up(value: float) -> str:
    """A figure to six digits, that is not below it."""
    text = f"{value:.6g}"
    return text if float(text) >= value else f"{value + abs(value) * 5e-6:.6g}"
