"""LoRAMoE: dense mixtures of LoRA experts, parted by the type of the task (Dou et al. 2024, arXiv 2312.09979).

    weights = softmax(W h),  y = W0 x + (alpha/r) sum_e w_e B_e A_e x
    Q_se = sum_t w_ste,  Z = I * Q,  L = L_task + aux_weight * var(Z) / mean(Z)^2
    I_se = 1 + delta if sequence s and expert e are of one type, else 1 - delta

The first half of the experts is of the first type, as are the tasks named in `knowledge_tasks` (those that draw on what
the base model knows); the other half is of the other type, as are all other tasks. The localized balance loss evens
out Z over the sequences and experts of a batch, so that Q leans by (1 + delta) / (1 - delta) towards the experts of
the *other* type: the two types of tasks part ways, though each to the half that is not named after it. Without
`knowledge_tasks`, or task ids in the batch, I is 1 and the loss balances all experts alike.

Departures from the authors' code: padding never counts (theirs counts it in Q); the experts of a layer share one
dropout mask; every linear is a target unless told otherwise (theirs: gate, up and down projections); the loss is on
(their script gives it weight 0, and delta 0), as a sum over routers. The paper divides by the mean, the code by its
square: this is the code's.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.routing import AuxiliaryLoss, Gate, LinearRouter, Record, Router, Site, Softmax
from moesaic.routing.losses import stacks


class LocalizedBalance(AuxiliaryLoss):
    """Squared coefficient of variation of what each expert gets of each sequence, weighed by the types of both.

    Rows of the batch are the sequences, packed or not; rows without a real token do not count. Not linear in the
    batch: it compares the sequences of one micro-batch.
    """

    def __init__(self, weight: float, *, delta: float = 0.0, knowledge_tasks: Sequence[int] | None = None) -> None:
        super().__init__(weight)
        self.delta = delta
        self.knowledge_tasks = knowledge_tasks

    def per_router(self, records: Sequence[Record], step: Hashable) -> Iterator[Tensor]:
        for stack in stacks(records, "weights"):
            record = stack.records[0]
            rows = record.routing.weights.shape[0]
            weights = stack.values.unflatten(1, (rows, -1))
            if stack.mask is None:
                received, present = weights.sum(dim=2), weights.new_ones(rows)
            else:
                mask = stack.mask.view(rows, -1)
                received = torch.einsum("rbte,bt->rbe", weights, mask.to(weights.dtype))
                present = mask.any(dim=1).to(weights.dtype)
            if self.delta > 0 and self.knowledge_tasks is not None and record.task_ids is not None:
                received = received * self.importance(record.task_ids, received)
            yield squared_variation(received, present)

    def importance(self, task_ids: Tensor, like: Tensor) -> Tensor:
        """1 + delta where the types of sequence and expert agree, 1 - delta elsewhere (rows, E)."""
        first_task = torch.zeros_like(task_ids, dtype=torch.bool)
        for task in self.knowledge_tasks or ():
            first_task = first_task | (task_ids == task)
        num_experts = like.shape[-1]
        first_expert = torch.arange(num_experts, device=like.device) < num_experts // 2
        agree = first_task.to(like.device).unsqueeze(1) == first_expert
        return (1 - self.delta) + 2 * self.delta * agree.to(like.dtype)


def squared_variation(x: Tensor, present: Tensor) -> Tensor:
    """Unbiased variance over squared mean of x (R, rows, E) over its last two axes, rows with `present` 0 left out."""
    count, row = present.sum() * x.shape[-1], present.unsqueeze(-1)
    mean = (x * row).sum(dim=(1, 2)) / count.clamp(min=1)
    squares = ((x - mean[:, None, None]).square() * row).sum(dim=(1, 2))
    return squares / (count - 1).clamp(min=1) / (mean.square() + 1e-10)


@dataclass
class LoRAMoEConfig(MixtureConfig):
    """Settings of LoRAMoE on top of `MixtureConfig`'s. Rank, alpha, experts and dropout are the authors'."""

    method: ClassVar[str] = "loramoe"
    paper: ClassVar[str] = "LoRAMoE (arXiv 2312.09979)"
    summary: ClassVar[str] = "all experts for every token; a balance loss parts them by type of task"

    r: int = field(default=4, metadata={"help": "rank of one expert"})
    lora_alpha: float = field(default=32, metadata={"help": "scaling numerator: alpha/r, or alpha/sqrt(r) with rslora"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout on the experts' input"})
    knowledge_tasks: list[int] | None = field(
        default=None, metadata={"help": "ids of the tasks of the first type; null treats all tasks alike"}
    )
    balance_delta: float = field(
        default=0.1, metadata={"help": "how far the balance parts the two types, from 0 (not at all) to 1"}
    )
    num_tasks: int | None = field(
        default=None, metadata={"help": "how many tasks there are, if known beforehand; `moesaic train` counts them"}
    )
    aux_weight: float = field(default=0.01, metadata={"help": "weight of the localized balance loss; 0 turns it off"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.balance_delta <= 1:
            raise ConfigError(f"balance_delta={self.balance_delta} must be between 0 and 1")
        for task in self.knowledge_tasks or ():
            if task < 0 or (self.num_tasks is not None and task >= self.num_tasks):
                there = "" if self.num_tasks is None else f": there are {self.num_tasks}, counted from 0"
                raise ConfigError(f"knowledge_tasks={self.knowledge_tasks}: {task} is no task's id{there}")
        if self.knowledge_tasks is not None and self.num_experts < 2:
            raise ConfigError(
                f"knowledge_tasks={self.knowledge_tasks} parts the experts in two: num_experts={self.num_experts} must "
                "be at least 2"
            )

    def router(self, site: Site) -> Router:
        return LinearRouter(site.d_in, self.experts_at(site))

    def gate(self) -> Gate:
        return Softmax()

    def losses(self) -> list[AuxiliaryLoss]:
        return [LocalizedBalance(self.aux_weight, delta=self.balance_delta, knowledge_tasks=self.knowledge_tasks)]
