"""What a mapping is chosen from: means of a table by category, by posterior, and of all prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moesaic.errors import ConfigError, DataError
from moesaic.llms.catalog import Catalog
from moesaic.llms.coe.mapping import Problem, solve
from moesaic.llms.tables import Table


def catalog() -> Catalog:
    priced: dict[str, Any] = {"input_price": 0, "output_price": 0}
    return Catalog.of(
        [{"name": f"m{i}", "aliases": [f"n{i}"], "parameters": 1 + i, "active": 0.5, **priced} for i in range(3)]
    )


def table(seed: int = 0, **given: Any) -> Table:
    rng = np.random.default_rng(seed)
    held: dict[str, Any] = {
        "prompts": tuple(map(str, range(40))), "categories": tuple(rng.choice(["x", "y", "z"], 40)),
        "models": ("n1", "m0"), "scores": rng.random((40, 2)), "costs": rng.random((40, 2)),
    }  # fmt: skip
    return Table(**{**held, **given})


def test_means_of_a_table_by_category() -> None:
    t = table()
    p = Problem.of_table(t, catalog())
    assert (p.categories, p.models, [*p.sizes], [*p.active]) == (("x", "y", "z"), ("m1", "m0"), [2, 1], [0.5, 0.5])
    assert t.costs is not None
    assert p.costs is not None
    assert p.errors is not None
    for i, name in enumerate(p.categories):
        at = [n for n, category in enumerate(t.categories) if category == name]
        assert p.shares[i] == pytest.approx(len(at) / 40)
        assert p.scores[i] == pytest.approx(t.scores[at].mean(axis=0))
        assert p.costs[i] == pytest.approx(t.costs[at].mean(axis=0))
        squares = ((t.scores[at] - t.scores[at].mean(axis=0)) ** 2).sum(axis=0)
        assert p.errors[i] == pytest.approx(np.sqrt((squares + 0.25) / (len(at) + 1) / len(at)))
    picked = Problem.of_table(t, catalog(), categories=["z", "x"])
    assert picked.categories == ("z", "x")
    assert picked.shares.sum() == pytest.approx(1)
    assert picked.scores == pytest.approx(p.scores[[2, 0]])


def test_means_of_a_table_by_posterior() -> None:
    t = table()
    q = np.random.default_rng(1).dirichlet(np.ones(2), 40)
    p = Problem.of_table(t, catalog(), q, ["a", "b"])
    for i in range(2):
        assert p.scores[i] == pytest.approx(sum(q[n, i] * t.scores[n] for n in range(40)) / q[:, i].sum())
    assert p.shares == pytest.approx(q.mean(axis=0))
    hard = np.array([[c == k for k in ("x", "y", "z")] for c in t.categories], float)
    sure, own = Problem.of_table(t, catalog(), hard, ["x", "y", "z"]), Problem.of_table(t, catalog())
    assert sure.scores == pytest.approx(own.scores)
    assert sure.errors == pytest.approx(own.errors)


def test_general_has_its_share_of_all_prompts() -> None:
    t = table()
    p, own = Problem.of_table(t, catalog(), general=0.2), Problem.of_table(t, catalog())
    assert p.categories == ("x", "y", "z", "general")
    assert p.shares == pytest.approx([*own.shares * 0.8, 0.2])
    assert p.scores[:3] == pytest.approx(own.scores)
    assert p.scores[3] == pytest.approx(t.scores.mean(axis=0))
    named = table(categories=("general",) * 10 + ("x",) * 30)
    both = Problem.of_table(named, catalog(), general=0.2)
    assert both.categories == ("general", "x")
    assert both.shares == pytest.approx([0.2 + 0.8 * 0.25, 0.6])


def test_tables_that_nothing_may_be_fitted_to_are_refused() -> None:
    for call, kind, said in (
        (lambda: Problem.of_table(table(evaluation_only=True), catalog()), DataError, "for evaluation only"),
        (lambda: Problem.of_table(table(), catalog(), categories=["x", "w"]), DataError, "no prompt of .* is of 'w'"),
        (lambda: Problem.of_table(table(models=("m0", "q")), catalog()), ConfigError, "no model 'q'"),
        (lambda: Problem.of_table(table(models=("m0", "n0")), catalog()), ConfigError, "each of them once"),
        (lambda: Problem.of_table(table(), catalog(), np.ones((40, 2))), ConfigError, "weights must be 40 x 3"),
        (lambda: Problem.of_table(table(), catalog(), -np.ones((40, 3))), ConfigError, "weights must be 40 x 3"),
        (lambda: Problem.of_table(table(), catalog(), general=1), ConfigError, "general=1 must be"),
    ):
        with pytest.raises(kind, match=said):
            call()


def test_luck_in_few_prompts_does_not_win_with_z() -> None:
    lucky = Table(tuple("abcdef"), ("x", *["y"] * 5), ("m0", "m1"), np.array([[1, 0.9], *[[0.5, 0.6]] * 5]))
    p = Problem.of_table(lucky, catalog())
    assert p.errors is not None
    scores = np.array([[0.9, 0.8]])
    one = Problem(("x",), p.models, np.ones(1), scores, p.sizes, p.active, None, np.array([[0.2, 0.01]]))
    assert [solve(one, z=z).expert["x"] for z in (0, 1)] == ["m0", "m1"]
    assert solve(one, z=1).score == pytest.approx(0.8)
    assert (p.errors[0] > 0.3).all()
