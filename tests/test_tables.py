"""Files of recorded outcomes: each published form, our own, and what is wrong with a row in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic.errors import ConfigError, DataError
from moesaic.llms.tables import Table, llmrouter_catalog, read_table

DATA = Path(os.environ.get("MOESAIC_DATA") or Path(__file__).parents[2] / "shared" / "data") / "llm_routing"
recorded = pytest.mark.skipif(not DATA.is_dir(), reason="needs the recorded tables (MOESAIC_DATA)")
OWN = {"prompt": "1 + 1", "category": "sums", "scores": {"b": 1, "a": 0.25}, "costs": {"a": 1e-6, "b": 2e-6}}
ARENA = {"global_index": "Set_A_7", "question": "q", "models": {"b": {"score": -0.1, "cost": 1e-5}}}


def written(folder: Path, name: str, *rows: Any) -> Path:
    file = folder / name
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return file


def same(one: Table, other: Table) -> bool:
    costs = one.costs is other.costs is None or np.array_equal(one.costs, other.costs)  # type: ignore[arg-type]
    named = [(t.prompts, t.categories, t.models, t.evaluation_only) for t in (one, other)]
    return named[0] == named[1] and np.array_equal(one.scores, other.scores) and bool(costs)


def test_our_own_rows_as_lines_and_as_a_table(tmp_path: Path) -> None:
    found = read_table(written(tmp_path, "t.jsonl", OWN, {**OWN, "prompt": "2, 3", "scores": {"a": True, "b": 0}}))
    assert (found.prompts, found.categories, found.models) == (("1 + 1", "2, 3"), ("sums", "sums"), ("a", "b"))
    assert found.scores.tolist() == [[0.25, 1], [1, 0]]
    assert found.costs is not None
    assert found.costs.tolist() == [[1e-6, 2e-6]] * 2
    lines = ("prompt,b,category,a|cost,a,b|cost", "1 + 1,1,sums,1e-6,0.25,2e-6", '"2, 3",False,sums,1e-6,True,2e-6')
    assert same(read_table(written(tmp_path, "t.csv", *lines)), found)
    bare = read_table(written(tmp_path, "bare.jsonl", {"prompt": "p", "scores": {"a": 1}}))
    assert (bare.categories, bare.costs) == (("",), None)


def test_a_table_of_routerbench_has_scores_and_costs(tmp_path: Path) -> None:
    head = "sample_id,prompt,eval_name,m/1,m/1|model_response,m/1|total_cost,oracle_model_to_route_to"
    found = read_table(written(tmp_path, "rb.csv", head, "x.1,why,mmlu,0.5,because,0.002,m/1"), "routerbench")
    assert (found.prompts, found.categories, found.models) == (("why",), ("mmlu",), ("m/1",))
    assert found.costs is not None
    assert (found.scores.tolist(), found.costs.tolist()) == ([[0.5]], [[0.002]])


def test_columns_are_in_the_order_of_names_whatever_the_files(tmp_path: Path) -> None:
    query = written(tmp_path, "default_query_x.jsonl", *({"query": q, "task_name": q * 2} for q in "pq"))
    assert query.is_file()
    rows = [{"question": "q", "scores": {"b": 1, "a": 0}}, {"question": "p", "scores": {"a": 0.5, "b": 0}}]
    found = read_table(written(tmp_path, "x.json", json.dumps(rows)))
    assert (found.models, found.categories, found.scores.tolist()) == (("a", "b"), ("qq", "pp"), [[0, 1], [0.5, 0]])


def test_routerarena_is_for_evaluation_only(tmp_path: Path) -> None:
    found = read_table(written(tmp_path, "r.jsonl", ARENA))
    assert (found.evaluation_only, found.categories, found.scores.tolist()) == (True, ("Set_A",), [[0.0]])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "it is no object"),
        ({**OWN, "prompt": " "}, "its prompt is missing"),
        ({**OWN, "prompt": 3}, "its prompt is missing or no text"),
        ({**OWN, "prompt": "\ud800"}, "half of a surrogate pair"),
        ({**OWN, "category": 3}, "its category is no text"),
        ({**OWN, "scores": {}}, "no scores by model"),
        ({**OWN, "scores": {"a": 1}}, "a score for each of the first row's models, once; see 'b'"),
        ({**OWN, "scores": {"a": 1, "b": 1, "c": 1}}, "see 'c'"),
        ({**OWN, "scores": {"a": 1, "b": "good"}}, "the score of 'b' is no number: 'good'"),
        ({**OWN, "scores": {"a": 1, "b": None}}, "the score of 'b' is no number"),
        ({**OWN, "scores": {"a": 1, "b": 1.01}}, "the score of 'b' is 1.01, not 0 to 1"),
        ({**OWN, "scores": {"a": float("nan"), "b": 1}}, "the score of 'a' is nan"),
        ({**OWN, "costs": {"a": 1, "b": -1}}, "the cost of 'b' is -1.0, not a number from 0 on"),
        ({**OWN, "costs": {"a": 1, "b": float("inf")}}, "the cost of 'b' is inf"),
        ({**OWN, "costs": {"a": 1}}, "a cost for each"),
        ({k: v for k, v in OWN.items() if k != "costs"}, "costs are there for every prompt or for none"),
        ({**OWN, "score": 1}, "unknown 'score'; did you mean 'scores'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, said: str) -> None:
    file = written(tmp_path, "t.jsonl", OWN, "", row)
    with pytest.raises(DataError, match=said) as error:
        read_table(file)
    assert str(error.value).startswith(f"{file}:3: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("t.csv", ["prompt,a", "x,1", "y,"], "t.csv:3: .*no scores by model"),
        ("t.csv", ["prompt,a,b", "x,1,1", "y,1,"], "t.csv:3: a score for each"),
        ("t.csv", ["prompt,a", "x,1,2"], "t.csv:2: it has another number of fields"),
        ("t.csv", ["prompt,a"], "holds no rows"),
        ("t.jsonl", [], "holds no rows"),
        ("t.jsonl", [{"text": 1}], "t.jsonl:1: neither .*say its format"),
        ("x.json", [[{"question": "q", "scores": {"a": 1}}]], "needs default_query_x.jsonl beside it"),
        ("y.json", [[{"question": "q", "scores": {"a": 1}}]], "y.json, row 1: its question is not in default_query_y"),
        ("z.json", [[{"question": "q", "scores": {"a": 1}}]], "default_query_z.jsonl:1: query or task_name is missing"),
        ("r.jsonl", [ARENA, {**ARENA, "models": []}], "r.jsonl:2: its models are no object"),
        ("r.jsonl", [{**ARENA, "global_index": 3}], "r.jsonl:1: its global_index"),
        ("r.jsonl", [{**ARENA, "models": {"b": {"score": 1}}}], "score or cost of 'b' is missing"),
        ("r.jsonl", [{**ARENA, "models": {"b": {"score": -2.0, "cost": 0}}}], "the score of 'b' is -2.0"),
        ("m.csv", ["question_id,model,turn,score", "1,a,1,10"], "needs mt_bench_question.jsonl beside it"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, rows: list[Any], said: str) -> None:
    written(tmp_path, "default_query_y.jsonl", {"query": "other", "task_name": "t"})
    written(tmp_path, "default_query_z.jsonl", {"query": "q"})
    with pytest.raises(DataError, match=said) as error:
        read_table(written(tmp_path, name, *rows))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("1,a,3,10", "m.csv:3: question '1', turn '3' is not in"),
        ("2,a,1,10", "m.csv:3: question '2', turn '1' is not in"),
        ("1,a,1,10", "m.csv:3: 'a' has two scores"),
        ("1,a,2,11", "m.csv:3: a tenth of the score of 'a' is 1.1"),
        ("1,a,2,ten", "m.csv:3: the score of 'a' is no number: 'ten'"),
        ("1,a,2,", "m.csv:3: score is missing"),
    ],
)
def test_mt_bench_rows(tmp_path: Path, row: str, said: str) -> None:
    written(tmp_path, "mt_bench_question.jsonl", {"question_id": 1, "category": "w", "turns": ["one", "two"]})
    good = ["question_id,model,turn,score", "1,a,1,10"]
    with pytest.raises(DataError, match=said):
        read_table(written(tmp_path, "m.csv", *good, row))
    found = read_table(written(tmp_path, "m.csv", *good, "1,a,2,4.0"))
    assert (found.prompts, found.categories) == (("one", "one\n\ntwo"), ("w", "w"))
    assert found.scores.tolist() == [[1.0], [0.4]]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b", "\n"]), inner, max_size=2),
    max_leaves=4,
)


GOOD: dict[str, dict[str, Any]] = {
    "jsonl": OWN,
    "csv": {"prompt": "p", "subject": "s", "a": 1, "a|cost": 0.1},
    "llmrouter": {"question": "q", "scores": {"a": 1}},
    "mt_bench": {"question_id": 1, "turn": 1, "model": "a", "score": 4},
    "routerarena": ARENA,
}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*GOOD]), st.data())
def test_whatever_a_row_holds_it_is_a_table_or_one_line(tmp_path: Path, name: str, data: st.DataObject) -> None:
    written(tmp_path, "default_query_t.jsonl", {"query": "q", "task_name": "x"})
    written(tmp_path, "mt_bench_question.jsonl", {"question_id": 1, "turns": ["one", 2]})
    good = GOOD[name]
    assert len(read_table(written(tmp_path, "t.jsonl", good), name)) == 1
    key = data.draw(st.sampled_from([*good]))
    value = data.draw(JSON)
    if isinstance(good[key], dict) and data.draw(st.booleans()):
        value = {**good[key], data.draw(st.sampled_from(["a", "b", "\n"])): value}
    file, said = written(tmp_path, "t.jsonl", good, {**good, key: value}), ""
    try:
        read_table(file, name)
    except DataError as error:
        said = str(error)
    assert "\n" not in said


def test_what_is_no_file_or_no_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file: "):
        read_table(tmp_path)
    with pytest.raises(DataError, match="no format 'rooter' of tables; did you mean 'llmrouter"):
        read_table(written(tmp_path, "t.jsonl", OWN), "rooter")


def test_descriptors_become_a_catalog(tmp_path: Path) -> None:
    held = {"size": "7B", "input_price": 0.1, "output_price": 0.2, "model": "org/a", "feature": "small"}
    written(tmp_path, "default_llm.json", {"a": held, "b": {**held, "size": "135M"}})
    a, b = llmrouter_catalog(tmp_path).values()
    assert (a.name, a.served_as, a.size, a.output_price, a.description) == ("a", "org/a", 7, 0.2, "small")
    assert b.size == 0.135
    for bad, kind, said in (
        ({"a": {**held, "size": "large"}}, DataError, "a: its size is no number of B or M: 'large'"),
        ({"a": {**held, "input_price": None}}, ConfigError, "model a: input_price is missing"),
        ({"a": 1}, DataError, "no object with an object for each model"),
        ("{", DataError, "not valid JSON"),
    ):
        with pytest.raises(kind, match=said):
            llmrouter_catalog(written(tmp_path, "default_llm.json", bad))
    with pytest.raises(DataError, match="cannot read"):
        llmrouter_catalog(tmp_path / "other.json")


@recorded
@pytest.mark.parametrize(
    ("file", "n", "categories", "scores"),
    [
        ("llmrouter/train.json", 5608, 14, {"llama-3.1-nemotron-51b-instruct": 0.6213}),
        ("llmrouter/test.json", 500, 10, {"llama-3.1-nemotron-51b-instruct": 0.563}),
        ("routellm/mmlu_responses.csv", 14042, 57, {"gpt-4-1106-preview": 0.806, "mixtral-8x7b-instruct-v0.1": 0.681}),
        ("routellm/gsm8k_responses.csv", 1319, 1, {"gpt-4-1106-preview": 0.857}),
        ("routellm/mt_bench_scores.csv", 160, 8, {"gpt-4-1106-preview": 0.923}),
        ("routerarena_sub10/two_models.jsonl", 809, 78, {"gemini-2.0-flash-001": 0.690}),
    ],
)
def test_what_was_published_is_read_whole(file: str, n: int, categories: int, scores: dict[str, float]) -> None:
    found = read_table(DATA / file)
    assert (len(found), len({*found.categories})) == (n, categories)
    assert found.evaluation_only == file.startswith("routerarena")
    for model, mean in scores.items():
        assert found.scores[:, found.models.index(model)].mean() == pytest.approx(mean, abs=6e-4)


@recorded
def test_llmrouters_best_single_model_and_oracle() -> None:
    models, test = llmrouter_catalog(DATA / "llmrouter"), read_table(DATA / "llmrouter" / "test.json")
    best = test.models[int(test.scores.mean(axis=0).argmax())]
    assert (models[best].size, round(test.scores.mean(axis=0).max(), 3)) == (51, 0.563)
    assert test.scores.max(axis=1).mean() == pytest.approx(0.743, abs=5e-4)
    assert {*test.models} <= {*models}
