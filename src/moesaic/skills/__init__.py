"""Control policies as experts: skills of a body, blended joint by joint.

Importing it makes Gymnasium know `moesaic/MiniHumanoid-Walk-v0` and the others, one by one or as a vector.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

_HOMES = {
    "SkillEnv": "moesaic.skills.environment",
    "SkillBlender": "moesaic.skills.skillblender",
    "Skill": "moesaic.skills.skill",
    "load": "moesaic.skills.saving",
    "save": "moesaic.skills.saving",
    "load_body": "moesaic.skills.body",
}
__all__ = ["Skill", "SkillBlender", "SkillEnv", "load", "load_body", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moesaic.skills.simulator import needed

    needed()
    return getattr(import_module(_HOMES[name]), name)


def _register() -> None:
    import gymnasium

    from moesaic.skills.body import built_in
    from moesaic.skills.tasks import SKILLS, TASKS

    for body in built_in():
        for task in (*SKILLS, *TASKS):
            body_name, name = ("".join(part.title() for part in text.split("_")) for text in (body, task))
            gymnasium.register(
                f"moesaic/{body_name}-{name}-v0", entry_point="moesaic.skills.single:SingleEnv",
                vector_entry_point="moesaic.skills.environment:SkillEnv", kwargs={"task": task, "body": body},
            )  # fmt: skip


if find_spec("gymnasium") is not None:
    _register()
