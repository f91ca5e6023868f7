"""MoLA: mixture of LoRA experts with layer-wise expert allocation (Gao et al. 2024, arXiv 2402.08562).

    p = softmax(W h),  weights = top-k(p) / sum of the kept,  y = W0 x + (alpha/r) sum_e w_e B_e A_e x

One linear router for each adapted linear; layers may differ in their number of experts ("higher layers need more":
2-4-6-8 by quarter). The Switch balance loss is optional: aux_weight=0 turns it off.

Departures from the authors' code: the balance loss is one for each linear, summed (theirs: one a layer, over the tokens
of its seven linears together), is on at 0.001 (one of their two scripts has it on, the other off), and leaves padding
out (theirs counts it); the experts of a linear share one dropout mask (theirs: one each).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.routing import AuxiliaryLoss, Gate, LinearRouter, Router, Site, SwitchBalance, TopK


@dataclass
class MoLAConfig(MixtureConfig):
    """Settings of MoLA on top of `MixtureConfig`'s."""

    method: ClassVar[str] = "mola"
    paper: ClassVar[str] = "MoLA (arXiv 2402.08562)"
    summary: ClassVar[str] = "a linear router and top-k for each linear; experts may differ by layer"

    lora_dropout: float = field(default=0.05, metadata={"help": "dropout on the experts' input"})
    top_k: int = field(default=2, metadata={"help": "experts a token"})
    experts_per_layer: list[int] | None = field(
        default=None, metadata={"help": "experts by group of layers, from the bottom, e.g. [2, 4, 6, 8]"}
    )
    aux_weight: float = field(default=0.001, metadata={"help": "weight of the Switch balance loss; 0 turns it off"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts_per_layer is not None:
            if not self.experts_per_layer:
                raise ConfigError("experts_per_layer needs at least one number")
            for num_experts in self.experts_per_layer:
                self.gate().check(num_experts)

    def experts_at(self, site: Site) -> int:
        if self.experts_per_layer is None:
            return self.num_experts
        if len(self.experts_per_layer) > site.num_layers > 1:
            raise ConfigError(f"experts_per_layer={self.experts_per_layer}: this model has {site.num_layers} layers")
        return self.experts_per_layer[site.layer * len(self.experts_per_layer) // site.num_layers]

    def router(self, site: Site) -> Router:
        return LinearRouter(site.d_in, self.experts_at(site))

    def gate(self) -> Gate:
        return TopK(self.top_k, normalize="sum")

    def losses(self) -> list[AuxiliaryLoss]:
        return [SwitchBalance(self.aux_weight)]
