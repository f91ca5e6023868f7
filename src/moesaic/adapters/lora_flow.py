"""LoRA-Flow: dynamic fusion weights, one gate a layer (Wang et al. 2024, arXiv 2402.11455).

    w = softmax(W_l h + b_l),  h the layer's input by token;  all modules of layer l share w

A few hundred examples train W_l (E, d) and b_l (E,). Here h is what the layer's first adapted module reads: the input
after its norm, in a model that norms first. Keys and values of cross-attention, which read the encoder, have their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.lora.layer import reads_the_encoder
from moesaic.routing import Gate, LinearRouter, Router, RoutingContext, Site, Softmax


class FlowRouter(LinearRouter):
    """The first of a layer scores, and the others take its logits."""

    def __init__(self, site: Site, num_experts: int) -> None:
        super().__init__(site.d_in, num_experts, bias=True)
        stack, _, module = site.name.rpartition(f".{site.layer}.")
        self.place = stack, site.layer, reads_the_encoder(module)
        self.owner: FlowRouter | None = None

    def follow(self, owner: FlowRouter) -> None:
        """Take `owner`'s logits from now on: it alone counts and saves what makes them."""
        del self.linear
        object.__setattr__(self, "owner", owner)

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        state = {} if context is None else context.state
        if self.owner is None:
            logits = super().score(h, context)
            state.setdefault((self.identity, "logits"), logits)
            return logits
        found = state.get((self.owner.identity, "logits"))
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
        return Softmax()
