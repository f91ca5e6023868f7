"""Read-ME's masks: which neurons of a dense model each domain of text uses most (`read_me.py` has the equations)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.errors import ConfigError
from moesaic.ffn.split import Seat, seats
from moesaic.ffn.watching import evaluating, tokens_of, watching

Masks = dict[str, Tensor]
"""By layer, m (N, d_ff)."""


@torch.no_grad()
def scores(model: PreTrainedModel, domains: Mapping[str, Iterable[Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Mean magnitude of every neuron on every domain: by layer (N, d_ff), in float64; padding is left out.

    Args:
        domains: by name, batches of `input_ids` and `attention_mask`; they are read once, one at a time.
    Raises:
        ConfigError: fewer than two domains, or one without a token.
    """
    if len(domains) < 2:
        raise ConfigError(
            f"Read-ME needs two domains at least, one an expert: {', '.join(domains) or 'none'} is not enough"
        )
    totals = {seat.name: torch.zeros(len(domains), seat.d_ff, dtype=torch.float64) for seat in seats(model)}
    counts = torch.zeros(len(domains), dtype=torch.float64)
    running: dict[str, Any] = {}

    def add(seat: Seat, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden, real = args[0].abs().flatten(0, -2), running["real"].flatten()
        totals[seat.name][running["domain"]] += hidden[real].sum(dim=0, dtype=torch.float64).cpu()

    with evaluating(model), watching(model, add):
        for i, (name, batches) in enumerate(domains.items()):
            for batch in batches:
                ids, real = tokens_of(model, batch)
                running |= {"domain": i, "real": real}
                counts[i] += int(real.sum())
                model(input_ids=ids, attention_mask=real.long(), use_cache=False)
            if counts[i] == 0:
                raise ConfigError(f"the domain {name!r} has no token: give each domain some text")
    return {name: total / counts[:, None] for name, total in totals.items()}


def masks(found: Mapping[str, Tensor], width: int) -> Masks:
    """m (N, d_ff) of each layer: the `width` neurons with the highest score of each domain.

    Raises:
        ConfigError: where a layer has fewer neurons than that.
    """
    made = {}
    for name, score in found.items():
        if not 1 <= width <= score.shape[1]:
            raise ConfigError(f"an expert of {width} neurons cannot be cut out of {score.shape[1]}")
        made[name] = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(width, dim=1).indices, True)
    return made


def shared(mask: Tensor) -> Tensor:
    """r (d_ff,): the neurons that every expert has."""
    return mask.all(dim=0)
