"""LoRA-Mixer: LoRA experts that are first trained apart and then mixed (ICLR 2026, arXiv 2507.00029).

    stage 1, hard     every token of a sequence of task d goes to expert d with weight 1; the router rests
    stage 2, soft     p = softmax(W h), every expert weighted by p; at inference the top 3, renormalised
    RSL               balance_coef * sum_e mean_t(p_e) f_e - entropy_coef * mean_t H(p), mean over routers
    preserve          sum over experts of ||theta - theta_0||^2, theta_0 taken as stage 2 begins
    L                 L_task + rsl_weight * RSL + preserve_coef * preserve                           (stage 2)

The paper's alpha is both rsl_weight and balance_coef, its lambda entropy_coef, its beta preserve_coef. RSL (routing
specialization loss) is the first version's "specialization balance loss". f is a constant: no gradient, no factor E.

Departures: none can be told, since no code and no full hyper-parameters are public.

This is a reconstruction. The paper's formula subtracts the
entropy, which flattens p (`entropy_sign="as_written"`), while its text says that p should sharpen (`"sharpen"`); its f
is the share of tokens that rank an expert first (`f_mode="argmax"`, eq. 3), or the share of the top-k's mass (`"mass"`,
section 3.3). Ours are: one linear router for each adapted linear, all experts preserved, renormalisation after top-k,
one run for both stages (`hard_fraction` of it in stage 1; 40k against 4k rows in the paper), and the coefficients.
The paper adapts the input and output projections of attention or SSM layers: name them in `target_modules`.

Over `adapters` that are trained already (the paper's plug-and-play regime) there is stage 2 alone, for the routers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.lora.tasks import NEVER, row_ids
from moesaic.routing import (
    AuxiliaryLoss,
    Gate,
    Joint,
    LinearRouter,
    Record,
    Router,
    RoutingContext,
    Site,
    Softmax,
    TopK,
)
from moesaic.routing.losses import entropy, stacks
from moesaic.routing.sharded import whole

EntropySign = Literal["as_written", "sharpen"]
Frequency = Literal["argmax", "mass"]


class MixerRouter(LinearRouter):
    """`logits = W h`, but for stage 1 of training: there a sequence's task id names its expert.

    Keeps theta_0, the experts as stage 2 began, in buffers of the adapter's checkpoint where `rank` is given.
    """

    shared = ("anchored",)
    anchor_A: Tensor
    anchor_B: Tensor
    anchored: Tensor

    def __init__(self, site: Site, num_experts: int, *, hard_fraction: float, rank: int | None = None) -> None:
        super().__init__(site.d_in, num_experts)
        self.hard_fraction = hard_fraction
        if rank is not None:
            self.register_buffer("anchor_A", torch.zeros(num_experts, rank, site.d_in))
            self.register_buffer("anchor_B", torch.zeros(num_experts, rank, site.d_out))
            self.register_buffer("anchored", torch.zeros((), dtype=torch.bool))

    def from_projection(self, read: Tensor, context: RoutingContext | None = None) -> Tensor:
        if not self.training or context is None or context.progress >= self.hard_fraction:
            return read
        if context.task_ids is None:
            raise ConfigError(
                f"hard_fraction={self.hard_fraction}: stage 1 picks the expert by task id, so give routing_task_ids in "
                "the batch, or set hard_fraction=0"
            )
        ids = row_ids(read, context, limit=self.num_experts, setting="num_experts")
        own = ids.unsqueeze(-1) == torch.arange(self.num_experts, device=read.device)
        # A gradient of zero rather than none: data-parallel training waits for one from every parameter.
        return torch.where(own, 0.0, NEVER).to(read.dtype) + 0 * read

    @classmethod
    def from_projections(cls, routers: Sequence[Self], read: Tensor, joint: Joint) -> Tensor:
        return read

    def drift(self, A: Tensor, B: Tensor) -> Tensor:
        """`sum ||theta - theta_0||^2` over the layer's experts; the first call takes theta_0."""
        total = A.new_zeros(())
        for now, anchor in ((A.view_as(self.anchor_A), self.anchor_A), (B.view_as(self.anchor_B), self.anchor_B)):
            with torch.no_grad():
                anchor.copy_(torch.where(self.anchored, anchor, now))
            total = total + (now - anchor).square().sum()
        self.anchored.fill_(True)
        return total


class SoftStageLoss(AuxiliaryLoss):
    """A loss of stage 2; zero in stage 1."""

    def __init__(self, weight: float, *, hard_fraction: float, reduce: Literal["sum", "mean"]) -> None:
        super().__init__(weight, reduce=reduce)
        self.hard_fraction = hard_fraction

    def per_router(self, records: Sequence[Record], step: Hashable) -> Iterator[Tensor]:
        if records[0].progress < self.hard_fraction:
            yield records[0].routing.logits.new_zeros(len(records))
        else:
            yield from self.soft(records)

    @abstractmethod
    def soft(self, records: Sequence[Record]) -> Iterator[Tensor]:
        """What `per_router` yields in stage 2."""


class RoutingSpecialization(SoftStageLoss):
    """`balance_coef * sum_e mean_t(p_e) f_e - s * entropy_coef * mean_t H(p)`, H in nats, mean over routers.

    s is 1 as written and -1 to sharpen; f_e sums to 1 over experts. Uniform rows give balance_coef/E - s *
    entropy_coef * ln E, balanced one-hot rows balance_coef/E, a collapsed router balance_coef. It can be negative.
    """

    def __init__(
        self,
        weight: float,
        *,
        balance_coef: float,
        entropy_coef: float,
        entropy_sign: EntropySign = "as_written",
        f_mode: Frequency = "argmax",
        top_k: int = 1,
        hard_fraction: float = 0.0,
    ) -> None:
        super().__init__(weight, hard_fraction=hard_fraction, reduce="mean")
        self.balance_coef = balance_coef
        self.signed_entropy_coef = -entropy_coef if entropy_sign == "as_written" else entropy_coef
        self.k = 1 if f_mode == "argmax" else top_k
        self.f_mode = f_mode

    def soft(self, records: Sequence[Record]) -> Iterator[Tensor]:
        for stack in stacks(records, "probs"):
            p = stack.values
            f = stack.mean(self.routed(p.detach()))
            balance = (stack.mean(p) * f / f.sum(dim=-1, keepdim=True).clamp(min=1e-9)).sum(dim=-1)
            yield self.balance_coef * balance + self.signed_entropy_coef * stack.mean(entropy(p))

    def routed(self, p: Tensor) -> Tensor:
        """What each token counts towards f (..., E): 1 for its first expert, or the mass of its top k."""
        top, index = p.topk(self.k, dim=-1)
        return torch.zeros_like(p).scatter(-1, index, torch.ones_like(top) if self.f_mode == "argmax" else top)


class Preserve(SoftStageLoss):
    """`sum ||theta - theta_0||^2` over all experts of all layers: A and B stay near where stage 2 found them."""

    needs_experts = True
    needs_own_router = True

    def __init__(self, weight: float, *, hard_fraction: float = 0.0) -> None:
        super().__init__(weight, hard_fraction=hard_fraction, reduce="sum")

    def soft(self, records: Sequence[Record]) -> Iterator[Tensor]:
        for record in records:
            assert isinstance(record.router, MixerRouter)
            assert record.experts is not None
            yield record.router.drift(*map(whole, record.experts())).unsqueeze(0)


@dataclass
class LoRAMixerConfig(MixtureConfig):
    """Settings of LoRA-Mixer on top of `MixtureConfig`'s.

    Stage 1 needs `routing_task_ids` in the batch and a loop that tells how far the training is: `moesaic train`,
    `RoutedTrainerMixin` or `set_training_progress`. Where nobody tells, all is stage 2. With `preserve_coef` above 0
    the checkpoint holds theta_0 too, and is twice as large.
    """

    method: ClassVar[str] = "lora-mixer"
    paper: ClassVar[str] = "LoRA-Mixer (ICLR 2026, arXiv 2507.00029)"
    summary: ClassVar[str] = (
        "one expert a task first, by task id; then soft routing, with experts held near their start"
    )

    r: int = field(default=64, metadata={"help": "rank of one expert"})
    num_experts: int = field(default=6, metadata={"help": "experts in each adapted layer; at least one a task"})
    lora_alpha: float = field(
        default=128, metadata={"help": "scaling numerator: alpha/r, or alpha/sqrt(r) with rslora"}
    )
    lora_dropout: float = field(default=0.1, metadata={"help": "dropout on the experts' input"})
    top_k: int = field(default=3, metadata={"help": "experts a token outside of training, which mixes all"})
    hard_fraction: float = field(
        default=0.9, metadata={"help": "share of the training in stage 1, where the task id picks the expert; 0: none"}
    )
    aux_weight: float = field(default=1.0, metadata={"help": "factor on both auxiliary losses; 0 turns them off"})
    rsl_weight: float = field(default=1.0, metadata={"help": "weight of the routing specialization loss"})
    balance_coef: float = field(default=1.0, metadata={"help": "weight of the balance within that loss"})
    entropy_coef: float = field(default=0.1, metadata={"help": "weight of the entropy within that loss"})
    entropy_sign: EntropySign = field(
        default="as_written", metadata={"help": "as_written flattens the weights of a token, sharpen peaks them"}
    )
    f_mode: Frequency = field(
        default="argmax", metadata={"help": "balance counts tokens by first expert, or by the mass of the top k"}
    )
    preserve_coef: float = field(
        default=0.01, metadata={"help": "weight of the squared distance of the experts from their start of stage 2"}
    )

    num_tasks: int | None = field(
        default=None, metadata={"help": "how many tasks there are, if known beforehand; `moesaic train` counts them"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts is not None:  # trained already, and frozen: there is no stage 1, and nothing to preserve
            self.hard_fraction = self.preserve_coef = 0.0
        if self.num_tasks is not None and self.num_tasks < 1:
            raise ConfigError(f"num_tasks={self.num_tasks} must be a whole number of at least 1")
        if self.num_tasks is not None and self.hard_fraction > 0 and self.num_tasks > self.num_experts:
            raise ConfigError(
                f"num_experts={self.num_experts} and hard_fraction={self.hard_fraction} disagree: stage 1 has an "
                f"expert a task, and there are {self.num_tasks} tasks"
            )
        if not 0 <= self.hard_fraction <= 1:
            raise ConfigError(f"hard_fraction={self.hard_fraction} must be between 0 and 1")
        for name in ("rsl_weight", "balance_coef", "entropy_coef", "preserve_coef"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0")

    def router(self, site: Site) -> Router:
        rank = self.rank_at(site) if self.preserve_coef > 0 else None
        return MixerRouter(site, self.experts_at(site), hard_fraction=self.hard_fraction, rank=rank)

    def gate(self) -> Gate:
        return Softmax()

    def eval_gate(self) -> Gate:
        return TopK(self.top_k, normalize="sum")

    def losses(self) -> list[AuxiliaryLoss]:
        losses: list[AuxiliaryLoss] = []
        if self.rsl_weight > 0:
            losses.append(
                RoutingSpecialization(
                    self.aux_weight * self.rsl_weight,
                    balance_coef=self.balance_coef,
                    entropy_coef=self.entropy_coef,
                    entropy_sign=self.entropy_sign,
                    f_mode=self.f_mode,
                    top_k=self.top_k,
                    hard_fraction=self.hard_fraction,
                )
            )
        if self.preserve_coef > 0:
            losses.append(Preserve(self.aux_weight * self.preserve_coef, hard_fraction=self.hard_fraction))
        return losses
