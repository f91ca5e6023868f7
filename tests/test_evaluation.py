"""Scores: figures on hand-made cases, choices against a plain loop, a whole run with its base beside it."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moesaic.data import causal
from moesaic.data import examples as data
from moesaic.errors import ConfigError, DataError
from moesaic.evaluation import metrics
from moesaic.evaluation.answers import answer
from moesaic.evaluation.opening import load_run
from moesaic.evaluation.run import evaluate_run, generate, score
from moesaic.evaluation.settings import EvalSettings
from moesaic.models.embedded import load_model
from moesaic.report.tables import eval_table, routing_table
from moesaic.runs.recipe import load_recipe
from moesaic.training.prepared import Prepared
from moesaic.training.run import train
from tests.tiny_folders import save_model, write_tasks


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One finished run a kind of model; the encoder's is routed."""
    root = tmp_path_factory.mktemp("runs")
    for kind, recipe in (("causal", "lora"), ("encoder", "hotmoe")):
        save_model(root / f"{kind}-model", kind)
        write_tasks(root / f"{kind}-data", kind)
        settings = [f"model={root / f'{kind}-model'}", f"data={root / f'{kind}-data'}", f"out={root / kind}"]
        train(load_recipe(recipe, [*settings, "steps=30", "batch_size=8", "warmup=3", "lr=0.02"]))
    return root


def test_figures_on_hand_made_answers():
    gold, predicted = [0, 0, 0, 1, 1], [0, 0, 1, 1, 0]
    assert metrics.accuracy(predicted, gold) == 0.6
    assert metrics.majority_rate(gold) == 0.6
    assert metrics.standard_error(0.5, 100) == 0.05
    assert metrics.matthews(predicted, gold) == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert metrics.matthews([0] * 5, gold) == 0.0, "a constant answer knows nothing"


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40))
def test_matthews_is_one_for_right_answers_and_does_not_care_for_names(gold):
    expected = 1.0 if len(set(gold)) > 1 else 0.0
    assert metrics.matthews(gold, gold) == pytest.approx(expected)
    renamed = [3 - g for g in gold]
    shifted = [*gold[1:], gold[0]]
    assert metrics.matthews(shifted, gold) == pytest.approx(metrics.matthews([3 - s for s in shifted], renamed))


@pytest.mark.parametrize(
    ("generated", "completion", "answer", "right"),
    [
        ("so it is 1,250.", "… #### 1250", "1250", True),
        ("so it is 12", "… 13", "13", False),
        ("7 and then 8", "", "7", False),
        ("no number", "", "7", False),
        ("-3.50", "", "-3.5", True),
        ("  Paris. ", "paris", None, True),
        ("Paris, France", "paris", None, False),
        ("1 2  3", "1 2 3", None, True),
        ("The Answer", "long text", "the answer", True),
        ("2024-05-06", "", "2023-01-06", False),
        ("10:30", "", "09:30", False),
        ("1/4", "", "3/4", False),
        ("room 5", "", "Room 5 is the kitchen", False),
        ("B12", "", "b12", True),
        ("12345678901234567890", "", "12345678901234567891", False),
        ("9" * 400, "", "8" * 400, False),
    ],
)
def test_exact_match_compares_last_numbers_or_normalised_text(generated, completion, answer, right):
    assert metrics.answers_match(generated, completion, answer) is right


TEMPLATE = (
    "{% for m in messages %}{{ 'first ' if m['role'] == 'user' else 'last ' }}{{ m['content'] }} : {% endfor %}"
    "{% if add_generation_prompt %}last {% endif %}"
)


@pytest.mark.parametrize("prompts", ["auto", "plain"])
def test_likelihood_of_choices_equals_a_plain_loop(runs, prompts):
    loaded = load_model(str(runs / "causal-model"))
    rows = data.load(runs / "causal-data", "validation", tasks=["pick"])
    recipe = load_recipe("lora", ["precision=fp32", f"prompts={prompts}"])
    loaded.tokenizer.chat_template = TEMPLATE
    prepared = Prepared(loaded.model.eval(), loaded, ("pick",), None, recipe)
    before, after, end = ("first ", " : last ", " :") if prompts == "auto" else ("", "", " <eos>")
    hits = []
    for row in rows:
        prompt = loaded.tokenizer(before + row.prompt + after)["input_ids"]
        totals = []
        for choice in row.choices:
            ids = [*prompt, *loaded.tokenizer(choice + end)["input_ids"]]
            logs = loaded.model(torch.tensor([ids])).logits.log_softmax(-1)[0]
            totals.append(sum(logs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
        hits.append(max(range(4), key=totals.__getitem__) == row.label)
    figures = score(prepared, rows, batch_size=7)["pick"]
    assert figures["score"] == pytest.approx(sum(hits) / len(hits))
    assert figures["n"] == len(rows)


def test_generation_is_the_same_alone_and_in_a_padded_batch(runs):
    prepared = load_run(runs / "causal")
    rows = [
        data.parse({"task": "copy", "prompt": f"first {text} :", "completion": "0"}, "")
        for text in ("3", "4 5", "7 8 9 1 2 3")
    ]
    together = generate(prepared, rows, max_new_tokens=4)
    assert together == [generate(prepared, [row], max_new_tokens=4)[0] for row in rows]


def test_a_causal_run_is_scored_on_choices_and_on_generated_answers(runs):
    results = evaluate_run(runs / "causal")
    assert results["tasks"]["copy"]["metric"] == "exact_match"
    assert results["tasks"]["pick"]["metric"] == "accuracy"
    assert {"accuracy_per_byte", "base_score"} <= set(results["tasks"]["pick"])
    assert {"majority", "matthews", "base_matthews"} <= set(results["tasks"]["even"])
    assert results["tasks"]["even"]["n"] == 20
    assert results["mean"] == pytest.approx(sum(t["score"] for t in results["tasks"].values()) / 3)
    assert json.loads((runs / "causal" / "eval-validation.json").read_text()) == results


def test_an_encoder_run_scores_its_base_with_the_adapter_off(runs):
    results = evaluate_run(runs / "encoder", EvalSettings(batch_size=6))
    prepared = load_run(runs / "encoder")
    rows = data.load(runs / "encoder-data", "validation")
    assert score(prepared, rows)["pick"]["score"] == results["tasks"]["pick"]["score"]
    with prepared.model.disable_adapter():
        off = score(prepared, rows)
    assert {t: s["score"] for t, s in off.items()} == {t: s["base_score"] for t, s in results["tasks"].items()}
    assert not prepared.model.training


def test_every_answer_is_kept_in_the_order_of_the_rows(runs):
    results = evaluate_run(runs / "causal")
    lines = (runs / "causal" / "predictions-validation.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    for task, figures in results["tasks"].items():
        rows = data.load(runs / "causal-data", "validation", tasks=[task])
        own = [a for a in answers if a["task"] == task]
        assert [a["index"] for a in own] == list(range(20))
        assert sum(a["correct"] for a in own) / 20 == figures["score"]
        for row, one in zip(rows, own, strict=True):
            if row.choices:
                assert one["correct"] == (one["predicted"] == row.label)
            else:
                assert one["correct"] == metrics.answers_match(one["predicted"], row.completion, None)
    assert not list((runs / "causal").glob(".*.part"))


def test_a_batch_size_does_not_change_which_row_an_answer_belongs_to(runs):
    prepared = load_run(runs / "encoder")
    rows = data.load(runs / "encoder-data", "validation")
    rows = [replace(row, prompt=row.prompt + " 1" * (i % 3)) for i, row in enumerate(rows)]
    assert answer(prepared, rows, batch_size=1) == answer(prepared, rows, batch_size=7)


def test_routing_is_reported_for_routed_runs_with_tasks_by_name(runs):
    routing = evaluate_run(runs / "encoder", EvalSettings(base=False))["routing"]
    assert set(routing["by_task"]) == {"even", "pick"}
    assert set(routing["by_layer_and_task"]["0"]) == {"even", "pick"}
    assert set(routing["entropy_by_layer"]) == {"0", "1"}
    assert 0 <= routing["entropy"] <= 1
    assert 0 <= routing["mutual_information"] <= 1
    assert routing["dead_share"] == pytest.approx(routing["dead_experts"] / routing["num_experts"], abs=1e-5)
    for row in routing["utilisation"].values():
        assert sum(row) == pytest.approx(1, abs=1e-4)
    json.dumps(routing, allow_nan=False)
    assert evaluate_run(runs / "causal", EvalSettings(base=False))["routing"] is None


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_a_task_gated_method_is_told_the_tasks_it_was_trained_on(runs, tmp_path, kind):
    settings = [f"model={runs / f'{kind}-model'}", f"data={runs / f'{kind}-data'}", f"out={tmp_path / 'run'}"]
    recipe = tmp_path / "oracle.yaml"
    recipe.write_text("method: oracle\n")
    train(load_recipe(str(recipe), [*settings, "steps=2", "batch_size=8", "adapter.r=2"]))
    routing = evaluate_run(tmp_path / "run", EvalSettings(tasks=["pick", "even"], limit=4))["routing"]
    trained = ("copy", "even", "pick") if kind == "causal" else ("even", "pick")
    for task, row in routing["by_task"].items():
        assert row == [float(name == task) for name in trained]
    assert routing["mutual_information"] == pytest.approx(1)
    assert routing["inner_balance"] is None, "a one-hot row has no second expert"


def test_the_tables_of_eval_name_what_was_measured(runs):
    results = [
        evaluate_run(runs / kind, EvalSettings(tasks=["even", "pick"], limit=4)) for kind in ("causal", "encoder")
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(eval_table(results), routing_table(results))
    text = console.export_text()
    assert "pick" in text
    assert "task-expert information" in text
    entropy = results[1]["routing"]["entropy"]
    assert f"{entropy:.2f}" in text
    assert routing_table(results[:1]) is None


def test_limit_tasks_and_base_settings(runs):
    results = evaluate_run(runs / "encoder", EvalSettings(tasks=["pick"], limit=3, base=False))
    assert list(results["tasks"]) == ["pick"]
    assert results["tasks"]["pick"]["n"] == 3
    assert "base_mean" not in results


def test_what_cannot_be_scored_is_said(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no recipe\.yaml"):
        evaluate_run(tmp_path)
    with pytest.raises(ConfigError, match="limit=0"):
        evaluate_run(runs / "encoder", EvalSettings(limit=0))
    with pytest.raises(DataError, match="task 'even' has no test split"):
        evaluate_run(runs / "encoder", EvalSettings(split="test"))
    with pytest.raises(DataError, match="an encoder cannot write an answer"):
        evaluate_run(runs / "encoder", EvalSettings(data=str(runs / "causal-data"), tasks=["copy"]))


def test_an_answer_is_set_off_by_one_blank_unless_written():
    assert causal.seam("a", "b") == " b"
    assert causal.seam("a ", "b") == "b"
    assert causal.seam("a", " b") == " b"
    assert causal.seam("", "b") == "b"
