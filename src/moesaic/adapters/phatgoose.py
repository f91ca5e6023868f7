"""PHATGOOSE: a gate trained for each adapter by itself (Muqeeth et al. 2024, arXiv 2402.05859).

    training, expert e on its own data:  y = base(x) + sigmoid(v_e . x) d_e(x)          v_e alone is trained, from 0
    inference:  logits = LN(x) LN(V)^T / sqrt(d),   w = softmax over the top_k largest

LN is a layer norm without parameters, so a logit is sqrt(d) times the correlation of x and v_e; the sigmoid is gone.
A batch may mix the experts' data: each row, by its task id, has its own expert alone, so no gate sees another's rows.

Departures from the authors' code: all gates are trained in one run (theirs: a run each).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.lora.config import MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.lora.tasks import NEVER, own_expert
from moesaic.routing import Gate, Router, Routing, RoutingContext, Site, TopK


class GateRouter(Router):
    """In training `v_e . h` of each row's own expert and no other; else the correlation of `h` with each v_e."""

    def __init__(self, d_in: int, num_experts: int, task_of: list[int] | None = None) -> None:
        super().__init__(num_experts)
        self.task_of: Tensor
        self.register_buffer("task_of", torch.tensor(task_of or range(num_experts)))
        self.gates = nn.Parameter(torch.zeros(num_experts, d_in, dtype=torch.float32))

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        gates = self.gates.to(h.dtype)
        if not self.training:
            return self.local(h, gates)
        own = own_expert(h, context, self.task_of)
        return torch.where(own, F.linear(h, gates), NEVER)

    def local(self, h: Tensor, gates: Tensor) -> Tensor:
        """`LN(h) LN(V)^T / sqrt(d)`, between -sqrt(d) and sqrt(d)."""
        size = h.shape[-1:]
        return F.linear(F.layer_norm(h, size), F.layer_norm(gates, size)) / size[0] ** 0.5


class OwnSigmoid(Gate):
    """The sigmoid of each logit: the weight of a row's own expert in the training of its gate."""

    def __call__(self, logits: Tensor) -> Routing:
        return Routing(torch.sigmoid(logits), torch.softmax(logits, dim=-1), logits)

    @property
    def sums_to_one(self) -> bool:
        return False


@dataclass
class PhatgooseConfig(MixtureConfig):
    """Settings of PHATGOOSE on top of `MixtureConfig`'s. Its training needs `routing_task_ids`: each row's expert."""

    method: ClassVar[str] = "phatgoose"
    paper: ClassVar[str] = "PHATGOOSE (ICML 2024, arXiv 2402.05859)"
    summary: ClassVar[str] = "a gate for each adapter, trained on its own data in minutes; correlations route"
    kind: ClassVar[Kind] = Kind(experts="adapters of one task")

    top_k: int | None = field(default=None, metadata={"help": "experts a token; two where left out"})

    def router(self, site: Site) -> Router:
        return GateRouter(site.d_in, self.num_experts, self.task_of)

    def gate(self) -> Gate:
        return OwnSigmoid()

    def eval_gate(self) -> Gate:
        return TopK(min(2, self.num_experts) if self.top_k is None else self.top_k, normalize="sum")
