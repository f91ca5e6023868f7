"""CAT, or LoRA soups: learned weights, the same for every input (Prabhakar et al. 2024, arXiv 2410.13025).

    w = softmax(a),  y = W0 x + sum_e w_e s_e B_e A_e x            a (E,) for each module, from 0: uniform at first

Experts stay as they are, so this is E numbers a module, trained in minutes, and exactly one LoRA of rank sum r_e:
`moesaic export collapse` writes it.

Departures from the authors' code: a starts at 0 (theirs: drawn from N(0, 1)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moesaic.lora.config import MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.routing import Gate, Router, RoutingContext, Site, Softmax


class StaticRouter(Router):
    """Logits that are parameters: no input changes them."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.logits = nn.Parameter(torch.zeros(num_experts, dtype=torch.float32))

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        return self.logits.to(h.dtype).expand(*h.shape[:-1], self.num_experts)


@dataclass
class CATConfig(MixtureConfig):
    """Settings of CAT: `MixtureConfig`'s."""

    method: ClassVar[str] = "cat"
    paper: ClassVar[str] = "LoRA Soups (arXiv 2410.13025)"
    summary: ClassVar[str] = "one learned weight for each adapter and module, whatever the input"
    kind: ClassVar[Kind] = Kind(experts="adapters", is_static=True)

    def router(self, site: Site) -> Router:
        return StaticRouter(self.num_experts)

    def gate(self) -> Gate:
        return Softmax()
