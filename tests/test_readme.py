"""The README is run as written, and so is docs/training.md; what figures it has are those of results/."""

import importlib
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moesaic import nano
from moesaic.cli.main import main
from moesaic.lora import METHODS
from moesaic.runs.method import methods
from moesaic.runs.recipe import adapter_config, load_recipe
from tests import tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def result(name: str) -> Any:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def run(example: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, cwd=folder, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_adapters_that_peft_wrote_become_one_model_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    compose, example = blocks("sh")[2], blocks("python")[0]
    for name in ("asc", "max", "reverse"):
        model = AutoModelForCausalLM.from_pretrained(nano.path())
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(f"loras/{name}")
        Path(f"data/{name}").mkdir(parents=True)
        row = {"prompt": f"4 1 8 2 {name} =", "completion": " 1"}  # in a folder of tasks a row need not name its own
        for split in ("train", "validation"):
            Path(f"data/{name}/{split}.jsonl").write_text(json.dumps(row))
    for line in compose.splitlines():
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
    said = capsys.readouterr().out
    assert "written: composed" in said
    assert "retrieval routes the prompt" in said
    assert "answer: " in said
    assert "next: moesaic eval composed\n" in said
    assert re.search(
        r"4 1 8 2 top =.*RoutingTrace\(6 routers.*, (asc|max|reverse) 100%", run(example, tmp_path), re.DOTALL
    )


def test_the_config_is_swapped_as_written(tmp_path: Path) -> None:
    assert "1 4 8" in run(blocks("python")[1], tmp_path).splitlines()[-1]


def adapters(setting: str) -> tuple[dict[str, float], tuple[float, float]]:
    """Mean scores by arm, percent, and the lowest and highest of the merges'."""
    arms = result(f"adapters-{setting}")["arms"]
    mean = {arm: 100 * statistics.mean(found["held_in"]) for arm, found in arms.items()}
    merges = [mean[arm] for arm in mean if arm.startswith("merge-")]
    return mean, (min(merges), max(merges))


def test_figures_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    table = importlib.import_module("results").act_one(result("demo")["adapters"], tasks=False)
    assert "\n".join(["<!-- act one -->", *table, "<!-- end -->"]) in README
    assert f"{result('demo')['adapters']['test_lists']} held-out lists" in README
    mean, (least, most) = adapters("smollm2")
    said = f"the model alone has {mean['base']:.1f}, PEFT's merges of the six adapters have {least:.1f} to {most:.1f}"
    said += f", `retrieval` has {mean['retrieval']:.1f}, GLIDER {mean['glider']:.1f}, and each task's own adapter"
    assert f"{said} {mean['oracle']:.1f}" in " ".join(README.split())
    mean, (least, most) = adapters("minilm")
    said = f"the merges have {least:.1f} to {most:.1f}, GLIDER has {mean['glider']:.1f}, and each task's own adapter"
    assert f"{said} {mean['oracle']:.1f}" in " ".join(README.split())
    files = (result(name) for name in ("bench", "bench-bfloat16", "bench-smollm2"))
    table = importlib.import_module("results_bench").costs(*files)
    assert "\n".join(["<!-- costs -->", *table, "<!-- end -->"]) in README
    scores = result("demo")["mixture"]["scores"]
    lost = [100 * statistics.mean(scores[arm].values()) for arm in ("lora", "hotmoe")]
    assert f"in act two it loses by {lost[0] - lost[1]:.1f} points" in " ".join(README.split())


def test_task_ids_reach_the_routers_through_the_trainer_and_in_generate(tmp_path: Path) -> None:
    example, mixin, loop = blocks("python", TRAINING)
    said = run(f"{mixin}\n{loop}", tmp_path)
    assert said.startswith("RoutedTrainerMixin\n")
    assert "max 4 1 8 :" in said
    seen = """
from moesaic.lora.methods import moelora
score = moelora.TaskRouter.score
def spy(self, h, context=None):
    print("ids", sorted(context.task_ids.tolist()), h.requires_grad)
    return score(self, h, context)
moelora.TaskRouter.score = spy
"""
    told = {line for line in run(seen + example, tmp_path).splitlines() if line.startswith("ids")}
    assert "ids [0, 1] False" in told, "generate"
    assert len(told) > 1, "training"


def test_the_recombination_of_the_command_is_that_of_the_config() -> None:
    line = next(line for block in blocks("sh", TRAINING) for line in block.splitlines() if "train custom" in line)
    (config,) = re.findall(r"moesaic\.(CustomConfig\(.*\))`", TRAINING)
    recipe = load_recipe("custom", line.split()[3:])
    made, wanted = adapter_config(recipe), eval(config, {"CustomConfig": METHODS["custom"]})
    for name in ("router_of", "gate_of", "settings"):
        assert getattr(made, name) == getattr(wanted, name)


def test_a_column_of_the_data_set_is_a_key_of_the_batch_in_trainer(tmp_path: Path) -> None:
    model, seen = tiny.wrap(tiny.llama(), tiny.small("moelora", num_tasks=3)), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "routing_task_ids": i} for i in range(2)]
    args = TrainingArguments(str(tmp_path), max_steps=1, remove_unused_columns=False, use_cpu=True, report_to=[])
    Trainer(model, args, train_dataset=Dataset.from_list(rows)).train()
    assert sorted(seen[0]["routing_task_ids"].tolist()) == [0, 1]


def test_the_table_of_methods_is_complete() -> None:
    firsts = re.findall(r"^\| (`[^|]*`) \|", README, flags=re.MULTILINE)
    assert sorted(re.findall(r"`([a-z-]+)`", " ".join(firsts))) == sorted(methods())


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", blocks("sh")[0], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
