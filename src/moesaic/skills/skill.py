"""A skill: an actor, and what it relies on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.runs.settings import differences
from moesaic.skills.policy import mlp, quiet

if TYPE_CHECKING:
    from moesaic.skills.observing import Senses


class Skill(nn.Module):
    """An actor: (N, c + s), a command and what all skills of a body see, to actions (N, d).

    Args:
        name: walk, reach …
        relies: the body's contract and `sees`, the names and sizes of what stands behind the command.
        bounds: within which its commands are to be, least and most.
    """

    std: Tensor

    def __init__(
        self, name: str, relies: dict[str, Any], command_dim: int, shared_dim: int, dim: int, hidden: Sequence[int],
        bounds: Sequence[float] = (-1.0, 1.0),
    ) -> None:  # fmt: skip
        super().__init__()
        if len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise ConfigError(f"the bounds of {name} are {list(bounds)}, and must be a least and a larger most")
        check_sizes(name, hidden, command_dim, shared_dim, dim)
        joints = relies.get("joints") if isinstance(relies, dict) else None
        if not isinstance(joints, list) or len(joints) != dim or not all(isinstance(own, str) for own in joints):
            raise ConfigError(f"what {name} relies on must name its {dim} joints: relies_on(env.senses)")
        self.name, self.relies, self.bounds = name, relies, [float(b) for b in bounds]
        self.command_dim, self.shared_dim, self.dim, self.hidden = command_dim, shared_dim, dim, list(hidden)
        self.net = mlp([command_dim + shared_dim, *hidden, dim])
        self.register_buffer("std", torch.ones(dim))
        quiet(self.net)

    def forward(self, observed: Tensor) -> Tensor:
        found: Tensor = self.net(observed)
        return found

    def check_alike(self, other: Skill) -> None:
        """Raise ConfigError unless another skill moves the same body and sees the same."""
        if changed := unlike(self.relies, other.relies):
            raise ConfigError(f"the skills {self.name} and {other.name} do not go together: {changed}")
        if self.shared_dim != other.shared_dim:
            raise ConfigError(f"{self.name} sees {self.shared_dim} numbers and {other.name} {other.shared_dim}")

    def shapes(self) -> dict[str, Any]:
        """What it is made with."""
        return {name: getattr(self, name) for name in _SHAPES}


def check_sizes(name: str, hidden: Sequence[int], *sizes: int) -> None:
    """Raise ConfigError unless all sizes of a network are whole numbers above 0."""
    given = [*sizes, *hidden] if isinstance(hidden, Sequence) else [hidden]
    if not isinstance(hidden, Sequence) or not all(type(own) is int and own > 0 for own in given):
        raise ConfigError(f"the sizes of {name} must be whole numbers above 0, hidden=[64, 64]; they are {given}")


def unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What differs in what two policies rely on, empty for nothing; one that was kept without `dt` says none."""
    unsaid = {"dt"} - (one.keys() & other.keys())
    before, now = ({name: held for name, held in own.items() if name not in unsaid} for own in (one, other))
    return differences(before, now)


def relies_on(senses: Senses) -> dict[str, Any]:
    """What a policy relies on: the body's servos, and what is seen behind a command."""
    return {**senses.body.contract(), "sees": senses.names()}


_SHAPES = ("name", "relies", "command_dim", "shared_dim", "dim", "hidden", "bounds")
