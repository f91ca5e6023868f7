"""The README is run as written."""

import re
import subprocess
import sys
from pathlib import Path

from datasets import Dataset
from transformers import Trainer, TrainingArguments

from moesaic.lora import METHODS
from moesaic.runs.method import methods
from moesaic.runs.recipe import adapter_config, load_recipe
from tests import tiny

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(example: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, cwd=folder, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_first_example_runs_as_written(tmp_path: Path) -> None:
    assert "1 4 8" in run(blocks("python")[0], tmp_path).splitlines()[-1]


def test_task_ids_reach_the_routers_through_the_trainer_and_in_generate(tmp_path: Path) -> None:
    _, example = blocks("python")
    seen = """
from moesaic.lora.methods import moelora
score = moelora.TaskRouter.score
def spy(self, h, context=None):
    print("ids", sorted(context.task_ids.tolist()), h.requires_grad)
    return score(self, h, context)
moelora.TaskRouter.score = spy
"""
    said = {line for line in run(seen + example, tmp_path).splitlines() if line.startswith("ids")}
    assert "ids [0, 1] False" in said, "generate"
    assert len(said) > 1, "training"


def test_the_recombination_of_the_command_is_that_of_the_config() -> None:
    line = next(line for block in blocks("sh") for line in block.splitlines() if "train custom" in line)
    (config,) = re.findall(r"moesaic\.(CustomConfig\(.*\))`", README)
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
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", blocks("sh")[0], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
