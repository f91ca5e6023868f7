"""Control arms: what a comparison needs to tell routing from capacity. None of them is anybody's method.

| method | weights | tells |
| --- | --- | --- |
| `uniform` | 1/E for every token | what the same experts do without routing: plain LoRA of rank E*r |
| `random` | top-k of a linear router that stays as it was drawn | what sparsity does without learning to route |
| `dense` | softmax of a linear router, no auxiliary loss | what learning to route does without sparsity and balance |
| `oracle` | 1 for the expert of the sequence's task id | what routing could do if it knew the task |

Departures: none, there being no authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.lora.tasks import NEVER, own_expert
from moesaic.routing import Gate, Joint, LinearRouter, Router, RoutingContext, Site, Softmax, TopK


class UniformRouter(Router):
    """Zero logits: every expert alike."""

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        return h.new_zeros(*h.shape[:-1], self.num_experts)

    @classmethod
    def from_inputs(cls, routers: Sequence[Self], h: Tensor, joint: Joint) -> Tensor:
        return h.new_zeros(*h.shape[:-1], len(routers), routers[0].num_experts)


class RandomRouter(Router):
    """A linear router that is drawn once, saved with the adapter, and never trained."""

    def __init__(self, d_in: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.weight: Tensor
        self.keep("weight", nn.Linear(d_in, num_experts, bias=False, dtype=torch.float32).weight.detach())

    def projection(self, context: RoutingContext | None = None) -> tuple[Tensor, None]:
        return self.weight, None


class OracleRouter(Router):
    """Expert e answers the sequences of task `task_of[e]`, and no others."""

    by_task = True

    def __init__(self, num_experts: int, task_of: list[int] | None = None) -> None:
        super().__init__(num_experts)
        self.task_of: Tensor
        self.register_buffer("task_of", torch.tensor(task_of or range(num_experts)))

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        own = own_expert(h, context, self.task_of)
        return torch.where(own, 0.0, NEVER).to(h.dtype).expand(*h.shape[:-1], self.num_experts)


@dataclass
class UniformConfig(MixtureConfig):
    """Settings of the uniform gate: `MixtureConfig`'s."""

    method: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "control"
    summary: ClassVar[str] = "every expert for every token, weighted 1/E: no routing"
    kind: ClassVar[Kind] = Kind(weights="fixed", is_static=True)

    def router(self, site: Site) -> Router:
        return UniformRouter(self.experts_at(site))

    def gate(self) -> Gate:
        return Softmax()


@dataclass
class DenseConfig(MixtureConfig):
    """Settings of the dense softmax gate: `MixtureConfig`'s."""

    method: ClassVar[str] = "dense"
    paper: ClassVar[str] = "control; Jacobs et al. 1991"
    summary: ClassVar[str] = "softmax of a linear router over all experts, no auxiliary loss"

    def router(self, site: Site) -> Router:
        return LinearRouter(site.d_in, self.experts_at(site))

    def gate(self) -> Gate:
        return Softmax()


@dataclass
class RandomConfig(MixtureConfig):
    """Settings of the random router on top of `MixtureConfig`'s."""

    method: ClassVar[str] = "random"
    paper: ClassVar[str] = "control; Chen et al. 2023 (SMoE-Dropout)"
    summary: ClassVar[str] = "top-k of a linear router that is drawn once and never trained"
    kind: ClassVar[Kind] = Kind(weights="fixed")

    top_k: int = field(default=2, metadata={"help": "experts a token"})

    def router(self, site: Site) -> Router:
        return RandomRouter(site.d_in, self.experts_at(site))

    def gate(self) -> Gate:
        return TopK(self.top_k, normalize="sum")


@dataclass
class OracleConfig(MixtureConfig):
    """Settings of the oracle gate on top of `MixtureConfig`'s. Needs `routing_task_ids` in every batch."""

    method: ClassVar[str] = "oracle"
    paper: ClassVar[str] = "control"
    summary: ClassVar[str] = "one expert a task, chosen by the task id: routing that cannot be wrong"
    kind: ClassVar[Kind] = Kind(weights="fixed", needs_tasks=True)

    num_experts: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "one a task: leave it out where num_tasks is given"}
    )
    num_tasks: int | None = field(
        default=None, metadata={"help": "how many tasks there are, and so experts; `moesaic train` counts them"}
    )

    def __post_init__(self) -> None:
        if self.num_experts is None:
            self.num_experts = MixtureConfig.num_experts if self.num_tasks is None else self.num_tasks
        super().__post_init__()
        if self.num_tasks not in (None, self.num_experts) and self.experts is None:
            raise ConfigError(
                f"num_experts={self.num_experts}, but there are {self.num_tasks} tasks, and method oracle has an "
                f"expert for each: set num_experts={self.num_tasks}"
            )

    def router(self, site: Site) -> Router:
        return OracleRouter(self.experts_at(site), self.task_of)

    def gate(self) -> Gate:
        return Softmax()
