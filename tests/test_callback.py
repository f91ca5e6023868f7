"""RoutingCallback in stock trainers: what it logs is what a trace says, and everyone who logs gets it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

import moesaic
from moesaic.host import find_host
from tests.exact import RoutedTrainer, mixture
from tests.loops import collate, rows, sft, trainer
from tests.tiny import llama

NAMES = {"router_aux_loss", "router_entropy", "router_load_spread", "router_dead_share"}


class Traced(TrainerCallback):
    """A trace of every step, and of every evaluation."""

    def __init__(self, model: Any) -> None:
        self.model, self.steps, self.aux = model, [], []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.opened = moesaic.trace(self.model)
        self.steps.append(self.opened.__enter__())

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.aux.append(find_host(self.model).aux.item())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.on_substep_end()
        self.opened.__exit__(None, None, None)


def test_a_trl_run_with_tensorboard_shows_what_the_routers_did(tmp_path: Path) -> None:
    model = mixture(random_b=True)(0.5)
    watch = Traced(model)
    loop = sft(
        model, tmp_path, max_steps=4, logging_steps=2, gradient_accumulation_steps=2, report_to="tensorboard",
        callbacks=[watch, moesaic.RoutingCallback(by_layer=True)],
    )  # fmt: skip
    loop.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    read = {
        tag.removeprefix("train/"): [e.value for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if "router" in tag
    }
    assert read.keys() >= NAMES | {"router_entropy_layer_0", "router_load_spread_layer_1", "router_dead_share_layer_1"}
    for at, step in enumerate((1, 3)):
        trace = watch.steps[step]
        dead = len(trace.dead_experts()) / trace.num_experts()
        assert read["router_entropy"][at] == pytest.approx(trace.entropy(), rel=1e-5)
        assert read["router_load_spread"][at] == pytest.approx(trace.outer_balance(), rel=1e-5)
        assert read["router_dead_share"][at] == pytest.approx(dead, rel=1e-5)
        assert read["router_entropy_layer_1"][at] == pytest.approx(trace.entropy_by_layer()[1], rel=1e-5)
        assert read["router_aux_loss"][at] == pytest.approx(sum(watch.aux[at * 4 : at * 4 + 4]) / 4, rel=1e-5)
    entropies = list(events.Scalars("train/entropy"))
    assert len(entropies) == 2, "TRL's own entropy, of the language model, stays what it is"
    logged = [e for e in loop.state.log_history if "loss" in e]
    assert [e["router_entropy"] for e in logged] == pytest.approx(read["router_entropy"], rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4]
    assert lines[1]["router_entropy"] == logged[1]["router_entropy"]
    assert find_host(model).traces == [], "nothing is left on the model"


def test_an_evaluation_during_training_has_its_own(tmp_path: Path) -> None:
    model, held_out = mixture(random_b=True)(0.01), rows([5, 7, 6, 4], seed=3)
    loop = trainer(
        model, tmp_path, max_steps=3, logging_steps=2, eval_strategy="steps", eval_steps=1, eval_dataset=held_out,
        callbacks=[moesaic.RoutingCallback(file=False)],
    )  # fmt: skip
    loop.train()
    evaluated = [e for e in loop.state.log_history if "eval_loss" in e]
    assert all(NAMES - {"router_aux_loss"} <= {k.removeprefix("eval_") for k in e} for e in evaluated)
    with moesaic.trace(model) as trace, torch.no_grad():
        model.eval()(**collate(held_out))
    assert evaluated[-1]["eval_router_entropy"] == pytest.approx(trace.entropy(), rel=1e-5)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("cls", [Trainer, RoutedTrainer, SFTTrainer])
def test_the_logged_loss_is_the_tasks_whatever_the_trainer(cls: Any, tmp_path: Path) -> None:
    make, losses = sft if cls is SFTTrainer else trainer, []
    for weight in (0.0, 100.0):
        loop = make(mixture(random_b=True)(weight), tmp_path, cls=cls, callbacks=[moesaic.RoutingCallback()])
        loop.train()
        losses.append(loop.state.log_history[0]["loss"])
    assert losses[0] == losses[1]
    assert loop.state.log_history[0]["router_aux_loss"] > 1


def test_a_resumed_run_keeps_its_lines_and_a_new_one_begins_them(tmp_path: Path) -> None:
    def run(**more: Any) -> list[int]:
        callbacks = [moesaic.RoutingCallback()]
        loop = trainer(mixture()(0.01), tmp_path, save_strategy="steps", save_steps=2, callbacks=callbacks, **more)
        loop.train(resume_from_checkpoint=more["max_steps"] == 4)
        text = (tmp_path / "metrics.jsonl").read_text()
        return [e["step"] for e in map(json.loads, text.splitlines()) if "loss" in e]

    assert run(max_steps=3) == [1, 2, 3]
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 4, "lo')  # was stopped here
    assert run(max_steps=4) == [1, 2, 3, 4]
    assert run(max_steps=1) == [1]


def test_a_model_without_routers_is_left_alone(tmp_path: Path) -> None:
    plain = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    loop = trainer(plain, tmp_path, callbacks=[moesaic.RoutingCallback()])
    loop.train()
    assert not any("router" in key for entry in loop.state.log_history for key in entry)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"] > 0


def test_task_information_is_logged_where_tasks_are_told(tmp_path: Path) -> None:
    data = [row | {"routing_task_ids": i % 2} for i, row in enumerate(rows([4, 7, 5, 6]))]
    callbacks = [moesaic.RoutingCallback()]
    loop = trainer(mixture()(0.01), tmp_path, train_dataset=data, remove_unused_columns=False, callbacks=callbacks)
    loop.train()
    assert 0 <= loop.state.log_history[0]["router_task_information"] <= 1
