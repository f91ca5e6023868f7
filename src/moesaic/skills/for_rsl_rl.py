"""rsl-rl-lib (5.x) over these bodies, and with these policies.

env = RslEnv(SkillEnv("far_reach", num_envs=256, autoreset="same_step"))
runner = OnPolicyRunner(env, settings("runs/far-reach-per-joint-s0", env), log_dir)
"""

from __future__ import annotations

from typing import Any

import torch
from rsl_rl.env import VecEnv
from rsl_rl.models import MLPModel
from tensordict import TensorDict
from torch import Tensor

from moesaic.skills.environment import SkillEnv, resets_in_step
from moesaic.skills.ppo import PPOSettings
from moesaic.skills.saving import load_for
from moesaic.skills.skill import relies_on


class RslEnv(VecEnv):
    """A `SkillEnv` of mode same_step as rsl-rl has its environments: `policy` for the actor, `critic` beside it."""

    def __init__(self, env: SkillEnv, seed: int = 0) -> None:
        self.env, self.num_envs, self.num_actions = resets_in_step(env, "rsl-rl"), env.num_envs, env.body.dim
        self.max_episode_length, self.device = env.steps, "cpu"
        self.cfg = {"task": env.name}
        self.observed = self._told(*env.reset(seed=seed))

    @property
    def episode_length_buf(self) -> Tensor:
        return torch.from_numpy(self.env.taken)

    @episode_length_buf.setter
    def episode_length_buf(self, steps: Tensor) -> None:
        self.env.taken[:] = steps.numpy()

    def get_observations(self) -> TensorDict:
        return self.observed

    def step(self, actions: Tensor) -> tuple[TensorDict, Tensor, Tensor, dict[str, Any]]:
        observed, reward, ended, late, info = self.env.step(actions.numpy())
        self.observed = self._told(observed, info)
        done = torch.from_numpy(ended | late)
        return self.observed, torch.from_numpy(reward).float(), done.long(), {"time_outs": torch.from_numpy(late)}

    def _told(self, observed: Any, info: Any) -> TensorDict:
        held = {"policy": torch.from_numpy(observed), "critic": torch.from_numpy(info["privileged"])}
        return TensorDict(held, batch_size=[self.num_envs])


class ActorModel(MLPModel):
    """An actor that is a skill or a blend that was saved in `folder`; `relies` is what the body at hand offers."""

    def __init__(self, *args: Any, folder: str, relies: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.distribution is not None
        actor = load_for(folder, relies, self.obs_dim, len(self.distribution.std_param))
        self.mlp = actor
        self.distribution.std_param.data.copy_(actor.std)


def settings(folder: str, env: RslEnv, critic_hidden: tuple[int, ...] = (64, 64)) -> dict[str, Any]:
    """What an `OnPolicyRunner` wants to go on training a policy of ours in `env`, as PPO here does."""
    own = PPOSettings()
    return {
        "num_steps_per_env": own.steps, "save_interval": 50, "seed": 0,
        "obs_groups": {"actor": ["policy"], "critic": ["critic"]},
        "actor": {
            "class_name": ActorModel, "folder": str(folder), "relies": relies_on(env.env.senses),
            "distribution_cfg": {"class_name": "GaussianDistribution", "init_std": 0.6},
        },
        "critic": {"class_name": "MLPModel", "hidden_dims": list(critic_hidden), "activation": "elu"},
        "algorithm": {
            "class_name": "PPO", "num_learning_epochs": own.epochs, "num_mini_batches": own.minibatches,
            "learning_rate": own.lr, "schedule": "adaptive", "desired_kl": own.target_kl, "gamma": own.gamma,
            "lam": own.lam, "entropy_coef": own.entropy_coef, "value_loss_coef": own.value_coef,
            "use_clipped_value_loss": own.clip_values, "clip_param": own.clip, "max_grad_norm": own.max_norm,
        },
    }  # fmt: skip
