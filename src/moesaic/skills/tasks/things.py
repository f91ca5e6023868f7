"""Tasks about a thing that the body moves: BoxPush, PackageLift, FootballShoot."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.skills.chance import Chance
from moesaic.skills.moment import Moment
from moesaic.skills.physics import Readings
from moesaic.skills.rewards import apart, near, norm, toward
from moesaic.skills.tasks.scenes import add_block, add_thing
from moesaic.skills.tasks.task import Rows, Task, in_turn

Floats = NDArray[np.float64]


class Thing(Task):
    """One thing, and where it should be (3 numbers). A policy is told how far it is from there, and from both hands."""

    @property
    def goal_dim(self) -> int:
        return 3

    @property
    def command_dim(self) -> int:
        return 3 * len(self.axes)

    def marks(self, now: Readings, goal: Floats) -> Floats:
        return goal[None, :3]

    def left(self, now: Readings, goal: Floats) -> Floats:
        """(N, a): from the thing to its goal, m."""
        return (goal - now.objects[:, 0])[:, self.axes]

    def reaches(self, now: Readings) -> Floats:
        """(N, 2, a): from each hand to the thing, m."""
        return now.objects[:, :1, self.axes] - now.hands[..., self.axes]

    def command(self, now: Readings, goal: Floats) -> Floats:
        return np.concatenate([self.left(now, goal), self.reaches(now).reshape(len(goal), -1)], axis=1)

    def errors(self, now: Readings, goal: Floats) -> dict[str, Floats]:
        return {self.accuracy: apart(self.left(now, goal))}

    def wrist_box(self, m: Moment) -> Floats:
        return toward(self.reaches(m.now))

    def box_goal(self, m: Moment) -> Floats:
        return toward(self.left(m.now, m.goal))


class BoxPush(Thing):
    """A cube of 0.1 m on a table is pushed (published: sideways by up to 0.5 m; planar: 0.1 to 0.5 m ahead)."""

    skills = ("walk", "reach")
    objects, masses = ("box",), (0.1, 0.5)
    accuracy, success = "box", 0.1
    scales: Mapping[str, float] = MappingProxyType({"box_goal": 5.0, "wrist_box": 5.0})
    half = 0.05

    @property
    def table(self) -> float:
        """1 m for H1, and as high for the body's size."""
        return self.body.base_height + 0.11

    def scene(self, spec: Any) -> None:
        add_block(spec, "table", at=(1.4, 0, self.table - 0.02), size=(1.0, 0.8, 0.02), holds_body=False)
        add_thing(spec, "box", planar=self.body.planar, kind="box", size=[self.half] * 3, mass=0.3)

    def begin(self, chance: Chance, rows: Rows) -> Floats:
        high = self.table + self.half
        low_high = np.array([0.5, 0.0, high]), np.array([0.6, 0.0, high])
        return in_turn(chance, rows, *low_high)[:, None]

    def draw(self, chance: Chance, rows: Rows, objects: Floats) -> Floats:
        low, high = ([0.1, 0, 0], [0.5, 0, 0]) if self.body.planar else ([0, -0.5, 0], [0.1, 0.5, 0])
        return objects[:, 0] + in_turn(chance, rows, np.array(low), np.array(high))


class PackageLift(Thing):
    """A package on a stand is lifted (published: 0.3 to 0.6 m; planar: a board on a stand that lets arms through,
    0.1 to 0.4 m)."""

    skills = ("reach", "squat")
    objects, masses = ("box",), (0.1, 2.0)
    accuracy, success = "height", 0.1
    scales: Mapping[str, float] = MappingProxyType({"box_height": 5.0, "wrist_box": 5.0})

    @property
    def sizes(self) -> list[float]:
        return [0.15, 0.2, 0.03] if self.body.planar else [0.25, 0.05, 0.5]

    @property
    def stand(self) -> float:
        return self.body.base_height * (0.9 if self.body.planar else 0.35)

    def scene(self, spec: Any) -> None:
        add_block(spec, "stand", at=(0.35, 0, self.stand / 2), size=(0.1, 0.1, self.stand / 2), holds_body=False)
        add_thing(spec, "box", planar=self.body.planar, kind="box", size=self.sizes, mass=1.0)

    def begin(self, chance: Chance, rows: Rows) -> Floats:
        at = np.array([0.35, 0.0, self.stand + self.sizes[2]])
        return np.tile(at, (len(rows), 1, 1))

    def draw(self, chance: Chance, rows: Rows, objects: Floats) -> Floats:
        low, high = (0.1, 0.4) if self.body.planar else (0.3, 0.6)
        return objects[:, 0] + in_turn(chance, rows, np.array([0, 0, low]), np.array([0, 0, high]))

    def errors(self, now: Readings, goal: Floats) -> dict[str, Floats]:
        return {"height": apart(self.left(now, goal)[:, -1:])}

    def box_height(self, m: Moment) -> Floats:
        return toward(self.left(m.now, m.goal)[:, -1])


class FootballShoot(Thing):
    """A ball of 0.3 to 0.5 kg, 0.5 to 1 m ahead, is kicked to a goal 5 m away; over once it is within 0.5 m."""

    skills = ("walk", "step")
    objects, masses = ("ball",), (0.3, 0.5)
    accuracy, success = "ball", 0.0  # done by `ended` alone
    scales: Mapping[str, float] = MappingProxyType({"torso_ball": 1.0, "ball_goal": 5.0})
    radius, within = 0.11, 0.5

    @property
    def command_dim(self) -> int:
        return 2 * len(self.axes)

    def scene(self, spec: Any) -> None:
        add_thing(spec, "ball", planar=self.body.planar, kind="sphere", size=[self.radius], mass=0.4)

    def begin(self, chance: Chance, rows: Rows) -> Floats:
        side = 0.0 if self.body.planar else 0.3
        low, high = np.array([0.5, -side, self.radius]), np.array([1.0, side, self.radius])
        return in_turn(chance, rows, low, high)[:, None]

    def draw(self, chance: Chance, rows: Rows, objects: Floats) -> Floats:
        side, up = (0.0, 0.0) if self.body.planar else (2.0, 0.5)
        low, high = np.array([5.0, -side, self.radius]), np.array([5.0, side, self.radius + up])
        return np.concatenate([in_turn(chance, rows, low, high), objects[:, 0]], axis=1)

    @property
    def goal_dim(self) -> int:
        return 6

    def left(self, now: Readings, goal: Floats) -> Floats:
        return super().left(now, goal[:, :3])

    def command(self, now: Readings, goal: Floats) -> Floats:
        ball = (now.objects[:, 0] - now.position)[:, self.axes]
        return np.concatenate([ball, self.left(now, goal)], axis=1)

    def ended(self, now: Readings, goal: Floats) -> NDArray[np.bool_]:
        return norm(self.left(now, goal)) < self.within

    def torso_ball(self, m: Moment) -> Floats:
        """The torso to where the ball lay at the beginning, on the ground."""
        return near((m.goal[:, 3:] - m.now.position)[:, self.ground])

    def ball_goal(self, m: Moment) -> Floats:
        return near(self.left(m.now, m.goal), 1.0)
