"""What a trace counts: sums of the routers of one shape, kept where they ran, and read out router by router."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.routing.losses import Record, entropy

LARGEST_RATIO = 1e6
"""A token's first over its second probability counts as this much at most: a softmax can be as sure as it likes."""


class ModuleTrace:
    """Sums of one router over real tokens. Tensors are float64 on the CPU."""

    def __init__(self, num_experts: int) -> None:
        self.tokens = 0
        self.weight = torch.zeros(num_experts, dtype=torch.float64)
        self.selected = torch.zeros(num_experts, dtype=torch.float64)
        self.entropy = 0.0
        self.ratio = 0.0
        """Sum of the logarithms of first over second probability, of `seconds` tokens that have a second."""
        self.seconds = 0
        self.by_task: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []
        """The weights (..., E) of every forward, where the trace keeps them."""

    def add(self, other: ModuleTrace) -> None:
        """Add what another trace of the same router counted."""
        self.tokens += other.tokens
        self.weight = self.weight + other.weight
        self.selected = self.selected + other.selected
        self.entropy += other.entropy
        self.ratio += other.ratio
        self.seconds += other.seconds
        for task, weight in other.by_task.items():
            self.by_task[task] = self.by_task[task] + weight if task in self.by_task else weight

    @property
    def utilisation(self) -> Tensor:
        """Share of the total weight each expert got (E,), summing to 1."""
        return shares(self.weight)

    @property
    def selection(self) -> Tensor:
        """Share of the tokens that gave each expert a weight above zero (E,)."""
        return self.selected / max(self.tokens, 1)

    @property
    def mean_entropy(self) -> float:
        """Mean entropy of the dense probabilities a token, divided by log E: 0 certain, 1 uniform."""
        num_experts = len(self.weight)
        return self.entropy / max(self.tokens, 1) / (math.log(num_experts) if num_experts > 1 else 1.0)

    @property
    def inner_balance(self) -> float | None:
        """Geometric mean over tokens of the largest over the second largest probability; None where none has a second.

        RMoE's inner balance. Geometric, since a few tokens that are a million to one would decide the plain mean.
        """
        return math.exp(self.ratio / self.seconds) if self.seconds else None

    @property
    def outer_balance(self) -> float | None:
        """Coefficient of variation of the experts' utilisation: 0 balanced, sqrt(E - 1) collapsed; None for E = 1."""
        use = self.utilisation
        return float(use.std(correction=0) / use.mean()) if len(use) > 1 else None

    @property
    def mutual_information(self) -> float | None:
        """Mutual information of task and expert over min(log tasks, log E), in [0, 1]; None below two tasks.

        Tasks are weighted equally, whatever their number of tokens.
        """
        if len(self.by_task) < 2:
            return None
        rows = torch.stack([shares(w) for w in self.by_task.values()])
        overall = entropy(rows.mean(dim=0))
        information = overall - entropy(rows).mean()
        return float(information / math.log(min(rows.shape))) if min(rows.shape) > 1 else 0.0


class Sums:
    """Running sums of R routers with E experts each, on the device where they ran.

    A forward is summed in its own dtype, forwards are added up in float64.
    """

    def __init__(self, routers: int, num_experts: int, device: torch.device) -> None:
        self.tokens = torch.zeros((), dtype=torch.long, device=device)
        self.selected = torch.zeros(routers, num_experts, dtype=torch.long, device=device)
        self.seconds = torch.zeros(routers, dtype=torch.long, device=device)
        dtype = wide(device)
        self.weight = torch.zeros(routers, num_experts, dtype=dtype, device=device)
        self.entropy = torch.zeros(routers, dtype=dtype, device=device)
        self.ratio = torch.zeros(routers, dtype=dtype, device=device)
        self.by_task: dict[int, Tensor] = {}

    def add(self, weights: Tensor, probs: Tensor, mask: Tensor | None, tasks: tuple[list[int], Tensor] | None) -> None:
        """Count `weights` and `probs` (R, N, E) of the tokens in `mask` (N,).

        `tasks` are the distinct ids, and which of them each of the batch's rows has (rows,).
        """
        dtype = self.weight.dtype
        if mask is not None:
            weights = torch.where(mask[:, None], weights, 0.0)
        rows = weights.view(*weights.shape[:1], len(tasks[1]), -1, weights.shape[-1]) if tasks else weights[:, None]
        totals = rows.sum(dim=2).to(dtype)
        self.weight += totals.sum(dim=1)
        if tasks:
            found = totals.new_zeros(len(totals), len(tasks[0]), totals.shape[-1]).index_add(1, tasks[1], totals)
            for position, task in enumerate(tasks[0]):
                before = self.by_task.get(task)
                self.by_task[task] = found[:, position] if before is None else before + found[:, position]
        self.tokens += weights.shape[1] if mask is None else mask.sum()
        self.selected += (weights > 0).sum(dim=1)
        self.entropy += _masked(entropy(probs), mask).sum(dim=1)
        if probs.shape[-1] > 1:
            first, index = probs.max(dim=-1)
            second = probs.scatter(-1, index[..., None], -1.0).amax(dim=-1)
            there = _masked(second > 0, mask)
            ratio = (first / second).clamp(max=LARGEST_RATIO).log()
            self.ratio += torch.where(there, ratio, 0.0).sum(dim=1)
            self.seconds += there.sum(dim=1)

    def modules(self) -> Iterator[ModuleTrace]:
        """The R routers' sums, on the CPU."""
        weight, by_task = self.weight.double().cpu(), {t: w.double().cpu() for t, w in self.by_task.items()}
        selected, tokens = self.selected.double().cpu(), int(self.tokens)
        entropies, ratios, seconds = self.entropy.tolist(), self.ratio.tolist(), self.seconds.tolist()
        for i in range(len(weight)):
            module = ModuleTrace(weight.shape[1])
            module.tokens, module.weight, module.selected = tokens, weight[i], selected[i]
            module.entropy, module.ratio, module.seconds = entropies[i], ratios[i], seconds[i]
            module.by_task = {task: rows[i] for task, rows in by_task.items()}
            yield module


class TaskIds:
    """Task ids of a forward's records, read from the device once for all that share them."""

    def __init__(self) -> None:
        self._read: dict[int, tuple[Tensor, list[int], Tensor]] = {}

    def of(self, record: Record) -> tuple[list[int], Tensor] | None:
        """The distinct ids, ascending, and each row's position among them (rows,); None where tokens have none."""
        ids, shape = record.task_ids, record.routing.weights.shape[:-1]
        if ids is None or len(shape) == 0 or len(ids) == 0 or shape[0] % len(ids):
            return None
        if id(ids) not in self._read:
            distinct, positions = ids.unique(return_inverse=True)
            self._read[id(ids)] = ids, distinct.tolist(), positions
        _, names, positions = self._read[id(ids)]
        return names, positions.to(record.routing.weights.device)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Values (R, N), zero where `mask` (N,) is False: padding may hold NaN."""
    return values if mask is None else values.masked_fill(~mask, 0)


def wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def shares(weight: Tensor) -> Tensor:
    """Weights (E,) divided by their sum."""
    return weight / weight.sum().clamp(min=1e-12)
