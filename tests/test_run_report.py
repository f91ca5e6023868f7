"""report.html of one run: what training, evaluation and composition leave is what the page shows."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
from peft import get_peft_model

import moesaic
from moesaic.cli.main import main
from moesaic.evaluation.opening import load_run
from moesaic.evaluation.routed import explain
from moesaic.evaluation.settings import EvalSettings
from moesaic.models.embedded import load_model
from tests.composing import asked, make
from tests.test_report import made_up
from tests.tiny_folders import save_model, write_tasks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reported")
    base, data = save_model(root / "base", "causal"), write_tasks(root / "data", "causal")
    how = ["adapter.num_experts=3", "adapter.r=2", "steps=6", "batch_size=4", "lr=0.01"]
    assert main(["train", "mola", f"model={base}", f"data={data}", *how, f"out={root / 'run'}"]) == 0
    return root / "run"


def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def headings(text: str) -> list[str]:
    return [unescape(found) for found in re.findall(r"<h2[^>]*>(.*?)</h2>", text)]


def test_training_writes_how_it_went(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = page(run)
    assert "How it learned" in headings(found)
    results = json.loads((run / "results.json").read_text())
    assert f"{results['trainable_parameters']:,}" in found
    assert "<h1>mola on " in found
    assert "6 steps of training" in found
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"written: {run / 'report.html'}\n"
    assert page(run) == found


def test_evaluation_adds_scores_routing_and_answers(run: Path) -> None:
    assert main(["eval", str(run), "limit=6"]) == 0
    found, scores = page(run), json.loads((run / "eval-validation.json").read_text())
    assert f"{100 * scores['mean']:.1f}\u00a0% of the answers on the validation split right" in found
    wanted = ["Scores on the validation split", "How it learned", "Who does what", "Every module by itself"]
    assert [heading for heading in headings(found) if heading in wanted] == wanted
    rows = json.loads((run / "samples-validation.json").read_text())["rows"]
    assert {row["task"] for row in rows} == set(scores["tasks"])
    assert "".join(rows[0]["tokens"]) == f"{rows[0]['prompt']}{rows[0]['answer']}".replace(" ", "")
    answers = ["".join(row["tokens"][len(row["tokens"]) - row["answered"] :]).strip() for row in rows]
    assert answers == [row["answer"] for row in rows]
    assert found.count('title="the answer">→') == sum(row["answered"] > 0 for row in rows)
    for row in rows:
        assert [round(sum(token), 1) for token in row["by_token"]] == [1.0] * len(row["tokens"])
    assert found.count('<p class="tokens">') == len(rows)
    modules = scores["routing"]["by_module_and_task"]
    assert modules.keys() == scores["routing"]["utilisation"].keys()
    assert all(sum(shares) == pytest.approx(1, abs=1e-4) for of in modules.values() for shares in of.values())


def test_a_page_asks_for_nothing(run: Path) -> None:
    found = page(run)
    assert set(re.findall(r"https?://[^\"' )<]+", found)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script|<link|<iframe|@import|url\((?!#)", found)


def test_a_composition_says_of_what(tmp_path: Path) -> None:
    place = make(tmp_path / "parts")
    given = ("method=retrieval", f"data={place / 'data'}", "adapter.encoder=hashing")
    assert main(asked(place, tmp_path / "out", *given)) == 0
    found = page(tmp_path / "out")
    assert "retrieval on nano: one model of 3 adapters" in found
    assert headings(found) == ["Experts"]
    assert main(["eval", str(tmp_path / "out"), "limit=2"]) == 0
    found = page(tmp_path / "out")
    assert {"Who does what", "Some answers"} <= set(headings(found))
    assert "Experts: 0 up, 1 down, 2 max" in found
    assert "Every module by itself" not in found  # all route alike
    rows = place / "data" / "train.jsonl"
    assert main(["eval", str(tmp_path / "out"), f"data={rows}", "limit=2"]) == 0
    assert f"Scores on {rows.name}" in headings(page(tmp_path / "out"))


def test_a_trainers_folder_has_a_page(tmp_path: Path) -> None:
    base = load_model(str(save_model(tmp_path / "base", "causal")))
    model = get_peft_model(base.model, moesaic.MoLAConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    folder = tmp_path / "out" / "checkpoint-4"
    model.save_pretrained(str(folder))
    history = [{"step": step, "loss": 3.0 - step, "router_entropy": 0.9 - step / 10} for step in (1, 2)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*history, {"step": 2, "train_loss": 9.0}]}))
    assert main(["report", str(tmp_path / "out")]) == 0
    assert headings(page(tmp_path / "out")) == ["How it learned", "How its routing changed"]


def test_a_comparisons_page_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(made_up()))
    assert main(["report", str(tmp_path)]) == 0
    assert "moesaic compare" in page(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", "{", "metrics.jsonl is damaged"),
        ("eval-test.json", '{"tasks": {}}', "holds figures that no run writes"),
        ("report.html", "mine", "report.html is no page of a run: move it away"),
    ],
)
def test_what_cannot_be_shown_is_told(
    file: str, content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_model(str(save_model(tmp_path / "base", "causal")))
    model = get_peft_model(base.model, moesaic.MoLAConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "out"))
    (tmp_path / "out" / file).write_text(content)
    assert main(["report", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "out" / file).read_text() == content


@pytest.mark.parametrize("there", ["a directory", "a link", "another page"])
def test_a_page_that_would_be_in_the_way_is_told_before_anything_is_scored(
    there: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_model(str(save_model(tmp_path / "base", "causal")))
    model = get_peft_model(base.model, moesaic.MoLAConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "out"))
    target = tmp_path / "out" / "report.html"
    if there == "a directory":
        target.mkdir()
    elif there == "a link":
        target.symlink_to(tmp_path / "elsewhere.html")
    else:
        target.write_text("mine")
    monkeypatch.setattr("moesaic.evaluation.run.load", lambda *a: pytest.fail("it was loaded"))
    assert main(["eval", str(tmp_path / "out"), f"data={write_tasks(tmp_path / 'data', 'causal')}"]) == 2
    assert "report.html is no page of a run: move it away" in capsys.readouterr().err


def test_reports_without_a_folder_and_of_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert "name at least one run folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


# -- experts that only share a number ----------------------------------------------------------------------------------


def test_experts_are_put_in_order_before_modules_are_averaged() -> None:
    """Two modules that tell tokens apart perfectly, by experts of crossed numbers: no average shows both as halves."""
    import torch

    from moesaic.evaluation.routed import _alike

    one = torch.eye(2)[torch.tensor([0, 0, 1, 1])]
    weights = torch.stack([one, one.flip(1)])
    order = _alike(weights)
    assert [o.tolist() for o in order] == [[0, 1], [1, 0]]


def test_one_layer_and_one_module_are_inspected(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = load_run(run)
    whole = explain(prepared, "first 1 2 3 4 :")
    assert whole["aligned"]
    assert len(whole["modules"]) == 14
    one = explain(prepared, "first 1 2 3 4 :", layer=1, module="q_proj")
    assert (one["aligned"], one["by_layer"].keys()) == (False, {"1"})
    (name,) = one["modules"]
    assert name.endswith("layers.1.self_attn.q_proj")
    some = explain(prepared, "first 1 2 3 4 :", module="self_attn")
    assert len(some["modules"]) == 8
    for asked_for, said in (("layer=7", "layer=7 has no router; those that have: 0, 1"), ("module=qproj", "'q_proj'")):
        assert main(["inspect", str(run), "first 1 :", asked_for]) == 2
        assert said in capsys.readouterr().err
    assert main(["inspect", str(run), "first 1 2 :", "answer=0"]) == 0
    assert "averages over 14 modules, their experts put in one order" in capsys.readouterr().out


def test_evaluation_alone_writes_no_samples(run: Path) -> None:
    from moesaic.evaluation.run import evaluate_run

    evaluate_run(run, EvalSettings(split="train", limit=2))
    assert not (run / "samples-train.json").exists()
