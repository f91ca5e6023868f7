"""Gates: logits in, mixture weights out.

| gate | weights of a row | sum |
| --- | --- | --- |
| `Softmax` | softmax of all logits | 1 |
| `TopK(normalize="sum")` | the k largest probabilities, divided by their sum | 1 |
| `TopK(normalize="softmax", temperature=t)` | softmax of the k largest probabilities over t | 1 |
| `TopK(normalize="none")` | the k largest probabilities as they are | <= 1 |
| `TopP(p)` | the smallest leading set whose mass reaches p | 1, or >= p without renormalisation |
| `EntropyHybrid(k, p, threshold)` | all probabilities if they are uncertain, else the leading ones as they are | <= 1 |
| `AsTheyAre` | the logits themselves, of any sign | any |

`Gate.sums_to_one` tells the last column apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing.entropy import EntropyType, exceeds, generalised_entropy


@dataclass
class Routing:
    """What a gate decided. All tensors are (..., E) and float32.

    `weights` mix the experts, `probs` is the dense softmax they came from, `logits` the router's scores."""

    weights: Tensor
    probs: Tensor
    logits: Tensor


PAIRS = 64
"""Experts up to which a compiled gate compares each with each: one fused kernel, where a sort is several of its own."""


def before(values: Tensor) -> Tensor:
    """Whether expert j comes before i in falling order of values (..., E), of equals the first: (..., E, E) at i, j."""
    other, own = values.unsqueeze(-2), values.unsqueeze(-1)
    number = torch.arange(values.shape[-1], device=values.device)
    return (other > own) | ((other == own) & (number < number.unsqueeze(-1)))


def _by_pairs(values: Tensor) -> bool:
    return torch.compiler.is_compiling() and values.shape[-1] <= PAIRS


class Gate(ABC):
    """Turns logits (..., E) into a `Routing`."""

    @property
    def top_k(self) -> int | None:
        """Non-zero weights a row, when it is the same for all rows."""
        return None

    @property
    def sums_to_one(self) -> bool:
        """Whether every row's weights sum to 1."""
        return True

    @property
    def signed(self) -> bool:
        """Whether weights may be of any sign and sum; else none is negative, and their sum is above 0 and at most 1."""
        return False

    @abstractmethod
    def __call__(self, logits: Tensor) -> Routing: ...

    def weights(self, logits: Tensor) -> Tensor:
        """The weights (..., E) alone, without gradients: what decoding needs, in as few kernels as may be."""
        return self(logits).weights

    def check(self, num_experts: int) -> None:  # noqa: B027
        """Raise ConfigError if the gate cannot work with this many experts."""


@dataclass(frozen=True)
class Softmax(Gate):
    """Every expert, weighted by its probability (LoRAMoE, Dou et al. 2024)."""

    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Routing:
        probs = torch.softmax(logits / self.temperature if self.temperature != 1.0 else logits, dim=-1)
        return Routing(probs, probs, logits)


@dataclass(frozen=True)
class TopK(Gate):
    """The k most probable experts (Shazeer et al. 2017). Exactly k are kept, ties included.

    `normalize="softmax"` takes the kept *probabilities* as logits at `temperature`: HotMoE's gate, with 0.1.
    """

    k: int
    normalize: Literal["sum", "softmax", "none"] = "sum"
    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Routing:
        plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        weights, probs = self.weigh(logits) if plain else _TopK.apply(logits, self)
        return Routing(weights, probs, logits)

    def weights(self, logits: Tensor) -> Tensor:
        """Kept probabilities over their sum are the softmax of the kept logits."""
        if _by_pairs(logits):
            return self.weigh(logits)[0]
        if self.normalize == "sum":
            top, index = logits.topk(self.k, dim=-1)
            return torch.softmax(torch.full_like(logits, -torch.inf).scatter_(-1, index, top), dim=-1)
        probs = torch.softmax(logits, dim=-1)
        top, index = probs.topk(self.k, dim=-1)
        if self.normalize == "none":
            return torch.zeros_like(probs).scatter_(-1, index, top)
        kept = torch.full_like(probs, -torch.inf).scatter_(-1, index, top).div_(self.temperature)
        return torch.softmax(kept, dim=-1)

    def weigh(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and dense probabilities, both (..., E)."""
        probs = torch.softmax(logits, dim=-1)
        if _by_pairs(probs):
            kept = before(probs).sum(dim=-1) < self.k
            if self.normalize == "softmax":
                return torch.softmax((probs / self.temperature).masked_fill(~kept, -torch.inf), dim=-1), probs
            weights = probs * kept
            return weights / weights.sum(dim=-1, keepdim=True) if self.normalize == "sum" else weights, probs
        top, index = probs.topk(self.k, dim=-1)
        if self.normalize == "sum":
            top = top / top.sum(dim=-1, keepdim=True)
        elif self.normalize == "softmax":
            top = torch.softmax(top / self.temperature, dim=-1)
        return torch.zeros_like(probs).scatter_(-1, index, top), probs

    @property
    def top_k(self) -> int:
        return self.k

    @property
    def sums_to_one(self) -> bool:
        return self.normalize != "none"

    def check(self, num_experts: int) -> None:
        if not 1 <= self.k <= num_experts:
            raise ConfigError(f"top_k={self.k} must be between 1 and num_experts={num_experts}")
        if self.temperature <= 0:
            raise ConfigError(f"the gate's temperature must be above 0, not {self.temperature}")


class _TopK(torch.autograd.Function):
    """`TopK.weigh` with its gradient written out: a third of the kernels, for nothing is gathered or scattered back.

    Kept probabilities divided by their sum are the softmax of the kept logits, and weights are 0 off the kept: so each
    of the gate's steps has the gradient of a softmax whose rows are known.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gate: TopK) -> tuple[Tensor, Tensor]:
        weights, probs = gate.weigh(logits)
        ctx.save_for_backward(weights, probs)
        ctx.gate = gate
        ctx.set_materialize_grads(False)
        return weights, probs

    @staticmethod
    def backward(ctx: Any, to_weights: Tensor | None, to_probs: Tensor | None) -> tuple[Tensor | None, None]:
        (weights, probs), gate = ctx.saved_tensors, ctx.gate
        if to_weights is None:
            return None if to_probs is None else _softmax_backward(to_probs, probs), None
        if gate.normalize == "sum":
            to_logits = _softmax_backward(to_weights, weights)
            return (to_logits if to_probs is None else to_logits + _softmax_backward(to_probs, probs)), None
        if gate.normalize == "softmax":
            through = _softmax_backward(to_weights, weights) / gate.temperature
        else:
            through = torch.where(weights > 0, to_weights, 0.0)
        return _softmax_backward(through if to_probs is None else through + to_probs, probs), None


def _softmax_backward(grad: Tensor, rows: Tensor) -> Tensor:
    return torch.ops.aten._softmax_backward_data(grad, rows, -1, rows.dtype)


@dataclass(frozen=True)
class TopP(Gate):
    """The most probable experts until their mass reaches `p`, the one that crosses it included.

    Nucleus selection (Holtzman et al. 2020) used as a gate (Huang et al. 2024): confident tokens use fewer experts.
    """

    p: float
    renormalize: bool = True

    def __call__(self, logits: Tensor) -> Routing:
        probs = torch.softmax(logits, dim=-1)
        if self.p >= 1:  # rounding must not decide whether the mass of the others is 1
            return Routing(probs, probs, logits)
        if _by_pairs(probs):
            keep = (before(probs) * probs.unsqueeze(-2)).sum(dim=-1) < self.p
        else:
            ordered, index = probs.sort(dim=-1, descending=True, stable=True)
            keep_ordered = ordered.cumsum(dim=-1) - ordered < self.p
            keep = torch.zeros_like(keep_ordered).scatter(-1, index, keep_ordered)
        weights = probs * keep
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(weights, probs, logits)

    @property
    def sums_to_one(self) -> bool:
        return self.renormalize

    def check(self, num_experts: int) -> None:
        if not 0 < self.p <= 1:
            raise ConfigError(f"top_p={self.p} must be above 0 and at most 1")


@dataclass(frozen=True)
class AsTheyAre(Gate):
    """Logits are the weights; what stands for probabilities is each expert's share of their magnitude."""

    def weights(self, logits: Tensor) -> Tensor:
        return logits

    def __call__(self, logits: Tensor) -> Routing:
        size = logits.abs()
        return Routing(logits, size / size.sum(dim=-1, keepdim=True).clamp(min=1e-12), logits)

    @property
    def sums_to_one(self) -> bool:
        return False

    @property
    def signed(self) -> bool:
        return True


@dataclass(frozen=True)
class EntropyHybrid(Gate):
    """Every expert where the router is uncertain, the leading few elsewhere (DynMoLE, Li et al. 2025).

    A row keeps all its experts if the entropy of its probabilities, over the maximum, exceeds `threshold`; from 1 on
    none does. Else it keeps the `keep_top_k` most probable, and on in that order while the cumulative mass is at most
    `top_p`: the expert that crosses `top_p` is left out, unless `include_crossing` (Holtzman et al. 2020). Weights are
    the kept probabilities as they are; gradient flows through them, not through the choice.
    """

    keep_top_k: int = 2
    top_p: float = 0.75
    threshold: float = 0.9
    q: float = 1.1
    kind: EntropyType = "tsallis"
    eps: float = 1e-5
    include_crossing: bool = False

    def __call__(self, logits: Tensor) -> Routing:
        probs = torch.softmax(logits, dim=-1)
        return Routing(probs * self.keep(probs.detach()), probs, logits)

    def weights(self, logits: Tensor) -> Tensor:
        probs = torch.softmax(logits, dim=-1)
        if self.top_p >= 1:
            return probs
        if _by_pairs(probs):
            return probs * self.keep(probs)
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        mass = ordered.cumsum(dim=-1)
        rest, mass = ordered[..., self.keep_top_k :], mass[..., self.keep_top_k :]
        rest *= mass - rest < self.top_p if self.include_crossing else mass <= self.top_p
        kept = torch.empty_like(probs).scatter_(-1, index, ordered)
        if self.threshold >= 1:
            return kept
        uncertain = exceeds(self.kind, probs, self.q, self.threshold, eps=self.eps)
        return torch.where(uncertain.unsqueeze(-1), probs, kept)

    def keep(self, probs: Tensor) -> Tensor:
        """Which experts take part (..., E), as booleans."""
        if self.top_p >= 1:  # rounding must not decide whether the mass of all is above 1
            return torch.ones_like(probs, dtype=torch.bool)
        if _by_pairs(probs):
            pairs = before(probs)
            mass = (pairs * probs.unsqueeze(-2)).sum(dim=-1)
            keep = mass < self.top_p if self.include_crossing else mass + probs <= self.top_p
            keep = keep | (pairs.sum(dim=-1) < self.keep_top_k)
        else:
            ordered, index = probs.sort(dim=-1, descending=True, stable=True)
            mass = ordered.cumsum(dim=-1)
            keep_ordered = mass - ordered < self.top_p if self.include_crossing else mass <= self.top_p
            keep_ordered[..., : self.keep_top_k] = True
            keep = torch.zeros_like(keep_ordered).scatter(-1, index, keep_ordered)
        if self.threshold >= 1:
            return keep
        uncertain = generalised_entropy(self.kind, probs, self.q, eps=self.eps) > self.threshold
        return keep | uncertain.unsqueeze(-1)

    @property
    def sums_to_one(self) -> bool:
        return False

    def check(self, num_experts: int) -> None:
        if not 1 <= self.keep_top_k <= num_experts:
            raise ConfigError(f"keep_top_k={self.keep_top_k} must be between 1 and num_experts={num_experts}")
        if not 0 <= self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be between 0 and 1")
        if self.threshold < 0:
            raise ConfigError(f"entropy_threshold={self.threshold} must be at least 0; from 1 on it is never exceeded")
        if not 0 < self.q <= 2:
            raise ConfigError(f"entropy_index={self.q} must be above 0 and at most 2; 1 is Shannon's entropy")
        if self.eps < 0:
            raise ConfigError(f"entropy_eps={self.eps} must be at least 0")
