"""Reward terms of SkillBlender (arXiv 2506.09366; terms and constants from the released configurations).

Each takes a `Moment` and gives (N,). A task names those it uses, with their scales; the reward of a step is

    max(0, sum of scale dt term)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesaic.skills.moment import Moment, swing

Floats = NDArray[np.float64]
LIFT = 0.06
"""How high a swinging foot should be, m."""
SWING = (0.17, 0.34, 0.17)
"""How far hip, knee and ankle swing, rad: the hip forward, the knee back, the ankle so that the sole stays level."""


def norm(x: Floats) -> Floats:
    """Euclidean norms over the last axis."""
    found: Floats = np.sqrt(np.einsum("...i,...i->...", x, x))
    return found


def reference(m: Moment) -> Floats:
    """(N, d): where joints should be in a walk. Offsets from the default pose (the release has absolute angles)."""
    found = np.zeros_like(m.now.q)
    lifted = swing(m.phase)
    for joints, far, sign in zip((m.body.hips, m.body.knees, m.body.ankles), SWING, (-1, 1, -1), strict=True):
        found[:, joints] = sign * far * lifted
    return found


def joint_pos(m: Moment) -> Floats:
    far = norm(m.offsets() - reference(m))
    return np.exp(-2 * far) - 0.2 * np.minimum(far, 0.5)


def feet_clearance(m: Moment) -> Floats:
    height = m.now.feet[:, :, 2] - m.body.foot_height
    return ((swing(m.phase) > 0) & (np.abs(height - LIFT) < 0.01)).sum(axis=1).astype(float)


def feet_contact_number(m: Moment) -> Floats:
    return np.where(m.standing == (swing(m.phase) == 0), 1.0, -0.3).mean(axis=1)


def feet_air_time(m: Moment) -> Floats:
    return (np.minimum(m.air, 0.5) * m.landed).sum(axis=1)


def foot_slip(m: Moment) -> Floats:
    speed = norm(m.now.feet_velocity[:, :, :2])
    return (np.sqrt(speed) * m.standing).sum(axis=1)


def feet_distance(m: Moment) -> Floats:
    low, high = m.body.foot_distance
    apart = norm(m.now.feet[:, 0, :2] - m.now.feet[:, 1, :2])
    return 0.5 * (np.exp(-100 * np.maximum(low - apart, 0)) + np.exp(-100 * np.maximum(apart - high, 0)))


def feet_contact_forces(m: Moment) -> Floats:
    """Beyond one and a half times the body's weight (700 N on H1)."""
    return np.clip(norm(m.now.feet_force) - 1.5 * m.weight, 0, 0.85 * m.weight).sum(axis=1)


def vel_mismatch_exp(m: Moment) -> Floats:
    up = np.exp(-10 * m.now.velocity[:, 2] ** 2)
    return 0.5 * (up + np.exp(-5 * norm(m.now.spin[:, :2])))


def default_joint_pos(m: Moment) -> Floats:
    away = m.offsets()
    left, right = np.array_split(np.array(m.body.sway, dtype=int), 2)
    sway = np.clip(norm(away[:, left]) + norm(away[:, right]) - 0.1, 0, 50)
    return np.exp(-100 * sway) - 0.01 * norm(away)


def upper_body_pos(m: Moment) -> Floats:
    return np.exp(-4 * np.abs(m.offsets()[:, m.body.upper]).mean(axis=1))


def orientation(m: Moment) -> Floats:
    roll, pitch = m.now.euler[:, 0], m.now.euler[:, 1]
    leaning = np.sqrt(np.maximum(1 - (np.cos(roll) * np.cos(pitch)) ** 2, 0))
    return 0.5 * (np.exp(-10 * (np.abs(roll) + np.abs(pitch))) + np.exp(-20 * leaning))


def base_height(m: Moment) -> Floats:
    return np.exp(-100 * np.abs(m.now.position[:, 2] - m.body.base_height))


def base_acc(m: Moment) -> Floats:
    return np.exp(-3 * norm(np.concatenate([m.now.velocity - m.before.velocity, m.now.spin - m.before.spin], axis=1)))


def action_smoothness(m: Moment) -> Floats:
    first = m.action - m.action_before
    second = m.action - 2 * m.action_before + m.action_earlier
    return (first**2).sum(axis=1) + (second**2).sum(axis=1) + 0.05 * np.abs(m.action).sum(axis=1)


def torques(m: Moment) -> Floats:
    return (m.now.torque**2).sum(axis=1)


def dof_vel(m: Moment) -> Floats:
    return (m.now.dq**2).sum(axis=1)


def dof_acc(m: Moment) -> Floats:
    return (((m.now.dq - m.before.dq) / m.dt) ** 2).sum(axis=1)


def apart(error: Floats) -> Floats:
    """mean |error| over all but the first axis: how SkillBlender measures goals and rewards them."""
    found: Floats = np.abs(error.reshape(len(error), -1)).mean(axis=1)
    return found


def near(error: Floats, sharpness: float = 4.0) -> Floats:
    """exp(-s mean |error|), which all published goals have."""
    return np.exp(-sharpness * apart(error))


def toward(error: Floats) -> Floats:
    """0.6 exp(-2 e) + 0.4 exp(-8 e), e as in `near`: a goal that is felt from afar and still up close."""
    return 0.6 * near(error, 2.0) + 0.4 * near(error, 8.0)
