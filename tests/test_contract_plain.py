"""What of the contract applies to PEFT's own kinds of LoRA: they are built by a recipe and run beside mixtures.

They have no router and no backend, so outputs, gradients, padding, caches, checkpoints and copies are left. A DoRA
without a delta divides by a norm and multiplies by it again, so it is its base to a rounding error only.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from moesaic.runs.method import PLAIN
from moesaic.runs.recipe import Recipe, adapter_config
from tests import tiny
from tests.test_contract import DTYPES, TOLERANCE, backward, close, every_base, every_model, frozen, ragged

every_plain = pytest.mark.parametrize("plain", list(PLAIN))
ROUNDING = {"lora": 0.0, "rslora": 0.0, "dora": 1e-5}


def wrapped(plain: str, *, name: str = "llama", base: str = "fp32", random_b: bool = True, **settings: Any) -> Any:
    """The adapter of the recipe `method=plain` around a tiny model, in eval mode."""
    from peft import get_peft_model

    targets = ["in_proj", "x_proj"] if name == "mamba" else "all-linear"  # PEFT refuses Mamba's out_proj
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": not random_b, **settings}
    model = tiny.MODELS[name]().to(DTYPES[base])
    torch.manual_seed(1)
    return get_peft_model(model, adapter_config(Recipe(method=plain, adapter=settings))).eval()


@every_plain
@every_model
def test_every_architecture_starts_as_its_base(plain: str, name: str) -> None:
    model, base = wrapped(plain, name=name, random_b=False), frozen(name)
    inputs = tiny.batch(base)
    wanted = base(**inputs).logits
    close(model(**inputs).logits, wanted, ROUNDING[plain], "logits")
    moved = wrapped(plain, name=name)
    assert not torch.equal(moved(**inputs).logits, wanted)
    with moved.disable_adapter():
        assert torch.equal(moved(**inputs).logits, wanted)


@every_plain
@every_model
def test_gradients_reach_the_adapter_and_nothing_frozen(plain: str, name: str) -> None:
    model = wrapped(plain, name=name).train()
    model(**tiny.batch(model, rows=6)).loss.backward()
    for key, parameter in model.named_parameters():
        learns = ".lora_" in key
        assert parameter.requires_grad == learns, key
        assert (parameter.grad is not None and bool(parameter.grad.any())) == learns, key


@every_plain
def test_accumulated_copies_of_a_micro_batch_equal_one(plain: str) -> None:
    model = wrapped(plain).train()
    inputs = ragged(model)
    items = (inputs["labels"][:, 1:] != -100).sum()
    _, one = backward(model, inputs)
    _, four = backward(model, inputs, parts=4)
    _, counted = backward(model, inputs, parts=4, num_items_in_batch=4 * items)
    for name, grad in one.items():
        close(four[name] / 4, grad, 1e-5, name)
        close(counted[name], grad, 1e-5, name)


@every_plain
def test_checkpointing_on_equals_off(plain: str) -> None:
    model = wrapped(plain, lora_dropout=0.2).train()
    inputs = ragged(model)
    loss, grads = backward(model, inputs, use_cache=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, recomputed = backward(model, inputs, use_cache=False)
    assert torch.equal(loss, again)
    for name, grad in grads.items():
        close(recomputed[name], grad, 1e-6, name)


@every_plain
@pytest.mark.parametrize(("left", "right"), [(0, 3), (3, 0)])
def test_padding_changes_neither_outputs_nor_losses(plain: str, left: int, right: int) -> None:
    model = wrapped(plain).train()
    inputs = tiny.batch(model)
    inputs["labels"][:, 0] = -100
    loss, grads = backward(model, inputs)
    wide_loss, wide_grads = backward(model, tiny.padded(inputs, left=left, right=right))
    close(wide_loss, loss, 1e-5, "loss")
    for name, grad in grads.items():
        close(wide_grads[name], grad, 1e-4, name)


@every_plain
@torch.no_grad()
def test_batching_and_decoding_equal_the_full_forward(plain: str) -> None:
    model = wrapped(plain)
    inputs = tiny.batch(model, tokens=8, labels=False)
    full = model(**inputs).logits
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    close(model(input_ids=ids[1:2], attention_mask=mask[1:2]).logits[0], full[1], 1e-5, "a row alone")
    first = model(input_ids=ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
    rest = model(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
    close(torch.cat([first.logits, rest.logits], dim=1), full, 1e-5, "with a cache")


@every_plain
@every_base
def test_a_reloaded_adapter_answers_alike_and_a_copy_lives_alone(plain: str, base: str, tmp_path: Path) -> None:
    model = wrapped(plain, base=base)
    inputs = tiny.batch(model)
    wanted = model(**inputs).logits
    assert wanted.dtype == DTYPES[base]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama().to(DTYPES[base]), str(tmp_path)).eval()
    close(loaded(**inputs).logits, wanted, TOLERANCE[base], "reloaded")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".lora_B." in name:
                parameter.zero_()
    assert not torch.equal(twin(**inputs).logits, wanted)
    assert torch.equal(model(**inputs).logits, wanted)
