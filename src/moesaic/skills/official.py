"""Skills out of SkillBlender's own checkpoints (rsl_rl 1.0.2: `model_state_dict`), by their shapes.

They see the published layout, which ends with roll, pitch and yaw, and were trained in another simulator: they can be
saved, blended with each other and exported, and `SkillEnv`, which shows more, refuses them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import AdapterError, ConfigError, first_line, suggest
from moesaic.skills.body import Body
from moesaic.skills.skill import Skill

COMMANDS = {"walk": (3, (-2.0, 2.0)), "reach": (14, (-1.0, 1.0)), "squat": (1, (-1.0, 1.0)), "step": (4, (-1.0, 1.0))}
"""Of each published skill: numbers of its command, and within what they are clamped (H1; 1 for G1's walk)."""
_LAYER = re.compile(r"actor\.(\d+)\.(weight|bias)")


def published_layout(dim: int) -> list[str]:
    """What stands behind a command there: 3 d + 6 numbers."""
    return [f"q:{dim}", f"dq:{dim}", f"action:{dim}", "spin:3", "euler:3"]


def import_official(file: str | Path, name: str, body: Body) -> Skill:
    """A skill from a checkpoint, for a body with as many joints.

    Raises:
        ConfigError: the skill has no published command.
        AdapterError: the file is damaged, holds no such actor, or one that is no numbers, or its shapes are not that
            skill's of this body.
    """
    if name not in COMMANDS:
        raise ConfigError(f"{name} is no published skill; {suggest(name, COMMANDS)}")
    state = _loaded(Path(file))
    layers = _actor(Path(file), state)
    sizes = [layers[0][0].shape[1], *(weight.shape[0] for weight, _ in layers)]
    for (weight, bias), before, after in zip(layers, sizes, sizes[1:], strict=False):
        if weight.shape != (after, before) or bias.shape != (after,):
            raise AdapterError(f"{file}: a layer is {tuple(weight.shape)} behind one of {before}")
    command_dim, bounds = COMMANDS[name]
    shared, dim = 3 * body.dim + 6, body.dim
    if sizes[-1] != dim:
        raise AdapterError(f"{file} moves {sizes[-1]} joints, and the body has {dim}")
    if sizes[0] != command_dim + shared:
        raise AdapterError(
            f"{file} sees {sizes[0]} numbers, and {name} of a body with {dim} joints {command_dim + shared}: "
            f"a command of {command_dim}, 3 x {dim} of its joints, spin and euler"
        )
    relies: dict[str, Any] = {**body.contract(), "sees": published_layout(dim)}
    made = Skill(name, relies, command_dim, shared, dim, sizes[1:-1], bounds)
    held = {
        f"net.{2 * i}.{part}": t
        for i, layer in enumerate(layers)
        for part, t in zip(("weight", "bias"), layer, strict=True)
    }
    std = state.get("std", torch.ones(dim))
    if not _usable(std) or std.shape != (dim,) or not (std > 0).all():
        raise AdapterError(f"{file}: std must be {dim} numbers above 0")
    made.load_state_dict({**held, "std": std})
    return made.eval()


def _actor(file: Path, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of the actor's layers, in order."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, held in state.items():
        if match := _LAYER.fullmatch(name):
            if not _usable(held):
                raise AdapterError(f"{file}: {name} is not dense, real and finite")
            found.setdefault(int(match[1]), {})[match[2]] = held.float()
    if not found or not all({"weight", "bias"} == own.keys() and own["weight"].dim() == 2 for own in found.values()):
        raise AdapterError(f"{file} holds no actor of linear layers: actor.0.weight, actor.0.bias …")
    return [(found[number]["weight"], found[number]["bias"]) for number in sorted(found)]


def _usable(held: Tensor) -> bool:
    return held.layout == torch.strided and held.is_floating_point() and bool(held.isfinite().all())


def _loaded(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ConfigError(f"there is no file {file}")
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise AdapterError(f"{file} is no checkpoint of tensors alone: it is damaged, or may run code") from None
    except Exception as error:  # whatever a damaged file makes
        raise AdapterError(f"{file} is no checkpoint of tensors alone: {first_line(error)}") from None
    state = held.get("model_state_dict") if isinstance(held, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(own, Tensor) for name, own in state.items()
    ):
        raise AdapterError(f"{file} holds no model_state_dict of tensors by name")
    return state
