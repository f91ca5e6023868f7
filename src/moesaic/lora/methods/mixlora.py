"""MixLoRA: experts are whole FFNs that share the frozen one (Li et al. 2024, arXiv 2404.15159).

    p = softmax(W_r x),  weights = top-k(p) / sum of the kept,  y = sum_e w_e FFN_e(x)

One linear router for each FFN, not for each linear; expert e is the frozen FFN with a LoRA of its own on every linear
(gate, up and down). The other targets, attention by default, get one plain LoRA each.

| routing | weights | the authors' |
| --- | --- | --- |
| `top_k` | the k largest probabilities, divided by their sum | MixLoRA |
| `top_p` | the largest until their mass reaches `top_p`, as they are | MixLoRA-Dynamic |
| `switch` | the largest as it is | MixLoRA-Switch |

Weights that are left as they are scale the FFN's output by their mass: it then does not start as the base's.

Departures from the authors' code: the balance loss counts shares of slots, so that it is 1 when balanced (theirs is k),
and is one for each FFN, summed, not one over the tokens of all layers: with L FFNs a weight of 0.001 here is 0.001 L/k
there. With `top_p` it counts shares of slots as well (theirs tokens, so that a token with many experts counts more).
Padding never counts (theirs counts it with `top_p` and `switch`). `switch` has no capacity, since sorted rows drop no
token. The experts of an FFN share one dropout mask (theirs: one each). The down projection's frozen product is made
once, of the weighted sum, which is the same since it is linear.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.routing import AuxiliaryLoss, Gate, LinearRouter, Router, Site, SwitchBalance, TopK, TopP, ZLoss

Routing = Literal["top_k", "top_p", "switch"]
_GATES: tuple[Routing, ...] = ("top_k", "top_p", "switch")


@dataclass
class MixLoRAConfig(MixtureConfig):
    """Settings of MixLoRA on top of `MixtureConfig`'s."""

    method: ClassVar[str] = "mixlora"
    paper: ClassVar[str] = "MixLoRA (arXiv 2404.15159)"
    summary: ClassVar[str] = "whole FFNs as experts, routed once a block; plain LoRA on attention"
    level = "block"

    r: int = field(default=16, metadata={"help": "rank of one expert in each linear, and of attention's plain LoRA"})
    lora_alpha: float = field(default=32, metadata={"help": "scaling numerator: alpha/r, or alpha/sqrt(r) with rslora"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout on the experts' input"})
    routing: str = field(default="top_k", metadata={"help": "top_k, top_p or switch (top-1, not renormalised)"})
    top_k: int = field(default=2, metadata={"help": "experts a token, with routing=top_k"})
    top_p: float = field(default=0.8, metadata={"help": "mass of the experts of a token, with routing=top_p"})
    router_init_std: float = field(default=0.02, metadata={"help": "standard deviation of the router's first weights"})
    aux_weight: float = field(default=0.001, metadata={"help": "weight of the Switch balance loss; 0 turns all off"})
    z_weight: float = field(default=0.001, metadata={"help": "weight of the z-loss, with routing=switch"})

    def __post_init__(self) -> None:
        if self.routing not in _GATES:
            raise ConfigError(f"unknown routing {self.routing!r}: choose one of {', '.join(_GATES)}")
        super().__post_init__()
        if self.router_init_std < 0:
            raise ConfigError(f"router_init_std={self.router_init_std} must be at least 0")
        TopP(self.top_p).check(self.num_experts)
        if self.z_weight < 0:
            raise ConfigError(f"z_weight={self.z_weight} must be at least 0; 0 turns the z-loss off")

    def router(self, site: Site) -> Router:
        router = LinearRouter(site.d_in, self.experts_at(site))
        nn.init.normal_(router.linear.weight, std=self.router_init_std)
        return router

    def gate(self) -> Gate:
        if self.routing == "top_p":
            return TopP(self.top_p, renormalize=False)
        return TopK(self.top_k) if self.routing == "top_k" else TopK(1, normalize="none")

    def losses(self) -> list[AuxiliaryLoss]:
        losses: list[AuxiliaryLoss] = [SwitchBalance(self.aux_weight)]
        if self.routing == "switch" and self.z_weight > 0:
            losses.append(ZLoss(self.z_weight))
        return losses
