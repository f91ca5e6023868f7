"""Category to expert: against exhaustive search, and what holds of every budget."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from moesaic.errors import ConfigError
from moesaic.llms.coe import mapping
from moesaic.llms.coe.frontier import frontier
from moesaic.llms.coe.mapping import Budget, InfeasibleBudget, Problem, SolverFailure, solve
from moesaic.llms.tables import llmrouter_catalog, read_table
from tests.exhaustive import budget, conflict, exhaustive, problem, score, takes

DATA = Path(os.environ.get("MOESAIC_DATA") or Path(__file__).parents[2] / "shared" / "data") / "llm_routing"


@pytest.mark.parametrize("first", range(0, 320, 40))
def test_the_program_equals_exhaustive_search(
    first: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "_DIGITS", 1e5 if first % 80 else 5)  # names: one objective, or one a category
    solved = 0
    for seed in range(first, first + 40):
        p, z = problem(seed), (seed % 3 == 0) * 1.5
        b = budget(p, seed)
        wanted = exhaustive(p, b, z)
        if wanted is None:
            with pytest.raises(InfeasibleBudget) as error:
                solve(p, b, z=z)
            binding, least = conflict(p, b)
            assert error.value.binding == binding, seed
            assert error.value.least == pytest.approx(least), seed
            continue
        solved += 1
        found = solve(p, b, z=z)
        choice = tuple(p.models.index(found.expert[k]) for k in p.categories)
        assert found.expert == wanted, seed
        assert (found.status, found.gap) == ("optimal", 0.0)
        assert found.score == pytest.approx(score(p, choice))
        assert [found.resident_size, found.average_active, found.average_cost, len(found.resident)] == pytest.approx(
            [*takes(p, choice).values()]
        )
        assert set(found.resident) == set(wanted.values())
    assert 12 < solved < 40
    assert capfd.readouterr() == ("", "")


def test_small_differences_count() -> None:
    """Against dynamic programming over categories, where many mappings are within a thousandth of the best."""
    rng = np.random.default_rng(0)
    p = Problem(
        tuple(f"c{i:02}" for i in range(14)), tuple(f"m{i}" for i in range(6)), rng.dirichlet(np.full(14, 9)),
        0.6 + 1e-3 * rng.random((14, 6)), np.ones(6), rng.uniform(1, 9, 6),
    )  # fmt: skip
    spent, best = np.zeros(1), np.zeros(1)
    for k in range(14):
        spent = (spent[:, None] + p.shares[k] * p.active).ravel()
        best = (best[:, None] + p.shares[k] * p.scores[k]).ravel()
        order = np.lexsort((-best, spent))
        spent, best = spent[order], best[order]
        kept = best > np.append(-1.0, np.maximum.accumulate(best)[:-1])
        spent, best = spent[kept], best[kept]
    for limit in (2.0, 3.0, 4.0):
        assert solve(p, Budget(active=limit)).score == pytest.approx(best[spent <= limit].max(), abs=2e-9)


def test_models_of_a_million_and_of_a_trillion_parameters() -> None:
    p = problem(20, 3, 3)
    p = replace(p, sizes=np.array([1000.0, 0.001, 0.002]), active=np.array([1000.0, 0.001, 0.002]))
    for limit in (0.0015, 0.0025, 0.0031, 1000.0009):
        b = Budget(resident=limit)
        assert solve(p, b).expert == exhaustive(p, b, 0.0)
    assert frontier(p)[0][0] == 0.001
    with pytest.raises(InfeasibleBudget, match=r"resident=0.0009, where 0.001 is the least"):
        solve(p, Budget(resident=0.0009))


def test_without_a_limit_each_category_has_its_best() -> None:
    p = problem(8, 6, 5)
    for b in (None, Budget(), Budget(resident=float("inf"))):
        found = solve(p, b)
        assert found.expert == {k: p.models[int(p.scores[i].argmax())] for i, k in enumerate(p.categories)}


def test_more_is_never_worse() -> None:
    p = problem(10, 5, 5)
    top = {"resident": p.sizes.sum(), "active": p.active.max()}
    for name, most in top.items():
        least = p.sizes.min() if name == "resident" else p.active.min()
        scores = [solve(p, Budget(**{name: limit})).score for limit in np.linspace(least, most, 9)]
        assert scores == sorted(scores)
        assert scores[0] < scores[-1]


def test_the_order_of_categories_and_models_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    for seed in range(40, 52):
        p = problem(seed, 4, 4)
        b = budget(p, seed)
        rows, columns = rng.permutation(4), rng.permutation(4)
        assert p.costs is not None
        assert p.errors is not None
        other = Problem(
            tuple(p.categories[i] for i in rows), tuple(p.models[i] for i in columns), p.shares[rows],
            p.scores[np.ix_(rows, columns)], p.sizes[columns], p.active[columns], p.costs[np.ix_(rows, columns)],
        )  # fmt: skip
        try:
            found = solve(p, b)
        except InfeasibleBudget as error:
            with pytest.raises(InfeasibleBudget, match=f"^{error}$".replace("(", ".").replace(")", ".")):
                solve(other, b)
        else:
            assert solve(other, b).expert == found.expert


def test_a_model_that_is_there_twice_changes_nothing() -> None:
    p = problem(20, 4, 3)

    def doubled(name: str) -> Problem:
        at = [0, 1, 2, 0]
        return Problem((p.categories), (*p.models, name), p.shares, p.scores[:, at], p.sizes[at], p.active[at])

    b = Budget(resident=float(p.sizes.sum()) * 0.8)
    for name, takes_over in (("z", False), ("a", True)):
        found = solve(doubled(name), b)
        kept = {k: name if takes_over and m == p.models[0] else m for k, m in solve(p, b).expert.items()}
        assert found.expert == kept
        assert found.score == pytest.approx(solve(p, b).score)


def test_a_budget_that_nothing_fits_says_what_binds_and_what_would_fit() -> None:
    p = problem(20, 3, 3)
    with pytest.raises(
        InfeasibleBudget, match=r"no mapping fits resident=.* is the least .billions of resident"
    ) as error:
        solve(p, Budget(resident=float(p.sizes.min()) * 0.9, active=1e4))
    assert error.value.binding == "resident"
    assert error.value.least == {"resident": pytest.approx(p.sizes.min())}
    assert "\n" not in str(error.value)
    assert solve(p, Budget(resident=error.value.least["resident"])).resident_size == p.sizes.min()
    said = float(str(error.value).partition("where ")[2].split()[0])
    assert said >= p.sizes.min()
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.binding, again.least) == (str(error.value), "resident", error.value.least)
    with pytest.raises(InfeasibleBudget, match=r"active=0, .* and experts=0, where 1 is the least .models.$"):
        solve(p, Budget(active=0, experts=0))


def test_a_pin_that_does_not_fit_is_named() -> None:
    p = problem(20, 3, 3)
    largest = p.models[int(p.sizes.argmax())]
    b = Budget(resident=float(p.sizes.max()) * 0.99, pins={p.categories[0]: {largest: True}})
    with pytest.raises(InfeasibleBudget) as error:
        solve(p, b)
    assert error.value.binding in ("resident", "pins")
    assert error.value.least["resident"] == p.sizes.max()


def planted(monkeypatch: pytest.MonkeyPatch, times: float, wrong: int) -> list[int]:
    """A solver that names the model `wrong` for every category, so many times; then HiGHS again."""
    calls, true = [0], optimize.milp

    def milp(c: Any, **how: Any) -> Any:
        calls[0] += 1
        if calls[0] > times:
            return true(c, **how)
        x = np.zeros(len(c))
        x[wrong : len(c) - 3 : 3] = 0.9999
        x[len(c) - 3 + wrong] = 0.9999
        return SimpleNamespace(status=0, x=x, mip_dual_bound=-9e9, message="")

    monkeypatch.setattr(optimize, "milp", milp)
    return calls


def test_what_breaks_a_constraint_is_not_taken_from_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(20, 3, 3)
    largest, name = int(p.sizes.argmax()), p.models[int(p.sizes.argmax())]
    budgets = [
        Budget(resident=float(p.sizes.max()) * 0.999), Budget(active=float(p.active[largest]) * 0.999),
        Budget(pins={p.categories[1]: {name: False}}), Budget(experts=0), Budget(cost=0.0),
    ]  # fmt: skip
    assert p.costs is not None
    p = replace(p, costs=np.where(np.arange(3) == largest, 1e-6, 0.0) + np.zeros((3, 3)))
    for b in budgets:
        feasible = b.experts is None
        wanted = solve(p, b) if feasible else None
        with monkeypatch.context() as patch:
            planted(patch, 1, largest)
            if feasible:
                assert solve(p, b) == wanted
        with monkeypatch.context() as patch:
            calls = planted(patch, np.inf, largest)
            with pytest.raises(SolverFailure, match="broke a constraint 20 times"):
                solve(p, b)
            assert calls == [20]


def test_out_of_time_the_best_so_far_is_flagged_with_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(20, 3, 3)
    best, single = solve(p).score, (p.shares @ p.scores).max()
    found = solve(p, time_limit=0.0)
    assert (found.status, len(found.resident)) == ("time limit", 1)
    assert found.score == pytest.approx(single)
    assert found.score < best <= found.score * (1 + found.gap) + 1e-9
    forced = {k: {p.models[i]: True} for i, k in enumerate(p.categories)}
    assert set(solve(p, Budget(pins=forced), time_limit=0.0).expert.values()) == set(p.models)
    with monkeypatch.context() as patch:
        nothing = SimpleNamespace(status=1, x=None, mip_dual_bound=None)
        patch.setattr(optimize, "milp", lambda *_, **__: nothing)
        with pytest.raises(SolverFailure, match="in time: a longer time_limit"):
            solve(p, Budget(resident=float(p.sizes.max()), pins=forced), time_limit=9.0)
    true = optimize.milp

    def stopped(c: Any, **how: Any) -> Any:
        found = true(c, **how)
        found.status, found.mip_dual_bound = 1, found.mip_dual_bound * 1.1
        return found

    monkeypatch.setattr(optimize, "milp", stopped)
    kept = solve(p, Budget(active=float(p.active.mean())), time_limit=9.0)
    monkeypatch.undo()
    assert replace(kept, gap=0.0, status="optimal") == solve(p, Budget(active=float(p.active.mean())))
    assert (kept.status, kept.gap) == ("time limit", pytest.approx(0.1))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"resident": -1}, "resident=-1 must be at least 0 .billions"),
        ({"cost": float("nan")}, "cost=nan must be"),
        ({"pins": {"x": {}}}, "pins: no category 'x'; "),
        ({"pins": {"c0": {"x": True}}}, "pins: no model 'x'; "),
        ({"pins": {"c0": {"m0": True, "m1": True}}}, "c0 needs one model"),
        ({"pins": {"c0": {"m0": False, "m1": False, "m2": False}}}, "c0 needs one model"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        solve(problem(20, 3, 3), Budget(**given))


def test_settings_that_mean_nothing_are_refused() -> None:
    p = problem(20, 3, 3)
    bare = replace(p, costs=None, errors=None)
    for call, said in (
        (lambda: solve(p, z=-1), "z=-1 must be"),
        (lambda: solve(bare, z=1), "0 where scores have no standard errors"),
        (lambda: solve(bare, Budget(cost=1)), "this one has none"),
        (lambda: solve(bare, ties=("cost",)), "cost cannot be made least"),
        (lambda: frontier(bare, "cost"), "over=cost needs a table with costs"),
        (lambda: frontier(p, "size"), "over=size: "),
        (lambda: frontier(p, step=-1), "step=-1 must be"),
        (lambda: replace(p, shares=p.shares * 2), "sum to 1"),
        (lambda: replace(p, models=("a", "a", "b")), "each of them once"),
        (lambda: replace(p, scores=p.scores.T[:2]), "scores must be 3 x 3"),
        (lambda: replace(p, sizes=p.sizes * 0), "sizes must be above 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            call()


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the recorded tables (MOESAIC_DATA)")
def test_true_categories_on_llmrouters_table() -> None:
    """As in the specification, but for 75: gsm8k is tied there, and we take the smaller model."""
    models = llmrouter_catalog(DATA / "llmrouter")
    train, test = (read_table(DATA / "llmrouter" / f"{name}.json") for name in ("train", "test"))
    p = Problem.of_table(train, models)
    for limit, wanted in ((7, 0.423), (15, 0.522), (24, 0.562), (60, 0.539), (75, 0.574), (110, 0.593), (216, 0.587)):
        found = solve(p, Budget(resident=limit))
        at = [test.models.index(found.expert[category]) for category in test.categories]
        assert test.scores[np.arange(len(test)), at].mean() == pytest.approx(wanted, abs=5e-4), limit
    with pytest.raises(InfeasibleBudget, match="resident=5, where 7 is the least"):
        solve(p, Budget(resident=5))
