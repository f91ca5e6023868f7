"""SMoE-Dropout: a fixed random router over more and more experts (Chen et al., ICLR 2023, arXiv 2303.01610).

    s = G x,   (v, i) = top-k(s),   w = softmax(v)        G (N, d) random and never trained; w by routing.TopK
    y = sum_j w_j E_{i_j}(x)                              E_e the e-th of N equal slices of the feed-forward layer
    k(t) = clip(round((k_max - k_min) t / T) + k_min)     grows while training: `KSchedule`

A network so trained is slimmed by taking fewer experts, with no more training: `set_top_k(model, k)`.

`combine="softmax"` is the paper's: a mean of k experts, so that the output keeps its scale over k. An even split of a
trained layer is scaled by N for it, or the mean would be a kth of the sum. `combine="sum"` gives each expert the weight
1: with k = N that is the dense layer, exactly.

Departures from the authors' code: one output bias a layer instead of one an expert; evaluation leaves k as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.errors import ConfigError
from moesaic.ffn.layer import ExpertLayer, bank_of
from moesaic.ffn.method import Method, setting
from moesaic.ffn.places import put, sites
from moesaic.ffn.split import Dense, Seat, Slices, cut, even, join, read
from moesaic.host import Host
from moesaic.routing import LinearRouter, Router, RoutingContext, Site, TopK


class FixedRouter(Router):
    """`logits = G h` with G (N, d) from N(0, 0.02), a buffer: no optimizer sees it."""

    def __init__(self, d_in: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.register_buffer("weight", torch.randn(num_experts, d_in) * 0.02)
        self.weight: Tensor

    def projection(self, context: RoutingContext | None = None) -> tuple[Tensor, None]:
        return self.weight, None

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, fixed"


@dataclass
class SMoEDropout(Method):
    """`num_experts` equal slices of each feed-forward layer behind a router, in Llama, Qwen, Mistral, GPT-2, BERT …

        convert(model, SMoEDropout(num_experts=8, combine="sum"))        # with all experts, the dense model exactly

    Trained with a growing k (`KSchedule`) and run at any (`set_top_k`). Raises ConfigError for settings that cannot be.
    Chen et al. 2023, arXiv 2303.01610.
    """

    name: ClassVar[str] = "smoe-dropout"
    summary: ClassVar[str] = "equal slices behind a fixed random router, for training with growing k"
    paper: ClassVar[str] = "SMoE-Dropout (ICLR 2023, arXiv 2303.01610)"

    num_experts: int = setting(16, "N, a divisor of the layers' d_ff")
    top_k: int | None = setting(None, "experts a token; all where left out")
    combine: Literal["softmax", "sum"] = setting("softmax", "softmax (the paper's: a mean) or sum (weights of 1)")
    router: Literal["fixed", "learned"] = setting("fixed", "fixed (the paper's) or learned")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts < 1:
            raise ConfigError(f"num_experts={self.num_experts} must be at least 1")
        k = self.num_experts if self.top_k is None else self.top_k
        if not 1 <= k <= self.num_experts:
            raise ConfigError(f"top_k={k} must be between 1 and num_experts={self.num_experts}")
        if self.combine == "sum" and self.router == "learned":
            raise ConfigError("combine=sum gives every expert the weight 1, so that a router learns nothing: softmax")

    def layer(self, model: PreTrainedModel, seat: Seat, site: Site, host: Host) -> ExpertLayer:
        dense = read(model, seat)
        width = even(seat.d_ff, self.num_experts).shape[1]
        experts = bank_of(seat)(model.config, self.num_experts, seat.d_model, width, dense.activation)
        kind = FixedRouter if self.router == "fixed" else LinearRouter
        gate = TopK(self.num_experts if self.top_k is None else self.top_k)
        made = ExpertLayer(
            site,
            kind(seat.d_model, self.num_experts),
            gate,
            experts,
            host,
            bias=dense.bias,
            combine=self.combine,
        )
        return made.to(dense.up.device, dense.up.dtype).train(model.training)

    def install(self, model: PreTrainedModel, host: Host) -> None:
        for seat, site in sites(model):
            put(model, seat, self.layer(model, seat, site, host))

    def convert(self, model: PreTrainedModel, host: Host, **parts: Any) -> None:
        made = [(seat, self.layer(model, seat, site, host)) for seat, site in sites(model)]
        for seat, layer in made:
            dense = read(model, seat)
            slices = cut(dense, even(seat.d_ff, self.num_experts))
            if self.combine == "softmax":
                slices.down = slices.down * self.num_experts
            layer.experts.fill(slices)
            put(model, seat, layer)


def dense_of(layer: ExpertLayer) -> Dense:
    """The dense layer that the experts part: bit for bit with combine="sum", or N a power of two.

    Raises:
        ConfigError: for a layer of another method, whose experts are no slices in order.
    """
    if not isinstance(layer.gate, (FixedRouter, LinearRouter)) or layer.shared is not None:
        raise ConfigError("only SMoE-Dropout's layers part a dense one in order")
    slices: Slices = layer.experts.slices()
    if layer.combine == "softmax":
        slices.down = slices.down / layer.experts.num_experts
    neurons = even(layer.experts.num_experts * layer.experts.width, layer.experts.num_experts)
    bias = None if layer.bias is None else layer.bias.detach()
    return join(slices, neurons, bias=bias, activation=layer.experts.act_fn)
