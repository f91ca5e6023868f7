"""Attention for tokens of many requests that lie flat in one row, each over its own keys and values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from moesaic.errors import ConfigError

NAME = "moesaic_requests"


@dataclass
class Past:
    """One request's keys and values in every layer, (kv heads, room, head size) each; `length` of them count."""

    length: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values up to these new ones (heads, n, size), which count once `length` says so."""
        end = self.length + key.shape[1]
        held = self.layers.get(layer)
        if held is None or held[0].shape[1] < end:
            room = max(2 * (0 if held is None else held[0].shape[1]), -(-end // 64) * 64)
            grown = tuple(t.new_empty(t.shape[0], room, t.shape[2]) for t in (key, value))
            for new, old in zip(grown, held or (), strict=False):
                new[:, : self.length] = old[:, : self.length]
            held = self.layers[layer] = (grown[0], grown[1])
        for whole, new in zip(held, (key, value), strict=True):
            whole[:, self.length : end] = new
        return held[0][:, :end], held[1][:, :end]


_RUNNING: ContextVar[Sequence[tuple[Past, int]]] = ContextVar("running")


@contextmanager
def running(parts: Sequence[tuple[Past, int]]) -> Iterator[None]:
    """Inside, a flat row holds these requests' tokens, one request's after the other's: so many of each."""
    token = _RUNNING.set(parts)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, heads, T, size) to (1, T, heads, size).

    Raises:
        ConfigError: for layers that cap their scores or have sinks.
    """
    if softcap is not None or s_aux is not None:
        raise ConfigError("the engine does not serve models whose attention caps its scores or has sinks")
    made, start = [], 0
    layer: int = module.layer_idx  # type: ignore[assignment]
    for past, count in _RUNNING.get():
        own = slice(start, start + count)
        keys, values = past.add(layer, key[0, :, own], value[0, :, own])
        seen = None
        if count > 1 or sliding_window is not None:
            places = torch.arange(keys.shape[1], device=keys.device)
            now = places[keys.shape[1] - count :, None]
            seen = places <= now
            if sliding_window is not None:
                seen &= places > now - sliding_window
        out = F.scaled_dot_product_attention(
            query[:, :, own], keys[None], values[None], attn_mask=seen, scale=scaling, enable_gqa=True
        )
        made.append(out.transpose(1, 2))
        start += count
    return torch.cat(made, dim=1), None


@torch.no_grad()
def forward(model: Any, parts: Sequence[tuple[Past, Sequence[int]]]) -> Tensor:
    """Logits (R, V) behind the last token of each of R requests, whose new tokens run as one flat row.

    Their keys and values are kept with each `Past`; its `length` is the caller's to raise.
    """
    ids = [token for _, tokens in parts for token in tokens]
    places = [past.length + i for past, tokens in parts for i in range(len(tokens))]
    lasts = list(itertools.accumulate(len(tokens) for _, tokens in parts))
    with running([(past, len(tokens)) for past, tokens in parts]):
        out = model(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([places]),
            use_cache=False,
            logits_to_keep=torch.tensor(lasts) - 1,
        )
    return out.logits[0]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
