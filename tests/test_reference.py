"""Reference adapters: TRL copies the trained adapter under another name, and the copy must answer as it does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import moesaic
from moesaic.host import find_host
from moesaic.lora import METHODS
from tests import tiny
from tests.tiny_folders import tokenizer

PAIRS = [
    {"prompt": "first 3 4 :", "chosen": " 3", "rejected": " 4"},
    {"prompt": "last 5 6 7 :", "chosen": " 7 1", "rejected": " 5"},
]


def add_reference(model: Any) -> None:
    """What DPO, GRPO, RLOO and KTO trainers do."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


@pytest.mark.filterwarnings("ignore:the training loss is computed from logits")
def test_a_reference_is_a_copy_of_the_adapter(method: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(method))
    inputs = tiny.batch(model)
    policy = model(**inputs).logits
    add_reference(model)
    assert torch.equal(model(**inputs).logits, policy), "the adapter that is active stays as it was"
    model.base_model.set_adapter("ref")
    assert torch.equal(model(**inputs).logits, policy)


@pytest.mark.parametrize("method", ["retrieval", "glider"])
def test_a_config_object_that_is_used_again_leaves_its_first_adapter_alone(method: str) -> None:
    config = tiny.small(method)
    first = tiny.wrap(tiny.llama(), config)
    find_host(first).pinned_scores = None
    inputs = tiny.batch(first)
    with moesaic.routing_prompts(first, ["skill_2 one", "skill_0 two", "other"]):
        before = first(**inputs).logits
    other = tiny.wrap(tiny.llama(), config)
    assert other.peft_config["default"] is not config
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("library.vectors"):
                parameter.zero_()
    with moesaic.routing_prompts(first, ["skill_2 one", "skill_0 two", "other"]):
        assert torch.equal(first(**inputs).logits, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [
    name if name in ("hotmoe", "mola", "retrieval") else pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(METHODS)
])  # fmt: skip
def test_preferences_start_at_ln_2(method: str, tmp_path: Path) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(method))
    args = DPOConfig(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, bf16=False, logging_steps=1)
    data = Dataset.from_list(PAIRS * 2)
    trainer = DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer(encoder=False))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
