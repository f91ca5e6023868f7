"""LoRA-Flow: dynamic fusion weights, one gate a layer (Wang et al. 2024, arXiv 2402.11455).

    w = softmax(W_l h) + b_l,  h the layer's input by token;  all modules of layer l share w

A few hundred examples train W_l (E, d) and b_l (E,). The bias is added to the weights, so they may be negative or above
1, and sum to 1 + sum b.

Departures from the authors' code: h is what the layer's first adapted module reads, the input after its norm in a model
that norms first (theirs: before it); b starts at 0, every adapter alike (theirs gives all to one of two at first); keys
and values of cross-attention, which read the encoder, have a gate of their own; any number of adapters (theirs: two).
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.lora.layer import reads_the_encoder
from moesaic.routing import AsTheyAre, Gate, Router, RoutingContext, SharingRouter, Site


@dataclass
class Run:
    """One run of a layer: its weights (..., E), and the modules that have taken them."""

    weights: Tensor
    taken: set[object]


class FlowRouter(SharingRouter):
    """The first module of a layer that runs weighs, and the others take its weights. All use one gate."""

    linear: nn.Linear

    def __init__(self, site: Site, num_experts: int) -> None:
        super().__init__(num_experts)
        self.linear = nn.Linear(site.d_in, num_experts, dtype=torch.float32)
        nn.init.zeros_(self.linear.bias)
        stack, _, module = site.name.rpartition(f".{site.layer}.")
        self.place = stack, site.layer, reads_the_encoder(module), site.reads_the_cache

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        state: MutableMapping[Any, Any] = {} if context is None else context.state
        key = FlowRouter, self.owner("linear")
        run: Run | None = state.get(key)
        if run is None or self.identity in run.taken:  # a layer may run several times in one forward
            run = state[key] = Run(self.weigh(h, self.module("linear", state)), set())
        run.taken.add(self.identity)
        if run.weights.shape[:-1] != h.shape[:-1]:
            raise self.strange(h)
        return run.weights

    def weigh(self, h: Tensor, linear: nn.Linear) -> Tensor:
        if linear.weight.shape[-1] != h.shape[-1]:
            raise self.strange(h)
        return torch.softmax(F.linear(h, linear.weight.to(h.dtype)), dim=-1) + linear.bias.to(h.dtype)

    def strange(self, h: Tensor) -> ConfigError:
        return ConfigError(
            f"lora-flow: the modules of layer {self.place[1]} do not read the same tokens in the same width (here "
            f"{tuple(h.shape)}), so they cannot share weights: take adapters of fewer modules"
        )


@dataclass
class LoRAFlowConfig(MixtureConfig):
    """Settings of LoRA-Flow: `MixtureConfig`'s."""

    method: ClassVar[str] = "lora-flow"
    paper: ClassVar[str] = "LoRA-Flow (ACL 2024, arXiv 2402.11455)"
    summary: ClassVar[str] = "a softmax gate a layer, by token, shared by all modules of the layer"
    kind: ClassVar[Kind] = Kind(experts="adapters")

    def router(self, site: Site) -> Router:
        return FlowRouter(site, self.num_experts)

    def connect(self, routers: list[Router]) -> None:
        owners: dict[Any, FlowRouter] = {}
        for router in routers:
            assert isinstance(router, FlowRouter)
            owner = owners.setdefault(router.place, router)
            if owner is not router:
                router.use("linear", owner)

    def gate(self) -> Gate:
        return AsTheyAre()
