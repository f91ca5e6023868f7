"""PPO (Schulman et al. 2017) as SkillBlender's release has it: a learning rate that follows the KL divergence, a critic
that sees more than the actor, time-outs that are bootstrapped.

Simulation takes most of its time: what is here keeps out of its way (one pass of the actor a step, values afterwards).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moesaic.errors import ConfigError, TrainingError, suggest
from moesaic.runs.settings import build, check_within
from moesaic.skills.environment import SkillEnv
from moesaic.skills.policy import Policy

SLOWEST, FASTEST = 1e-5, 1e-2
"""Learning rates between which the divergence moves it."""


@dataclass
class PPOSettings:
    """Defaults learn a skill of MiniHumanoid in minutes; `PUBLISHED` are the release's."""

    steps: int = 16
    epochs: int = 4
    minibatches: int = 4
    gamma: float = 0.985
    lam: float = 0.9
    clip: float = 0.2
    clip_values: bool = False
    value_coef: float = 1.0
    entropy_coef: float = 0.001
    lr: float = 1e-3
    target_kl: float = 0.03
    max_norm: float = 1.0
    average: float = 0.9
    """Of the actor over rounds, which is what is kept: the share of it that stays in a round; 0 keeps the last one."""


PUBLISHED = PPOSettings(
    steps=60, epochs=2, minibatches=4, gamma=0.994, lam=0.9, clip_values=True, lr=1e-5, target_kl=0.01, average=0.0,
)  # fmt: skip


_WITHIN: dict[str, tuple[float, float]] = {
    "steps": (1, 100_000), "epochs": (1, 1000), "minibatches": (1, 100_000), "gamma": (0, 1), "lam": (0, 1),
    "clip": (1e-6, 1e6), "value_coef": (0, 1e6), "entropy_coef": (0, 1e6), "lr": (1e-12, 1), "target_kl": (1e-12, 1e6),
    "max_norm": (1e-12, 1e12), "average": (0, 0.999999),
}  # fmt: skip


def settings_of(given: Mapping[str, Any]) -> PPOSettings:
    """`ppo.…` as given. Raises ConfigError for an unknown one (naming the nearest), or one that cannot be."""
    known = {f.name for f in fields(PPOSettings)}
    if unknown := given.keys() - known:
        raise ConfigError(f"ppo.{min(unknown)}: no such setting; {suggest(min(unknown), known)}")
    try:
        made = build(PPOSettings, dict(given))
    except ConfigError as error:
        raise ConfigError(f"ppo.{error}") from None
    check_within(made, _WITHIN, "ppo.")
    return made


class PPO:
    """Trains a policy in an environment of mode same_step. `iterate` is one round: collect, then learn.

    Raises:
        ConfigError: a round has fewer than two samples, or fewer than minibatches.
    """

    def __init__(self, env: SkillEnv, policy: Policy, settings: PPOSettings, *, seed: int = 0) -> None:
        self.env, self.policy, self.settings = env, policy, settings
        samples = settings.steps * env.num_envs
        if samples < max(2, settings.minibatches):
            raise ConfigError(
                f"ppo.steps={settings.steps} of num_envs={env.num_envs} are {samples} samples a round, too few for "
                f"ppo.minibatches={settings.minibatches} or to learn from: more of either"
            )
        self.learning = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, lr=settings.lr, fused=True)
        self.generator = torch.Generator().manual_seed(seed)
        self.observed, info = env.reset(seed=seed)
        self.privileged = info["privileged"]
        self.taken = 0
        self.averaged = [p.detach().clone() for p in self._actor()]
        t, n = settings.steps, env.num_envs
        o, p, d = self.observed.shape[1], self.privileged.shape[1], env.body.dim
        self._obs, self._priv = torch.zeros(t, n, o), torch.zeros(t + 1, n, p)
        self._actions, self._means = torch.zeros(t, n, d), torch.zeros(t, n, d)
        self._rewards, self._done = torch.zeros(t, n), torch.zeros(t, n)
        self._late = torch.zeros(t, n, dtype=torch.bool)
        self._last = torch.zeros(t, n, p)

    def iterate(self) -> dict[str, float]:
        """One round; figures of it. Raises TrainingError where numbers stop being numbers."""
        figures = self.collect()
        figures |= self.learn()
        for held, p in zip(self.averaged, self._actor(), strict=True):
            held.lerp_(p.detach(), 1 - self.settings.average)
        return figures

    def _actor(self) -> list[Tensor]:
        return [p for p in self.policy.mean.parameters() if p.requires_grad]

    @torch.no_grad()
    def settle(self) -> None:
        """Make the actor what is to be kept of it: one that is not at the mercy of the last round."""
        for p, held in zip(self._actor(), self.averaged, strict=True):
            p.copy_(held)

    @torch.no_grad()
    def collect(self) -> dict[str, float]:
        """`steps` control steps of every environment."""
        env, terms, ended = self.env, dict[str, float](), 0
        std = self.policy.log_std.exp()
        n, t = env.num_envs, self.settings.steps
        noise = torch.randn(t, n, len(std), generator=self.generator) * std
        for step in range(t):
            obs = torch.from_numpy(self.observed)
            mean = self.policy.mean(obs)
            action = mean + noise[step]
            self._obs[step], self._priv[step] = obs, torch.from_numpy(self.privileged)
            self._means[step], self._actions[step] = mean, action
            self.observed, reward, fallen, late, info = env.step(action.numpy())
            self.privileged = info["privileged"]
            self._rewards[step] = torch.from_numpy(reward)
            self._done[step] = torch.from_numpy(fallen | late)
            self._late[step] = torch.from_numpy(late)
            if late.any():
                self._last[step] = torch.from_numpy(info["final_info"]["privileged"])
            ended += int(fallen.sum())
            for name, part in env.parts.items():
                terms[name] = terms.get(name, 0.0) + float(part.mean())
        self._priv[t] = torch.from_numpy(self.privileged)
        self.taken += t * n
        said = {f"reward/{name}": value / t for name, value in terms.items()}
        return {"reward": float(self._rewards.mean()), "falls": ended / (t * n), **said}

    def learn(self) -> dict[str, float]:
        """A few epochs over what was collected."""
        s, policy = self.settings, self.policy
        with torch.no_grad():
            values = policy.value(self._priv)
            rewards = self._rewards.clone()
            if self._late.any():
                rewards[self._late] += s.gamma * policy.value(self._last[self._late])
            advantages = gae(rewards, values, self._done, s.gamma, s.lam)
            old = policy.log_prob(self._actions, self._means).flatten()
            log_std = policy.log_std.detach().clone()
        returns = (advantages + values[:-1]).flatten()
        advantages = advantages.flatten()
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        obs, priv = self._obs.flatten(0, 1), self._priv[:-1].flatten(0, 1)
        actions, means, before = self._actions.flatten(0, 1), self._means.flatten(0, 1), values[:-1].flatten()
        sums = dict.fromkeys(("loss", "value_loss", "kl", "clipped"), 0.0)
        rounds = s.epochs * s.minibatches
        for _ in range(s.epochs):
            order = torch.randperm(len(obs), generator=self.generator)
            for rows in order.chunk(s.minibatches):
                mean = policy.mean(obs[rows])
                with torch.no_grad():
                    kl = divergence(means[rows], log_std, mean, policy.log_std)
                    self._follow(float(kl))
                ratio = torch.exp(policy.log_prob(actions[rows], mean) - old[rows])
                gain = advantages[rows]
                surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - s.clip, 1 + s.clip) * gain).mean()
                value, target = policy.value(priv[rows]), returns[rows]
                squared = (value - target) ** 2
                if s.clip_values:
                    near = before[rows] + (value - before[rows]).clamp(-s.clip, s.clip)
                    squared = torch.maximum(squared, (near - target) ** 2)
                value_loss = squared.mean()
                loss = s.value_coef * value_loss - surrogate - s.entropy_coef * policy.entropy()
                if not torch.isfinite(loss):
                    raise TrainingError(
                        "the loss is no number any more: a smaller ppo.lr, or look at what the body does"
                    )
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.learning, s.max_norm)
                self.optimizer.step()
                clipped = ((ratio.detach() - 1).abs() > s.clip).float().mean()
                for name, part in zip(sums, (loss.detach(), value_loss.detach(), kl, clipped), strict=True):
                    sums[name] += float(part) / rounds
        return {**sums, "lr": self.lr, "std": float(policy.log_std.detach().exp().mean())}

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """All that the next round depends on; `restore` takes it back."""
        arrays = {f"policy.{name}": held.numpy().copy() for name, held in self.policy.state_dict().items()}
        for number, own in self.optimizer.state_dict()["state"].items():
            arrays |= {f"optimizer.{number}.{name}": held.numpy().copy() for name, held in own.items()}
        arrays |= {f"env.{name}": held for name, held in self.env.state().items()}
        arrays |= {f"averaged.{number}": held.numpy().copy() for number, held in enumerate(self.averaged)}
        arrays |= {"observed": self.observed, "privileged": self.privileged}
        arrays["generator"] = self.generator.get_state().numpy()
        return arrays, {"taken": self.taken, "lr": self.lr, "diverged": self.env.diverged}

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        """Go on from `state`: the next round is what it would have been. Raises whatever damage makes."""
        parts: dict[str, dict[str, Any]] = {"policy": {}, "optimizer": {}, "env": {}, "averaged": {}}
        for name, held in arrays.items():
            part, dot, rest = name.partition(".")
            if dot:
                parts[part][rest] = held
        self.policy.load_state_dict({name: torch.from_numpy(held) for name, held in parts["policy"].items()})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, held in parts["optimizer"].items():
            number, _, moment = name.partition(".")
            moments.setdefault(int(number), {})[moment] = torch.from_numpy(held)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": [{**groups[0], "lr": values["lr"]}]})
        kept = parts["averaged"]
        self.averaged = [torch.from_numpy(kept[str(number)].copy()) for number in range(len(kept))]
        self.env.restore(parts["env"])
        self.env.diverged, self.taken = int(values["diverged"]), int(values["taken"])
        self.observed, self.privileged = arrays["observed"], arrays["privileged"]
        self.generator.set_state(torch.from_numpy(arrays["generator"]))

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _follow(self, kl: float) -> None:
        """Slower where the policy moved too far, faster where it hardly did."""
        target, lr = self.settings.target_kl, self.lr
        if kl > 2 * target:
            lr = max(SLOWEST, lr / 1.5)
        elif 0 < kl < target / 2:
            lr = min(FASTEST, lr * 1.5)
        self.optimizer.param_groups[0]["lr"] = lr


def gae(rewards: Tensor, values: Tensor, done: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages (T, N) of rewards (T, N), values (T + 1, N), done (T, N) (Schulman et al. 2016)."""
    found, last = torch.zeros_like(rewards), torch.zeros(rewards.shape[1])
    for t in range(len(rewards) - 1, -1, -1):
        going = 1 - done[t]
        last = rewards[t] + gamma * values[t + 1] * going - values[t] + gamma * lam * going * last
        found[t] = last
    return found


def divergence(mean: Tensor, log_std: Tensor, to_mean: Tensor, to_log_std: Tensor) -> Tensor:
    """KL of two Gaussians with diagonal covariances, averaged over rows: from means (N, d) to others."""
    ratio = torch.exp(2 * (log_std - to_log_std))
    moved = ((to_mean - mean) * torch.exp(-to_log_std)) ** 2
    return 0.5 * (ratio - 1 - torch.log(ratio) + moved).sum(dim=-1).mean()
