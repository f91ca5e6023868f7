"""Runs, adapters and comparisons that version 0.1.0's first layout wrote, in tests/fixtures/before, are still good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.cli.main import main
from tests.tiny_folders import save_model, write_tasks

BEFORE = Path(__file__).parent / "fixtures" / "before"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what was written then, beside the models and data that it was made of."""
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    for kind, model, data in (("encoder", "model", "data"), ("causal", "lm", "lmdata")):
        save_model(tmp_path / model, kind)
        write_tasks(tmp_path / data, kind)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_has_the_scores_that_it_had(place: Path) -> None:
    before = json.loads((place / "run" / "eval-validation.json").read_text())
    assert main(["eval", "run", "limit=5"]) == 0
    now = json.loads((place / "run" / "eval-validation.json").read_text())
    assert now["tasks"] == before["tasks"]
    old, new = before["routing"], now["routing"]
    for figure in ("entropy", "mutual_information"):  # under autocast frozen weights were in float32 then
        assert new[figure] == pytest.approx(old[figure], abs=1e-4)
    assert new["utilisation"].keys() == old["utilisation"].keys()
    for module, shares in new["utilisation"].items():
        assert shares == pytest.approx(old["utilisation"][module], abs=0.02)


def test_a_composed_adapter_loads_in_peft_and_is_inspected(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("lm"), "composed/adapter")
    with moesaic.trace(model) as trace, torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert len(trace.modules) == 14
    assert main(["inspect", "composed", "prompt=last 3 4 5"]) == 0
    assert "arrow routes the prompt" in capsys.readouterr().out


def test_a_comparison_is_done_and_gives_the_same_figures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((place / "cmp" / "comparison.json").read_text())
    assert main(["compare", "cmp"]) == 0
    assert "4 of 4 cells" in capsys.readouterr().out
    now = json.loads((place / "cmp" / "comparison.json").read_text())
    assert [arm["scores"] for arm in now["arms"]] == [arm["scores"] for arm in before["arms"]]
    assert now["verdicts"] == before["verdicts"]
