"""The skill to walk as fast as told."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesaic.skills.body import Body
from moesaic.skills.chance import Chance
from moesaic.skills.moment import Moment
from moesaic.skills.physics import Readings
from moesaic.skills.rewards import norm
from moesaic.skills.tasks.task import Rows, Task, in_turn

Floats = NDArray[np.float64]
SIDEWAYS = ("feet_distance", "default_joint_pos")
"""Terms that a planar body has no use for, as tracking a turn."""
BACK = -0.4
"""How fast a planar body walks back at most, m/s."""


class Walk(Task):
    """Goal: vx, vy (m/s) and heading (rad); a planar body has vx alone, of -0.4 to 1."""

    seconds, every = 24.0, 8.0
    accuracy, success = "velocity", 0.15

    def __init__(self, body: Body) -> None:
        super().__init__(body)
        terms = {
            "joint_pos": 1.6, "feet_clearance": 2.0, "feet_contact_number": 2.4, "feet_air_time": 1.0,
            "foot_slip": -0.05, "feet_distance": 0.2, "feet_contact_forces": -0.01, "tracking_lin_vel": 2.4,
            "tracking_ang_vel": 2.2, "vel_mismatch_exp": 0.5, "low_speed": 0.2, "track_vel_hard": 1.0,
            "default_joint_pos": 0.5, "upper_body_pos": 0.5, "orientation": 1.0, "base_height": 0.2, "base_acc": 0.2,
            "action_smoothness": -0.002, "torques": -1e-5, "dof_vel": -5e-4, "dof_acc": -1e-7,
        }  # fmt: skip
        self.bounds = (2 * BACK, 2.0) if body.planar else (-2.0, 2.0)
        left_out = {*SIDEWAYS, "tracking_ang_vel"} if body.planar else set()
        left_out |= set() if body.upper else {"upper_body_pos"}
        self.scales = {name: scale for name, scale in terms.items() if name not in left_out}

    @property
    def goal_dim(self) -> int:
        return 3

    @property
    def command_dim(self) -> int:
        return 1 if self.body.planar else 3

    def draw(self, chance: Chance, rows: Rows, objects: Floats) -> Floats:
        if self.body.planar:
            goal = in_turn(chance, rows, np.array([BACK, 0.0, 0.0]), np.array([1.0, 0.0, 0.0]))
        else:
            goal = in_turn(chance, rows, np.array([-1.0, -1.0, -np.pi]), np.array([2.0, 1.0, np.pi]))
        goal[norm(goal[:, :2]) < 0.2, :2] = 0
        return goal

    def turning(self, now: Readings, goal: Floats) -> Floats:
        """(N,): rad/s towards the heading."""
        away = (goal[:, 2] - now.euler[:, 2] + np.pi) % (2 * np.pi) - np.pi
        return np.clip(0.5 * away, -1, 1)

    def asked(self, goal: Floats) -> str:
        own = f"{goal[0]:+.1f} m/s" if self.body.planar else f"{goal[0]:+.1f}, {goal[1]:+.1f} m/s"
        return f"asked for {own}"

    def command(self, now: Readings, goal: Floats) -> Floats:
        if self.body.planar:
            return 2 * goal[:, :1]
        return np.concatenate([2 * goal[:, :2], self.turning(now, goal)[:, None]], axis=1)

    def slips(self, now: Readings, goal: Floats) -> tuple[Floats, Floats]:
        """Difference to the velocity asked for, (N, 2) in the body's own axes, and to the turn (N,)."""
        ahead, left = heading(now)
        own = np.stack([(now.velocity[:, :2] * axis).sum(axis=1) for axis in (ahead, left)], axis=1)
        turn = np.zeros(len(goal)) if self.body.planar else self.turning(now, goal) - now.spin[:, 2]
        return goal[:, :2] - own, turn

    def errors(self, now: Readings, goal: Floats) -> dict[str, Floats]:
        moving, turn = self.slips(now, goal)
        found = {"velocity": np.abs(moving[:, 0])}
        return found if self.body.planar else found | {"sideways": np.abs(moving[:, 1]), "turn": np.abs(turn)}

    def tracking_lin_vel(self, m: Moment) -> Floats:
        moving, _ = self.slips(m.now, m.goal)
        return np.exp(-5 * (moving**2).sum(axis=1))

    def tracking_ang_vel(self, m: Moment) -> Floats:
        return np.exp(-5 * self.slips(m.now, m.goal)[1] ** 2)

    def track_vel_hard(self, m: Moment) -> Floats:
        moving, turn = self.slips(m.now, m.goal)
        slow, askew = norm(moving), np.abs(turn)
        return 0.5 * (np.exp(-10 * slow) + np.exp(-10 * askew)) - 0.2 * (slow + askew)

    def low_speed(self, m: Moment) -> Floats:
        moving, _ = self.slips(m.now, m.goal)
        asked = m.goal[:, 0]
        speed = asked - moving[:, 0]
        found = np.where(
            np.abs(speed) < 0.5 * np.abs(asked), -1.0, np.where(np.abs(speed) > 1.2 * np.abs(asked), 0, 1.2)
        )
        return np.where(np.sign(speed) != np.sign(asked), -2.0, found) * (np.abs(asked) > 0.1)


def heading(now: Readings) -> tuple[Floats, Floats]:
    """Unit vectors (N, 2) on the ground, ahead of the body and to its left."""
    yaw = now.euler[:, 2]
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.stack([cos, sin], axis=1), np.stack([-sin, cos], axis=1)
