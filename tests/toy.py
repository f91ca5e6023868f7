"""A mixture whose router notes what it is shown: for tests of masks, task ids, state and memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import mapping
from torch import Tensor, nn

from moesaic.lora import METHODS, MixtureConfig
from moesaic.routing import Gate, LinearRouter, Router, RoutingContext, Site, Softmax
from tests.tiny import PAD, batch, bert, gpt2, llama, mamba, qwen3

BUILDERS = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2, "bert": bert, "mamba": mamba}

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
        means = logits.reshape(len(logits), -1, logits.shape[-1]).mean(dim=1)
        now = means.mean(dim=0)
        context.state.setdefault(site.layer, now if before is None else before + now)
        kept = context.memory.setdefault(site.name, means.detach())
        kept = kept.view(-1, *[1] * (logits.dim() - 2), logits.shape[-1]) if len(kept) == len(logits) else 0
        return logits + (0 if before is None else before) + kept


@contextmanager
def toy_method() -> Iterator[str]:
    """A method that exists within the block only; gives its name."""

    @dataclass
    class ToyContextConfig(MixtureConfig):
        method: ClassVar[str] = "toy-context"

        def router(self, site: Site) -> Router:
            return ToyRouter(site.d_in, self.experts_at(site))

        def gate(self) -> Gate:
            return Softmax()

    tables: list[dict[Any, Any]] = [
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    ]
    try:
        yield ToyContextConfig.method
    finally:
        del METHODS[ToyContextConfig.method]
        for table in tables:
            del table[ToyContextConfig.type]


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
