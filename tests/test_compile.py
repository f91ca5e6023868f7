"""Under `torch.compile` a forward is one graph: reading a prompt, a step of decoding, and training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import CompileConfig, StaticCache

from moesaic.host import find_host, masks
from moesaic.lora import METHODS
from moesaic.routing import EntropyHybrid, Gate, TopK, TopP
from moesaic.routing.gates import before
from tests import tiny

OFTEN = ("dynmole", "hotmoe", "rmoe")
"""Between them what tracing has most to do with: the others are slow."""
NAMES = [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in sorted(METHODS) if name != "custom"
]
GATES = [
    TopK(2), TopK(3, normalize="none"), TopK(2, normalize="softmax", temperature=0.1), TopP(0.6),
    TopP(0.6, renormalize=False), EntropyHybrid(keep_top_k=1, top_p=0.5), EntropyHybrid(include_crossing=True),
]  # fmt: skip


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_one_graph(run: Callable[..., Any]) -> Callable[..., Any]:
    """Raises where the graph breaks."""
    compiled: Callable[..., Any] = torch.compile(run, backend="aot_eager", fullgraph=True)
    return compiled


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_and_a_step_of_decoding_are_a_graph_each(name: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(name, target_modules=["v_proj", "down_proj"]))
    ids = tiny.batch(model, labels=False)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    found = [_logits(model, ids, mask, how) for how in (lambda run: run, in_one_graph)]
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("mola", {"num_experts": 32, "r": 4, "target_modules": ["q_proj"]}), ("mixlora", {})],
)
def test_experts_that_are_read_alone_and_whole_ffns_are_in_the_graph_too(name: str, settings: dict[str, Any]) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(name, **settings))
    ids = tiny.batch(model, rows=1, labels=False)["input_ids"]
    found = [_logits(model, ids, torch.ones_like(ids), how) for how in (lambda run: run, in_one_graph)]
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def _logits(model: Any, ids: Tensor, mask: Tensor, how: Callable[..., Any]) -> list[Tensor]:
    """Of the prompt, and behind it of a token with a static cache that an eager forward has filled."""
    logits = [how(lambda: model(input_ids=ids, attention_mask=mask).logits)()]
    if find_host(model).asks("by_prompt"):
        return logits
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 4)
    model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    step = how(lambda token, mask: model(input_ids=token, attention_mask=mask, past_key_values=cache).logits)
    return [*logits, step(ids[:, :1], torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1))]


@pytest.mark.parametrize("name", NAMES)
def test_training_is_a_graph_with_the_gradients_of_eager(name: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(name, target_modules=["v_proj", "down_proj"])).train()
    if not any(p.requires_grad for p in model.parameters()):
        pytest.skip("nothing of it is trained")
    batch = tiny.batch(model)
    found = []
    for how in (lambda run: run, in_one_graph):
        torch.manual_seed(0)
        output = how(lambda: model(**batch))()
        output.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        found.append((output.loss.detach(), output.get("router_aux_loss"), grads))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("gate", GATES, ids=str)
@given(st.lists(st.lists(st.integers(-6, 6), min_size=5, max_size=5), min_size=1, max_size=4))
def test_a_gate_that_compares_pairs_is_the_one_that_sorts(gate: Gate, rows: list[list[int]]) -> None:
    """Halves of integers: with many ties, of which the first come first."""
    logits = torch.tensor(rows) / 2
    wanted = gate(logits).weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.routing.gates._by_pairs", lambda values: True)
        found = gate(logits).weights, gate.weights(logits)
    for weights in found:
        torch.testing.assert_close(weights.sort(dim=-1)[0], wanted.sort(dim=-1)[0])
        if not (isinstance(gate, TopK) and _tied(logits, gate.k)):  # which of them topk takes is not said
            torch.testing.assert_close(weights, wanted)


def _tied(logits: Tensor, k: int) -> bool:
    falling = logits.softmax(dim=-1).sort(dim=-1, descending=True)[0]
    return bool((falling[:, k - 1] == falling[:, k]).any())


def test_before_is_a_stable_order() -> None:
    values = torch.tensor([2.0, 3.0, 2.0, 1.0])
    assert before(values).sum(dim=-1).tolist() == [1, 0, 2, 3]


@given(past=st.integers(0, 6), tokens=st.integers(1, 3), room=st.integers(0, 2), back=st.sampled_from([0, 1]))
def test_a_mask_is_read_alike_behind_a_past_that_is_a_tensor(past: int, tokens: int, room: int, back: int) -> None:
    """As a compiled forward has it on a static cache: two-dimensional masks, and prepared ones with room behind."""
    flat = torch.rand(2, past + tokens + room, generator=torch.Generator().manual_seed(past)) > 0.4
    prepared = (torch.ones(tokens, flat.shape[1]).tril(past).bool() & flat[:, None])[:, None]
    where = torch.tensor(past)
    for mask in (flat, prepared):
        torch.testing.assert_close(masks.two_d(mask, tokens, where), masks.two_d(mask, tokens, past))
        known, found = masks.seen(mask, past + tokens), masks.seen(mask, where + tokens)
        assert known is not None
        assert found is not None
        torch.testing.assert_close(found[:, : past + tokens], known)
        assert not found[:, past + tokens :].any()
    if tokens > back:
        wanted = torch.stack([prepared[:, 0, i, past + i - back] for i in range(back, tokens)], dim=1)
        for begun in (where, past):
            torch.testing.assert_close(masks._allowed(prepared, tokens, begun, back), wanted)


def test_generate_compiles_with_a_static_cache() -> None:
    """As it does by itself on a GPU; left padding included."""
    model = tiny.wrap(tiny.llama(), tiny.small("hotmoe", target_modules=["v_proj", "down_proj"]))
    ids = tiny.batch(model, labels=False)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    asked: Any = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    asked |= {"input_ids": ids, "attention_mask": mask, "eos_token_id": None}
    compiles = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiles._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    found = model.generate(**asked, cache_implementation="static", compile_config=compiles)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(model.generate(**asked).logits))
