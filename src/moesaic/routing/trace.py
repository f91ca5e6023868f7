"""RoutingTrace: what the routers did, counted while the model runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.routing.losses import Record, entropy


class ModuleTrace:
    """Running sums of one router. Tensors are float64 on the CPU."""

    def __init__(self, num_experts: int) -> None:
        self.tokens = 0
        self.weight = torch.zeros(num_experts, dtype=torch.float64)
        self.selected = torch.zeros(num_experts, dtype=torch.float64)
        self.entropy = 0.0
        self.by_task: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []

    @property
    def utilisation(self) -> Tensor:
        """Share of the total weight each expert got (E,), summing to 1."""
        return self.weight / self.weight.sum().clamp(min=1e-12)

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
    def mutual_information(self) -> float | None:
        """Mutual information of task and expert over min(log tasks, log E), in [0, 1]; None below two tasks.

        Tasks are weighted equally, whatever their number of tokens.
        """
        if len(self.by_task) < 2:
            return None
        rows = torch.stack([w / w.sum().clamp(min=1e-12) for w in self.by_task.values()])
        overall = entropy(rows.mean(dim=0))
        information = overall - entropy(rows).mean()
        return float(information / math.log(min(rows.shape))) if min(rows.shape) > 1 else 0.0


class RoutingTrace:
    """Collects records of every forward while it is attached.

    | figure | meaning |
    | --- | --- |
    | `utilisation()` | module -> share of weight by expert (E,) |
    | `by_layer()` | layer -> the same, averaged over the layer's modules |
    | `by_task()` | task id -> the same, averaged over modules |
    | `entropy()` | mean entropy of a token's dense probabilities (before top-k) over log E, averaged over modules |
    | `dead_experts()` | (module, expert) pairs whose weight (after top-k) is below a share of 1/E; needs many tokens |
    | `mutual_information()` | task-expert mutual information in [0, 1], averaged over modules |
    """

    def __init__(self, *, keep_weights: bool = False) -> None:
        self.modules: dict[str, ModuleTrace] = {}
        self.layer_of: dict[str, int] = {}
        self.keep_weights = keep_weights

    @torch.no_grad()
    def update(self, records: Sequence[Record]) -> None:
        for record in records:
            weights = record.routing.weights.detach()
            num_experts = weights.shape[-1]
            module = self.modules.setdefault(record.site.name, ModuleTrace(num_experts))
            self.layer_of[record.site.name] = record.site.layer
            if self.keep_weights:
                module.kept.append(weights.cpu())
            flat = weights.reshape(-1, num_experts).double().cpu()
            probs = record.routing.probs.detach().reshape(-1, num_experts).double().cpu()
            tasks = _task_of_token(record, weights.shape[:-1])
            if record.mask is not None:
                real = record.mask.flatten().cpu()
                flat, probs = flat[real], probs[real]
                tasks = None if tasks is None else tasks[real]
            module.tokens += len(flat)
            module.weight += flat.sum(dim=0)
            module.selected += (flat > 0).double().sum(dim=0)
            module.entropy += float(entropy(probs).sum())
            if tasks is not None:
                for task in tasks.unique().tolist():
                    total = module.by_task.setdefault(task, torch.zeros(num_experts, dtype=torch.float64))
                    total += flat[tasks == task].sum(dim=0)

    def __repr__(self) -> str:
        if not self.modules:
            return "RoutingTrace(nothing routed yet)"
        tokens = max(m.tokens for m in self.modules.values())
        return (
            f"RoutingTrace({len(self.modules)} routers, {tokens} tokens, entropy {self.entropy():.2f} of 1, "
            f"{len(self.dead_experts())} of {sum(len(m.weight) for m in self.modules.values())} experts dead)"
        )

    def utilisation(self) -> dict[str, Tensor]:
        return {name: module.utilisation for name, module in self.modules.items()}

    def by_layer(self) -> dict[int, Tensor]:
        layers: dict[int, list[Tensor]] = {}
        for name, module in self.modules.items():
            layers.setdefault(self.layer_of[name], []).append(module.utilisation)
        return {layer: _mean(rows) for layer, rows in sorted(layers.items()) if len({len(r) for r in rows}) == 1}

    def by_task(self) -> dict[int, Tensor]:
        tasks: dict[int, list[Tensor]] = {}
        for module in self.modules.values():
            for task, weight in module.by_task.items():
                tasks.setdefault(task, []).append(weight / weight.sum().clamp(min=1e-12))
        return {task: _mean(rows) for task, rows in sorted(tasks.items()) if len({len(r) for r in rows}) == 1}

    def entropy(self) -> float | None:
        """None before any token was routed."""
        values = [module.mean_entropy for module in self.modules.values()]
        return sum(values) / len(values) if values else None

    def dead_experts(self, threshold: float = 0.1) -> list[tuple[str, int]]:
        """Experts that got less than `threshold` times the fair share 1/E."""
        return [
            (name, expert)
            for name, module in self.modules.items()
            for expert, share in enumerate(module.utilisation.tolist())
            if share < threshold / len(module.weight)
        ]

    def mutual_information(self) -> float | None:
        values = [m.mutual_information for m in self.modules.values()]
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else None

    def weights(self, name: str) -> list[Tensor]:
        """The weights (..., E) of every forward, of one module; needs `keep_weights=True`."""
        return self.modules[name].kept

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain numbers, for JSON."""
        return {
            "tokens": max((m.tokens for m in self.modules.values()), default=0),
            "entropy": self.entropy(),
            "mutual_information": self.mutual_information(),
            "dead_experts": [f"{name}[{expert}]" for name, expert in self.dead_experts()],
            "utilisation": {name: row.tolist() for name, row in self.utilisation().items()},
            "by_layer": {str(layer): row.tolist() for layer, row in self.by_layer().items()},
            "by_task": {str(task): row.tolist() for task, row in self.by_task().items()},
        }


def _mean(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows).mean(dim=0)


def _task_of_token(record: Record, shape: torch.Size) -> Tensor | None:
    if record.task_ids is None or len(shape) == 0:
        return None
    tasks = record.task_ids.cpu()
    if len(tasks) == 0 or shape[0] % len(tasks):
        return None
    tasks = tasks.repeat_interleave(shape[0] // len(tasks))
    return tasks.view(-1, *[1] * (len(shape) - 1)).expand(shape).reshape(-1)
