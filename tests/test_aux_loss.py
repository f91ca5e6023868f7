"""The auxiliary loss is really trained, everywhere: the routers' gradient at the optimizer step is the exact one.

With B = 0 the task loss gives routers no gradient at all, so what they have is the auxiliary loss alone; with B random
it is the difference to the same run with aux_weight=0. Micro-batches are unequal, so their weights show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer
from trl import SFTTrainer

import moesaic
from tests.exact import (
    Loop,
    OwnLoss,
    RoutedSFTTrainer,
    RoutedTrainer,
    check,
    equal_shares,
    logits_loss,
    mixture,
    token_shares,
)
from tests.loops import LENGTHS, rows, sft, trainer
from tests.tiny import bert, gpt2, mamba, qwen3, t5

# -- stock Trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["hotmoe", "mola"])
@pytest.mark.parametrize("cls", [Trainer, RoutedTrainer])
def test_trainer_gives_routers_the_exact_gradient(cls: Any, name: str, accumulation: int, tmp_path: Path) -> None:
    check(
        mixture(name, random_b=True),
        lambda model: trainer(model, tmp_path, cls=cls, gradient_accumulation_steps=accumulation),
        micro_batches=accumulation,
        shares=token_shares if cls is Trainer else equal_shares,
        difference=True,
    )


@pytest.mark.parametrize("cls", [Trainer, RoutedTrainer])
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True},
        {"bf16": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["checkpointing", "bf16", "both"],
)
def test_trainer_with_checkpointing_and_bf16(cls: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    check(
        mixture(),
        lambda model: trainer(model, tmp_path, cls=cls, gradient_accumulation_steps=4, **settings),
        micro_batches=4,
        shares=token_shares if cls is Trainer else equal_shares,
        autocast="bf16" in settings,
    )


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (qwen3, ["q_proj", "v_proj", "gate_proj"]),
        (mamba, ["in_proj", "x_proj", "out_proj"]),
    ],
    ids=["qwen3", "mamba"],
)
def test_trainer_on_other_causal_models(build: Any, targets: list[str], tmp_path: Path) -> None:
    check(
        mixture(build=build, target_modules=targets),
        lambda model: trainer(model, tmp_path, gradient_accumulation_steps=4),
        micro_batches=4,
        shares=token_shares,
    )


def test_trainer_on_gpt2_counts_labels_as_trainer_does(tmp_path: Path) -> None:
    """GPT-2 names no loss type, so Trainer counts its labels unshifted; the weights of a step still sum to one."""
    check(
        mixture(build=gpt2, target_modules=["c_attn", "c_proj", "c_fc"]),
        lambda model: trainer(model, tmp_path, gradient_accumulation_steps=4),
        micro_batches=4,
        shares=lambda batches: [(b["labels"] != -100).sum().item() / sum(LENGTHS) for b in batches],
    )


def test_trainer_on_t5_weighs_micro_batches_by_their_labels(tmp_path: Path) -> None:
    data = [{**row, "labels": [5, 6, 7, 8 + i]} for i, row in enumerate(rows(LENGTHS))]
    check(
        mixture(build=t5, target_modules=["q", "k", "wi"]),
        lambda model: trainer(model, tmp_path, gradient_accumulation_steps=4, train_dataset=data),
        micro_batches=4,
        shares=equal_shares,
    )


def test_trainer_on_bert_weighs_micro_batches_by_their_labels(tmp_path: Path) -> None:
    """BERT swallows num_items_in_batch; the auxiliary loss is at its right weight all the same."""
    data = [{**row, "labels": i % 3} for i, row in enumerate(rows(LENGTHS))]
    check(
        mixture(build=bert, target_modules=["query", "value", "output.dense"]),
        lambda model: trainer(model, tmp_path, gradient_accumulation_steps=4, train_dataset=data),
        micro_batches=4,
        shares=equal_shares,
    )


# -- SFTTrainer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("cls", [SFTTrainer, RoutedSFTTrainer])
def test_sft_gives_routers_the_exact_gradient(cls: Any, accumulation: int, tmp_path: Path) -> None:
    check(
        mixture(random_b=True),
        lambda model: sft(model, tmp_path, cls=cls, gradient_accumulation_steps=accumulation),
        micro_batches=accumulation,
        shares=token_shares if cls is SFTTrainer else equal_shares,
        difference=True,
    )


SFT_SETTINGS = {
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "bf16": {"bf16": True},
    "padding-free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": 1},
    "bfd-checkpointing-bf16": {
        "packing": True,
        "packing_strategy": "bfd",
        "per_device_train_batch_size": 1,
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
@pytest.mark.parametrize(("cls", "settings"), [
    pytest.param(
        cls, settings, id=f"{cls.__name__}-{name}",
        marks=[pytest.mark.slow] if cls is RoutedSFTTrainer and name != "bfd-checkpointing-bf16" else [],
    )
    for cls in (SFTTrainer, RoutedSFTTrainer) for name, settings in SFT_SETTINGS.items()
])  # fmt: skip
def test_sft_with_packing_checkpointing_and_bf16(cls: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    check(
        mixture(),
        lambda model: sft(model, tmp_path, cls=cls, gradient_accumulation_steps=4, **settings),
        micro_batches=4,
        shares=token_shares if cls is SFTTrainer else equal_shares,
        autocast="bf16" in settings,
    )


# -- losses that only the mixin can serve --------------------------------------------------------------------------


class RoutedOwnLoss(moesaic.RoutedTrainerMixin, OwnLoss): ...


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    ("make_loop", "settings"),
    [
        (lambda *a, **k: trainer(*a, cls=RoutedTrainer, **k), {"label_smoothing_factor": 0.1}),
        (lambda *a, **k: trainer(*a, cls=RoutedTrainer, **k), {"compute_loss_func": logits_loss}),
        (lambda *a, **k: trainer(*a, cls=RoutedOwnLoss, **k), {}),
        (lambda *a, **k: sft(*a, cls=RoutedSFTTrainer, **k), {"label_smoothing_factor": 0.1}),
        (lambda *a, **k: sft(*a, cls=RoutedSFTTrainer, **k), {"compute_loss_func": logits_loss}),
        (lambda *a, **k: sft(*a, cls=RoutedSFTTrainer, **k), {"loss_type": "dft"}),
    ],
    ids=["smoothing", "loss-func", "own-loss", "sft-smoothing", "sft-loss-func", "sft-dft"],
)
def test_mixin_serves_every_loss(make_loop: Loop, settings: dict[str, Any], accumulation: int, tmp_path: Path) -> None:
    check(
        mixture(),
        lambda model: make_loop(model, tmp_path, gradient_accumulation_steps=accumulation, **settings),
        micro_batches=accumulation,
        shares=equal_shares,
    )
