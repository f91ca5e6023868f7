"""HydraLoRA: one down projection, many up projections (Tian et al., NeurIPS 2024, arXiv 2404.19245).

    p = softmax(W h),   y = W0 x + (alpha/r) sum_e p_e B_e A x

The experts of a layer share A (r, d_in), which learns what the tasks have in common; the heads B_e learn what parts
them. Dense weights, no auxiliary loss.

Departures from the authors' code: the number of heads is a setting (the paper finds it by k-means over the data); the
heads of a linear share one dropout mask (theirs: one each, so that masks average out over the heads).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from moesaic.lora.config import MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.routing import Gate, LinearRouter, Router, Site, Softmax


@dataclass
class HydraLoRAConfig(MixtureConfig):
    """Settings of HydraLoRA on top of `MixtureConfig`'s."""

    method: ClassVar[str] = "hydralora"
    paper: ClassVar[str] = "HydraLoRA (arXiv 2404.19245)"
    summary: ClassVar[str] = "one shared A, an up projection B for each expert, dense weights"
    kind: ClassVar[Kind] = Kind(shares_down=True)

    r: int = field(default=4, metadata={"help": "rank of the shared down projection and of each head"})
    num_experts: int = field(default=4, metadata={"help": "heads in each adapted layer"})
    lora_alpha: float = field(default=32, metadata={"help": "scaling numerator: alpha/r, or alpha/sqrt(r) with rslora"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout on the experts' input"})

    def router(self, site: Site) -> Router:
        return LinearRouter(site.d_in, self.experts_at(site))

    def gate(self) -> Gate:
        return Softmax()
