"""State, memory, and the frame they belong to: when it opens and closes, and which one a recomputed layer sees."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import BertForMaskedLM, DynamicCache

from moesaic.errors import TrainingError
from moesaic.host import find_host
from tests.tiny import batch, bert, llama, mixtures, small, t5, wrap
from tests.toy import BUILDERS, left_padded, shown, toy_method


@pytest.fixture(scope="module")
def toy() -> Iterator[str]:
    with toy_method() as name:
        yield name


# -- state and memory ----------------------------------------------------------------------------------------------


def test_state_runs_through_one_forward_and_no_further(toy: str) -> None:
    model = wrap(llama(layers=3), small(toy, target_modules=["q_proj"]))
    with shown() as calls, torch.no_grad():
        model(**batch(model, labels=False))
        model(**batch(model, labels=False))
        states = [context.state for _, context, _ in calls]
        assert all(s is states[0] for s in states[:3])
        assert all(s is states[3] for s in states[3:])
        assert states[0] is not states[3]
        assert [key for key in states[0] if isinstance(key, int)] == [0, 1, 2]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_memory_lives_as_long_as_the_cache(name: str, toy: str) -> None:
    """Scores kept at prefill are there at every decoding step, and gone with the cache."""
    model = wrap(BUILDERS[name](), small(toy))
    inputs = batch(model, rows=2, labels=False)
    with shown() as calls:
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        memories = {id(context.memory) for _, context, _ in calls}
        assert len(memories) == 1
        assert len(calls) == 4 * len(mixtures(model))
        memory = weakref.ref(calls[0][1].memory)
    gc.collect()
    assert memory() is None
    with shown() as calls, torch.no_grad():
        model(**inputs, use_cache=False)
        model(**inputs, use_cache=False)
        first, last = calls[0][1].memory, calls[-1][1].memory
        assert first is not last


@pytest.mark.parametrize("own_cache", [True, False])
def test_a_decoding_step_reads_what_its_own_prefill_kept(own_cache: bool, toy: str) -> None:
    """Two conversations in turn, with caches passed in or made by the model: each step finds its prompt's scores."""
    model = wrap(llama(), small(toy, target_modules=["q_proj"]))
    prompts = [batch(model, rows=1, seed=seed, labels=False)["input_ids"] for seed in (0, 1)]
    name = next(iter(mixtures(model))).removeprefix("base_model.model.")
    with torch.no_grad():
        caches, kept = [], []
        for ids in prompts:
            cache = DynamicCache(config=model.config) if own_cache else None
            with shown() as calls:
                caches.append(model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values)
                kept.append(calls[0][1].memory[name])
        assert not torch.equal(*kept)
        for cache, scores in zip(caches, kept, strict=True):
            with shown() as calls:
                model(input_ids=prompts[0][:, -1:], past_key_values=cache)
                assert torch.equal(calls[0][1].memory[name], scores)


# -- frames --------------------------------------------------------------------------------------------------------


def two_forwards(model: PeftModel, *, together: bool) -> list[Tensor]:
    """Gradients of two batches with different padding: one backward each, or both forwards before one backward."""
    model.zero_grad()
    losses = []
    for seed, columns in ((0, 1), (1, 4)):
        inputs = left_padded(model, columns=columns, seed=seed)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        if together:
            losses.append(loss)
        else:
            loss.backward()
    if together:
        sum(losses).backward()  # type: ignore[union-attr]
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("method", ["hotmoe", "toy-context"])
def test_two_forwards_before_one_backward_with_checkpointing_are_exact(method: str, toy: str) -> None:
    """Each recomputed layer sees the mask and the state of its own forward, not of the last one."""
    switches = {"aux_weight": 1.0} | ({"step_window": False} if method == "hotmoe" else {})
    model = wrap(llama(layers=3, initializer_range=0.5), small(method, **switches)).train()
    apart = two_forwards(model, together=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    together = two_forwards(model, together=True)
    assert len(apart) == len(together) > 0
    for a, b in zip(apart, together, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-8


def test_recomputed_layers_see_their_own_forward(toy: str) -> None:
    model = wrap(llama(), small(toy)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    masks, total = [], torch.zeros(())
    with shown() as calls:
        for seed, columns in ((0, 1), (1, 4)):
            inputs = left_padded(model, columns=columns, seed=seed)
            masks.append(inputs["attention_mask"].bool())
            total = total + model(**inputs, labels=inputs["input_ids"]).loss
        calls.clear()
        total.backward()
        seen = [context.mask for _, context, _ in calls]
    num = len(mixtures(model))
    assert len(seen) == 2 * num, "every layer once more for each forward"
    assert sum(torch.equal(mask, masks[0]) for mask in seen) == num
    assert sum(torch.equal(mask, masks[1]) for mask in seen) == num


def test_reentrant_checkpointing_is_refused() -> None:
    model = wrap(llama(), small("hotmoe")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(TrainingError, match=r"use_reentrant.*False"):
        model(**batch(model))
    assert find_host(model).frame is None
    model.eval()(**batch(model))


@pytest.mark.parametrize("build", [llama, t5])
def test_exception_in_forward_leaves_no_open_frame(build: Any, toy: str) -> None:
    model = wrap(build(), small(toy))
    inputs = batch(model, labels=False)
    bad = {**inputs, "input_ids": inputs["input_ids"] + 10_000}
    for call in (model, lambda **k: model.generate(input_ids=k["input_ids"], max_new_tokens=2)):
        with pytest.raises(IndexError):
            call(**bad)
        assert find_host(model).frame is None
    with shown() as calls, torch.no_grad():
        model(**inputs)
        assert all(context.mask.shape == shape[:-1] for _, context, shape in calls if context.mask is not None)


def test_a_stack_called_on_its_own_has_its_own_frame(toy: str) -> None:
    model = wrap(t5(), small(toy))
    inputs = left_padded(model)
    inner: Any = model.get_base_model()
    with shown() as calls, torch.no_grad():
        inner.encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        assert calls
        assert all(torch.equal(context.mask, inputs["attention_mask"].bool()) for _, context, _ in calls)
    assert find_host(model).frame is None


def test_frames_close_when_nothing_is_wrapped_in_the_head() -> None:
    """Masked-LM BERT: the head is outside every block, and is left alone."""
    config = bert().config
    model = wrap(BertForMaskedLM(config).eval(), small("hotmoe"))
    assert not [name for name in mixtures(model) if ".cls." in name]
    inputs = batch(model, labels=False)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert find_host(model).frame is None
