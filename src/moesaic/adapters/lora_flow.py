"""LoRA-Flow: dynamic fusion weights, one gate a layer (Wang et al. 2024, arXiv 2402.11455).

    w = softmax(W_l h) + b_l,  h the layer's input by token;  all modules of layer l share w

A few hundred examples train W_l (E, d) and b_l (E,). The bias is added to the weights, so they may be negative or above
1, and sum to 1 + sum b.

Departures from the authors' code: h is what the layer's first adapted module reads, the input after its norm in a model
that norms first (theirs: before it); b starts at 0, every adapter alike (theirs gives all to one of two at first); keys
and values of cross-attention, which read the encoder, have a gate of their own; any number of adapters (theirs: two).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.lora.layer import reads_the_encoder
from moesaic.routing import AsTheyAre, Gate, Router, RoutingContext, Site


class FlowRouter(Router):
    """The first of a layer weighs, and the others take its weights."""

    def __init__(self, site: Site, num_experts: int) -> None:
        super().__init__(num_experts)
        self.linear = nn.Linear(site.d_in, num_experts, dtype=torch.float32)
        nn.init.zeros_(self.linear.bias)
        stack, _, module = site.name.rpartition(f".{site.layer}.")
        self.place = stack, site.layer, reads_the_encoder(module)
        self.owner: FlowRouter | None = None

    def follow(self, owner: FlowRouter) -> None:
        """Take `owner`'s weights from now on: it alone counts and saves what makes them."""
        del self.linear
        object.__setattr__(self, "owner", owner)

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        state = {} if context is None else context.state
        if self.owner is None:
            probs = torch.softmax(F.linear(h, self.linear.weight.to(h.dtype)), dim=-1)
            weights = probs + self.linear.bias.to(h.dtype)
            state.setdefault((self.identity, "weights"), weights)
            return weights
        found = state.get((self.owner.identity, "weights"))
        if found is None or found.shape[:-1] != h.shape[:-1]:
            raise ConfigError(
                f"lora-flow: layer {self.place[1]} runs {h.shape[:-1]} tokens that its first module did not"
            )
        return found


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
        owners: dict[tuple[str, int, bool], FlowRouter] = {}
        for router in routers:
            assert isinstance(router, FlowRouter)
            owner = owners.setdefault(router.place, router)
            if owner is not router:
                router.follow(owner)

    def gate(self) -> Gate:
        return AsTheyAre()
