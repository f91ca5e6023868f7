"""SkillBlender (Kuang et al., arXiv 2506.09366): frozen skills, blended joint by joint.

    y   = MLP(o)                                     o = task command | what all skills see
    g_i = clamp(y_i, low_i, high_i)                  a command for each of K skills
    W   = softmax over skills of Z (K, d)            a weight for each skill and joint
    mu  = sum over skills of W_i * pi_i(g_i | shared)        (d,)

Skills are frozen, and yet between the head and the loss: its commands learn through them. Exploration is noise on the
blended action, not on commands or weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.routing.gates import Routing, Softmax
from moesaic.routing.losses import Record
from moesaic.routing.router import Site
from moesaic.skills.names import KINDS
from moesaic.skills.policy import mlp, quiet
from moesaic.skills.skill import Skill, check_sizes


class SkillBlender(nn.Module):
    """Actions (N, d) of observations (N, o) of a task, by skills that stay as they are.

    Args:
        skills: K of them, for one body and one layout of what they see.
        command_dim: c, the numbers with which the task's own observation begins.
        kind: per_joint as above; scalar: one weight a skill; switch: the skill with the largest alone (its gradient is
            the softmax's); mcp: Gaussians multiplied (Peng et al., NeurIPS 2019), with a gate in (0, 1) for each skill.

    Raises:
        ConfigError: the skills are of different bodies, see different things, come twice or have no deviation; the kind
            is unknown, or a size none.
    """

    bounds: Tensor
    precision: Tensor
    std: Tensor

    def __init__(
        self, skills: Sequence[Skill], command_dim: int, hidden: Sequence[int], kind: str = "per_joint"
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"kind={kind}; known: {', '.join(KINDS)}")
        if not skills or not all(isinstance(skill, Skill) for skill in skills):
            raise ConfigError("a blend is of skills, one at least")
        if len({id(skill) for skill in skills}) < len(skills):
            raise ConfigError("a blend has each skill once")
        for skill in skills:
            if not ((skill.std > 0) & (skill.std**-2).isfinite()).all():
                raise ConfigError(f"{skill.name} has a deviation that is not above 0, and a blend may weigh by it")
        check_sizes("a blend", hidden, command_dim)
        first = skills[0]
        for skill in skills[1:]:
            first.check_alike(skill)
        self.kind, self.command_dim, self.dim, self.hidden = kind, command_dim, first.dim, list(hidden)
        self.relies, self.shared_dim = first.relies, first.shared_dim
        self.register_buffer("std", torch.ones(first.dim))
        self.skills = nn.ModuleList(skills).requires_grad_(False)
        self.sizes = [skill.command_dim for skill in skills]
        self.gate = Softmax()
        per = self.dim if kind == "per_joint" else 1
        self.head = mlp([command_dim + first.shared_dim, *hidden, sum(self.sizes) + len(skills) * per])
        quiet(self.head)
        bounds = [skill.bounds for skill in skills for _ in range(skill.command_dim)]
        self.register_buffer("bounds", torch.tensor(bounds).t().contiguous())
        self.register_buffer("precision", torch.stack([skill.std**-2 for skill in skills]))

    @classmethod
    def of(cls, skills: Sequence[dict[str, Any]], **shapes: Any) -> SkillBlender:
        """From what `shapes` gives, with weights to be loaded."""
        return cls([Skill(**own) for own in skills], **shapes)

    def shapes(self) -> dict[str, Any]:
        """What it is made with."""
        named = ("command_dim", "hidden", "kind")
        skills: list[Any] = [*self.skills]
        return {"skills": [skill.shapes() for skill in skills], **{name: getattr(self, name) for name in named}}

    def asked(self, observed: Tensor) -> tuple[list[Tensor], Routing]:
        """A command (N, c_i) for each skill, and weights (N, d, K), or (N, 1, K) where joints share them."""
        y = self.head(observed)
        commands, logits = y.split([sum(self.sizes), y.shape[-1] - sum(self.sizes)], dim=-1)
        commands = commands.clamp(*self.bounds)
        routing = self.gate(logits.unflatten(-1, (len(self.sizes), -1)).transpose(-1, -2))
        return list(commands.split(self.sizes, dim=-1)), routing

    def actions(self, observed: Tensor, commands: Sequence[Tensor]) -> Tensor:
        """What each skill would do, (N, d, K)."""
        shared = observed[..., self.command_dim :]
        return torch.stack([s(torch.cat([g, shared], -1)) for s, g in zip(self.skills, commands, strict=True)], dim=-1)

    def forward(self, observed: Tensor) -> Tensor:
        commands, routing = self.asked(observed)
        done = self.actions(observed, commands)
        return (self.weights(routing) * done).sum(dim=-1)

    def weights(self, routing: Routing) -> Tensor:
        """By which actions are added up, (N, d or 1, K), 1 in sum."""
        if self.kind == "switch":
            hard = nn.functional.one_hot(routing.weights.argmax(dim=-1), len(self.sizes)).to(routing.weights)
            return hard + routing.weights - routing.weights.detach()
        if self.kind == "mcp":
            gated = torch.sigmoid(routing.logits) * self.precision.t()
            return gated / gated.sum(dim=-1, keepdim=True)
        return routing.weights

    @torch.no_grad()
    def records(self, observed: Tensor, joints: Sequence[str]) -> list[Record]:
        """What the router did, a record a joint, for a `RoutingTrace`."""
        _, routing = self.asked(observed)
        weights = self.weights(routing).expand(-1, self.dim, -1)
        return [
            Record(Site(name, observed.shape[-1], self.dim, number, self.dim), Routing(own, own, own.log()))
            for number, (name, own) in enumerate(zip(joints, weights.unbind(dim=1), strict=True))
        ]
