"""What routers see of a forward: masks of each stack, task ids, state and memory; and when frames open and close."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BertForMaskedLM, GenerationConfig, StaticCache

import moesaic
from moesaic.errors import TrainingError
from moesaic.host import TASK_IDS, find_host
from moesaic.lora import METHODS, MixtureConfig
from moesaic.lora import config as lora_config
from moesaic.routing import Gate, LinearRouter, Router, RoutingContext, Site, Softmax
from tests.tiny import PAD, batch, bert, gpt2, llama, mamba, mixtures, qwen3, small, t5, wrap

CALLS: list[tuple[str, RoutingContext, torch.Size]] = []
"""What the toy router was shown: module, context, shape of its input."""


class ToyRouter(LinearRouter):
    """A linear router that notes its context, hands a running sum from layer to layer and keeps prefill's scores."""

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        logits = super().score(h, context)
        assert context is not None
        assert context.site is not None
        site = context.site
        CALLS.append((site.name, context, h.shape))
        before = context.state.get(site.layer - 1)
        now = logits.mean() if before is None else before + logits.mean()
        context.state.setdefault(site.layer, now)
        kept = context.memory.setdefault(site.name, logits.detach().mean(dim=tuple(range(1, logits.dim() - 1))))
        kept = kept.view(-1, *[1] * (logits.dim() - 2), logits.shape[-1]) if len(kept) == len(logits) else 0
        return logits + (0 if before is None else before) + kept


@pytest.fixture(scope="module")
def toy() -> Iterator[str]:
    """A method that exists for this file only."""
    from peft import mapping

    @dataclass
    class ToyContextConfig(MixtureConfig):
        method: ClassVar[str] = "toy-context"

        def router(self, site: Site) -> Router:
            return ToyRouter(site.d_in, self.experts_at(site))

        def gate(self) -> Gate:
            return Softmax()

    assert lora_config.METHODS is METHODS
    yield "toy-context"
    del METHODS["toy-context"]
    for table in (
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    ):
        table.pop(ToyContextConfig.type)  # type: ignore[call-overload]


@contextmanager
def shown() -> Iterator[list[tuple[str, RoutingContext, torch.Size]]]:
    CALLS.clear()
    yield CALLS
    CALLS.clear()


def left_padded(model: nn.Module, columns: int = 2, **kwargs: Any) -> dict[str, Tensor]:
    inputs = batch(model, labels=False, **kwargs)
    inputs["input_ids"][0, :columns] = PAD
    inputs["attention_mask"][0, :columns] = 0
    return inputs


# -- masks ---------------------------------------------------------------------------------------------------------

BUILDERS = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2, "bert": bert, "mamba": mamba}


@pytest.mark.parametrize("way", ["by-name", "positional", "embeddings", "peft"])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_router_sees_the_padding_mask(name: str, way: str, toy: str) -> None:
    model = wrap(BUILDERS[name](), small(toy))
    inner: Any = model.get_base_model()
    inputs = left_padded(inner)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with shown() as calls, torch.no_grad():
        if way == "by-name":
            inner(input_ids=ids, attention_mask=mask)
        elif way == "peft":
            model(input_ids=ids, attention_mask=mask)
        elif way == "embeddings" and name == "mamba":
            embedded = inner.get_input_embeddings()(ids)
            inner(inputs_embeds=embedded, attention_mask=mask, input_ids=None)
        elif way == "embeddings":
            inner(inputs_embeds=inner.get_input_embeddings()(ids), attention_mask=mask)
        elif name == "gpt2":
            inner(ids, None, None, mask)
        elif name == "mamba":
            inner(ids, None, mask)
        else:
            inner(ids, mask)
        assert len(calls) == len(mixtures(model))
        for module, context, shape in calls:
            assert context.mask is not None, module
            assert context.mask.shape == shape[:-1]
            assert torch.equal(context.mask, mask.bool()), module


def test_four_dimensional_and_mapped_masks_are_read(toy: str) -> None:
    """A prepared causal mask, boolean or additive, and the mapping by attention type that some models take."""
    model = wrap(qwen3(), small(toy))
    inputs = left_padded(model)
    ids, two_d = inputs["input_ids"], inputs["attention_mask"].bool()
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril() & two_d[:, None, None, :]
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask in (causal, additive, {"full_attention": additive}):
        with shown() as calls, torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
            assert calls
            assert all(context.mask is not None and torch.equal(context.mask, two_d) for _, context, _ in calls)


def test_static_cache_masks_cover_the_current_tokens_only(toy: str) -> None:
    model = wrap(llama(), small(toy))
    inputs = left_padded(model)
    config = GenerationConfig(max_new_tokens=4, cache_implementation="static", do_sample=False, pad_token_id=PAD)
    with shown() as calls:
        model.generate(**inputs, generation_config=config)
        widths = [context.mask.shape[1] for _, context, _ in calls if context.mask is not None]
        assert len(widths) == len(calls)
        assert set(widths) == {inputs["input_ids"].shape[1], 1}
        assert torch.equal(calls[0][1].mask, inputs["attention_mask"].bool())
        assert all(context.mask.all() for _, context, shape in calls if shape[1] == 1)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with shown() as calls, torch.no_grad():
        model(**inputs, past_key_values=cache)
        assert all(torch.equal(context.mask, inputs["attention_mask"].bool()) for _, context, _ in calls)


@pytest.mark.parametrize("mode", ["forward", "greedy", "beam"])
def test_t5_stacks_see_their_own_masks(mode: str, toy: str) -> None:
    """Encoder and cross-attention keys and values: the encoder's mask; decoder: its own, or none."""
    model = wrap(t5(), small(toy))
    inputs = left_padded(model, rows=2, tokens=7)
    encoder_mask = inputs["attention_mask"].bool()
    decoder = torch.ones(2, 5, dtype=torch.long)
    decoder[1, 3:] = 0
    beams = 3 if mode == "beam" else 1
    with shown() as calls, torch.no_grad():
        if mode == "forward":
            model(**inputs, decoder_attention_mask=decoder)
        else:
            generation = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
            for mask in (torch.ones_like(encoder_mask), encoder_mask):  # the second call must not see the first's mask
                calls.clear()
                model.generate(input_ids=inputs["input_ids"], attention_mask=mask.long(), **generation)
        kinds = {"encoder": 0, "cross": 0, "decoder": 0}
        for module, context, shape in calls:
            if module.startswith("encoder"):
                kinds["encoder"] += 1
                assert torch.equal(context.mask, encoder_mask), module
            elif module.endswith(("EncDecAttention.k", "EncDecAttention.v")):
                kinds["cross"] += 1
                assert torch.equal(context.mask, encoder_mask.repeat_interleave(beams, dim=0)), module
            else:
                kinds["decoder"] += 1
                expected = decoder.bool() if mode == "forward" else None
                seen = context.mask
                assert (seen is None or seen.all()) if expected is None else torch.equal(seen, expected), module
                assert seen is None or seen.shape == shape[:-1]
        assert all(kinds.values()), kinds


def test_pooler_and_head_inputs_without_tokens_have_no_mask(toy: str) -> None:
    model = wrap(bert(), small(toy, target_modules=["pooler.dense", "query"]))
    with shown() as calls, torch.no_grad():
        model(**left_padded(model))
        seen = {module.rpartition(".")[2]: context.mask for module, context, _ in calls}
    assert seen["dense"] is None
    assert seen["query"] is not None


def test_padding_free_batches_tell_sequences_apart(toy: str) -> None:
    model = wrap(llama(), small(toy)).train()
    ids = torch.randint(3, 60, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    with shown() as calls:
        model(input_ids=ids, position_ids=positions, labels=ids)
        expected = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2]])
        assert all(torch.equal(context.sequences, expected) for _, context, _ in calls)
        assert all(context.mask is None for _, context, _ in calls)


# -- task ids ------------------------------------------------------------------------------------------------------


def test_task_ids_are_a_batch_key_that_the_model_never_sees(toy: str) -> None:
    model = wrap(llama(), small(toy))
    inputs = batch(model)
    with shown() as calls:
        model(**inputs, **{TASK_IDS: torch.tensor([2, 0, 1])})
        assert all(context.task_ids.tolist() == [2, 0, 1] for _, context, _ in calls)
        calls.clear()
        model(**inputs)
        assert all(context.task_ids is None for _, context, _ in calls)


@pytest.mark.parametrize("build", [llama, t5, mamba])
def test_pinned_task_ids_expand_with_beams_and_answers(build: Any, toy: str) -> None:
    model = wrap(build(), small(toy))
    inputs = batch(model, rows=2, labels=False)
    inputs.pop("decoder_input_ids", None)
    beams = {} if build is mamba else {"num_beams": 2}
    with shown() as calls, moesaic.routing_tasks(model, task_ids=[3, 5]):
        model.generate(
            **inputs, max_new_tokens=3, do_sample=build is mamba, num_return_sequences=2, pad_token_id=0, **beams
        )
        rows = {shape[0] for _, _, shape in calls}
        assert 4 in rows
        for _, context, shape in calls:
            assert context.task_ids.tolist() == ([3, 5] if shape[0] == 2 else [3, 3, 5, 5])
    with shown() as calls, torch.no_grad():
        model(**batch(model, rows=2, labels=False))
        assert all(context.task_ids is None for _, context, _ in calls), "unpinned at the end of the block"


def test_trace_by_task_during_generate() -> None:
    model = wrap(llama(), small("hotmoe"))
    inputs = left_padded(model, rows=2, tokens=6)
    with moesaic.trace(model, keep_weights=True) as t, moesaic.routing_tasks(model, task_ids=[0, 1]):
        out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=2)
    assert out.shape == (2, 10)
    assert set(t.modules) == {name.removeprefix("base_model.model.") for name in mixtures(model)}
    assert set(t.by_task()) == {0, 1}
    for module in t.modules.values():
        assert [w.shape[1] for w in module.kept] == [6, 1, 1, 1]
        assert module.tokens == 2 * (4 + 6) + 3 * 4, "prefill without padding, then one token a beam"
    model(**batch(model, labels=False))
    assert len(next(iter(t.modules.values())).kept) == 4, "closed with the block"


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
        assert sorted(states[0]) == [0, 1, 2]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_memory_lives_as_long_as_the_cache(name: str, toy: str) -> None:
    """Scores kept at prefill are there at every decoding step, and gone with the cache."""
    model = wrap(BUILDERS[name](), small(toy))
    inputs = batch(model, rows=2, labels=False)
    host = find_host(model)
    with shown() as calls:
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        memories = {id(context.memory) for _, context, _ in calls}
        assert len(memories) == 1
        assert len(calls) == 4 * len(mixtures(model))
    gc.collect()
    assert len(host._memory) == 0
    with shown() as calls, torch.no_grad():
        model(**inputs, use_cache=False)
        model(**inputs, use_cache=False)
        first, last = calls[0][1].memory, calls[-1][1].memory
        assert first is not last


def test_decoding_with_memory_equals_the_whole_sequence(toy: str) -> None:
    """With the scores of prefill kept, decoding step by step depends on them: other prompts, other continuations."""
    model = wrap(llama(), small(toy))
    ids = batch(model, rows=1, tokens=6, labels=False)["input_ids"]
    with torch.no_grad():
        prefill = model(input_ids=ids, use_cache=True)
        step = model(input_ids=ids[:, -1:], past_key_values=prefill.past_key_values).logits
        host = find_host(model)
        assert len(host._memory) == 1
        host._memory.clear()
        prefill = model(input_ids=ids, use_cache=True)
        host._memory.clear()
        forgotten = model(input_ids=ids[:, -1:], past_key_values=prefill.past_key_values).logits
    assert not torch.equal(step, forgotten)


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
    switches = {"aux_weight": 1.0} | ({"similarity_window": False} if method == "hotmoe" else {})
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
