"""The skills that stay in place: to reach, to squat, to step."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moesaic.skills.body import Body
from moesaic.skills.chance import Chance
from moesaic.skills.moment import Moment
from moesaic.skills.physics import Readings
from moesaic.skills.rewards import apart, near, norm
from moesaic.skills.tasks.task import Rows, Task

Floats = NDArray[np.float64]
SHARED = {"orientation": 1.0, "torques": -1e-5, "dof_vel": -5e-4, "dof_acc": -1e-7}


class Posture(Task):
    """A skill that stays where it is; another goal every second."""

    seconds = 24.0
    every: ClassVar[float | None] = 1.0
    told = 4.0
    """What a metre is in a command (published: 2 for a step, else 1): what is of order 1 is learned sooner."""
    sharpness = 8.0
    """Of the goal's reward (published: 4)."""

    def scaled(self, **own: float) -> dict[str, float]:
        """The terms of a skill; a planar body has none that ask for width."""
        planar = ("feet_distance", "default_joint_pos") if self.body.planar else ()
        return {name: scale for name, scale in {**own, **SHARED}.items() if name not in planar}


class Reach(Posture):
    """Goal: where each hand should be, on a circle (sphere) of 0.25 m around where it rests."""

    accuracy, success = "wrist", 0.08
    radius = 0.25

    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self.scales = self.scaled(wrist_pos=5.0, feet_distance=0.5, default_joint_pos=0.5, upper_body_pos=0.5)

    @property
    def goal_dim(self) -> int:
        return 2 * len(self.axes)

    @property
    def command_dim(self) -> int:
        return self.goal_dim

    def draw(self, chance: Chance, rows: Rows, objects: Floats) -> Floats:
        rest = self.body.rest.hands[:, self.axes]
        goal = np.empty((len(rows), 2, len(self.axes)))
        left = np.arange(len(rows))
        while len(left):
            way = chance.normal(rows[left], self.goal_dim).reshape(len(left), 2, -1)
            offset = self.radius * way / norm(way)[..., None]
            goal[left] = rest + offset
            x, z = offset[..., 0], offset[..., -1]
            good = (x > -0.10).all(axis=1) & (np.abs(z) < 0.25).all(axis=1)
            if not self.body.planar:
                good &= (offset[:, 0, 1] > -0.10) & (offset[:, 1, 1] < 0.10)
            left = left[~good]
        return goal.reshape(len(rows), -1)

    def away(self, now: Readings, goal: Floats) -> Floats:
        """(N, 2, a): from each hand to where it should be, m."""
        return goal.reshape(len(goal), 2, -1) - now.hands[..., self.axes]

    def marks(self, now: Readings, goal: Floats) -> Floats:
        return _placed(self.body.rest.hands, self.axes, goal)

    def command(self, now: Readings, goal: Floats) -> Floats:
        return self.told * self.away(now, goal).reshape(len(goal), -1)

    def errors(self, now: Readings, goal: Floats) -> dict[str, Floats]:
        return {"wrist": apart(self.away(now, goal))}

    def wrist_pos(self, m: Moment) -> Floats:
        return near(self.away(m.now, m.goal), self.sharpness)

    def upper_body_pos(self, m: Moment) -> Floats:
        """The torso's joint alone: the arms are to move."""
        torso = [number for number in self.body.upper if self.body.joints[number].startswith("torso")]
        return np.exp(-4 * np.abs(m.offsets()[:, torso]).sum(axis=1))


class Squat(Posture):
    """Goal: the height of the base, m."""

    accuracy, success = "height", 0.06

    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self.scales = self.scaled(squatting=5.0, feet_distance=0.5, default_joint_pos=0.5, upper_body_pos=1.0)

    @property
    def goal_dim(self) -> int:
        return 1

    @property
    def command_dim(self) -> int:
        return 1

    def draw(self, chance: Chance, rows: Rows, objects: Floats) -> Floats:
        """All heights alike (published: N(0.89, 0.2) within 0.2 and 1.1 m for H1, of which half ask it to stand)."""
        size = self.body.base_height / 0.89
        low = max(0.2 * size, self.body.falls_below + 0.05)
        return chance.uniform(rows, 1, low, self.body.base_height + 0.02)

    def away(self, now: Readings, goal: Floats) -> Floats:
        """(N, 1): how much higher the base should be, m."""
        return goal - now.position[:, 2:]

    def marks(self, now: Readings, goal: Floats) -> Floats:
        """Beside the base, ahead of it and behind."""
        ahead = np.array([[0.3, 0.0, 0.0], [-0.3, 0.0, 0.0]])
        return np.array([*now.position[0, :2], goal[0]]) + ahead

    def command(self, now: Readings, goal: Floats) -> Floats:
        return self.told * self.away(now, goal)

    def errors(self, now: Readings, goal: Floats) -> dict[str, Floats]:
        return {"height": apart(self.away(now, goal))}

    def squatting(self, m: Moment) -> Floats:
        return near(self.away(m.now, m.goal), self.sharpness)


class Step(Posture):
    """Goal: where each foot should be on the ground; one of them 0.25 m from where it stood, in any direction."""

    accuracy, success = "foot", 0.08
    length = 0.25

    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self.scales = self.scaled(feet_pos=5.0, upper_body_pos=0.5)

    @property
    def goal_dim(self) -> int:
        return 2 * len(self.ground)

    @property
    def command_dim(self) -> int:
        return self.goal_dim

    def draw(self, chance: Chance, rows: Rows, objects: Floats) -> Floats:
        goal = np.tile(self.body.rest.feet[:, self.ground], (len(rows), 1, 1))
        way = chance.normal(rows, len(self.ground) + 1)
        which = (way[:, -1] > 0).astype(int)
        goal[np.arange(len(rows)), which] += self.length * way[:, :-1] / norm(way[:, :-1])[:, None]
        return goal.reshape(len(rows), -1)

    def away(self, now: Readings, goal: Floats) -> Floats:
        return goal.reshape(len(goal), 2, -1) - now.feet[..., self.ground]

    def marks(self, now: Readings, goal: Floats) -> Floats:
        return _placed(self.body.rest.feet, self.ground, goal)

    def command(self, now: Readings, goal: Floats) -> Floats:
        return self.told * self.away(now, goal).reshape(len(goal), -1)

    def errors(self, now: Readings, goal: Floats) -> dict[str, Floats]:
        return {"foot": apart(self.away(now, goal))}

    def feet_pos(self, m: Moment) -> Floats:
        return near(self.away(m.now, m.goal), self.sharpness)


def _placed(rest: Floats, axes: list[int], goal: Floats) -> Floats:
    """(2, 3): where they rest, moved to a goal (2 a,) that says `axes` of both."""
    points = rest.copy()
    points[:, axes] = goal.reshape(2, -1)
    return points
