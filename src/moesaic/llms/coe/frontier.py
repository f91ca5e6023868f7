"""The whole frontier of budget and quality: each limit from which on a better mapping is possible, and the mapping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from moesaic.errors import ConfigError, suggest
from moesaic.llms.coe.mapping import solve
from moesaic.llms.coe.problem import UNITS, Budget, InfeasibleBudget, Problem, Solution
from moesaic.report import charts
from moesaic.report.page import alone
from moesaic.report.tables import number
from moesaic.report.text import Grid, percent

if TYPE_CHECKING:
    from markupsafe import Markup

Points = Sequence[tuple[float, Solution]]

_COLUMNS = {
    "resident": "resident, B", "active": "average active, B", "cost": "USD a million prompts", "experts": "models",
}  # fmt: skip
_NEAR = 1e-6
"""Of a limit: what the solver tells apart without doubt."""


def frontier(
    problem: Problem,
    over: str = "resident",
    budget: Budget | None = None,
    *,
    z: float = 0.0,
    step: float | None = None,
    time_limit: float | None = None,
) -> list[tuple[float, Solution]]:
    """(limit, best mapping from that limit on), upwards; a mapping takes all of its limit.

    Found from the top: the best mapping that takes the least of `over`, then the best that takes less than that, until
    none fits. So each is proved, and none is passed over that is further than `step` below the one above it.

    Args:
        over: which limit is moved: a key of `UNITS`. budget: the other limits, and how far up to go.
        z: as in `solve`. time_limit: seconds a point; see `Solution.status`.
        step: by default a millionth of the limit, so every breakpoint. Over average parameters or cost there may be
            many where categories and models are.
    Raises:
        InfeasibleBudget: nothing fits at all. ConfigError: no such limit, no costs, or a step below 0.
    """
    if over not in UNITS:
        raise ConfigError(f"over={over}: {suggest(over, UNITS)}")
    if over == "cost" and problem.costs is None:
        raise ConfigError("over=cost needs a table with costs: this one has none")
    if step is not None and not 0 <= step < math.inf:
        raise ConfigError(f"step={step} must be a number from 0 on")
    limits, found = budget or Budget(), list[tuple[float, Solution]]()
    ties = tuple(dict.fromkeys((over, "resident", "active")))
    while True:
        try:
            solution = solve(problem, limits, z=z, time_limit=time_limit, ties=ties)
        except InfeasibleBudget:
            if not found:
                raise
            return found[::-1]
        value = taken(solution, over)
        found.append((value, solution))
        change: dict[str, Any] = {over: max(0.0, value - max(step or 0.0, _NEAR * value))}
        limits = replace(limits, **change)
        if not value:
            return found[::-1]


def taken(solution: Solution, over: str) -> float:
    """What a mapping takes of a limit; NaN where costs are not known."""
    cost = math.nan if solution.average_cost is None else solution.average_cost
    return {
        "resident": solution.resident_size, "active": solution.average_active, "cost": cost,
        "experts": float(len(solution.resident)),
    }[over]  # fmt: skip


def rows(points: Points, over: str = "resident") -> list[dict[str, Any]]:
    """For a JSON file: a mapping of plain values for each point, its limit under the name of `over`'s."""
    return [{"over": over, "limit": value, **asdict(solution)} for value, solution in points]


def grid(points: Points, over: str = "resident") -> Grid:
    """A row for each point."""
    known = ("resident", "active") if points[0][1].average_cost is None else ("resident", "active", "cost")
    others = [name for name in known if name != over]
    held = [
        [_shown(value, over), percent(solution.score), *(_shown(taken(solution, name), name) for name in others),
         ", ".join(solution.resident) + (f" (gap {solution.gap:.1%})" if solution.status != "optimal" else "")]
        for value, solution in points
    ]  # fmt: skip
    legend = [
        (_COLUMNS[over], "from this limit on the mapping is the best"),
        ("score, %", "expected: means of what was recorded, by category (replayed)"),
    ]
    if any(solution.status != "optimal" for _, solution in points):
        legend.append(("gap", "how much better an unknown mapping could be, where time ran out"))
    header = [_COLUMNS[over], "score, %", *(_COLUMNS[name] for name in others), "models"]
    return Grid(f"Quality by {UNITS[over]}", header, held, legend)


def drawing(curves: Mapping[str, Sequence[tuple[float, float]]], over: str = "resident") -> Markup:
    """Staircases by name: (limit, score from it on), both as `frontier` has them; those of other rows, say, beside.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    each = 1e6 if over == "cost" else 1.0
    series = [
        charts.Line(name, [(each * limit, 100 * score) for limit, score in points], i)
        for i, (name, points) in enumerate(curves.items())
    ]
    said = "; ".join(
        f"{s.label} from {s.points[0][1]:.1f} at {s.points[0][0]:.4g} to {s.points[-1][1]:.1f} at {s.points[-1][0]:.4g}"
        for s in series
    )
    across = "USD on a million prompts" if over == "cost" else UNITS[over]
    title = f"Quality by {across}"
    return charts.lines(series, across=across, up="score, %", title=title, description=f"{said}.", stairs=True)


def svg(curves: Mapping[str, Sequence[tuple[float, float]]], over: str = "resident") -> str:
    """The drawing as a file of its own."""
    return alone(drawing(curves, over))


def _shown(value: float, over: str) -> str:
    return number(1e6 * value if over == "cost" else value, "{:,.4g}")
