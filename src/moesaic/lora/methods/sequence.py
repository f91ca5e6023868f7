"""Sequence-level routing: the prompt as a whole chooses the experts, not each token (a control; sentence-level routing
is Kudugunta et al. 2021's, arXiv 2110.03742).

    z = (W h + b) / temperature,   logits_t = mean over s in S(t) of z_s,   p = softmax(logits)
    S(t): the prompt's tokens, in a causal model those up to t;  all real ones up to t where no prompt is known

One linear router for each adapted linear. The mean of the logits is the logit of the mean, so this costs what a
router by token does. Under a KV cache the first forward is the prompt, and every token after it keeps its routing;
labels mark the prompt in training. The loss is HotMoE's mutual information: experts balanced overall, each row certain.
Under Adam a temperature below 1 is a router that learns faster, by as much, and commits sooner.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.host.fitting import by_row
from moesaic.lora.config import MixtureConfig
from moesaic.routing import (
    AuxiliaryLoss,
    Gate,
    LinearRouter,
    MutualInformation,
    Router,
    RoutingContext,
    Site,
    Softmax,
    TopK,
    pool,
)


class SequenceRouter(LinearRouter):
    """`logits_t = mean_s (W h_s + b)` over the prompt, or over what is read of it in a causal model.

    Rows of a 2-D input are tokens of which nothing more is known: each is a sequence.
    """

    def __init__(self, d_in: int, num_experts: int, *, causal: bool, temperature: float = 1.0) -> None:
        super().__init__(d_in, num_experts, bias=True)
        self.causal = causal
        self.temperature = temperature

    def from_projection(self, read: Tensor, context: RoutingContext | None = None) -> Tensor:
        read = read / self.temperature if self.temperature != 1.0 else read
        if read.dim() < 3:
            return read
        context = context or RoutingContext()
        memory = self._memory(context, read)
        if self in memory:
            kept = by_row(memory[self], read, None, "the cache's routing")
            assert kept is not None
            return kept.expand_as(read)
        real = _counted(read, context)
        if not self.causal:
            means = pool(read, real.squeeze(-1), context.sequences)
            return means.unsqueeze(-2).expand_as(read) if context.sequences is None else means[context.sequences]
        total, count = (_running(part, context.sequences) for part in (read * real, real))
        logits = total / count.clamp(min=1)
        if not self.training:
            memory[self] = logits[..., -1:, :].detach()
        return logits

    def _memory(self, context: RoutingContext, read: Tensor) -> MutableMapping[Any, Any]:
        if torch.compiler.is_compiling():
            if self.causal and not self.training and read.shape[-2] == 1:
                raise ConfigError("method sequence cannot decode under torch.compile: generate without it")
            return {}
        return context.memory

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'running' if self.causal else 'whole'} mean"


def _counted(read: Tensor, context: RoutingContext) -> Tensor:
    """1 for tokens that have a say (..., T, 1), else 0: the prompt's, or all real ones of a row without a prompt."""
    real = read.new_ones(*read.shape[:-1], 1)
    if context.mask is not None:
        real = context.mask.unsqueeze(-1).to(read.dtype)
    if context.prompt is None or context.sequences is not None:
        return real
    prompt = context.prompt.unsqueeze(-1).to(read.dtype)
    return torch.where(prompt.any(dim=-2, keepdim=True), prompt, real)


def _running(values: Tensor, sequences: Tensor | None) -> Tensor:
    """Sums over each token and those before it in its sequence, of values (..., T, n)."""
    sums = values.cumsum(dim=-2)
    if sequences is None:
        return sums
    places = torch.arange(sequences.shape[-1], device=sequences.device).expand_as(sequences)
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[..., 1:] = sequences[..., 1:] != sequences[..., :-1]
    begin = torch.where(begins, places, 0).cummax(dim=-1).values.unsqueeze(-1)
    before = torch.nn.functional.pad(sums, (0, 0, 1, 0)).gather(-2, begin.expand_as(sums))
    return sums - before


@dataclass
class SequenceConfig(MixtureConfig):
    """Settings of sequence-level routing on top of `MixtureConfig`'s."""

    method: ClassVar[str] = "sequence"
    paper: ClassVar[str] = "control; Kudugunta et al. 2021 (arXiv 2110.03742)"
    summary: ClassVar[str] = "a linear router over the mean of the prompt: one choice a sequence"

    top_k: int | None = field(default=None, metadata={"help": "experts a sequence; null mixes all of them"})
    router_temperature: float = field(default=1.0, metadata={"help": "logits are divided by it"})
    aux_weight: float = field(
        default=0.1, metadata={"help": "weight of the mutual information loss, mean over routers; 0 turns it off"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_temperature <= 0:
            raise ConfigError(f"router_temperature={self.router_temperature} must be above 0")

    def router(self, site: Site) -> Router:
        return SequenceRouter(site.d_in, self.experts_at(site), causal=site.causal, temperature=self.router_temperature)

    def gate(self) -> Gate:
        return Softmax() if self.top_k is None else TopK(self.top_k, normalize="sum")

    def losses(self) -> list[AuxiliaryLoss]:
        return [MutualInformation(self.aux_weight, reduce="mean")]
