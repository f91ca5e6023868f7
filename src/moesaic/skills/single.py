"""One body, as a Gymnasium `Env`: row 0 of a `SkillEnv` of one."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError
from moesaic.skills.environment import Singles, SkillEnv


class SingleEnv(gym.Env[Singles, Singles]):
    """A body at one skill or task; arguments as `SkillEnv` has them."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012

    def __init__(self, task: str = "walk", body: str = "mini_humanoid", **settings: Any) -> None:
        self.many, self._over = SkillEnv(task, body, 1, autoreset="next_step", **settings), True
        self.render_mode = self.many.render_mode
        self.observation_space = self.many.single_observation_space
        self.action_space = self.many.single_action_space
        self.metadata = {**self.metadata, "render_fps": round(1 / self.many.physics.dt)}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Singles, dict[str, Any]]:
        super().reset(seed=seed)
        observed, info = self.many.reset(seed=seed)
        self._over = False
        return observed[0], {name: held[0] for name, held in info.items()}

    def step(self, action: Singles) -> tuple[Singles, float, bool, bool, dict[str, Any]]:
        """One control step. Raises ConfigError before a reset, and once an episode is over."""
        if self._over:
            raise ConfigError("no episode is under way: reset() comes before step()")
        observed, reward, ended, late, info = self.many.step(np.asarray(action)[None])
        self._over = bool(ended[0] or late[0])
        told: dict[str, Any] = {"privileged": info["privileged"][0]}
        return observed[0], float(reward[0]), bool(ended[0]), bool(late[0]), told

    def render(self) -> NDArray[np.uint8] | None:
        return self.many.frame() if self.render_mode else None

    def close(self) -> None:
        self.many.close()
