"""A policy as an ONNX file: `observation` (N, o) to `action` (N, d)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from torch import nn

from moesaic.errors import ConfigError, MissingDependency
from moesaic.runs.folder import writing
from moesaic.skills.skill import Skill
from moesaic.skills.skillblender import SkillBlender


def to_onnx(policy: Skill | SkillBlender, file: Path) -> None:
    """Write it, weights included.

    Raises:
        ConfigError: the name does not end in .onnx.
        MissingDependency: onnxscript is not installed.
    """
    if file.suffix != ".onnx":
        raise ConfigError(f"{file} must end in .onnx")
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingDependency("onnxscript", "skills") from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # what is not installed is not needed
    size = policy.command_dim + policy.shared_dim
    part = file.with_name(f".{file.name}.part")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.onnx.export(
            nn.Module.eval(policy), (torch.zeros(2, size),), part, dynamo=True, external_data=False, verbose=False,
            input_names=["observation"], output_names=["action"],
            dynamic_shapes=({0: torch.export.Dim("bodies")},),
        )  # fmt: skip
        _tell(policy, part)
        with writing(file):
            part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _tell(policy: Skill | SkillBlender, file: Path) -> None:
    """Put into the file what its numbers are: joints, gains, what an action is, and the parts of an observation."""
    import onnx

    made = onnx.load(file)
    told = {**policy.relies, "command": policy.command_dim}
    onnx.helper.set_model_props(made, {f"moesaic.{name}": json.dumps(value) for name, value in told.items()})
    onnx.save(made, file)
