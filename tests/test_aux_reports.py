"""Loops that cannot carry the auxiliary loss say so, and what is reported of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer
from trl import SFTTrainer

import moesaic
from moesaic.errors import TrainingError
from tests.exact import (
    Loop,
    OwnLoss,
    RoutedSFTTrainer,
    RoutedTrainer,
    assert_same,
    equal_shares,
    exact,
    logits_loss,
    mixture,
)
from tests.loops import LENGTHS, collate, rows, sft, trainer, watched
from tests.tiny import router_parameters

# -- loops that cannot carry it say so -------------------------------------------------------------------------------


class LogitsOnly(Trainer):
    """compute_loss as many write it: labels stay among the inputs, and output.loss is not used."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = logits_loss(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make_loop", "settings"),
    [
        (trainer, {"label_smoothing_factor": 0.1}),
        (trainer, {"compute_loss_func": logits_loss}),
        (lambda *a, **k: trainer(*a, cls=OwnLoss, **k), {}),
        (lambda *a, **k: trainer(*a, cls=LogitsOnly, **k), {"max_steps": 2}),
        (sft, {"label_smoothing_factor": 0.1}),
        (sft, {"compute_loss_func": logits_loss}),
        (sft, {"loss_type": "dft"}),
    ],
    ids=["smoothing", "loss-func", "own-loss", "logits-only", "sft-smoothing", "sft-loss-func", "sft-dft"],
)
def test_stock_loop_that_cannot_carry_it_warns(make_loop: Loop, settings: dict[str, Any], tmp_path: Path) -> None:
    loop = make_loop(mixture()(0.01), tmp_path, **settings)
    with pytest.warns(UserWarning, match=r"auxiliary loss.*moesaic\.RoutedTrainerMixin"):
        watch = watched(loop)
    exact_gradient, _ = exact(mixture()(0.01), watch.batches[:1], [1.0]) if "labels" in watch.batches[0] else ({}, [])
    for name, gradient in exact_gradient.items():
        assert watch.gradients[0][name].norm() < 0.5 * gradient.norm() + 1e-8, "carried after all: no need to warn"


@pytest.mark.parametrize(
    "make_loop",
    [
        trainer,
        sft,
        lambda *a, **k: trainer(*a, cls=RoutedTrainer, label_smoothing_factor=0.1, **k),
        lambda *a, **k: sft(*a, cls=RoutedSFTTrainer, loss_type="dft", **k),
    ],
    ids=["trainer", "sft", "mixin-smoothing", "mixin-dft"],
)
def test_loop_that_carries_it_does_not_warn(make_loop: Loop, tmp_path: Path) -> None:
    loop = make_loop(mixture()(0.01), tmp_path, gradient_accumulation_steps=2, max_steps=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*auxiliary loss.*")
        loop.train()


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "sgd"])
def test_each_optimizer_step_has_its_own_step_window(optimizer: str, tmp_path: Path) -> None:
    """Same rows and weights (learning rate 0) in both steps: the same gradient, if nothing is left of the first."""
    loop = trainer(
        mixture()(0.01),
        tmp_path,
        gradient_accumulation_steps=4,
        max_steps=2,
        learning_rate=0.0,
        optim=optimizer,
        train_dataset=rows(LENGTHS) * 2,
    )
    first, second = watched(loop).gradients
    assert_same(second, first, tolerance=1e-6)


# -- what is reported ------------------------------------------------------------------------------------------------


def test_output_reports_the_weighted_loss() -> None:
    batch = collate(rows([4, 7, 5]))
    make = mixture(random_b=True)
    model = make(0.5).train()
    plain = make(0.0).train()(**batch).loss
    output = model(**batch)
    _, (value,) = exact(make(0.5), [batch], [1.0])
    assert output.router_aux_loss.item() == pytest.approx(value, rel=1e-5)
    assert torch.equal(output.loss, plain), "its gradient is added, its value stands beside"
    assert type(output).__name__ == "CausalLMOutputWithPast"


def test_a_loop_of_ones_own_can_take_it() -> None:
    """output.loss has its gradient; without labels it is the output's own, or moesaic.router_aux_loss, once."""
    batch = collate(rows([4, 7, 5]))
    labels = batch.pop("labels")
    model = mixture()(0.01).train()
    with pytest.warns(UserWarning, match="router_aux_loss"):
        output = model(**batch)
    aux = moesaic.router_aux_loss(model)
    assert aux is not None
    assert torch.equal(aux, output.router_aux_loss)
    assert moesaic.router_aux_loss(model) is None
    (logits_loss(output, labels, 1) + aux).backward()
    expected, _ = exact(mixture()(0.01), [batch | {"labels": labels}], [1.0])
    assert_same({n: p.grad for n, p in router_parameters(model).items() if p.grad is not None}, expected)


def test_tuple_outputs_carry_it_too() -> None:
    batch = collate(rows([4, 7, 5]))
    model = mixture(random_b=True)(0.5).train()
    by_name = mixture(random_b=True)(0.5).train()
    model(**batch, return_dict=False)[0].backward()
    by_name(**batch).loss.backward()
    assert_same(*({n: p.grad for n, p in router_parameters(m).items() if p.grad is not None} for m in (model, by_name)))


@pytest.mark.parametrize("cls", [Trainer, RoutedTrainer, SFTTrainer, RoutedSFTTrainer])
def test_eval_loss_is_not_contaminated(cls: Any, tmp_path: Path) -> None:
    losses = []
    for weight in (0.0, 100.0):
        model = mixture(random_b=True)(weight)
        make_loop = sft if issubclass(cls, SFTTrainer) else trainer
        loop = make_loop(model, tmp_path, cls=cls)
        data = loop.train_dataset
        losses.append(loop.evaluate(data)["eval_loss"])
        with moesaic.trace(model) as t:
            assert model(**collate(rows([4, 7]))).get("router_aux_loss") is None
        assert t.modules
    assert losses[0] == losses[1]


@pytest.mark.parametrize("make_loop", [trainer, sft], ids=["trainer", "sft"])
def test_mixin_logs_the_mean_over_micro_batches(make_loop: Loop, tmp_path: Path) -> None:
    cls = RoutedTrainer if make_loop is trainer else RoutedSFTTrainer
    loop = make_loop(mixture()(0.01), tmp_path, cls=cls, gradient_accumulation_steps=4)
    watch = watched(loop)
    _, values = exact(mixture()(0.01), watch.batches, equal_shares(watch.batches))
    logged = [entry["router_aux_loss"] for entry in loop.state.log_history if "router_aux_loss" in entry]
    assert logged == [pytest.approx(sum(values) / 4, rel=1e-4)]


def test_gradient_checkpointing_of_the_whole_is_refused_when_reentrant(tmp_path: Path) -> None:
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(TrainingError, match="use_reentrant"):
        trainer(mixture()(0.01), tmp_path, **settings).train()
