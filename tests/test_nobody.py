"""None of them: a prompt that is like no expert's rows is answered by the base alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import moesaic
from moesaic.adapters.prompts import NOBODY, REFUSED, OrNobody, encoder_of
from moesaic.cli.main import main
from moesaic.errors import ConfigError
from moesaic.evaluation.opening import load_run
from moesaic.routing import TopK
from tests.composing import TASKS, asked, make

NEAR, FAR = "2 4 down =", "an entirely different kind of question about the weather, asked at length"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make(tmp_path_factory.mktemp("nobody"))
    how = (f"data={root / 'data'}", "adapter.encoder=hashing", "adapter.none_below=own")
    for method in ("retrieval", "glider"):
        assert main(asked(root, root / method, f"method={method}", *how)) == 0
    return root


@pytest.mark.parametrize("method", ["retrieval", "glider"])
def test_the_base_answers_what_no_expert_knows(place: Path, method: str) -> None:
    prepared = load_run(place / method)
    model, tokenizer = prepared.model, prepared.base.tokenizer
    rows = tokenizer([NEAR, FAR], padding=True, return_tensors="pt")
    with torch.no_grad():
        both, far = model(**rows).logits, model(**tokenizer(FAR, return_tensors="pt")).logits
        near = model(**tokenizer(NEAR, return_tensors="pt")).logits
        with model.disable_adapter():
            base = model(**tokenizer(FAR, return_tensors="pt")).logits
            base_near = model(**tokenizer(NEAR, return_tensors="pt")).logits
    assert torch.equal(far, base)
    assert not torch.allclose(near, base_near)
    torch.testing.assert_close(both[1, -far.shape[1] :], far[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(both[0, -near.shape[1] :], near[0], atol=1e-4, rtol=0)


def test_own_floors_are_what_99_of_100_own_rows_reach(place: Path) -> None:
    config = load_run(place / "retrieval").model.peft_config["default"]
    texts = [f"{i} 4 {TASKS[0]} =" for i in range(6)]
    vectors = encoder_of("hashing")(texts)
    nearest = [max(float(v @ w) for j, w in enumerate(vectors) if j != i) for i, v in enumerate(vectors)]
    wanted = torch.tensor(nearest).quantile(REFUSED, interpolation="lower")
    assert config.floors[config.experts.index(TASKS[0])] == pytest.approx(float(wanted), abs=1e-6)
    glider = load_run(place / "glider").model.peft_config["default"]
    means = [F.normalize(vectors[[j for j in range(6) if j != i]].sum(dim=0), dim=0) for i in range(6)]
    lowest = min(float(v @ m) for v, m in zip(vectors, means, strict=True))
    assert glider.floors[glider.experts.index(TASKS[0])] == pytest.approx(lowest, abs=1e-5)


def test_the_gate_gives_nobody_a_weight_where_all_are_too_far() -> None:
    gate = OrNobody(TopK(1))
    found = gate(torch.tensor([[0.3, NOBODY, 0.9], [NOBODY, NOBODY, NOBODY]]))
    assert found.weights.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert (gate.top_k, gate.sums_to_one) == (1, False)


def test_inspect_and_eval_say_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("retrieval", "glider"):
        assert main(["inspect", str(place / method), FAR, "answer=0"]) == 0
        said = capsys.readouterr().out
        assert "none of them" in said
        assert "asks for" in said
        assert said.count("too far") == 3
    assert main(["eval", str(place / "retrieval"), "limit=2"]) == 0


@pytest.mark.parametrize(
    ("setting", "said"),
    [("adapter.none_below=2", "must be a cosine"), ("adapter.none_below=mine", "must be a cosine")],
)
def test_what_is_no_floor_is_told(
    place: Path, tmp_path: Path, setting: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("method=retrieval", f"data={place / 'data'}", "adapter.encoder=hashing", setting)
    assert main(asked(place, tmp_path / "out", *how)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_single_row_calibrates_nothing(place: Path) -> None:
    texts = {task: [f"1 2 {task} ="] for task in TASKS}
    adapters = {task: str(place / task) for task in TASKS}
    how = {"adapters": adapters, "texts": texts, "encoder": "hashing", "ignore_base": True}
    with pytest.raises(ConfigError, match="is calibrated on rows of each adapter"):
        moesaic.RetrievalConfig(none_below="own", **how)
    assert moesaic.RetrievalConfig(none_below=0.5, **how).floors == [0.5] * 3
    assert moesaic.RetrievalConfig(**how).floors is None
