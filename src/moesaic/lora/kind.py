"""What a method is, beyond its router, gate and losses: one line in its file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Kind:
    """What sets a method apart from a learned, token-wise gate over experts that are trained with it.

    Attributes:
        experts: pairs that are trained with the mixture ("own"; adapters may take their place), adapters that are
            trained already, or such adapters of one task each, by whose rows each is trained or chosen.
        weights: found by a router that is trained ("learned": only then can a comparison show that routing helps), by
            a rule ("fixed"), or by `MixtureConfig.fit` ("searched", and none before it).
        is_static: the weights are the same for every input, so that the mixture is one LoRA in another shape.
        merges_factors: weights merge the experts' A and B, each by itself, instead of what the experts answer.
        shares_down: all experts of a layer share one down projection A (r, d_in).
        needs_tasks: it cannot route without task ids, and has nothing to route with fewer than two tasks.
        needs_targets: its auxiliary loss compares with `routing_targets` of the batch.
    """

    experts: Literal["own", "adapters", "adapters of one task"] = "own"
    weights: Literal["learned", "fixed", "searched"] = "learned"
    is_static: bool = False
    merges_factors: bool = False
    shares_down: bool = False
    needs_tasks: bool = False
    needs_targets: bool = False

    @property
    def needs_adapters(self) -> bool:
        return self.experts != "own"

    @property
    def needs_own_task(self) -> bool:
        return self.experts == "adapters of one task"

    @property
    def learns_routing(self) -> bool:
        return self.weights == "learned"
