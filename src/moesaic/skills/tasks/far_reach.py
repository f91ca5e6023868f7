"""FarReach: both hands to where only a few steps lead."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesaic.skills.body import Body
from moesaic.skills.chance import Chance
from moesaic.skills.moment import Moment
from moesaic.skills.rewards import toward
from moesaic.skills.tasks.posture import Reach
from moesaic.skills.tasks.task import Rows, in_turn

Floats = NDArray[np.float64]


class FarReach(Reach):
    """Goal: a target of `Reach` for each hand, and both moved together.

    Published: by up to 2 m ahead and to the left and 0.5 m up. Planar: -0.5 to 2 m ahead, up to 0.25 m up.
    """

    seconds, every = 8.0, None
    skills = ("walk", "reach")
    told = 1.0

    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self.scales = {"wrist_pos": 5.0}

    def wrist_pos(self, m: Moment) -> Floats:
        return toward(self.away(m.now, m.goal))

    def draw(self, chance: Chance, rows: Rows, objects: Floats) -> Floats:
        goal = super().draw(chance, rows, objects).reshape(len(rows), 2, -1)
        low, high = ([-0.5, 0.0], [2.0, 0.25]) if self.body.planar else ([0.0, 0.0, 0.0], [2.0, 2.0, 0.5])
        moved = in_turn(chance, rows, np.array(low), np.array(high))
        return (goal + moved[:, None]).reshape(len(rows), -1)
