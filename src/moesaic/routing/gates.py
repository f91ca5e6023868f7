"""Gates: logits in, mixture weights out.

| gate | weights of a row | sum |
| --- | --- | --- |
| `Softmax` | softmax of all logits | 1 |
| `TopK(normalize="sum")` | the k largest probabilities, divided by their sum | 1 |
| `TopK(normalize="softmax", temperature=t)` | softmax of the k largest probabilities over t | 1 |
| `TopK(normalize="none")` | the k largest probabilities as they are | < 1 |
| `TopP(p)` | the smallest leading set whose mass reaches p | 1, or >= p without renormalisation |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic.errors import ConfigError


@dataclass
class Routing:
    """What a gate decided. All tensors are (..., E) and float32.

    `weights` mix the experts, `probs` is the dense softmax they came from, `logits` the router's scores."""

    weights: Tensor
    probs: Tensor
    logits: Tensor


class Gate(ABC):
    """Turns logits (..., E) into a `Routing`."""

    @property
    def top_k(self) -> int | None:
        """Non-zero weights a row, when it is the same for all rows."""
        return None

    @abstractmethod
    def __call__(self, logits: Tensor) -> Routing: ...

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
        probs = torch.softmax(logits, dim=-1)
        top, index = probs.topk(self.k, dim=-1)
        if self.normalize == "sum":
            top = top / top.sum(dim=-1, keepdim=True)
        elif self.normalize == "softmax":
            top = torch.softmax(top / self.temperature, dim=-1)
        weights = torch.zeros_like(probs).scatter(-1, index, top)
        return Routing(weights, probs, logits)

    @property
    def top_k(self) -> int:
        return self.k

    def check(self, num_experts: int) -> None:
        if not 1 <= self.k <= num_experts:
            raise ConfigError(f"top_k={self.k} must be between 1 and num_experts={num_experts}")
        if self.temperature <= 0:
            raise ConfigError(f"the gate's temperature must be above 0, not {self.temperature}")


@dataclass(frozen=True)
class TopP(Gate):
    """The most probable experts until their mass reaches `p`, the one that crosses it included.

    Nucleus selection (Holtzman et al. 2020) used as a gate (Huang et al. 2024): confident tokens use fewer experts.
    """

    p: float
    renormalize: bool = True

    def __call__(self, logits: Tensor) -> Routing:
        probs = torch.softmax(logits, dim=-1)
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        keep_ordered = ordered.cumsum(dim=-1) - ordered < self.p
        keep = torch.zeros_like(keep_ordered).scatter(-1, index, keep_ordered)
        weights = probs * keep
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(weights, probs, logits)

    def check(self, num_experts: int) -> None:
        if not 0 < self.p <= 1:
            raise ConfigError(f"top_p={self.p} must be above 0 and at most 1")
