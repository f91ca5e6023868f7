"""Skills and blends in a folder: `policy.safetensors`, and `policy.json`, which says what they are and rely on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.errors import AdapterError, ConfigError, first_line, path_of
from moesaic.runs.folder import atomic_folder, read_json, write_json
from moesaic.runs.settings import differences
from moesaic.skills.skill import Skill
from moesaic.skills.skillblender import SkillBlender

WEIGHTS, MANIFEST, MODEL = "policy.safetensors", "policy.json", "model"
VERSION = 1


def save(policy: Skill | SkillBlender, folder: str | Path, trained: Mapping[str, Any]) -> None:
    """Write it, in place of what is there; `trained` says how it came to be."""
    from safetensors.torch import save_file

    with atomic_folder(path_of(folder)) as place:
        save_file({name: held.contiguous() for name, held in policy.state_dict().items()}, place / WEIGHTS)
        kind = "skill" if isinstance(policy, Skill) else "blend"
        write_json(place / MANIFEST, {"format": VERSION, "is": kind, **policy.shapes(), "trained": dict(trained)})


def load(folder: str | Path, relies: Mapping[str, Any] | None = None) -> Skill | SkillBlender:
    """What `save` wrote, or a run's model; `relies` is what the body at hand offers.

    Raises:
        AdapterError: it is damaged, of another version, or for another body.
        ConfigError: there is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place = model_of(folder)
    if not (place / MANIFEST).is_file():
        raise ConfigError(f"{folder} holds no policy: `moesaic skill train` makes one")
    held = read_json(place / MANIFEST)
    if held.get("format") != VERSION:
        raise AdapterError(f"{folder} is of another version of moesaic")
    try:
        kinds: dict[str, Callable[..., Skill | SkillBlender]] = {"skill": Skill, "blend": SkillBlender.of}
        kind = kinds[held["is"]]
        skip = ("format", "is", "trained")
        made: Skill | SkillBlender = kind(**{name: value for name, value in held.items() if name not in skip})
        made.load_state_dict(load_file(place / WEIGHTS))
    except (LookupError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise AdapterError(f"{folder} is damaged: {first_line(error)}") from None
    if not all(torch.isfinite(held).all() for held in made.state_dict().values()):
        raise AdapterError(f"{folder} is damaged: it has weights that are no numbers")
    if relies is not None:
        check_body(made, relies, folder)
    return made.eval()


def check_body(policy: Skill | SkillBlender, relies: Mapping[str, Any], folder: str | Path) -> None:
    """Raise AdapterError unless the body at hand is the one that the policy in `folder` is for."""
    if changed := differences(policy.relies, dict(relies)):
        raise AdapterError(f"the policy in {folder} is for another body: {changed}")


def load_skill(folder: str | Path, relies: Mapping[str, Any] | None = None) -> Skill:
    """A skill alone. Raises as `load` does, and ConfigError for a blend."""
    found = load(folder, relies)
    if not isinstance(found, Skill):
        raise ConfigError(f"{folder} holds a blend, and a skill is wanted")
    return found


def model_of(folder: str | Path) -> Path:
    """Where a run's policy lies; a folder that is one itself is taken as it is."""
    place = path_of(folder)
    return place / MODEL if (place / MODEL).is_dir() else place
