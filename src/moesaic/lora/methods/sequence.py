"""Sequence-level routing: the prompt as a whole chooses the experts, not each token (a control; sentence-level routing
is Kudugunta et al. 2021's, arXiv 2110.03742).

    z = (W h + b) / temperature,   logits_t = mean over s in S(t) of z_s,   p = softmax(logits)
    S(t): the tokens that were given, in a causal model those up to t;  all real ones where nothing says which were

One linear router for each adapted linear. The mean of the logits is the logit of the mean, so this costs what a
router by token does. Labels mark answers in training, `generate` knows its prompt, and a KV cache keeps the sums that
its tokens came to, so an answer keeps its prompt's routing however the prompt got into the cache. In later turns on one
cache what was answered before still does not count, as in training on a chat's answers. The loss is HotMoE's mutual
information, one micro-batch at a time: experts balanced overall, each row certain.
Under Adam a temperature below 1 is a router that learns faster, by as much, and commits sooner.

Departures: a control of ours; Kudugunta et al. route whole FFNs of a model trained so from its start, each sentence to
its best few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.routing import (
    AuxiliaryLoss,
    Gate,
    Joint,
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
    """`logits_t = mean_s (W h_s + b)` over the prompt, or over what is read of it in a causal model."""

    by_prompt = True

    def __init__(self, d_in: int, num_experts: int, *, causal: bool, temperature: float = 1.0) -> None:
        super().__init__(d_in, num_experts, bias=True)
        self.causal = causal
        self.temperature = temperature

    def from_projection(self, read: Tensor, context: RoutingContext | None = None) -> Tensor:
        read = read / self.temperature if self.temperature != 1.0 else read
        return mean_read(read, context or RoutingContext(), self, causal=self.causal)

    @classmethod
    def from_projections(cls, routers: Sequence[Self], read: Tensor, joint: Joint) -> Tensor:
        """While an answer is decoded its prompt's sums are known, and nothing is read."""
        parts = zip(routers, joint.contexts(), read.unbind(-2), strict=True)
        known = [context.sums.kept(router.identity, part) for router, context, part in parts if router.causal]
        sums = [found for found in known if found is not None]
        if read.dim() < 4 or len(sums) < len(routers):
            return super().from_projections(routers, read, joint)
        together = torch.stack(sums, dim=-2)
        return (together[..., :-1] / together[..., -1:].clamp(min=1)).expand_as(read)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'running' if self.causal else 'whole'} mean"


def mean_read(read: Tensor, context: RoutingContext, router: Router, *, causal: bool) -> Tensor:
    """What is read (rows, T, n) averaged over each token's prompt, up to the token in a causal model.

    Rows of a 2-D input are tokens of which nothing more is known: each is a sequence.

    Args:
        router: whose means they are, where a KV cache keeps the sums.
    """
    if read.dim() < 3:
        return read
    counted = context.mask if context.prompt is None else context.prompt
    if not causal:
        means = pool(read, counted, context.sequences)
        return means.unsqueeze(-2).expand_as(read) if context.sequences is None else means[context.sequences]
    behind = context.site is not None and not context.whole
    if torch.compiler.is_compiling() and not router.training and (behind or read.shape[-2] == 1):
        raise ConfigError("routing by the prompt cannot decode under torch.compile: generate without it")
    kept = context.sums.kept(router.identity, read)
    if kept is not None:
        return (kept[..., :-1] / kept[..., -1:].clamp(min=1)).expand_as(read)
    real = read.new_ones(*read.shape[:-1], 1) if counted is None else counted.unsqueeze(-1).to(read.dtype)
    sums = context.sums(router.identity, torch.cat([read * real, real], dim=-1), context.sequences)
    return sums[..., :-1] / sums[..., -1:].clamp(min=1)


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
