"""What every skill and every task of a body says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moesaic.skills import rewards
from moesaic.skills.body import Body
from moesaic.skills.chance import Chance
from moesaic.skills.moment import Moment
from moesaic.skills.physics import Readings

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


class Task(ABC):
    """One thing to do: what is asked, what a policy is told of it, and what it is worth.

    Attributes:
        seconds: of an episode; `every`: seconds after which another goal is drawn, None for one an episode.
        scales: reward terms by name, of `rewards` or methods of the task.
        skills: those that the paper blends for it; a skill has none.
        objects: bodies that `scene` adds.
        masses: least and most mass of the first object, kg.
        accuracy: which of `errors` a report leads with; `success`: below which it counts as done, in its unit.
    """

    seconds: ClassVar[float] = 8.0
    every: ClassVar[float | None] = None
    scales: Mapping[str, float]
    skills: ClassVar[tuple[str, ...]] = ()
    objects: ClassVar[tuple[str, ...]] = ()
    masses: ClassVar[tuple[float, float] | None] = None
    accuracy: ClassVar[str]
    success: ClassVar[float]
    bounds: tuple[float, float] = (-1.0, 1.0)
    """Within which a blend may command it, in units of `command`: what it was trained for."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.axes = [0, 2] if body.planar else [0, 1, 2]
        self.ground = [0] if body.planar else [0, 1]

    @property
    @abstractmethod
    def goal_dim(self) -> int:
        """g, the numbers that say what is asked."""

    @property
    @abstractmethod
    def command_dim(self) -> int:
        """c, the numbers that a policy is told of it, before all else it sees."""

    def scene(self, spec: Any) -> None:  # noqa: B027
        """Put what is needed beside the body."""

    def begin(self, chance: Chance, rows: Rows) -> Floats:
        """Where objects (n, o, 3) are at the beginning of an episode."""
        return np.zeros((len(rows), len(self.objects), 3))

    @abstractmethod
    def draw(self, chance: Chance, rows: Rows, objects: Floats) -> Floats:
        """Goals (n, g) for some environments; `objects` (n, o, 3) as they are now."""

    @abstractmethod
    def command(self, now: Readings, goal: Floats) -> Floats:
        """What a policy is told, (N, c)."""

    @abstractmethod
    def errors(self, now: Readings, goal: Floats) -> dict[str, Floats]:
        """How far from the goal, (N,) each, in m, m/s or rad."""

    def marks(self, now: Readings, goal: Floats) -> Floats:
        """What a film shows of the goal (g,) of the first of those at hand: points (m, 3)."""
        return np.zeros((0, 3))

    def asked(self, goal: Floats) -> str:
        """What it says of it in words; empty where points say all."""
        return ""

    def ended(self, now: Readings, goal: Floats) -> NDArray[np.bool_]:
        """Whether it is done before its time, (N,). That truncates an episode: rewards are positive, and where an end
        were worth nothing (as published) a policy would stop short of it."""
        return np.zeros(len(goal), dtype=bool)

    def reward(self, m: Moment) -> tuple[Floats, dict[str, Floats]]:
        """(N,) max(0, sum of scale dt term), and each of its parts."""
        parts = {name: scale * m.dt * self.term(name)(m) for name, scale in self.scales.items()}
        total: Floats = sum(parts.values(), np.zeros(len(m.goal)))
        return np.maximum(total, 0), parts

    def term(self, name: str) -> Any:
        return getattr(self, name, None) or getattr(rewards, name)


def in_turn(chance: Chance, rows: Rows, low: Floats, high: Floats) -> Floats:
    """(n, k) drawn evenly between `low` and `high` (k,)."""
    return low + (high - low) * chance.uniform(rows, len(low))
