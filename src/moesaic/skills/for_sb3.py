"""Stable-Baselines3 over these bodies, and with these policies.

env = VecSkillEnv(SkillEnv("far_reach", num_envs=256, autoreset="same_step"))
model = PPO(ActorPolicy, env, policy_kwargs={"folder": "runs/far-reach-per-joint-s0"})
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.vec_env import VecEnv

from moesaic.skills.environment import SkillEnv, resets_in_step
from moesaic.skills.saving import load_for, save
from moesaic.skills.skill import relies_on


class VecSkillEnv(VecEnv):
    """A `SkillEnv` of mode same_step as Stable-Baselines3 has its environments.

    `terminal_observation` and `TimeLimit.truncated` are in the info of those that ended.
    """

    def __init__(self, env: SkillEnv) -> None:
        self.env = resets_in_step(env, "Stable-Baselines3")
        self.actions: np.ndarray[Any, Any] | None = None
        seen: Any = copy(env.single_observation_space)
        seen.relies = relies_on(env.senses)  # a policy is made from spaces, and knows its body by them
        super().__init__(env.num_envs, seen, env.single_action_space)

    def reset(self) -> Any:
        seeds = [own for own in self._seeds if own is not None]
        observed, _ = self.env.reset(seed=self._seeds if seeds else None)
        self._reset_seeds()
        self._reset_options()
        return observed

    def step_async(self, actions: np.ndarray[Any, Any]) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        assert self.actions is not None, "step_async gives the actions"
        observed, reward, ended, late, info = self.env.step(self.actions)
        done = ended | late
        told: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for row in np.flatnonzero(done):
            told[row] = {"terminal_observation": info["final_obs"][row], "TimeLimit.truncated": bool(late[row])}
        return observed, reward.astype(np.float32), done, told

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [getattr(self.env, method_name)(*args, **kwargs)] * len(self._rows(indices))

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * len(self._rows(indices))

    def _rows(self, indices: Any) -> Sequence[int]:
        if indices is None:
            return range(self.num_envs)
        return [int(indices)] if np.ndim(indices) == 0 else indices

    def get_images(self) -> Sequence[np.ndarray[Any, Any] | None]:
        return self.env.render() or [None] * self.num_envs


class ActorPolicy(ActorCriticPolicy):
    """A policy whose actor is a skill or a blend that was saved; the critic begins anew, and sees what the actor sees.

    Args:
        folder: a run, or a policy that was saved.
    """

    def __init__(self, *args: Any, folder: str, critic_hidden: Sequence[int] = (128, 64), **kwargs: Any) -> None:
        self.folder, self.critic_hidden = str(folder), list(critic_hidden)
        kwargs |= {"net_arch": {"pi": [], "vf": self.critic_hidden}, "activation_fn": torch.nn.ELU}
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        seen: Any = self.observation_space
        actor = load_for(self.folder, getattr(seen, "relies", None), seen.shape[0], get_action_dim(self.action_space))
        self.action_net = actor
        self.log_std.data.copy_(torch.log(actor.std))
        learning = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = self.optimizer_class(learning, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def save_actor(self, folder: str, *, task: str) -> None:
        """Keep the actor as `moesaic skill` keeps them, with what it was trained for. Raises as `save` does."""
        actor: Any = self.action_net
        actor.std = self.log_std.detach().exp().cpu()
        save(actor, folder, trained={"task": task})

    def _get_constructor_parameters(self) -> dict[str, Any]:
        kept = super()._get_constructor_parameters()
        del kept["net_arch"], kept["activation_fn"]
        return {**kept, "folder": self.folder, "critic_hidden": self.critic_hidden}
