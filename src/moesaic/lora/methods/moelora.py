"""MOELoRA: experts weighted by the task, not the token (Liu et al., SIGIR 2024, arXiv 2310.18339).

    p = softmax(W_g e_t),   y = W0 x + alpha/(E r) * sum_e p_e B_e A_e x

e_t is the embedding of task t; one embedding and one gate W_g weigh the experts of all layers. All tokens of a sequence
get the same weights, so for one task the mixture is one LoRA of rank E*r. Needs `routing_task_ids` in every batch. `r`
is the rank of one expert: the paper's r is E*r here.

Departures from the authors' code: A is drawn as in all methods here (theirs: N(0, 0.01)); the embedding has no spare
row; the experts of a linear share one dropout mask (theirs: one each).
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.lora.tasks import row_ids
from moesaic.routing import Gate, Router, RoutingContext, SharingRouter, Site, Softmax
from moesaic.routing.sharded import whole


class TaskRouter(SharingRouter):
    """`logits = W_g e_t`: a linear gate on the embedding of the sequence's task."""

    shared = ("embedding.weight",)
    by_task = True
    embedding: nn.Embedding
    linear: nn.Linear

    def __init__(self, num_tasks: int, num_experts: int, *, task_dim: int) -> None:
        super().__init__(num_experts)
        self.num_tasks = num_tasks
        self.embedding = nn.Embedding(num_tasks, task_dim)
        self.linear = nn.Linear(task_dim, num_experts, bias=False)

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        passed: MutableMapping[Any, Any] = {} if context is None else context.state
        ids = row_ids(h, context, limit=self.num_tasks, setting="num_tasks")
        table, gate = (whole(self.module(name, passed).weight).to(h) for name in ("embedding", "linear"))
        return F.linear(F.embedding(ids, table), gate).expand(*h.shape[:-1], self.num_experts)

    def extra_repr(self) -> str:
        return f"tasks={self.num_tasks}"


@dataclass
class MOELoRAConfig(MixtureConfig):
    """Settings of MOELoRA on top of `MixtureConfig`'s."""

    method: ClassVar[str] = "moelora"
    paper: ClassVar[str] = "MOELoRA (arXiv 2310.18339)"
    summary: ClassVar[str] = "dense weights from an embedding of the task id"
    kind: ClassVar[Kind] = Kind(needs_tasks=True)

    r: int = field(default=2, metadata={"help": "rank of one expert; the paper's r is num_experts times it"})
    lora_dropout: float = field(default=0.1, metadata={"help": "dropout on the experts' input"})
    num_tasks: int = field(default=8, metadata={"help": "how many tasks there are; `moesaic train` counts them"})
    task_dim: int = field(default=64, metadata={"help": "size of a task's embedding"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_tasks", "task_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def scaling(self) -> float:
        return super().scaling / self.num_experts

    def router(self, site: Site) -> Router:
        return TaskRouter(self.num_tasks, self.experts_at(site), task_dim=self.task_dim)

    def connect(self, routers: list[Router]) -> None:
        """One embedding and one gate for all; with other numbers of experts, a gate for each."""
        owners: dict[int, TaskRouter] = {}
        for router in routers:
            assert isinstance(router, TaskRouter)
            for name, key in (("embedding", 0), ("linear", router.num_experts)):
                owner = owners.setdefault(key, router)
                if owner is not router:
                    router.use(name, owner)

    def gate(self) -> Gate:
        return Softmax()
