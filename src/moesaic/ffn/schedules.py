"""How many experts a token takes at each step of training: k(t) for t = 0 … T.

| schedule | k(t) | source |
| --- | --- | --- |
| `linear` | round((kmax - kmin) t / T) + kmin | SMoE-Dropout (Chen et al. 2023), its default |
| `cosine` | round((kmin - kmax) cos(pi t / 2T)) + kmax | SMoE-Dropout |
| `exp` | round((kmin - kmax) 0.99^floor(t / (T / 300))) + kmax | SMoE-Dropout |
| `multi_step` | kmin, 2 kmin, 4 kmin … kmax, for equal parts of T | SMoE-Dropout |
| `constant` | kmax | a router trained at one k |
| `elastic` | drawn from kmin … kmax, anew for each step and layer | Matryoshka MoE's elastic training |

A `-down` behind the first four runs them from kmax to kmin. `elastic` is drawn from the seed, the step and the
layer alone. At T all have reached kmax, also `exp`, which rounding may leave one below.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from transformers import TrainerCallback

from moesaic.errors import ConfigError
from moesaic.ffn.places import routed_layers
from moesaic.ffn.slimming import check_top_k, keep, set_top_k, take

Kind = Literal[
    "linear", "cosine", "exp", "multi_step", "constant", "elastic",
    "linear-down", "cosine-down", "exp-down", "multi_step-down",
]  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """k over the steps of a training."""

    kind: Kind
    k_min: int
    k_max: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(type(k) is int for k in (self.k_min, self.k_max)):
            raise ConfigError(f"k_min={self.k_min!r} and k_max={self.k_max!r} must be whole numbers")
        if self.kind not in get_args(Kind):
            raise ConfigError(f"unknown schedule {self.kind!r}: choose one of {', '.join(get_args(Kind))}")
        if not 1 <= self.k_min <= self.k_max:
            raise ConfigError(f"k_min={self.k_min} and k_max={self.k_max}: 1 <= k_min <= k_max")

    def at(self, step: int, steps: int, layer: int = 0) -> int:
        """k of a layer (counted from 0) at `step` of `steps`: within k_min and k_max, and at the end one of the two."""
        low, high, share = self.k_min, self.k_max, min(step / max(steps, 1), 1.0)
        kind, _, down = self.kind.partition("-")
        if kind == "constant" or share == 1:
            return low if down else high
        if self.kind == "elastic":
            return random.Random(f"{self.seed} {step} {layer}").randint(low, high)
        if kind == "linear":
            k = round((high - low) * share) + low
        elif kind == "cosine":
            k = round((low - high) * math.cos(math.pi * share / 2)) + high
        elif kind == "exp":
            k = round((low - high) * 0.99 ** math.floor(300 * share)) + high
        else:
            doubled = [low]
            while doubled[-1] < high:
                doubled.append(min(2 * doubled[-1], high))
            k = doubled[min(int(share * len(doubled)), len(doubled) - 1)]
        k = min(max(k, low), high)
        return low + high - k if down else k


class KSchedule(TrainerCallback):
    """Sets k before each step of a Trainer; a resumed training goes on where it was, as k follows from the step.

    A checkpoint takes the k of its last step, under `elastic` the k of the end, and so does the model at the end.
    """

    def __init__(self, schedule: Schedule) -> None:
        if not isinstance(schedule, Schedule):
            raise ConfigError(f"KSchedule({schedule!r}): give it a Schedule, such as Schedule('linear', 8, 16)")
        self.schedule = schedule

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        apply(self.schedule, model, state.global_step, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        set_top_k(model, self.schedule.at(state.max_steps, state.max_steps))


def apply(schedule: Schedule, model: nn.Module, step: int, steps: int) -> None:
    """Each layer's k at a step of a training, for loops that are no Trainer's; end them with `set_top_k`.

    A model that is saved meanwhile takes this k, or under `elastic`, that of the end.

    Raises:
        ConfigError: where the model has no layers made of experts, or fewer than k_max.
    """
    check_top_k(model, schedule.k_max)
    take(model, [schedule.at(step, steps, layer=i) for i, _ in enumerate(routed_layers(model))])
    keep(model, schedule.at(steps if schedule.kind == "elastic" else step, steps))
