"""Stock trainers from beginning to end: train, save, resume, reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.loops import LENGTHS, collate, rows, sft, trainer
from tests.tiny import MODELS, llama, router_parameters, small, wrap


def examples(name: str) -> list[dict[str, Any]]:
    if name == "bert":
        return [{**row, "labels": i % 3} for i, row in enumerate(rows(LENGTHS))]
    if name == "t5":
        return [{**row, "labels": [5, 6, 7, 8 + i]} for i, row in enumerate(rows(LENGTHS))]
    return rows(LENGTHS)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", MODELS)
def test_trainer_resumes_exactly(name: str, tmp_path: Path) -> None:
    """Four steps at once, and two, a new process' worth of objects, two more: the same losses and parameters."""
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "random",
        "train_dataset": examples(name),
    }
    make = lambda: wrap(MODELS[name](), small("hotmoe", lora_dropout=0.1), random_b=False)  # noqa: E731
    whole = trainer(make(), tmp_path, **settings)
    whole.train()
    resumed = trainer(make(), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    losses = [[e["loss"] for e in loop.state.log_history if "loss" in e] for loop in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    for (key, value), other in zip(trained(whole.model).items(), trained(resumed.model).values(), strict=True):
        assert (value - other).abs().max() == 0.0, key
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert len(saved) == len(trained(whole.model))


def test_training_changes_every_router_and_nothing_else(tmp_path: Path) -> None:
    base = llama()
    before = {n: p.clone() for n, p in base.named_parameters()}
    model = wrap(base, small("hotmoe"))
    start = trained(model)
    trainer(model, tmp_path, max_steps=2).train()
    moved = {n for n, p in trained(model).items() if not torch.equal(p, start[n])}
    assert set(router_parameters(model)) <= moved
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            own = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, before[own]), name


def test_sft_trainer_takes_the_config_trains_saves_and_reloads(tmp_path: Path) -> None:
    """One config swapped for LoRA's, on SFTTrainer's own defaults: checkpointing and bf16."""
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    loop = sft(
        base,
        tmp_path / "run",
        peft_config=small("hotmoe", task_type="CAUSAL_LM"),
        gradient_checkpointing=True,
        bf16=True,
        max_steps=3,
    )
    start = trained(loop.model)
    loop.train()
    assert all(not torch.equal(p, start[n]) for n, p in router_parameters(loop.model).items())
    loop.save_model(str(tmp_path / "adapter"))
    inputs = collate(rows([5, 3]))
    model = loop.accelerator.unwrap_model(loop.model, keep_fp32_wrapper=False)  # without accelerate's autocast
    expected = model.eval()(**inputs).logits
    for restored in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        PeftModel.from_pretrained(type(llama()).from_pretrained(tmp_path / "base"), tmp_path / "adapter"),
    ):
        assert torch.equal(restored.eval()(**inputs).logits, expected)
