"""What a policy sees of a body, and what the critic beside it sees.

    command (c) | q - q0 (d) | 0.05 dq (d) | last action (d) | spin | euler | velocity | height | sin, cos of the clock

A planar body has one number for spin (pitch) and for euler and two for velocity. The published layout ends with euler;
what stands behind it makes skills learnable in minutes. A critic sees the same without noise, and then things, feet,
pushes, traits (friction, the base's and a thing's mass) and which foot stands.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesaic.skills.body import Body
from moesaic.skills.chance import Chance
from moesaic.skills.physics import Readings
from moesaic.skills.tasks.task import Task

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
LIMIT = 18.0
"""Actions and observations are clipped to it."""
NOISE = {"q": 0.03, "dq": 0.015, "spin": 0.06, "euler": 0.018}
"""Standard deviations, in an observation's units: the published level of 0.6 times each sensor's."""


class Senses:
    """A body at a task, as seen. `command_dim` c and `shared_dim` are the sizes of what a skill has of its own and of
    what all skills of a body share; a policy sees both, in this order."""

    def __init__(self, body: Body, task: Task) -> None:
        d, axes = body.dim, [0, 1, 2]
        self.body, self.task, self.default = body, task, np.array(body.default)
        self._spin, self._velocity = ([1], [0, 2]) if body.planar else (axes, axes)
        turns = len(self._spin)
        sizes = {"q": d, "dq": d, "action": d, "spin": turns, "euler": turns}
        self.sizes = {**sizes, "velocity": len(self._velocity), "height": 1, "clock": 2}
        self.command_dim, self.shared_dim = task.command_dim, sum(self.sizes.values())
        starts = dict(zip(self.sizes, self.command_dim + np.cumsum([0, *self.sizes.values()]), strict=False))
        self.noisy = np.concatenate([starts[name] + np.arange(self.sizes[name]) for name in NOISE])
        """Places (k,) of what sensors measure."""
        self._spread = np.repeat([*NOISE.values()], [self.sizes[name] for name in NOISE])

    def names(self) -> list[str]:
        """What all skills share, with sizes."""
        return [f"{name}:{size}" for name, size in self.sizes.items()]

    def plain(self, now: Readings, goal: Floats, action: Floats, angle: Floats) -> Floats:
        """(n, c + shared) without noise; `angle` (n,) of the gait's clock, rad."""
        parts = [
            self.task.command(now, goal), now.q - self.default, 0.05 * now.dq, action, now.spin[:, self._spin],
            now.euler[:, self._spin], now.velocity[:, self._velocity], now.position[:, 2:],
            np.sin(angle)[:, None], np.cos(angle)[:, None],
        ]  # fmt: skip
        return np.concatenate(parts, axis=1)

    def measured(self, plain: Floats, level: float, chance: Chance, rows: NDArray[np.int64]) -> Singles:
        """What sensors make of it, for a policy (n, c + shared)."""
        if not level:
            return clipped(plain)
        noise = level * self._spread * chance.normal(rows, len(self.noisy))
        seen = plain.copy()
        seen[:, self.noisy] += noise
        return clipped(seen)

    def privileged(self, plain: Floats, now: Readings, *more: Floats) -> Singles:
        """What a critic sees, (n, p)."""
        here, axes = now.position[:, None], self.task.axes
        things = (now.objects - here, now.objects_velocity, now.feet - here)
        return clipped(np.concatenate([plain, *(t[..., axes].reshape(len(t), -1) for t in things), *more], axis=1))


def clipped(seen: Floats) -> Singles:
    return np.clip(seen, -LIMIT, LIMIT).astype(np.float32)
