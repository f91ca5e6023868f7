"""What routers see of a forward: the masks of their own stack, packed sequences, and task ids."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StaticCache

import moesaic
from moesaic.errors import ConfigError
from moesaic.host import TASK_IDS
from moesaic.host.fitting import by_row
from tests.tiny import batch, bert, llama, mamba, mixtures, qwen3, small, t5, wrap
from tests.toy import BUILDERS, left_padded, shown, toy_method


@pytest.fixture(scope="module")
def toy() -> Iterator[str]:
    with toy_method() as name:
        yield name


# -- masks ---------------------------------------------------------------------------------------------------------


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
        elif way == "embeddings":
            inner(inputs_embeds=inner.get_input_embeddings()(ids), attention_mask=mask)
        else:
            given = {"input_ids": ids, "attention_mask": mask}
            names = list(inspect.signature(inner.forward).parameters)
            inner(*[given.get(n) for n in names[: names.index("attention_mask") + 1]])
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
    config = GenerationConfig(max_new_tokens=4, cache_implementation="static", do_sample=False, pad_token_id=0)
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
    inputs, passed_on = batch(model), set()
    stack = model.get_base_model().model
    stack.register_forward_pre_hook(lambda m, args, kwargs: passed_on.update(kwargs), with_kwargs=True)
    with shown() as calls:
        model(**inputs, **{TASK_IDS: torch.tensor([2, 0, 1])})
        assert all(context.task_ids.tolist() == [2, 0, 1] for _, context, _ in calls)
        assert "attention_mask" in passed_on
        assert TASK_IDS not in passed_on
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


def test_task_ids_that_do_not_divide_the_batch_are_refused(toy: str) -> None:
    model = wrap(llama(), small(toy))
    with pytest.raises(ConfigError, match="2 entries for a batch of 3 rows"):
        model(**batch(model, rows=3), **{TASK_IDS: torch.tensor([0, 1])})


@pytest.mark.parametrize(
    ("rows", "tokens", "wanted"),
    [
        (10, 5, [7] * 5 + [9] * 5),
        (20, 5, [7] * 10 + [9] * 10),
        (6, 5, None),
        (10, None, None),
    ],
    ids=["flattened", "flattened beams", "dealt to an expert", "unknown"],
)
def test_a_flat_input_has_task_ids_only_if_it_holds_whole_sequences(rows: int, tokens: Any, wanted: Any) -> None:
    ids = by_row(torch.tensor([7, 9]), torch.zeros(rows, 4), tokens, TASK_IDS)
    assert (None if ids is None else ids.tolist()) == wanted


@pytest.mark.parametrize(
    "ids", [["a"], None, 0, [[0, 1, 1]], [0.5, 1.0, 1.0], [True, False, True], float("nan")], ids=str
)
def test_task_ids_must_be_whole_numbers_one_a_row(ids: Any, toy: str) -> None:
    model = wrap(llama(), small(toy))
    with pytest.raises(ConfigError, match="task_ids"), moesaic.routing_tasks(model, task_ids=ids):
        pass
    with pytest.raises(ConfigError, match=TASK_IDS):
        model(**batch(model), **{TASK_IDS: ids if ids is not None else "none"})


def test_in_training_every_row_has_its_own_task_id(toy: str) -> None:
    model = wrap(llama(), small(toy))
    inputs = batch(model, rows=4)
    model(**inputs, **{TASK_IDS: torch.tensor([0, 1])})  # two beams of two rows
    with pytest.raises(ConfigError, match="2 entries for a batch of 4 rows"):
        model.train()(**inputs, **{TASK_IDS: torch.tensor([0, 1])})


@pytest.mark.parametrize("progress", [-0.1, 1.5, float("nan"), "half"])
def test_progress_is_a_share(progress: Any, toy: str) -> None:
    with pytest.raises(ConfigError, match="must be between 0 and 1"):
        moesaic.set_training_progress(wrap(llama(), small(toy)), progress)
