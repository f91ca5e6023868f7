"""ButtonPress: the left hand to a button on a wall, the right arm hanging."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.skills.body import Body
from moesaic.skills.chance import Chance
from moesaic.skills.moment import Moment
from moesaic.skills.physics import Readings
from moesaic.skills.rewards import apart, near, toward
from moesaic.skills.tasks.scenes import add_block
from moesaic.skills.tasks.task import Rows, Task, in_turn

Floats = NDArray[np.float64]
WALL = 1.5


class ButtonPress(Task):
    """Goal: the button on a wall 1.5 m ahead, up to 0.5 m aside and up or down from 1 m (planar: 0.3 up or down)."""

    skills = ("walk", "reach")
    accuracy, success = "button", 0.1

    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self.right = [number for number in body.upper if body.joints[number].startswith("right")]
        self.scales = {"button": 5.0, "right_arm_default": 0.5} if self.right else {"button": 5.0}

    @property
    def goal_dim(self) -> int:
        return 3

    @property
    def command_dim(self) -> int:
        return len(self.axes)

    def scene(self, spec: Any) -> None:
        add_block(spec, "wall", at=(WALL + 0.1, 0, 1.5), size=(0.05, 2, 1.5), holds_body=True)

    def draw(self, chance: Chance, rows: Rows, objects: Floats) -> Floats:
        side, up = (0.0, 0.3) if self.body.planar else (0.5, 0.5)
        return in_turn(chance, rows, np.array([WALL, -side, 1 - up]), np.array([WALL, side, 1 + up]))

    def marks(self, now: Readings, goal: Floats) -> Floats:
        return goal[None]

    def away(self, now: Readings, goal: Floats) -> Floats:
        return (goal - now.hands[:, 0])[:, self.axes]

    def command(self, now: Readings, goal: Floats) -> Floats:
        return self.away(now, goal)

    def errors(self, now: Readings, goal: Floats) -> dict[str, Floats]:
        return {"button": apart(self.away(now, goal))}

    def button(self, m: Moment) -> Floats:
        return toward(self.away(m.now, m.goal))

    def right_arm_default(self, m: Moment) -> Floats:
        return near(m.offsets()[:, self.right])
