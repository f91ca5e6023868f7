"""lm-eval scores a mixture as `moesaic eval` does, once `moesaic.with` has told it where prompts end.

lm-eval is no part of the `dev` extra (see docs/training.md): `pip install lm_eval`, and these tests run.
"""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

import moesaic
from moesaic import nano
from moesaic.evaluation.harness import tell_prompts
from moesaic.evaluation.run import evaluate_run
from moesaic.evaluation.settings import EvalSettings
from moesaic.models.embedded import load_model
from tests.composing import TASKS, make

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval, which is 140 MB with what it needs, is not installed")

METHODS = {
    "hotmoe": lambda adapters, texts: moesaic.HotMoEConfig(
        target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
    "glider": lambda adapters, texts: moesaic.GliderConfig(
        adapters=adapters, texts=texts, encoder="hashing", ignore_base=True, task_type="CAUSAL_LM"
    ),
    "retrieval": lambda adapters, texts: moesaic.RetrievalConfig(
        adapters=adapters, texts=texts, encoder="hashing", ignore_base=True, task_type="CAUSAL_LM"
    ),
}
TASK = r"""
task: digits
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{(choices | join('<eos>|') ~ '<eos>').split('|')}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def rows() -> list[dict[str, Any]]:
    """Prompts and choices of several lengths, of digits that would sway the routing if they counted as the prompt."""
    drawn, made = random.Random(0), []
    for i in range(24):
        [prompt, *choices] = [" ".join(drawn.choices("123456789", k=drawn.randint(2, 6))) for _ in range(5)]
        made.append({"task": "digits", "prompt": f"{prompt} {TASKS[i % 3]} =", "choices": choices, "answer": i % 4})
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make(tmp_path_factory.mktemp("harness"))
    adapters = {task: str(root / task) for task in TASKS}
    texts = {task: [f"{digits} ="] for task, digits in zip(TASKS, ("1 2 3", "4 5 6", "7 8 9"), strict=True)}
    for name, config in METHODS.items():
        torch.manual_seed(0)
        model = get_peft_model(load_model("nano").model, config(adapters, texts))
        for key, value in model.named_parameters():
            if "moe_lora_B" in key and name == "hotmoe":
                torch.nn.init.normal_(value, std=0.5)
        model.save_pretrained(str(root / name))
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (root / "digits.yaml").write_text(TASK.format(rows=root / "rows.jsonl"))
    return root


def figures(place: Path, method: str, batch_size: int) -> tuple[float, list[int]]:
    """What `moesaic eval` finds: the accuracy, and the choice of each row."""
    settings = EvalSettings(data=str(place / "rows.jsonl"), model="nano", base=False, batch_size=batch_size)
    found = evaluate_run(place / method, settings)
    lines = (place / method / "predictions-validation.jsonl").read_text().splitlines()
    return found["tasks"]["digits"]["score"], [json.loads(line)["predicted"] for line in lines]


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("name", METHODS)
def test_lm_eval_scores_as_moesaic_eval(place: Path, name: str, batch_size: int, monkeypatch: Any) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", HFLM._loglikelihood_tokens)
    tell_prompts()
    model = {"pretrained": str(nano.path()), "peft": str(place / name), "dtype": "float32"}
    tasks = TaskManager(include_path=str(place), include_defaults=False)
    found = lm_eval.simple_evaluate(
        "hf", model_args=model, tasks=["digits"], task_manager=tasks, batch_size=batch_size, device="cpu"
    )
    samples = sorted(found["samples"]["digits"], key=lambda sample: sample["doc_id"])
    scores = [[told[0][0] for told in sample["resps"]] for sample in samples]
    accuracy, chosen = figures(place, name, batch_size)
    assert found["results"]["digits"]["acc,none"] == pytest.approx(accuracy, abs=1e-3)
    assert [each.index(max(each)) for each in scores] == chosen


def test_the_command_tells_lm_eval(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moesaic.with", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={nano.path()},peft={place / 'glider'},dtype=float32", "--batch_size", "8"]
    command += ["--tasks", "digits", "--include_path", str(place), "--output_path", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = tmp_path.glob("found*.json")
    found = json.loads(file.read_text())["results"]["digits"]["acc,none"]
    assert found == pytest.approx(figures(place, "glider", 8)[0], abs=1e-3)


@pytest.mark.parametrize("program", [["lm_eval"], ["lm-eval"], ["-m", "lm_eval"]])
def test_by_each_of_its_names(program: list[str], monkeypatch: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    stock = HFLM._loglikelihood_tokens
    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", stock)
    for _ in range(2):
        importlib.import_module("moesaic.with").found([*program, "run"])
        assert HFLM._loglikelihood_tokens.__wrapped__ is stock
