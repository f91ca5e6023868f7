"""LoraHub: weights found without gradients on a few examples (Huang et al. 2023, arXiv 2307.13269).

    y = W0 x + (sum_e w_e s_e B_e) (sum_e w_e A_e) x                    w (E,), the same for all modules and inputs
    w = argmin  loss on the examples + .05 mean |w_e|,   |w_e| <= 1.5, from 0

Factors are merged, as its authors do: with cross terms B_e A_f, and two adapters at weight 1/2 give a quarter of each.
The search is CMA-ES (Hansen 2016), which the paper takes from Nevergrad; 40 tries of the loss. The result is one LoRA
of the adapters' own rank, which `moesaic export` writes.

Departures from the authors' code: the penalty stands beside the mean loss of the examples, as in the paper (their code
divides that mean by the number of examples once more, so that with n examples the penalty weighs n times as much); the
search is plain CMA-ES, not Nevergrad's choice of optimisers; its seed is fixed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from moesaic.errors import ConfigError, MissingDependency
from moesaic.lora.config import MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.lora.stored import LARGEST
from moesaic.routing import AsTheyAre, Gate, Router, RoutingContext, Site

BOUND = 1.5
PENALTY = 0.05
BUDGET = 40


class FixedRouter(Router):
    """The same weights for every input, set from outside and saved."""

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__(len(weights))
        self.weights: Tensor
        self.keep("weights", torch.tensor(weights, dtype=torch.float32))

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        return self.weights.to(h.dtype).expand(*h.shape[:-1], self.num_experts)


@dataclass
class LoraHubConfig(MixtureConfig):
    """Settings of LoraHub on top of `MixtureConfig`'s."""

    method: ClassVar[str] = "lorahub"
    paper: ClassVar[str] = "LoraHub (COLM 2024, arXiv 2307.13269)"
    summary: ClassVar[str] = "weights for the adapters' factors, searched without gradients on a few examples"
    kind: ClassVar[Kind] = Kind(experts="adapters", weights="searched", is_static=True, merges_factors=True)

    weights: list[float] | None = field(
        default=None, metadata={"help": "of the adapters, in their order; what the search found, or 0 before it"}
    )

    budget: int = field(default=BUDGET, metadata={"help": "tries of the search"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget < 1:
            raise ConfigError(f"budget={self.budget} must be at least 1")
        if self.weights is not None and not all(abs(weight) <= LARGEST for weight in self.weights):
            raise ConfigError(f"weights={self.weights} must be finite numbers, of at most {LARGEST:g}")
        if self.weights is not None and len(self.weights) != self.num_experts:
            raise ConfigError(f"weights has {len(self.weights)} entries for {self.num_experts} adapters")

    def router(self, site: Site) -> Router:
        return FixedRouter(self.weights or [0.0] * self.num_experts)

    def gate(self) -> Gate:
        return AsTheyAre()

    def fit(self, model: Any, loss: Callable[[], float]) -> str:
        routers = [m for m in model.modules() if isinstance(m, FixedRouter)]

        def with_weights(weights: list[float]) -> float:
            for router in routers:
                router.weights.copy_(torch.tensor(weights))
            return loss()

        with torch.no_grad():
            self.weights = search(with_weights, self.num_experts, budget=self.budget)
            least = with_weights(self.weights)
        found = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(self.experts or (), self.weights, strict=True))
        return f"loss {least:.3f} by at most {self.budget} tries, weights {found}"


def search(
    loss: Callable[[list[float]], float], num_experts: int, *, budget: int = BUDGET, seed: int = 42
) -> list[float]:
    """The weights (E,) with the smallest `loss(weights) + .05 mean |w|` of `budget` tries, by CMA-ES from 0.

    Raises:
        MissingDependency: `cma` is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it misses matplotlib, which only its pictures need
            import cma
    except ImportError:
        raise MissingDependency("cma", "train") from None

    def objective(weights: Sequence[float]) -> float:
        return loss([float(w) for w in weights]) + PENALTY * sum(map(abs, weights)) / num_experts

    start = [0.0] * num_experts
    options = {"bounds": [-BOUND, BOUND], "maxfevals": budget, "seed": seed, "verbose": -9}
    best, least, tries = start, objective(start), 1
    strategy = cma.CMAEvolutionStrategy(start, BOUND / 3, options)
    while tries < budget:
        asked = strategy.ask()[: budget - tries]
        found = [objective(weights) for weights in asked]
        tries += len(asked)
        for weights, value in zip(asked, found, strict=True):
            if value < least:
                best, least = [float(w) for w in weights], value
        if len(asked) < strategy.popsize:
            break
        strategy.tell(asked, found)
    return best
