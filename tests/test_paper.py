"""What is counted on paper is what torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moesaic.bench import arms
from moesaic.bench.generating import adapted
from moesaic.bench.paper import BASES, Base, flops

TINY = Base("tiny", 2, 32, 32, 128, arms.VOCABULARY)
TOKENS = 16


def counted(model: torch.nn.Module) -> int:
    """FLOPs of a forward without the attention itself, which no adapter changes."""
    ids = torch.randint(0, arms.VOCABULARY, (1, TOKENS))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("method", ["uniform", "mola"])
def test_the_flops_of_an_adapter_are_those_that_torch_counts(method: str) -> None:
    base = arms.llama(TINY.d, TINY.layers)
    plain = counted(adapted(base, None))
    added = counted(adapted(base, arms.mixture(method, arms.LINEARS, backend="rank"))) - plain
    assert counted(adapted(base, arms.lora(arms.LINEARS))) - plain == TOKENS * flops(TINY.lora(arms.USUAL.rank))
    routers = TINY.routers(arms.USUAL.experts) if method == "mola" else 0
    assert added == TOKENS * flops(TINY.lora(arms.USUAL.rank) + routers)


def test_the_weights_of_a_base_are_those_that_torch_counts() -> None:
    model = arms.llama(TINY.d, TINY.layers)
    layers = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert TINY.weights == layers
    assert TINY.read() == layers + model.lm_head.weight.numel()
    assert [round(base.read() / 1e9, 1) for base in BASES] == [7.5, 69.5]  # without the embeddings, which are looked up
