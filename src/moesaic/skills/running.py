"""Runs that train a policy, as people write them and as they lie on disk.

settings.json  checkpoint/  metrics.jsonl  model/ (a skill, or a blend with its skills)  results.json (last: finished)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, path_of, suggest
from moesaic.runs.recipe import PACKAGED
from moesaic.runs.settings import build, check_keys, check_within, lists, names, parse_overrides, read_yaml, texts
from moesaic.skills.body import built_in
from moesaic.skills.names import KINDS, SKILLS, TASKS

_PPO = {"help": "settings of PPO: ppo.lr=3e-4 ppo.steps=60 …"}

_SEEDS = (0, 2**63 - 10**6)
_WITHIN: dict[str, tuple[float, float]] = {
    "steps": (1, 10**12), "num_envs": (1, 10**6), "seed": _SEEDS, "threads": (0, 1024), "every": (1, 10**9),
    "init_std": (1e-6, 100), "randomise": (0, 1),
}  # fmt: skip


@dataclass
class SkillRun:
    """One policy for one skill or task. `out`, `overwrite`, `every` and `threads` say where and how."""

    task: str = field(default="", metadata={"help": f"{', '.join(SKILLS)}, or a task: {', '.join(TASKS)}"})
    skills: list[str] = field(
        default_factory=list, metadata={"help": "of a blend: folders of skills, comma-separated, runs or their model/"}
    )
    kind: str = field(default="per_joint", metadata={"help": f"of a blend: {', '.join(KINDS)}"})
    body: str = field(default="mini_humanoid", metadata={"help": "mini_humanoid, humanoid, or a manifest's path"})
    steps: int = field(
        default=2_400_000,
        metadata={"help": "control steps of all environments, in whole rounds"},
    )
    num_envs: int = field(default=256, metadata={"help": "environments at a time"})
    hidden: list[int] = field(default_factory=lambda: [64, 64], metadata={"help": "of the actor, or a blend's head"})
    critic_hidden: list[int] = field(default_factory=lambda: [64, 64], metadata={"help": "of the critic"})
    init_std: float = field(default=1.0, metadata={"help": "of exploration, in units of actions"})
    randomise: float = field(
        default=0.3,
        metadata={"help": "friction, mass, pushes, delays, noise: 0 none, 1 as much as published"},
    )
    ppo: dict[str, Any] = field(default_factory=dict, metadata=_PPO)
    seed: int = field(default=0, metadata={"help": "of weights, exploration and environments"})
    threads: int = field(default=0, metadata={"help": "of the simulator; 0 steps on the caller's"})
    every: int = field(default=50, metadata={"help": "rounds between checkpoints"})
    out: str = field(default="", metadata={"help": "run folder; runs/<task>-<kind>-s<seed> where left out"})
    overwrite: bool = field(default=False, metadata={"help": "replace a run that is there"})

    @property
    def blends(self) -> bool:
        return bool(self.skills)

    def folder(self) -> Path:
        if self.out:
            return path_of(self.out)
        body = "" if self.body == SkillRun.body else f"{Path(self.body).stem}-"
        kind = self.kind if self.blends else "flat"
        return Path("runs") / f"{body}{self.task}-{kind}-s{self.seed}".replace("_", "-")

    def describes(self) -> dict[str, Any]:
        """What makes two runs the same one: more steps only make it longer."""
        return {k: v for k, v in asdict(self).items() if k not in ("out", "overwrite", "every", "threads", "steps")}


def recipe(body: str, task: str) -> dict[str, Any]:
    """The settings that suit a built-in body and a task: `recipes/skills/BODY/TASK.yaml`."""
    file = PACKAGED / "skills" / body / f"{task}.yaml"
    return read_yaml(file) if body in built_in() and file.is_file() else {}


def load_run(arguments: Sequence[str], *, blends: bool) -> SkillRun:
    """`key=value` settings on top of a recipe. Raises ConfigError for an unknown key (naming the nearest) or value."""
    if arguments and "=" not in arguments[0]:
        arguments = [f"task={arguments[0]}", *arguments[1:]]
    given = parse_overrides(arguments, lists=lists(SkillRun), texts=texts(SkillRun), sections=("ppo",))
    check_keys("settings", given, names(SkillRun))
    if empty := [key for key, value in given.items() if value is None]:
        raise ConfigError(f"{empty[0]} is empty: leave it out")
    task, body = given.get("task", ""), given.get("body", SkillRun.body)
    if not task:
        raise ConfigError("task is missing: task=walk")
    if task not in (*SKILLS, *TASKS):
        raise ConfigError(f"no skill or task {task}; {suggest(task, (*SKILLS, *TASKS))}")
    made = build(SkillRun, recipe(body, task), given)
    made.skills = [folder for folder in made.skills if folder]
    if blends and not made.skills:
        from moesaic.skills.tasks import find

        wanted = ",".join(f"runs/{name}-flat-s0" for name in find(made.task).skills or ("walk",))
        raise ConfigError(f"skills is missing, the folders of those that are blended: skills={wanted}")
    if made.skills and not blends:
        raise ConfigError("skill train learns from nothing; `moesaic skill blend` takes skills")
    if made.kind not in KINDS:
        raise ConfigError(f"kind={made.kind}; {suggest(made.kind, KINDS)}")
    if not blends and "kind" in given:
        raise ConfigError("kind is a blend's: `moesaic skill blend` takes it")
    check_within(made, _WITHIN)
    if min([*made.hidden, *made.critic_hidden, 1]) < 1:
        raise ConfigError("the sizes of layers must be above 0")
    return made


@dataclass
class Look:
    """What is done with runs that are there."""

    folders: list[str] = field(default_factory=list, metadata={"help": "runs, one after another"})
    task: str = field(default="", metadata={"help": "another task than the run's own"})
    rollouts: int = field(default=128, metadata={"help": "eval: bodies at once"})
    seconds: float = field(default=0.0, metadata={"help": "of a rollout; 0 for the task's own"})
    seed: int = field(default=10_000, metadata={"help": "of goals and of where bodies begin"})
    stick: bool = field(default=False, metadata={"help": "play: lines in place of OpenGL"})
    out: str = field(
        default="", metadata={"help": "eval: a page of several; play: film.gif or .mp4; export: policy.onnx"}
    )


TAKES = {
    "eval": {"folders", "task", "rollouts", "seconds", "seed", "out"},
    "play": {"folders", "task", "seconds", "seed", "stick", "out"},
    "export": {"folders", "out"},
}


def load_look(arguments: Sequence[str], action: str) -> Look:
    """Folders and `key=value` settings. Raises ConfigError as `load_run` does, and for what `action` does not take."""
    folders, settings = [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]
    given = parse_overrides(settings, lists=lists(Look), texts=texts(Look))
    check_keys("settings", given, names(Look))
    if useless := given.keys() - TAKES[action]:
        raise ConfigError(f"{min(useless)} does nothing in `moesaic skill {action}`: leave it out")
    made = build(Look, {}, given)
    made.folders = [folder for folder in (*folders, *made.folders) if folder]
    if not made.folders:
        raise ConfigError(f"no run is given: moesaic skill {action} runs/walk-flat-s0")
    check_within(made, {"rollouts": (1, 10**6), "seconds": (0, 86400), "seed": _SEEDS})
    return made
