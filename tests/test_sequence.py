"""Sequence-level routing against its definition, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.errors import ConfigError
from moesaic.lora.methods.sequence import SequenceRouter
from moesaic.routing import RoutingContext, Site
from tests import tiny

F64 = torch.float64


def by_hand(router: SequenceRouter, h: Tensor, context: RoutingContext) -> Tensor:
    """Logits of each token of h (B, T, d), one at a time."""
    z = (h @ router.linear.weight.T + router.linear.bias) / router.temperature
    out = torch.zeros_like(z)
    for b in range(z.shape[0]):
        for t in range(z.shape[1]):
            seen = []
            for s in range(z.shape[1]):
                real = context.mask is None or bool(context.mask[b, s])
                if context.prompt is not None:
                    real = bool(context.prompt[b, s])
                same = context.sequences is None or context.sequences[b, s] == context.sequences[b, t]
                if real and same and (s <= t or not router.causal):
                    seen.append(z[b, s])
            if seen:
                out[b, t] = torch.stack(seen).mean(dim=0)
    return out


CONTEXTS: dict[str, dict[str, Any]] = {
    "all tokens": {},
    "padded": {"mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()},
    "prompt known": {
        "mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool(),
        "prompt": torch.tensor([[0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool(),
    },
    "packed prompts": {
        "prompt": torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]]).bool(),
        "sequences": torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 4, 4]]),
    },
    "packed": {"sequences": torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 4, 4]])},
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("given", list(CONTEXTS))
def test_logits_and_gradients_equal_the_definition(given: str, causal: bool) -> None:
    router = SequenceRouter(5, 3, causal=causal, temperature=0.5).double().train()
    h = torch.randn(2, 6, 5, dtype=F64, requires_grad=True)
    context = RoutingContext(**CONTEXTS[given])
    got, wanted = router(h, context), by_hand(router, h, context)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    inputs = [h, *router.parameters()]
    direction = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((got * direction).sum(), inputs),
        torch.autograd.grad((wanted * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_generated_tokens_keep_the_prompts_routing_also_under_beams() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("sequence"))
    inputs = tiny.padded(tiny.batch(model, tokens=6, labels=False), left=2)
    settings = {"max_new_tokens": 4, "pad_token_id": tiny.PAD, "eos_token_id": None, "do_sample": False}
    for beams in (1, 3):
        with moesaic.trace(model, keep_weights=True) as trace:
            model.generate(**inputs, num_beams=beams, **settings)
        for name in trace.modules:
            prefill, *steps = trace.weights(name)
            assert len(steps) == 3
            for step in steps:
                torch.testing.assert_close(step[:, 0], prefill[:, -1], atol=0, rtol=0)


def test_a_cache_that_is_used_anew_forgets_the_last_prompt() -> None:
    from transformers import StaticCache

    model = tiny.wrap(tiny.llama(), tiny.small("sequence"))
    cache = StaticCache(config=model.config, max_cache_len=16)
    first, second = (tiny.batch(model, rows=1, labels=False, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        wanted = model(**second).logits
        model(**first, past_key_values=cache)
        cache.reset()
        torch.testing.assert_close(model(**second, past_key_values=cache).logits, wanted)


def test_an_encoder_routes_by_the_whole_sequence_and_a_decoder_by_what_was_read() -> None:
    for name, causal in (("bert", False), ("llama", True), ("t5", True)):
        model = tiny.wrap(tiny.MODELS[name](), tiny.small("sequence"))
        routers = [layer.moe_lora_router["default"] for layer in tiny.mixtures(model).values()]
        assert {router.causal for router in routers} == {causal}


def test_a_temperature_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"router_temperature=0\.0 must be above 0"):
        tiny.small("sequence", router_temperature=0.0)


def test_decoding_under_compile_is_refused_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    router = SequenceRouter(4, 3, causal=True).eval()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    router(torch.randn(1, 5, 4))
    with pytest.raises(ConfigError, match=r"under torch\.compile"):
        router(torch.randn(1, 1, 4))
    behind = RoutingContext(site=Site("x", 4, 3), whole=False)
    with pytest.raises(ConfigError, match=r"under torch\.compile"):
        router(torch.randn(1, 5, 4), behind)
