"""Auxiliary losses: what shapes a router beside the task.

A loss sees the records of one forward, one per router, and returns one scalar. Padding never counts.
Routers whose records have the same shape are stacked and computed at once, so that the number of kernels does
not grow with the depth of the model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic.routing.entropy import shannon as entropy
from moesaic.routing.gates import Routing
from moesaic.routing.router import Router, RoutingContext, Site

Reduce = Literal["sum", "mean"]
Source = Literal["weights", "probs"]


LONGEST_WINDOW = 64
"""Micro-batches that `Similarity` remembers at most, so that a loop which never steps does not grow without bound."""


@dataclass
class Record:
    """What one router did in one forward. `routing` is (..., E); `mask` and `sequences` have its leading shape."""

    site: Site
    routing: Routing
    mask: Tensor | None = None
    sequences: Tensor | None = None
    prompt: Tensor | None = None
    task_ids: Tensor | None = None
    targets: Tensor | None = None
    progress: float = 1.0
    experts: Callable[[], tuple[Tensor, Tensor]] | None = None
    """Gives the layer's A and B as they are when it is called; present when a loss asks for them."""
    router: Router | None = None
    hidden: Tensor | None = None
    """Mean input of each sequence (sequences, d_in), detached; present when a loss asks for it."""

    @classmethod
    def of(cls, site: Site, routing: Routing, context: RoutingContext, router: Router | None) -> Record:
        """A record with all that the context knows."""
        known = ("mask", "prompt", "sequences", "task_ids", "targets", "progress")
        return cls(site, routing, router=router, **{name: getattr(context, name) for name in known})


@dataclass
class Stack:
    """Records of one shape, stacked: values (R, N, E) and token weights (N,) that sum to the number of real tokens."""

    records: list[Record]
    values: Tensor
    mask: Tensor | None

    def mean(self, per_token: Tensor) -> Tensor:
        """Mean over real tokens of (R, N, ...)."""
        if self.mask is None:
            return per_token.mean(dim=1)
        share = self.mask.to(per_token.dtype)
        share = share / share.sum().clamp(min=1)
        return torch.einsum("rn...,n->r...", per_token, share)


class Records(list[Record]):
    """The records of one forward, which stack each tensor once for all losses."""

    def __init__(self, records: Iterable[Record]) -> None:
        super().__init__(records)
        self._stacks: dict[str, list[Stack]] = {}

    def stacks(self, source: Source | Literal["logits"]) -> list[Stack]:
        if source not in self._stacks:
            self._stacks[source] = list(_stacks(self, source))
        return self._stacks[source]


def stacks(records: Sequence[Record], source: Source | Literal["logits"]) -> list[Stack]:
    """Group records by shape and mask, and stack the named tensor of each group."""
    return (records if isinstance(records, Records) else Records(records)).stacks(source)


def _stacks(records: Sequence[Record], source: str) -> Iterator[Stack]:
    groups: dict[Hashable, list[Record]] = {}
    for record in records:
        routing = record.routing
        key = (routing.logits.shape, routing.logits.device, id(record.mask), id(record.sequences))
        groups.setdefault(key, []).append(record)
    for group in groups.values():
        mask, device = group[0].mask, group[0].routing.logits.device
        values = torch.stack([getattr(r.routing, source).to(device) for r in group]).flatten(1, -2)
        yield Stack(group, values, None if mask is None else mask.flatten())


class AuxiliaryLoss(ABC):
    """`loss(records, step) -> scalar`; the total added to the task loss is `weight * loss`.

    `step` names the optimiser step: it stays the same while gradients accumulate. `needs_hidden` asks for
    `Record.hidden`, `needs_experts` for `Record.experts`.
    """

    needs_hidden = False
    needs_experts = False
    needs_own_router = False
    """Whether it reads more of the router than its routing, and so fits its own method's alone."""

    def __init__(self, weight: float, *, reduce: Reduce = "sum") -> None:
        self.weight = weight
        self.reduce = reduce

    def __call__(self, records: Sequence[Record], step: Hashable = None) -> Tensor:
        values = list(self.per_router(records, step))
        per_router = torch.cat([value.to(values[0].device) for value in values])  # layers may lie on several devices
        return per_router.sum() if self.reduce == "sum" else per_router.mean()

    @abstractmethod
    def per_router(self, records: Sequence[Record], step: Hashable) -> Iterator[Tensor]:
        """Loss values, one a router, in groups of any size (r,)."""


class SwitchBalance(AuxiliaryLoss):
    """`E * sum_e f_e P_e`: share of routed slots times mean probability (Fedus et al. 2022, eq. 4).

    `f_e` counts expert e among the non-zero weights and sums to 1 over experts, so perfect balance gives 1 for
    any k. Gradient flows through `P` alone.
    """

    def per_router(self, records: Sequence[Record], step: Hashable) -> Iterator[Tensor]:
        for probs, weights in zip(stacks(records, "probs"), stacks(records, "weights"), strict=True):
            routed = (weights.values > 0).to(probs.values.dtype)
            share = weights.mean(routed / routed.sum(dim=-1, keepdim=True))
            yield probs.values.shape[-1] * (share * probs.mean(probs.values)).sum(dim=-1)


class ZLoss(AuxiliaryLoss):
    """`mean_t logsumexp(logits_t)^2`: keeps logits small (ST-MoE, Zoph et al. 2022, eq. 5)."""

    def per_router(self, records: Sequence[Record], step: Hashable) -> Iterator[Tensor]:
        for stack in stacks(records, "logits"):
            yield stack.mean(stack.values.logsumexp(dim=-1).square())


class MutualInformation(AuxiliaryLoss):
    """`relu(log E - (H(mean_t p_t) - mean_t H(p_t))) / log E`, in [0, 1]: balanced overall, certain per token.

    0 for balanced one-hot rows, 1 for uniform rows and for a collapsed router. `source` names what p is: the dense
    probabilities or the gate's weights. HotMoE's generalised Jensen-Shannon term.

    With `window`, the means are over all micro-batches of the optimiser step so far, the earlier ones detached.
    """

    def __init__(
        self, weight: float, *, source: Source = "probs", reduce: Reduce = "sum", window: bool = False
    ) -> None:
        super().__init__(weight, reduce=reduce)
        self.source = source
        self.window = window
        self._step: Hashable = None
        self._seen: dict[Hashable, tuple[Tensor, Tensor | int]] = {}

    def per_router(self, records: Sequence[Record], step: Hashable) -> Iterator[Tensor]:
        window = self.window and not torch.compiler.is_compiling()
        if window and (step is None or step != self._step):
            self._seen, self._step = {}, step
        for stack in stacks(records, self.source):
            log_e = math.log(stack.values.shape[-1])
            means = stack.mean(torch.cat([stack.values, entropy(stack.values).unsqueeze(-1)], dim=-1))
            if window:
                means = self.with_earlier(stack, means)
            overall, per_token = entropy(means[..., :-1]), means[..., -1]
            yield torch.relu(log_e - (overall - per_token)) / (log_e or 1.0)

    def with_earlier(self, stack: Stack, now: Tensor) -> Tensor:
        """Means (R, n) over this micro-batch's tokens and those of earlier ones, which it then is one of."""
        names = tuple(record.site.name for record in stack.records)
        number: Tensor | int = stack.values.shape[1] if stack.mask is None else stack.mask.sum()
        if names not in self._seen:
            self._seen[names] = now.detach(), number
            return now
        before, count = self._seen[names]
        share = torch.as_tensor(number / (count + number)).nan_to_num()  # 0 of 0 where all is padding
        means = torch.lerp(before, now, share.to(now))
        self._seen[names] = means.detach(), count + number
        return means


class Similarity(AuxiliaryLoss):
    """Sequences with like hidden states should route alike, unlike ones apart.

        beta_similar * mean((1 - S_r) * S_x) + beta_different * mean(S_r * (1 - S_x))

    `S_x` (N, N) are cosines of the sequences' mean inputs (detached), `S_r` of their mean weights, the diagonal
    included. A pair is pulled together when its S_x exceeds beta_different / (beta_similar + beta_different): 0.6 with
    the defaults. `center_hidden` subtracts the batch mean first, for base models whose states all point the same way.

    With `window`, sequences of earlier micro-batches of the same optimiser step take part, detached. So the loss is
    not linear in the batch: the last of n equal micro-batches has the large batch's value, not its gradient.
    """

    needs_hidden = True

    def __init__(
        self,
        weight: float,
        *,
        beta_similar: float = 1.0,
        beta_different: float = 1.5,
        center_hidden: bool = False,
        window: bool = True,
        reduce: Reduce = "sum",
    ) -> None:
        super().__init__(weight, reduce=reduce)
        self.beta_similar = beta_similar
        self.beta_different = beta_different
        self.center_hidden = center_hidden
        self.window = window
        self._step: Hashable = None
        self._seen: dict[Hashable, list[Tensor]] = {}

    def per_router(self, records: Sequence[Record], step: Hashable) -> Iterator[Tensor]:
        window = self.window and not torch.compiler.is_compiling()
        if not window or step is None or step != self._step:
            self._seen, self._step = {}, step
        for stack in stacks(records, "weights"):
            group, shape = stack.records, stack.records[0].routing.weights.shape
            together = stack.values.transpose(0, 1).reshape(*shape[:-1], -1)
            pooled = pool(together, group[0].mask, group[0].sequences)
            routes = pooled.unflatten(1, (len(group), -1)).transpose(0, 1)
            names = tuple(record.site.name for record in group)
            s_r = cosine_matrix(self.with_earlier(("routes", names), routes) if window else routes)
            # beta_s (1 - s_r) s_x + beta_d s_r (1 - s_x), with what has no gradient gathered
            s_x = self.inputs_alike(group, names, window)
            slope = self.beta_different - (self.beta_similar + self.beta_different) * s_x
            yield torch.addcmul(self.beta_similar * s_x, s_r, slope).mean(dim=(-2, -1))

    def inputs_alike(self, group: list[Record], names: Hashable, window: bool) -> Tensor:
        """S_x (R, N, N) of each record. Layers that share an input (query, key and value) share its mean."""
        distinct: dict[int, Tensor] = {}
        for record in group:
            assert record.hidden is not None, "Similarity needs Record.hidden: the layer must pool its input"
            distinct.setdefault(id(record.hidden), record.hidden.detach().to(group[0].routing.logits.device))
        order: list[int] = []
        cosines: list[Tensor] = []
        for width in sorted({hidden.shape[-1] for hidden in distinct.values()}):
            alike = {key: hidden for key, hidden in distinct.items() if hidden.shape[-1] == width}
            inputs = torch.stack(list(alike.values()))
            inputs = self.with_earlier((width, names), inputs) if window else inputs
            cosines.append(cosine_matrix(inputs - inputs.mean(dim=1, keepdim=True) if self.center_hidden else inputs))
            order += alike
        of_distinct = torch.cat(cosines)
        return of_distinct[
            torch.tensor([order.index(id(record.hidden)) for record in group], device=of_distinct.device)
        ]

    def with_earlier(self, key: Hashable, now: Tensor) -> Tensor:
        """`now` (R, N, d) behind what earlier micro-batches of the step had there, and kept for later ones."""
        seen = self._seen.setdefault(key, [])
        together = torch.cat([*seen, now], dim=1) if seen else now
        seen.append(now.detach())
        del seen[:-LONGEST_WINDOW]
        return together


def cosine_matrix(x: Tensor) -> Tensor:
    """Cosines (..., N, N) between the rows of x (..., N, d)."""
    unit = torch.nn.functional.normalize(x, dim=-1)
    return unit @ unit.transpose(-1, -2)


def pool(values: Tensor, mask: Tensor | None, sequences: Tensor | None) -> Tensor:
    """Mean over the real tokens of each sequence: (batch, tokens, d) -> (sequences, d).

    Without `sequences` every row of the batch is a sequence; with it, a packed batch of `sequences.max() + 1`.
    A 2-D input (rows, d) has one token a row.
    """
    if sequences is not None:
        flat, index = values.flatten(0, -2), sequences.flatten()
        share = torch.ones_like(index, dtype=values.dtype) if mask is None else mask.flatten().to(values.dtype)
        num = int(index.max()) + 1
        total = values.new_zeros(num, flat.shape[-1]).index_add(0, index, flat * share[:, None])
        count = values.new_zeros(num).index_add(0, index, share)
        return total / count.clamp(min=1)[:, None]
    if values.dim() < 3:
        return values
    if mask is None:
        return values.mean(dim=-2)
    share = mask.to(values.dtype)
    share = share / share.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.bmm(share.unsqueeze(1), values).squeeze(1)
