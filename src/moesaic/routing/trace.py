"""RoutingTrace: what the routers did, counted while the model runs.

Counting stays on the device that the model runs on: routers of one shape are counted together, whatever their number,
and nothing is copied to the host before a figure is asked for (save the task ids, once a forward).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moesaic.routing.losses import Record, stacks
from moesaic.routing.tally import ModuleTrace, Sums, TaskIds, shares, wide

_TO_TELL = 20
"""Tokens an expert, in the mean, before a trace calls one dead."""

_NAMED = 5
"""Experts that a trace names, those with most weight."""


class RoutingTrace:
    """Collects records of every forward while it is attached.

    | figure | meaning |
    | --- | --- |
    | `utilisation()` | module -> share of weight by expert (E,) |
    | `by_layer()` | layer -> the same, averaged over the layer's modules |
    | `by_task()` | task id -> the same, averaged over modules |
    | `by_layer_and_task()` | layer -> task id -> the same, averaged over the layer's modules |
    | `by_module_and_task()` | module -> task id -> the same, of its own experts |
    | `entropy()` | mean entropy of a token's dense probabilities (before top-k) over log E, averaged over modules |
    | `entropy_by_layer()` | layer -> the same, averaged over the layer's modules |
    | `dead_experts()` | (module, expert) pairs whose weight (after top-k) is below a share of 1/E; needs many tokens |
    | `mutual_information()` | task-expert mutual information in [0, 1], averaged over modules |
    | `inner_balance()` | largest over second largest probability, geometric mean over tokens, then modules |
    | `outer_balance()` | standard deviation over mean of the experts' utilisation, averaged over modules |
    | `layer_information()` | mutual information, in bits, of a token's first expert in one layer and in the next |

    Inner and outer balance are named by RMoE (Qiu et al., ICLR 2025), which gives no formula of the outer one that we
    know of: ours is the coefficient of variation. So is the cross-layer information: from contingency tables of expert
    indices, between layers that follow each other among modules that differ in nothing but the layer.
    """

    def __init__(self, *, keep_weights: bool = False, names: Sequence[str] = ()) -> None:
        self.keep_weights, self.names = keep_weights, names
        self.layer_of: dict[str, int] = {}
        self._kept: dict[str, list[Tensor]] = {}
        self._groups: dict[tuple[tuple[str, ...], int], Sums] = {}
        self._tables: dict[tuple[tuple[str, str], ...], Tensor] = {}
        self._modules: dict[str, ModuleTrace] | None = None

    @torch.no_grad()
    def update(self, records: Sequence[Record]) -> None:
        """Count one forward's records."""
        self._modules = None
        tasks = TaskIds()
        firsts: dict[str, Tensor] = {}
        for record in records:
            self.layer_of[record.site.name] = record.site.layer
            if self.keep_weights:
                self._kept.setdefault(record.site.name, []).append(record.routing.weights.detach().cpu())
        for weights, probs in zip(stacks(records, "weights"), stacks(records, "probs"), strict=True):
            names = tuple(r.site.name for r in weights.records)
            key = names, weights.values.shape[-1]
            if key not in self._groups:
                self._groups[key] = Sums(len(names), key[1], weights.values.device)
            values = weights.values.detach().abs()  # an expert that is subtracted is used as well
            self._groups[key].add(values, probs.values.detach(), weights.mask, tasks.of(weights.records[0]))
            real = 1.0 if weights.mask is None else weights.mask[:, None].float()
            first = torch.zeros_like(values).scatter_(-1, values.argmax(dim=-1, keepdim=True), 1.0) * real
            firsts |= zip(names, first, strict=True)
        self._count_pairs(firsts)

    def _count_pairs(self, firsts: dict[str, Tensor]) -> None:
        """Add to the contingency tables of first experts (E, E') of neighbouring layers, those of a shape at once."""
        alike: dict[tuple[torch.Size, torch.Size], list[tuple[str, str]]] = {}
        for lower, upper in _neighbours({name: self.layer_of[name] for name in firsts}):
            shapes = firsts[lower].shape, firsts[upper].shape
            if shapes[0][0] == shapes[1][0]:
                alike.setdefault(shapes, []).append((lower, upper))
        for pairs in alike.values():
            below, above = (torch.stack([firsts[pair[side]] for pair in pairs]) for side in (0, 1))
            counts = torch.bmm(below.transpose(1, 2), above).to(wide(below.device))
            key = tuple(pairs)
            self._tables[key] = self._tables[key] + counts if key in self._tables else counts

    @property
    def modules(self) -> dict[str, ModuleTrace]:
        """What was counted, by module; read from the device when first asked for."""
        if self._modules is None:
            self._modules = {}
            for (names, num_experts), sums in self._groups.items():
                for name, found in zip(names, sums.modules(), strict=True):
                    self._modules.setdefault(name, ModuleTrace(num_experts)).add(found)
            for name, kept in self._kept.items():
                self._modules[name].kept = kept
        return self._modules

    def __repr__(self) -> str:
        if not self.modules:
            return "RoutingTrace(nothing routed yet)"
        tokens = max(m.tokens for m in self.modules.values())
        known = self.names and all(len(m.weight) == len(self.names) for m in self.modules.values())
        shares = torch.stack([*self.utilisation().values()]).mean(dim=0).tolist() if known else []
        named = sorted(zip(shares, self.names, strict=False), reverse=True)[:_NAMED]
        return (
            f"RoutingTrace({len(self.modules)} routers, {tokens} tokens, entropy {self.entropy():.2f} of 1"
            + (f", {len(self.dead_experts())} of {self.num_experts()} experts dead" if self._tells_the_dead() else "")
            + "".join(f", {name} {share:.0%}" for share, name in named)
            + ")"
        )

    def _tells_the_dead(self) -> bool:
        """Whether so many tokens came that an expert without any is one that is not used."""
        return all(module.tokens >= _TO_TELL * len(module.weight) for module in self.modules.values())

    def num_experts(self) -> int:
        """Experts of all modules together."""
        return sum(len(m.weight) for m in self.modules.values())

    def utilisation(self) -> dict[str, Tensor]:
        return {name: module.utilisation for name, module in self.modules.items()}

    def by_layer(self) -> dict[int, Tensor]:
        """Mean utilisation of a layer's modules, their experts aligned (see `aligned`)."""
        order = self.aligned()
        return _average((self.layer_of[name], m.utilisation[order[name]]) for name, m in self.modules.items())

    def by_task(self) -> dict[int, Tensor]:
        """The same of each task, over all modules."""
        order = self.aligned()
        return _average((t, shares(w)[order[n]]) for n, m in self.modules.items() for t, w in m.by_task.items())

    def by_layer_and_task(self) -> dict[int, dict[int, Tensor]]:
        """The same of each task in each layer."""
        order, layers = self.aligned(), dict[int, list[str]]()
        for name in self.modules:
            layers.setdefault(self.layer_of[name], []).append(name)
        return {
            layer: _average((t, shares(w)[order[n]]) for n in names for t, w in self.modules[n].by_task.items())
            for layer, names in sorted(layers.items())
        }

    def by_module_and_task(self) -> dict[str, dict[int, Tensor]]:
        """For each module, its own experts' shares of each task: nothing is averaged."""
        return {name: {t: shares(w) for t, w in sorted(m.by_task.items())} for name, m in self.modules.items()}

    def aligned(self) -> dict[str, Tensor]:
        """For each module, its experts (E,) in the order in which they can be averaged with other modules'.

        Experts that have names are the same in all modules. Others only share a number: each module has a router of
        its own, and an average over numbers would hide what every one of them does. So they are paired, from the first
        module on, by how alike the tasks are that they answer.
        """
        found, seen = {}, dict[int, Tensor]()
        tasks = sorted({task for module in self.modules.values() for task in module.by_task})
        for name, module in self.modules.items():
            num = len(module.weight)
            rows = [shares(module.by_task[t]) if t in module.by_task else torch.zeros(num) for t in tasks]
            profile = torch.stack([*(row.double().cpu() for row in rows), module.utilisation.double().cpu()])
            order = torch.arange(num) if self.names or num not in seen else paired(seen[num], profile)
            found[name], seen[num] = order, seen.get(num, 0) + profile[:, order]
        return found

    def entropy(self) -> float | None:
        """None before any token was routed."""
        return _mean(module.mean_entropy for module in self.modules.values())

    def entropy_by_layer(self) -> dict[int, float]:
        named = ((self.layer_of[name], torch.tensor(m.mean_entropy)) for name, m in self.modules.items())
        return {layer: float(value) for layer, value in _average(named).items()}

    def dead_experts(self, threshold: float = 0.1) -> list[tuple[str, int]]:
        """Experts that got less than `threshold` times the fair share 1/E."""
        return [
            (name, expert)
            for name, module in self.modules.items()
            for expert, share in enumerate(module.utilisation.tolist())
            if share < threshold / len(module.weight)
        ]

    def mutual_information(self) -> float | None:
        return _mean(m.mutual_information for m in self.modules.values())

    def inner_balance(self) -> float | None:
        """None where no token has a second expert: one-hot probabilities, or a single expert."""
        logs = _mean(None if m.inner_balance is None else math.log(m.inner_balance) for m in self.modules.values())
        return None if logs is None else math.exp(logs)

    def outer_balance(self) -> float | None:
        """None where every layer has a single expert."""
        return _mean(m.outer_balance for m in self.modules.values())

    def layer_information(self) -> float | None:
        """In bits, averaged over pairs of layers; None where no two layers have a module in common."""
        tables = [table for stacked in self._tables.values() for table in stacked.double().cpu()]
        return _mean(_information(table) for table in tables)

    def weights(self, name: str) -> list[Tensor]:
        """The weights (..., E) of every forward, of one module; needs `keep_weights=True`."""
        return self._kept[name]

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain numbers, for JSON."""
        return {
            "tokens": max((m.tokens for m in self.modules.values()), default=0),
            "entropy": self.entropy(),
            "mutual_information": self.mutual_information(),
            "inner_balance": self.inner_balance(),
            "outer_balance": self.outer_balance(),
            "layer_information": self.layer_information(),
            "num_experts": self.num_experts(),
            "dead_experts": [f"{name}[{expert}]" for name, expert in self.dead_experts()],
            "utilisation": {name: row.tolist() for name, row in self.utilisation().items()},
            "entropy_by_layer": {str(layer): value for layer, value in self.entropy_by_layer().items()},
            "by_layer": _plain(self.by_layer()),
            "by_task": _plain(self.by_task()),
            "by_layer_and_task": {str(layer): _plain(tasks) for layer, tasks in self.by_layer_and_task().items()},
            "by_module_and_task": {name: _plain(tasks) for name, tasks in self.by_module_and_task().items()},
        }


def paired(wanted: Tensor, profile: Tensor) -> Tensor:
    """The columns of `profile` (R, E) in the order of those of `wanted` that they are most alike, the likest first."""
    alike, order = wanted.t() @ profile, torch.zeros(profile.shape[1], dtype=torch.long)
    for _ in range(len(order)):
        to, of = divmod(int(alike.argmax()), len(order))
        order[to] = of
        alike[to], alike[:, of] = -torch.inf, -torch.inf
    return order


def _neighbours(layer_of: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Pairs of modules in layers that follow each other, with the same name but for the layer's index."""
    kinds: dict[str, dict[int, str]] = {}
    for name, layer in layer_of.items():
        kinds.setdefault(re.sub(rf"(^|\.){layer}(\.|$)", r"\1*\2", name, count=1), {})[layer] = name
    for layers in kinds.values():
        ordered = [layers[layer] for layer in sorted(layers)]
        yield from pairwise(ordered)


def _information(table: Tensor) -> float:
    """Mutual information in bits of a contingency table (E, E')."""
    joint = table / table.sum().clamp(min=1)
    apart = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    return float(torch.where(joint > 0, joint * (joint / apart.clamp(min=1e-300)).log2(), 0.0).sum())


def _average(rows: Iterable[tuple[int, Tensor]]) -> dict[int, Tensor]:
    """Mean row of each key, ascending; keys whose rows differ in length are left out."""
    found: dict[int, list[Tensor]] = {}
    for key, row in rows:
        found.setdefault(key, []).append(row)
    return {k: torch.stack(v).mean(dim=0) for k, v in sorted(found.items()) if len({r.shape for r in v}) == 1}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _plain(rows: dict[int, Tensor]) -> dict[str, list[float]]:
    return {str(key): row.tolist() for key, row in rows.items()}
