"""Adapters that our own training did not leave: what SFTTrainer and PEFT save is evaluated, inspected and composed."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from trl import SFTConfig, SFTTrainer

import moesaic
from moesaic.cli.main import main
from moesaic.errors import AdapterError, ConfigError
from moesaic.evaluation.opening import load, load_run, open_adapter
from moesaic.evaluation.run import evaluate_run
from moesaic.evaluation.settings import EvalSettings
from moesaic.models.embedded import load_model
from moesaic.runs.recipe import load_recipe
from moesaic.training.run import train
from tests.composing import TASKS, make
from tests.tiny_folders import save_model, write_tasks


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two output folders of a stock script: of a mixture, saved, and of LoRA, of which only checkpoints were."""
    root = tmp_path_factory.mktemp("stock")
    save_model(root / "base", "causal")
    write_tasks(root / "data", "causal")
    rows = [json.loads(line) for line in (root / "data" / "copy" / "train.jsonl").read_text().splitlines()]
    table = Dataset.from_list([{key: row[key] for key in ("prompt", "completion")} for row in rows])
    for name, config in (("mixture", moesaic.MoLAConfig), ("plain", LoraConfig)):
        how = SFTConfig(
            str(root / name), max_steps=4, save_steps=2, per_device_train_batch_size=8, learning_rate=1e-2,
            report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        )  # fmt: skip
        adapter = config(target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(str(root / "base"), how, train_dataset=table, peft_config=adapter)
        trainer.train()
        if name == "mixture":
            trainer.save_model()
    return root


def test_a_trainers_output_folder_is_evaluated(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["--json", "eval", "mixture", "plain", "data=data", "tasks=copy", "limit=5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["run"], r["method"], r["tasks"]["copy"]["n"]) for r in found] == [
        ("mixture", "mola", 5),
        ("plain", "lora", 5),
    ]
    assert found[0]["routing"]["by_task"].keys() == {"copy"}
    assert found[1]["routing"] is None
    model = load_run("mixture").model
    assert found[0]["trainable_parameters"] == sum(p.numel() for n, p in model.named_parameters() if "moe_lora" in n)
    assert (place / "mixture" / "eval-validation.json").is_file()
    assert main(["eval", "mixture/checkpoint-2", "data=data", "tasks=copy", "limit=5"]) == 0
    assert (place / "mixture" / "checkpoint-2" / "eval-validation.json").is_file()


def test_the_newest_checkpoint_is_taken_and_said(place, caplog):
    (place / "plain" / "checkpoint-best").mkdir(exist_ok=True)
    opened = open_adapter(place / "plain")
    assert (opened.adapter, opened.recipe.method) == (place / "plain" / "checkpoint-4", "lora")
    load(opened)
    assert "taking its newest checkpoint, checkpoint-4" in caplog.text


def test_an_output_folder_is_inspected_and_composed(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(place / "mixture"), "first 1 2 3 4 :"]) == 0
    assert "mola routes the prompt" in capsys.readouterr().out
    assert main(["compose", f"adapters={place / 'plain'}", "method=uniform"]) == 0
    assert main(["inspect", "composed/adapter", "first 1 2 3 4 :"]) == 0
    assert "plain" in capsys.readouterr().out


def test_a_runs_adapter_and_its_checkpoints_are_of_the_run(tmp_path):
    save_model(tmp_path / "base", "encoder")
    write_tasks(tmp_path / "data", "encoder")
    settings = [f"model={tmp_path / 'base'}", f"data={tmp_path / 'data'}", f"out={tmp_path / 'run'}"]
    train(load_recipe("hotmoe", [*settings, "steps=4", "save_every=2", "batch_size=8", "warmup=1"]))
    whole = evaluate_run(tmp_path / "run", EvalSettings(base=False))
    assert evaluate_run(tmp_path / "run" / "adapter", EvalSettings(base=False)) == whole
    kept = (tmp_path / "run" / "eval-validation.json").read_text()
    before = evaluate_run(tmp_path / "run" / "checkpoints" / "checkpoint-2", EvalSettings(base=False))
    assert (before["run"], before["tasks"].keys()) == ("checkpoint-2", whole["tasks"].keys())
    assert (tmp_path / "run" / "eval-validation.json").read_text() == kept, "the run's own figures stay"
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "alone")
    with pytest.raises(ConfigError, match="an encoder's heads are known by a run folder"):
        load(open_adapter(tmp_path / "alone", model=str(tmp_path / "base")))


def test_what_a_recipe_would_have_said_is_asked_for_by_name(place, tmp_path):
    with pytest.raises(ConfigError, match="data is missing: data=FOLDER"):
        evaluate_run(place / "mixture")
    shutil.copytree(place / "mixture", tmp_path / "moved")
    file = tmp_path / "moved" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match=r"names no base model: model=… does"):
        open_adapter(tmp_path / "moved")
    assert load(open_adapter(tmp_path / "moved", model=str(place / "base"))).base.kind == "causal"
    with pytest.raises(ConfigError, match="no chat template"):
        evaluate_run(place / "mixture", EvalSettings(data=str(place / "data" / "copy" / "train.jsonl"), prompts="chat"))
    with pytest.raises(ConfigError, match="prompts=chatt; did you mean 'chat'"):
        open_adapter(place / "mixture", prompts="chatt")


def test_folders_that_cannot_be_opened_are_refused_in_a_line(place, tmp_path):
    with pytest.raises(ConfigError, match=r"nor an adapter's: neither it nor a checkpoint-N in it has"):
        open_adapter(tmp_path)
    base = load_model(str(place / "base")).model
    get_peft_model(base, IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(tmp_path / "ia3")
    with pytest.raises(AdapterError, match="holds an adapter of type 'IA3': neither LoRA nor a mixture of moesaic"):
        open_adapter(tmp_path / "ia3")
    told = moesaic.MOELoRAConfig(target_modules=["q_proj"], num_tasks=2)
    get_peft_model(load_model(str(place / "base")).model, told).save_pretrained(tmp_path / "told")
    with pytest.raises(ConfigError, match="moelora is told each row's task by its number"):
        load(open_adapter(tmp_path / "told"))


def test_routers_may_hold_whole_numbers(tmp_path):
    make(tmp_path)
    texts, adapters = {task: [task] for task in TASKS}, {task: str(tmp_path / task) for task in TASKS}
    config = moesaic.GliderConfig(
        adapters=adapters, texts=texts, encoder="hashing", ignore_base=True, task_type="CAUSAL_LM"
    )
    get_peft_model(load_model("nano").model, config).save_pretrained(str(tmp_path / "glider"))
    settings = EvalSettings(data=str(tmp_path / "data"), model="nano", limit=1, base=False)
    assert evaluate_run(tmp_path / "glider", settings)["tasks"].keys() == {*TASKS}


@pytest.mark.parametrize(
    "damage",
    [{"base_model_name_or_path": -1}, {"alora_invocation_tokens": "x"}, {"use_rslora": "x"}, {"use_rslora": -1},
     {"r": "8"}, {"lora_dropout": True}],
)  # fmt: skip
def test_a_config_of_peft_with_values_of_another_kind_is_one_line(place, tmp_path, damage):
    shutil.copytree(place / "plain" / "checkpoint-4", tmp_path / "plain")
    file = tmp_path / "plain" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(AdapterError, match=rf"adapter_config.json is damaged: {next(iter(damage))}=.* must be") as told:
        open_adapter(tmp_path / "plain")
    assert "\n" not in str(told.value)


def test_factors_that_are_whole_numbers_are_none(place, tmp_path):
    shutil.copytree(place / "plain" / "checkpoint-4", tmp_path / "plain")
    file = tmp_path / "plain" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].view(torch.int32)}, file)
    with pytest.raises(AdapterError, match=rf"is damaged: {name} is none of F32, BF16, F16, F64"):
        open_adapter(tmp_path / "plain")
