"""One control step of N environments, as rewards see it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesaic.skills.body import Body
from moesaic.skills.physics import Readings

Floats = NDArray[np.float64]
PERIOD = 0.64
"""Seconds of two steps of a walk."""
TOUCHES = 5.0
"""A foot that is pressed with more, N, stands."""


@dataclass
class Moment:
    """What rewards are made of. All arrays lead with N.

    Attributes:
        now, before: readings after this step and after the one before.
        action, action_before, action_earlier: (N, d) of this step and the two before.
        goal: (N, g) what the task asks for, as it draws it.
        phase: (N,) sine of the gait's clock.
        standing: (N, 2) feet on the ground; `air` (N, 2) seconds since each left it, `landed` (N, 2) it came down now.
    """

    body: Body
    dt: float
    weight: float
    now: Readings
    before: Readings
    action: Floats
    action_before: Floats
    action_earlier: Floats
    goal: Floats
    phase: Floats
    standing: NDArray[np.bool_]
    air: Floats
    landed: NDArray[np.bool_]

    def offsets(self) -> Floats:
        """(N, d): how far joints are from the default pose, rad."""
        return self.now.q - np.array(self.body.default)


def swing(phase: Floats) -> Floats:
    """(N, 2): how far along its swing each foot is, 0 for one that should stand, up to 1."""
    return np.stack([np.maximum(-phase, 0), np.maximum(phase, 0)], axis=1) * (np.abs(phase) >= 0.1)[:, None]
