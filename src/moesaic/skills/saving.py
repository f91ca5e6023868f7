"""Skills and blends in a folder: `policy.safetensors`, and `policy.json`, which says what they are and rely on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.errors import AdapterError, ConfigError, first_line, path_of
from moesaic.runs.folder import atomic_folder, read_json, write_json, writing
from moesaic.skills.skill import Skill, unlike
from moesaic.skills.skillblender import SkillBlender

WEIGHTS, MANIFEST, MODEL = "policy.safetensors", "policy.json", "model"
VERSION = 1


def save(policy: Skill | SkillBlender, folder: str | Path, trained: Mapping[str, Any]) -> None:
    """Write it, in place of a policy that is there; `trained` says how it came to be.

    Raises:
        ConfigError: the folder holds something else, or cannot be written; weights are no numbers, or `trained` is not
            what JSON holds.
    """
    from safetensors.torch import save_file

    final = path_of(folder)
    try:
        told = json.loads(json.dumps(dict(trained)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trained holds what JSON cannot: {first_line(error)}") from None
    if not all(torch.isfinite(held).all() for held in policy.state_dict().values()):
        raise ConfigError(f"this policy has weights that are no numbers; {folder} is left as it was")
    if final.is_dir() and any(final.iterdir()) and not (final / MANIFEST).is_file():
        raise ConfigError(f"{folder} holds files that are not a policy's; name another folder")
    with writing(final), atomic_folder(final) as place:
        save_file({name: held.contiguous() for name, held in policy.state_dict().items()}, place / WEIGHTS)
        (place / WEIGHTS).chmod(0o644)  # safetensors leaves its file readable by its owner alone
        kind = "skill" if isinstance(policy, Skill) else "blend"
        write_json(place / MANIFEST, {"format": VERSION, "is": kind, **policy.shapes(), "trained": told})


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
        unfinished = (path_of(folder) / "checkpoint").is_dir()
        more = "it is an unfinished run: the same command goes on" if unfinished else "`moesaic skill train` makes one"
        raise ConfigError(f"{folder or 'an empty path'} holds no policy: {more}")
    held = read_json(place / MANIFEST)
    if held.get("format") != VERSION:
        raise AdapterError(f"{folder} is of another version of moesaic")
    try:
        kinds: dict[str, Callable[..., Skill | SkillBlender]] = {"skill": Skill, "blend": SkillBlender.of}
        kind = kinds[held["is"]]
        skip = ("format", "is", "trained")
        made: Skill | SkillBlender = kind(**{name: value for name, value in held.items() if name not in skip})
        made.load_state_dict(load_file(place / WEIGHTS))
    except PermissionError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror}") from None
    except (LookupError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise AdapterError(f"{folder} is damaged: {first_line(error)}") from None
    if not all(torch.isfinite(held).all() for held in made.state_dict().values()):
        raise AdapterError(f"{folder} is damaged: it has weights that are no numbers")
    if relies is not None:
        check_body(made, relies, folder)
    return made.eval()


def check_body(policy: Skill | SkillBlender, relies: Mapping[str, Any], folder: str | Path) -> None:
    """Raise AdapterError unless the body at hand is the one that the policy in `folder` is for."""
    own, here = policy.relies["joints"], relies["joints"]
    if len(own) != len(here):
        raise AdapterError(
            f"the policy in {folder} is for another body: {len(own)} joints, and this one has {len(here)}"
        )
    if changed := unlike(policy.relies, relies):
        raise AdapterError(f"the policy in {folder} is for another body: {changed}")


def load_for(folder: str | Path, relies: Mapping[str, Any] | None, seen: int, moved: int) -> Skill | SkillBlender:
    """What `load` gives, for so many numbers seen and joints moved. Raises as it does, and ConfigError for others."""
    found = load(folder, relies)
    if (found.command_dim + found.shared_dim, found.dim) != (seen, moved):
        raise ConfigError(
            f"the policy in {folder} sees {found.command_dim + found.shared_dim} numbers and moves {found.dim} joints, "
            f"and here are {seen} and {moved}: it is for another task or body"
        )
    return found


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
