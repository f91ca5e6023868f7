"""Arrow: routing by the direction in which an adapter acts most (Ostapenko et al. 2024, arXiv 2405.11157).

    p_e = first right singular vector of B_e A_e,   logits_e = |p_e . x| / temperature
    w = softmax over the top_k largest

No training and no data. The vector's sign means nothing, hence the absolute value; x is taken as it is, so that longer
inputs route more sharply. p_e is exact, from the small factors alone: with Q_a R_a = A^T and Q_b R_b = B^T it is Q_a
times the first right singular vector of R_b R_a^T. (Power iteration, as PEFT has it, misses where two singular values
are close.) An expert that changes nothing has p = 0.

Departures from the authors' code: outputs are summed, sum_e w_e B_e A_e x (theirs merges factors by default, with cross
terms B_e A_f and the weights squared; its PHATGOOSE sums outputs); top_k is 3 where left out (theirs: all).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.lora.stored import LARGEST
from moesaic.routing import Gate, Joint, Router, RoutingContext, Site, TopK


def prototypes(A: Tensor, B: Tensor) -> Tensor:
    """First right singular vectors (E, d_in) of B_e^T A_e, of unit length; 0 where an expert changes nothing.

    Args:
        A: (E, r, d_in). B: (E, r, d_out).
    """
    A, B = A.double(), B.double()
    basis, to_input = torch.linalg.qr(A.transpose(-1, -2))
    core = torch.linalg.qr(B.transpose(-1, -2)).R @ to_input.transpose(-1, -2)
    _, values, right = torch.linalg.svd(core)
    first = (basis @ right[:, 0].unsqueeze(-1)).squeeze(-1)
    return torch.where(values[:, :1] > 0, first, 0.0).float()


class ArrowRouter(Router):
    """`|P h| / temperature`, with P (E, d_in) read off the experts and saved with them."""

    def __init__(self, d_in: int, num_experts: int, *, temperature: float) -> None:
        super().__init__(num_experts)
        self.prototypes: Tensor
        self.keep("prototypes", torch.zeros(num_experts, d_in))
        self.temperature = temperature

    def read_experts(self, A: Tensor, B: Tensor) -> None:
        stacked = (factor.unflatten(0, (self.num_experts, -1)) for factor in (A, B))
        self.prototypes.copy_(prototypes(*stacked))

    def projection(self, context: RoutingContext | None = None) -> tuple[Tensor, None]:
        return self.prototypes, None

    def from_projection(self, read: Tensor, context: RoutingContext | None = None) -> Tensor:
        return read.abs() / self.temperature

    @classmethod
    def from_projections(cls, routers: Sequence[Self], read: Tensor, joint: Joint) -> Tensor:
        return routers[0].from_projection(read)  # one temperature for all layers


@dataclass
class ArrowConfig(MixtureConfig):
    """Settings of Arrow on top of `MixtureConfig`'s."""

    method: ClassVar[str] = "arrow"
    paper: ClassVar[str] = "Arrow (arXiv 2405.11157)"
    summary: ClassVar[str] = "each adapter's strongest input direction is its prototype: no training, no data"
    kind: ClassVar[Kind] = Kind(experts="adapters", weights="fixed")

    top_k: int | None = field(
        default=None, metadata={"help": "experts a token; the three best, or all, where left out"}
    )
    router_temperature: float = field(default=1.0, metadata={"help": "logits are divided by it"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1e-6 <= self.router_temperature <= LARGEST:
            raise ConfigError(
                f"router_temperature={self.router_temperature} must be above 0, from 1e-06 to {LARGEST:g}"
            )

    def router(self, site: Site) -> Router:
        return ArrowRouter(site.d_in, self.num_experts, temperature=self.router_temperature)

    def gate(self) -> Gate:
        return TopK(min(3, self.num_experts) if self.top_k is None else self.top_k, normalize="sum")
