"""Skills, which are learned first, and tasks, for which skills are blended."""

from __future__ import annotations

from moesaic.errors import ConfigError, suggest
from moesaic.skills.tasks.button_press import ButtonPress
from moesaic.skills.tasks.far_reach import FarReach
from moesaic.skills.tasks.posture import Reach, Squat, Step
from moesaic.skills.tasks.task import Task
from moesaic.skills.tasks.things import BoxPush, FootballShoot, PackageLift
from moesaic.skills.tasks.walk import Walk

SKILLS: dict[str, type[Task]] = {"walk": Walk, "reach": Reach, "squat": Squat, "step": Step}
TASKS: dict[str, type[Task]] = {
    "far_reach": FarReach, "button_press": ButtonPress, "box_push": BoxPush, "package_lift": PackageLift,
    "football_shoot": FootballShoot,
}  # fmt: skip


def find(name: str) -> type[Task]:
    """A skill or a task by name. Raises ConfigError for an unknown one."""
    known = SKILLS | TASKS
    if name not in known:
        raise ConfigError(f"no skill or task {name}; {suggest(name, known)}")
    return known[name]
