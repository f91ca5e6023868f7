"""SkillBench: how well a policy does a skill or a task, and how it moves meanwhile.

Deterministic actions, no noise, no pushes, no randomised bodies. Accuracy is the error at the last step before another
goal is drawn or the episode ends, as published; survival, success and smoothness are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.skills.body import Body
from moesaic.skills.environment import SkillEnv

Floats = NDArray[np.float64]
SECONDS = {"walk": 24.0, "reach": 8.0, "squat": 8.0, "step": 8.0}
"""Of a rollout; 8 s for tasks (published: 2.5 s, in which a body as small as ours does not get there, and FarReach's
targets change every 5 s: half of them lie behind where it stands then)."""


@torch.no_grad()
def evaluate(
    act: Callable[[Tensor], Tensor], task: str, body: str | Body, *, rollouts: int = 128, seed: int = 10_000,
    seconds: float | None = None, watch: Callable[[SkillEnv, Tensor], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Figures of a policy, (N, o) to (N, d), over `rollouts` bodies at once.

    Returns:
        `errors`: by name, mean and standard deviation over rollouts of the last error before a goal changes (one that
        falls keeps its last). `success`: share of goals reached by bodies that stand. `survival`: share that never
        fell. Of steps before a fall: `velocity` mean |dq|, rad/s; `torque` mean |tau|, Nm; `energy` their product;
        `tilt` mean of |roll| and |pitch|, rad; `height` of the base, m; `jerk` mean squared change of actions; `jolt`
        mean change of the base's velocity in a step, m/s.
    """
    env = SkillEnv(task, body, rollouts, autoreset="same_step", randomise=0, seconds=seconds or SECONDS.get(task, 8.0))
    env.measuring = True
    observed, _ = env.reset(seed=seed)
    going, last = np.ones(rollouts, dtype=bool), dict[str, Floats]()
    fell, won = np.zeros((2, rollouts), dtype=bool)
    counted = np.zeros(rollouts)
    sums = {name: np.zeros(rollouts) for name in ("velocity", "torque", "roll", "pitch", "height", "jerk", "jolt")}
    errors: dict[str, list[Floats]] = {}
    reached: list[NDArray[np.bool_]] = []
    before, moving = np.zeros((rollouts, env.body.dim)), env.readings.velocity
    try:
        for step in range(1, env.steps + 1):
            seen = torch.from_numpy(observed)
            if watch is not None:
                watch(env, seen)
            action = act(seen).numpy()
            observed, _, fallen, _, _ = env.step(action)
            now = env.last
            parts = {
                "velocity": np.abs(now.dq).mean(axis=1), "torque": np.abs(now.torque).mean(axis=1),
                "roll": np.abs(now.euler[:, 0]), "pitch": np.abs(now.euler[:, 1]), "height": now.position[:, 2],
                "jerk": ((action - before) ** 2).mean(axis=1), "jolt": np.linalg.norm(now.velocity - moving, axis=1),
            }  # fmt: skip
            for name, part in parts.items():
                sums[name] += part * going
            counted += going
            before, moving = action, now.velocity
            last = {k: np.where(going & ~fallen, v, last.get(k, v)) for k, v in env.errors.items()}
            fell |= going & fallen
            won |= going & ~fallen & env.succeeded
            going &= ~(fallen | won)
            if step == env.steps or step % env.every == 0:
                for name, error in last.items():
                    errors.setdefault(name, []).append(error)
                reached.append(won | (going & (last[env.task.accuracy] < env.task.success)))
    finally:
        env.close()
    mean = {name: float(held.sum() / max(counted.sum(), 1)) for name, held in sums.items()}
    over = {name: np.mean(held, axis=0) for name, held in errors.items()}
    return {
        "task": task, "rollouts": rollouts, "seconds": env.seconds, "seed": seed, "leads": env.task.accuracy,
        "errors": {name: {"mean": float(held.mean()), "sd": float(held.std())} for name, held in over.items()},
        "success": float(np.mean(reached)), "survival": float(1 - fell.mean()),
        "velocity": mean["velocity"], "torque": mean["torque"], "energy": mean["velocity"] * mean["torque"],
        "roll": mean["roll"], "pitch": mean["pitch"], "tilt": (mean["roll"] + mean["pitch"]) / 2,
        "height": mean["height"], "jerk": mean["jerk"], "jolt": mean["jolt"],
    }  # fmt: skip
