"""Gaussian policies over joint actions, with a critic of their own beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of these sizes with ELU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ELU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def quiet(net: nn.Sequential) -> None:
    """Let it begin with next to nothing: a body at rest, skills weighted alike."""
    for p in net[-1].parameters():
        p.mul_(0.01)


class Policy(nn.Module):
    """Normal(mean(observation), diag(std^2)): the standard deviations (d,) are free parameters, the same everywhere.

    Args:
        mean: a module, (N, o) to (N, d): a network, or skills that are blended.
        critic_dim: p, of the privileged observations that the critic values.
    """

    def __init__(
        self, mean: nn.Module, dim: int, critic_dim: int, critic_hidden: Sequence[int], init_std: float = 1.0
    ) -> None:
        super().__init__()
        self.mean = mean
        self.log_std = nn.Parameter(torch.full((dim,), math.log(init_std)))
        self.critic = mlp([critic_dim, *critic_hidden, 1])

    def log_prob(self, action: Tensor, mean: Tensor) -> Tensor:
        """(N,) of actions (N, d) around means (N, d)."""
        z = (action - mean) * torch.exp(-self.log_std)
        return -0.5 * (z * z).sum(dim=-1) - self.log_std.sum() - 0.5 * math.log(2 * math.pi) * action.shape[-1]

    def entropy(self) -> Tensor:
        """In nats, the same in every state."""
        return self.log_std.sum() + 0.5 * (1 + math.log(2 * math.pi)) * len(self.log_std)

    def value(self, privileged: Tensor) -> Tensor:
        """(N,)."""
        return self.critic(privileged).squeeze(-1)
