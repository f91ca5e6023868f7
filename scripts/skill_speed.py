"""What a control step costs: results/skill-speed.json. `python scripts/skill_speed.py [rounds=3]`, idle machine.

Arms take turns within a round, each in a process of its own. Control steps of all environments together, by CPU second
and by second; a step of training counts what is learned from it, too. EnvPool takes part where it is installed (0.8.4
was, beside gym 0.26; the wheel of 1.2.5 lacked files of its own).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "skill-speed.json"
TASK, ID = "walk", "moesaic/MiniHumanoid-Walk-v0"
FEW = 8
"""Environments of those that step one after another."""
CPU = 12.0
"""CPU seconds of an arm, at least."""


def env_of(num_envs: int, **settings: Any) -> Any:
    from moesaic.skills.environment import SkillEnv

    env = SkillEnv(settings.pop("task", TASK), num_envs=num_envs, autoreset="same_step", **settings)
    env.reset(seed=0)
    return env


def actions(num_envs: int, dim: int = 10) -> list[Any]:
    chance = np.random.default_rng(0)
    return [(0.2 * chance.standard_normal((num_envs, dim))).astype(np.float32) for _ in range(64)]


def stepping(env: Any, step: Callable[[Any], Any], num_envs: int) -> Callable[[], int]:
    drawn = actions(num_envs)

    def some() -> int:
        for action in drawn[:16]:
            step(action)
        return 16 * num_envs

    return some


def bare(num_envs: int = 256, threads: int = 0) -> Callable[[], int]:
    """MuJoCo's own batched stepping, from states that our environment is in."""
    env = env_of(num_envs, randomise=0, threads=threads)
    states = env.physics._state.copy()
    drawn = actions(num_envs)

    def some() -> int:
        env.physics._state[:] = states
        for action in drawn[:16]:
            env.physics.step(env._default + env.body.action_scale * action)
        return 16 * num_envs

    return some


def ours(num_envs: int = 256, threads: int = 0, randomise: float = 0.0) -> Callable[[], int]:
    env = env_of(num_envs, randomise=randomise, threads=threads)
    return stepping(env, env.step, num_envs)


def one_body(plain: bool) -> Any:
    """One body an environment: ours, or one written by hand for Gymnasium that senses less and rewards speed alone."""
    import gymnasium as gym
    import mujoco

    import moesaic.skills  # noqa: F401
    from moesaic.skills.body import load_body

    if not plain:
        return gym.make(ID, randomise=0)
    body = load_body("mini_humanoid")

    class Plain(gym.Env[Any, Any]):
        def __init__(self) -> None:
            self.model = body.model()
            self.data = mujoco.MjData(self.model)
            self.rest = np.array(body.default)
            self.size = self.model.nq + self.model.nv - 1
            self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self.size,), np.float32)
            self.action_space = gym.spaces.Box(-1, 1, (self.model.nu,), np.float32)

        def look(self) -> Any:
            return np.concatenate([self.data.qpos[1:], self.data.qvel], dtype=np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            super().reset(seed=seed)
            mujoco.mj_resetData(self.model, self.data)
            self.data.qpos[3 : 3 + len(self.rest)] = self.rest
            return self.look(), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            self.data.ctrl[:] = self.rest + body.action_scale * action
            mujoco.mj_step(self.model, self.data, nstep=body.decimation)
            reward = float(self.data.qvel[0]) - 1e-3 * float(np.square(action).sum())
            return self.look(), reward, bool(self.data.qpos[1] + body.base_height < body.falls_below), False, {}

    return gym.wrappers.TimeLimit(Plain(), 1000)


def vector(kind: str, plain: bool = True) -> Callable[[], int]:
    import gymnasium as gym

    makers = [partial(one_body, plain)] * FEW
    env = {"sync": gym.vector.SyncVectorEnv, "async": gym.vector.AsyncVectorEnv}[kind](makers)
    env.reset(seed=0)
    return stepping(env, env.step, FEW)


def envpool() -> Callable[[], int]:
    """Another body, as EnvPool takes no MJCF: a planar walker of 6 actuators, with four physics steps an action."""
    import envpool as pool

    env = pool.make_gymnasium("Walker2d-v4", num_envs=256, num_threads=1)
    env.reset()
    drawn = [action[:, :6].astype(float) for action in actions(256)]

    def some() -> int:
        for action in drawn[:16]:
            env.step(action)
        return 16 * 256

    return some


def sb3(over: str, steps: int) -> Callable[[], int]:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    from moesaic.skills.for_sb3 import VecSkillEnv

    if over == "dummy":
        env: Any = DummyVecEnv([partial(one_body, True)] * FEW)
    else:
        env = VecSkillEnv(env_of(256, randomise=0))
    model = PPO(
        "MlpPolicy", env, n_steps=steps, batch_size=steps * env.num_envs // 4, n_epochs=4, device="cpu",
        policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [64, 64]}},
    )  # fmt: skip

    def some() -> int:
        model.learn(steps * env.num_envs, reset_num_timesteps=False)
        return steps * int(env.num_envs)

    return some


def ppo(blends: bool) -> Callable[[], int]:
    import torch

    from moesaic.skills.policy import Policy
    from moesaic.skills.ppo import PPO, PPOSettings
    from moesaic.skills.skill import Skill, relies_on
    from moesaic.skills.skillblender import SkillBlender

    env = env_of(256, randomise=0, task="far_reach" if blends else TASK)
    relies, dim, shared = relies_on(env.senses), env.body.dim, env.senses.shared_dim
    if blends:
        skills = [
            Skill("walk", relies, 1, shared, dim, [64, 64], (-0.8, 2.0)),
            Skill("reach", relies, 4, shared, dim, [64, 64]),
        ]
        actor: Any = SkillBlender(skills, env.senses.command_dim, [128, 64])
    else:
        actor = Skill(TASK, relies, env.senses.command_dim, shared, dim, [64, 64])
    torch.manual_seed(0)
    privileged = env.reset(seed=0)[1]["privileged"].shape[1]
    made = PPO(env, Policy(actor, dim, privileged, [64, 64]), PPOSettings())

    def some() -> int:
        made.iterate()
        return made.settings.steps * 256

    return some


ARMS: dict[str, tuple[Callable[..., Callable[[], int]], dict[str, Any]]] = {
    "bare rollout": (bare, {}),
    "bare rollout, 2 threads": (bare, {"threads": 2}),
    "ours": (ours, {}),
    "ours, randomised": (ours, {"randomise": 1.0}),
    "ours, 2 threads": (ours, {"threads": 2}),
    "SyncVectorEnv, a plain environment": (vector, {"kind": "sync"}),
    "AsyncVectorEnv, a plain environment": (vector, {"kind": "async"}),
    "SyncVectorEnv, our environment": (vector, {"kind": "sync", "plain": False}),
    "SB3 PPO, DummyVecEnv, a plain environment": (sb3, {"over": "dummy", "steps": 512}),
    "SB3 PPO, our VecEnv": (sb3, {"over": "ours", "steps": 16}),
    "our PPO, flat": (ppo, {"blends": False}),
    "our PPO, blend": (ppo, {"blends": True}),
    **({"EnvPool, Walker2d-v4": (envpool, {})} if find_spec("envpool") else {}),
    **{f"ours, {n} environments": (ours, {"num_envs": n}) for n in (1, 16, 64, 1024)},
}


def measure(arm: str) -> dict[str, float]:
    """Control steps a CPU second (children included) and a second."""
    import torch

    torch.set_num_threads(1)
    make, settings = ARMS[arm]
    some = make(**settings)
    some()
    began, count = clock(), 0
    while clock()[0] - began[0] < CPU or count == 0:
        count += some()
        if clock()[1] - began[1] > 4 * CPU:
            break
    used, passed = (now - before for now, before in zip(clock(), began, strict=True))
    return {"per_cpu_second": count / used, "per_second": count / passed}


def clock() -> tuple[float, float]:
    """CPU seconds of this process and those of its children that live, and seconds."""
    import psutil

    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(t.user + t.system for t in times), time.perf_counter()


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    given = dict(text.split("=", 1) for text in sys.argv[1:])
    if given.keys() - {"rounds"}:
        sys.exit(__doc__)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for number in range(int(given.get("rounds", 3))):
        for arm in ARMS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found[arm].append(pool.submit(measure, arm).result())
            print(f"round {number + 1}, {arm}: {found[arm][-1]['per_cpu_second']:,.0f} a CPU second", flush=True)
    from moesaic.runs.results import command_line, versions

    names = ("per_cpu_second", "per_second")
    OUT.write_text(json.dumps({
        "arms": {
            arm: {k: {"mean": statistics.mean(v), "all": v} for k in names if (v := [round(f[k], 1) for f in all_])}
            for arm, all_ in found.items()
        },
        "command": command_line(), "versions": versions(("mujoco", "gymnasium", "stable-baselines3", "torch")),
    }, indent=2) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
