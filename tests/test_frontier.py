"""The whole frontier of budget and quality: against every mapping there is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from moesaic.llms.coe.frontier import drawing, frontier, grid, rows, svg, taken
from moesaic.llms.coe.mapping import Budget, InfeasibleBudget, Solution
from tests.exhaustive import LIMITS, every, fits, problem, score, takes


@pytest.mark.parametrize("over", LIMITS)
def test_the_frontier_is_every_mapping_that_no_other_beats_for_less(over: str) -> None:
    for seed in (20, 22, 23):
        p = problem(seed, 3, 4)
        b = Budget(experts=3) if over != "experts" else Budget(resident=float(p.sizes.sum()) * 0.9)
        found = frontier(p, over, b)
        wanted: dict[float, float] = {}
        best = -1.0
        for spent, points in sorted((takes(p, c)[over], -score(p, c)) for c in every(p) if fits(p, b, c)):
            if -points > best + 1e-9:
                wanted[spent] = best = -points
        assert [value for value, _ in found] == pytest.approx([*wanted]), seed
        assert [s.score for _, s in found] == pytest.approx([*wanted.values()]), seed
        assert all(taken(s, over) == value for value, s in found)
        coarse = frontier(p, over, b, step=found[-1][0])
        assert coarse[-1] == found[-1]
        assert len(coarse) <= 2


def test_a_frontier_of_nothing_says_why() -> None:
    with pytest.raises(InfeasibleBudget) as error:
        frontier(problem(20, 3, 3), "active", Budget(resident=1e-3))
    assert error.value.binding == "resident"


def test_the_frontier_as_data_table_and_drawing() -> None:
    p = problem(20, 4, 4)
    found = frontier(p)
    kept = json.loads(json.dumps(rows(found)))
    assert [(row["over"], row["limit"]) for row in kept] == [("resident", value) for value, _ in found]
    first = {k: v for k, v in kept[0].items() if k not in ("over", "limit")}
    assert Solution(**{**first, "resident": tuple(first["resident"])}) == found[0][1]
    made = grid(found)
    assert made.header == ["resident, B", "score, %", "average active, B", "USD a million prompts", "models"]
    assert [len(row) for row in made.rows] == [5] * len(found)
    assert made.rows[-1][1] == f"{100 * found[-1][1].score:.1f}"
    late = replace(found[0][1], status="time limit", gap=0.25)
    assert grid([(1.0, late)], "cost").rows[0][-1].endswith("(gap 25.0%)")
    assert "cost" not in " ".join(grid([(1.0, replace(late, average_cost=None))], "active").header)
    for curve in ([(v, s.score) for v, s in found], [(7.0, 0.5)]):
        assert svg({"train": curve, "test": [(v, s / 2) for v, s in curve]}).count("<svg") == 1
    assert "on a million prompts" in drawing({"x": [(1e-6, 0.5), (2e-6, 0.6)]}, "cost")


def test_a_score_is_drawn_as_holding_until_the_next() -> None:
    drawn = str(drawing({"x": [(1.0, 0.5), (2.0, 0.6), (4.0, 0.8)]}))
    (path, *_) = re.findall(r'<path d="M ([^"]*)"[^>]*><title>x</title>', drawn)
    corners = [tuple(map(float, point.split())) for point in path.split(" L ")]
    assert all((a[0] == b[0]) != (a[1] == b[1]) or a == b for a, b in pairwise(corners))
    assert len({y for _, y in corners}) == 3
