"""Read-ME's training: rounds of the router and of the experts, on masked views of one dense model.

    o_i  = |top-half(a^l(x_t)) and m_i^l|,    L_RD = KL(softmax(G_t) || softmax(o))      router, the model frozen
    loss of the next token with y_t = (a^l(x_t) * m^l_{z_t}) Wd^T, z_t = argmax G        model, the router frozen

A neuron that several masks hold is one row of one matrix, and learns from all its users. `loss="released"` is that of
the authors' code: smoothed cross-entropy to the expert with the most firing neurons and to the softmax of their counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moesaic.errors import ConfigError, TrainingError
from moesaic.ffn.checking import check
from moesaic.ffn.masks import Masks, shared
from moesaic.ffn.method import setting
from moesaic.ffn.pregate import PreGate
from moesaic.ffn.split import Seat
from moesaic.ffn.watching import watching

Batch = Mapping[str, Tensor]
Around = Callable[[], AbstractContextManager[Any]]
Said = Callable[[str, int, float], None]
"""Told of each step: the stage, the step, its loss."""


@dataclass
class Rounds:
    """How Read-ME is trained; all but `rounds` are the paper's, whose batches are of 64 and 128 rows of 4096 tokens."""

    rounds: int = setting(2, "how often both stages are run; 8 in the paper")
    router_steps: int = setting(100, "of the router, in a round")
    expert_steps: int = setting(200, "of the experts, in a round")
    router_lr: float = setting(5e-4, "in the first round, a cosine to nothing in each")
    expert_lr: float = setting(5e-5, "likewise")
    decay: float = setting(0.8, "of both rates from round to round")
    weight_decay: float = setting(0.01, "AdamW's")
    loss: Literal["paper", "released"] = setting("paper", "of the router: paper, or released (the authors' code)")

    def __post_init__(self) -> None:
        check(self)
        for name in ("rounds", "router_steps", "expert_steps", "router_lr", "expert_lr", "decay", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
            if name.endswith("_lr") and getattr(self, name) > 1:
                raise ConfigError(f"{name}={getattr(self, name)} is above 1: no weight can learn at such a rate")

    @property
    def steps(self) -> int:
        """Of both stages, over all rounds."""
        return self.rounds * (self.router_steps + self.expert_steps)


@contextmanager
def masked(model: PreTrainedModel, masks: Masks, chosen: Callable[[], Tensor]) -> Iterator[None]:
    """The model with each token's hidden units masked by those of its expert, `chosen()` (B, T), in every layer."""

    def mask(seat: Seat, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        kept = F.embedding(chosen().to(hidden.device), masks[seat.name].to(hidden))
        return (hidden * kept.view(hidden.shape),)

    with watching(model, mask):
        yield


def targets(
    model: PreTrainedModel, masks: Masks, batch: Batch, count: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """What each layer says of a batch's experts, by `count(hidden (B, T, d_ff), mask (N, d_ff))`; no gradients."""
    found: list[Tensor] = []

    def read(seat: Seat, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden = args[0].view(*batch["input_ids"].shape, -1)
        found.append(count(hidden, masks[seat.name].to(hidden.device)))

    with torch.no_grad(), watching(model, read):
        model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)
    return found


def overlaps(hidden: Tensor, mask: Tensor) -> Tensor:
    """o (B, T, N): how many of the half with the largest magnitudes each expert has."""
    size = hidden.abs()
    top = torch.zeros_like(size).scatter_(-1, size.topk(size.shape[-1] // 2, dim=-1).indices, 1.0)
    return top @ mask.to(top).t()


def firing(hidden: Tensor, mask: Tensor) -> Tensor:
    """The released code's count (B, T, N): thresholds on the signed units at five shares of an expert's own width."""
    own = (mask & ~shared(mask)).to(hidden)
    width = int(own[0].sum())
    ordered = hidden.sort(dim=-1, descending=True).values
    ranks = [width - 1, *(int(width * part) for part in (0.8, 0.6, 0.4, 0.2))]
    fires = sum((hidden > ordered[..., max(q - 1, 0), None]).to(hidden) for q in ranks) / (3 * max(width, 1))
    counted = fires @ own.t()  # type: ignore[operator]
    return 10 * (counted - counted.mean(dim=-1, keepdim=True))


def distillation(logits: Tensor, found: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
    """Eq. 4: KL(softmax(G) || softmax(o)), its mean over layers and real tokens."""
    own = logits.log_softmax(-1)
    each = torch.stack([(own.exp() * (own - o.log_softmax(-1))).sum(-1) for o in found]).mean(dim=0)
    return _mean(each, real)


def released(logits: Tensor, found: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
    """The loss of the authors' code, its mean over layers."""
    flat, total = logits.flatten(0, -2), logits.new_zeros(logits.shape[:-1])
    for count in found:
        hard = F.cross_entropy(flat, count.argmax(-1).flatten(), label_smoothing=0.5, reduction="none")
        soft = -(count.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        total = total + 0.75 * hard.view(total.shape) + 0.25 * soft
    return _mean(total / len(found), real)


_LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "paper": (overlaps, distillation),
    "released": (firing, released),
}


def _mean(each: Tensor, real: Tensor | None) -> Tensor:
    if real is None:
        return each.mean()
    return (each * real).sum() / real.sum().clamp(min=1)


def tune(
    model: PreTrainedModel,
    pre_gate: PreGate,
    masks: Masks,
    batches: Iterator[Batch],
    rounds: Rounds,
    *,
    say: Said | None = None,
    first: int = 0,
    around: Around = nullcontext,
) -> Iterator[int]:
    """Train in place; yields the number of each round that is done, for whoever keeps what was reached.

    Args:
        batches: of mixed domains, without end: `input_ids` and `attention_mask` (B, T).
        first: the round to begin with, after a break.
        around: what each forward is in, such as autocast, whose copies of the weights must not outlive a step.
    """
    for number in range(first, rounds.rounds):
        share = rounds.decay**number
        router_loss = partial(_router_loss, model, pre_gate, masks, *_LOSSES[rounds.loss])
        stage(
            pre_gate, [model], rounds.router_steps, share * rounds.router_lr, rounds.weight_decay, batches,
            router_loss, partial(say, "router") if say else None, around,
        )  # fmt: skip
        stage(
            model, [pre_gate], rounds.expert_steps, share * rounds.expert_lr, rounds.weight_decay, batches,
            partial(_expert_loss, model, pre_gate, masks), partial(say, "experts") if say else None, around,
        )  # fmt: skip
        yield number


def _router_loss(
    model: PreTrainedModel, pre_gate: PreGate, masks: Masks, count: Any, loss: Any, batch: Batch
) -> Tensor:
    logits, _ = pre_gate(batch["input_ids"], batch.get("attention_mask"))
    found: Tensor = loss(logits, targets(model, masks, batch, count), batch.get("attention_mask"))
    return found


def _expert_loss(model: PreTrainedModel, pre_gate: PreGate, masks: Masks, batch: Batch) -> Tensor:
    ids, real = batch["input_ids"], batch.get("attention_mask")
    with torch.no_grad():
        chosen = pre_gate(ids, real)[0].argmax(-1)
    labels = ids if real is None else ids.masked_fill(real == 0, -100)
    with masked(model, masks, lambda: chosen):
        found: Tensor = model(input_ids=ids, attention_mask=real, labels=labels, use_cache=False).loss
    return found


def stage(
    learns: nn.Module,
    rests: Sequence[nn.Module],
    steps: int,
    lr: float,
    weight_decay: float,
    batches: Iterator[Batch],
    loss_of: Callable[[Batch], Tensor],
    say: Callable[[int, float], None] | None = None,
    around: Around = nullcontext,
) -> None:
    """One stage: AdamW with a cosine to nothing; what rests gets no gradient.

    Raises:
        ConfigError: what learns is in half precision, where most of its steps would round to nothing.
    """
    if not steps:
        return
    if half := next((p.dtype for p in learns.parameters() if p.requires_grad and p.element_size() < 4), None):
        raise ConfigError(f"weights in {half} lose most steps of training: load the model with dtype=torch.float32")
    was = {p: p.requires_grad for module in rests for p in module.parameters()}
    for p in was:
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in learns.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    decline = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    try:
        for step in range(steps):
            with around():
                loss = loss_of(next(batches))
            if not bool(loss.isfinite()):
                raise TrainingError(f"the loss is {loss.item()} at step {step}: lower the learning rate")
            loss.backward()
            optimizer.step()
            decline.step()
            optimizer.zero_grad(set_to_none=True)
            if say is not None:
                say(step, loss.item())
    finally:
        for p, grad in was.items():
            p.requires_grad_(grad)
