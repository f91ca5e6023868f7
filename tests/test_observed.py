"""Logs, in which not every model saw every prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.errors import DataError
from moesaic.llms.coe.fit import Fitting, fit
from moesaic.llms.coe.observed import PRIOR, Observed, cells
from moesaic.llms.coe.problem import GENERAL, Budget, Problem
from tests.toy_prompts import MODELS, WORDS, catalog, prompts, table

NEW, NEW_KINDS = prompts(60, seed=1)


def written(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


def logged(share: float, seed: int = 0) -> list[dict[str, Any]]:
    """Of a table's outcomes, some, as logs have them."""
    t, draw = table(240), np.random.default_rng(seed)
    return [
        {"prompt": prompt, "model": model, "score": float(t.scores[n, m]), "cost": float(t.costs[n, m]), "category": k}
        for n, (prompt, k) in enumerate(zip(t.prompts, t.categories, strict=True))
        for m, model in enumerate(MODELS)
        if draw.random() < share
    ]  # fmt: skip


def test_logs_are_means_by_prompt_and_model(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "model": "y", "score": 1}, {"prompt": "a", "model": "y", "score": 0, "cost": 2},
        {"prompt": "b", "model": "x", "score": 0.5, "cost": None}, {"prompt": "a", "model": "x", "score": 1, "cost": 4},
    ]  # fmt: skip
    found = Observed.read(written(tmp_path / "log.jsonl", rows))
    assert (found.prompts, found.models, found.categories) == (("a", "b"), ("x", "y"), ("", ""))
    assert found.scores == pytest.approx(np.array([[1, 0.5], [0.5, np.nan]]), nan_ok=True)
    assert found.costs == pytest.approx(np.array([[4, 2], [np.nan, np.nan]]), nan_ok=True)
    assert not found.complete


def test_prompts_without_a_category_are_of_general_where_others_have_one(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "model": "all-9b", "score": 1, "category": "k"},
        {"prompt": "a", "model": "bird-1b", "score": 0}, {"prompt": "b", "model": "all-9b", "score": 1},
        {"prompt": "c", "model": "bird-1b", "score": 1, "category": ""},
    ]  # fmt: skip
    found = Observed.read(written(tmp_path / "log.jsonl", rows))
    assert found.categories == ("k", "", "")
    problem = found.by_category(catalog())
    assert (problem.categories, problem.shares.tolist()) == ((GENERAL, "k"), pytest.approx([2 / 3, 1 / 3]))
    with pytest.raises(DataError, match="has no categories: `moesaic llm fit` finds some"):
        Observed.read(written(tmp_path / "log.jsonl", [rows[2]])).by_category(catalog())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{\n", ":2"),
        ([], ":2: it is no object"),
        ({"prompt": "a", "score": 1}, ":2: prompt and model must be texts"),
        ({"prompt": " ", "model": "m", "score": 1}, ":2: prompt and model"),
        ({"prompt": "a", "model": 5, "score": 1}, ":2: prompt and model"),
        ({"prompt": "a", "model": "m"}, ":2: its score must be a number 0 to 1"),
        ({"prompt": "a", "model": "m", "score": "1"}, ":2: its score must be"),
        ({"prompt": "a", "model": "m", "score": 1.5}, ":2: its score must be"),
        ({"prompt": "a", "model": "m", "score": 1, "cost": -1}, ":2: its cost must be a number from 0 on"),
        ({"prompt": "a", "model": "m", "score": 1, "cost": 1e999}, ":2: its cost must be"),
        ({"prompt": "a", "model": "m", "score": 1, "cost": 10**400}, ":2: its cost must be"),
        ({"prompt": "a", "model": "m", "score": 10**400}, ":2: its score must be"),
        ({"prompt": "a", "model": "m", "score": 1, "category": "u"}, ":2: its prompt was of category 'k' before"),
    ],
)
def test_a_bad_line_of_a_log_is_named(tmp_path: Path, row: Any, said: str) -> None:
    first = {"prompt": "a", "model": "m", "score": 1, "category": "k"}
    with pytest.raises(DataError, match=said) as error:
        Observed.read(written(tmp_path / "log.jsonl", [first, row]))
    assert "\n" not in str(error.value)


def test_a_table_is_read_as_one_and_the_problem_is_that_of_the_table(tmp_path: Path) -> None:
    t = table(60)
    rows = [
        {"prompt": p, "category": k, "scores": dict(zip(MODELS, s, strict=True))}
        for p, k, s in zip(t.prompts, t.categories, t.scores.tolist(), strict=True)
    ]
    found = Observed.read(written(tmp_path / "table.jsonl", rows))
    assert found.complete
    assert np.array_equal(found.scores, t.scores)
    weights = np.random.default_rng(0).random((60, 3))
    ours = found.problem(catalog(), weights, [*WORDS], general=0.1)
    theirs = Problem.of_table(table(60), catalog(), weights, [*WORDS], general=0.1)
    assert np.array_equal(ours.scores, theirs.scores)


def test_cells_of_whole_tables_are_those_of_a_problem() -> None:
    t = table(60)
    weights = np.random.default_rng(0).random((60, 3))
    problem = Problem.of_table(t, catalog(), weights, [*WORDS])
    means, errors = cells(weights, t.scores)
    assert means == pytest.approx(problem.scores)
    assert errors == pytest.approx(problem.errors)


def test_few_prompts_lean_on_what_is_known_otherwise_and_none_wholly() -> None:
    rng = np.random.default_rng(0)
    kind = np.repeat(np.arange(2), 200)
    true = np.array([[0.2, 0.6], [0.4, 0.8]])  # of category k and model e: a_k + b_e
    values = (rng.random((400, 2)) < true[kind]).astype(float)
    values[200:, 1] = np.nan  # the second model saw nothing of the second category
    values[203, 1] = 0.0  # but one prompt, on which it failed
    means, errors = cells(np.eye(2)[kind], values)
    assert means[1, 1] == pytest.approx(0.8 * PRIOR / (PRIOR + 1), abs=0.12)
    assert means[:, 0] == pytest.approx(true[:, 0], abs=0.1)
    assert errors[1, 1] > 3 * errors[0, 1]
    values[203, 1] = np.nan
    means, errors = cells(np.eye(2)[kind], values)
    assert means[1, 1] == pytest.approx(0.8, abs=0.12)
    assert errors[1, 1] == pytest.approx(0.5, abs=0.2)


def test_a_model_that_saw_easy_prompts_only_is_not_thought_better_for_it() -> None:
    kind = np.repeat(np.arange(2), 300)
    values = (np.random.default_rng(1).random((600, 2)) < np.array([[0.9], [0.2]])[kind]).astype(float)
    values[295:, 1] = np.nan  # alike, but the second was asked what is easy
    means, _ = cells(np.eye(2)[kind], values)
    assert abs(means[1, 1] - means[1, 0]) < 0.1


@pytest.mark.parametrize("map", ["hard", "posterior", "blend"])
def test_a_composition_of_half_a_log_sends_most_prompts_where_the_whole_would(tmp_path: Path, map: str) -> None:
    log = Observed.read(written(tmp_path / "log.jsonl", logged(0.5)))
    settings = Fitting(map=map, encoder="tfidf", uncertainty="entropy", accuracy=0.9)
    composition = fit(log, catalog(), Budget(resident=6), settings)
    right = {"birds": "bird-1b", "metal": "metal-2b", "sums": "sums-3b"}
    found = [d.expert == right[kind] for d, kind in zip(composition.decide_many(NEW), NEW_KINDS, strict=True)]
    assert np.mean(found) > 0.8
    assert 0.3 < composition.about["held_out"]["seen"] < 0.7
    assert GENERAL in composition.solution.expert
