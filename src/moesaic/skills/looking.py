"""What runs came to: measured, and filmed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moesaic.errors import ConfigError, path_of
from moesaic.routing import RoutingTrace
from moesaic.runs.folder import check_writable, read_json, reading
from moesaic.runs.results import versions
from moesaic.skills.body import load_body
from moesaic.skills.environment import SkillEnv
from moesaic.skills.observing import Senses
from moesaic.skills.running import Look
from moesaic.skills.saving import MANIFEST, check_body, load, model_of
from moesaic.skills.skill import Skill, relies_on
from moesaic.skills.skillbench import SECONDS, evaluate
from moesaic.skills.skillblender import SkillBlender
from moesaic.skills.tasks import find
from moesaic.skills.training import rounds

if TYPE_CHECKING:
    from moesaic.skills.pictures import Image

BINS = 24
"""Parts of a rollout whose weights are shown."""
LONGEST = 120.0
"""Seconds of a GIF: its pictures are held until it is whole, some 6 MB a second."""


def opened(folder: str, wanted: Look) -> tuple[Skill | SkillBlender, str, str, dict[str, Any]]:
    """A run's policy, its task, its body, and what is told of it. Raises as `load` does."""
    policy = load(folder)
    trained = read_json(model_of(folder) / MANIFEST).get("trained", {})
    with reading(model_of(folder) / MANIFEST):
        settings = trained.get("settings", {})
        task, body = str(wanted.task or trained.get("task", "")), settings.get("body", "mini_humanoid")
        if type(steps := trained.get("steps", 0)) is not int:
            raise TypeError(f"steps is {steps}")
    if not task:
        raise ConfigError(f"{folder} does not say what it was trained for: task=walk")
    if not isinstance(body, str):
        raise ConfigError(f"{model_of(folder) / MANIFEST} is damaged: body is {body}")
    own = load_body(body)
    senses = Senses(own, find(task)(own))
    check_body(policy, relies_on(senses), folder)
    if policy.command_dim != senses.command_dim:
        raise ConfigError(
            f"{folder} takes {policy.command_dim} numbers for a command, and {task} gives {senses.command_dim}"
        )
    return policy, task, body, trained


def measured(folder: str, wanted: Look) -> dict[str, Any]:
    """Figures of SkillBench, and of a blend the weights of its skills by joint over time."""
    policy, task, body, trained = opened(folder, wanted)
    times: list[torch.Tensor] = []
    names = [str(skill.name) for skill in policy.skills] if isinstance(policy, SkillBlender) else []
    trace = RoutingTrace(names=names)
    joints = policy.relies["joints"]

    def watch(_: SkillEnv, seen: torch.Tensor) -> None:
        if isinstance(policy, SkillBlender):
            records = policy.records(seen, joints)
            trace.update(records)
            times.append(torch.stack([record.routing.weights.mean(dim=0) for record in records]))

    found = evaluate(
        policy, task, body, rollouts=wanted.rollouts, seed=wanted.seed, seconds=wanted.seconds or None, watch=watch
    )
    over = [part.mean(dim=0).tolist() for part in torch.stack(times).tensor_split(BINS)] if len(times) >= BINS else []
    return {
        **found, "run": str(folder), "kind": policy.kind if isinstance(policy, SkillBlender) else "flat", "body": body,
        "joints": joints, "skills": names, "weights": over, "routing": trace.to_dict() if names else None,
        "trained": trained, "learning": rounds(path_of(folder)), "versions": versions(("mujoco", "gymnasium", "numpy")),
    }  # fmt: skip


@torch.no_grad()
def film(folder: str, wanted: Look, file: Path) -> int:
    """A rollout of one body, half as many pictures a second as it has steps; how many there are."""
    from moesaic.skills.pictures import write_film

    if file.suffix not in (".gif", ".mp4"):
        raise ConfigError(f"out={file} must end in .gif or .mp4")
    check_writable(file, f"out={file}")
    policy, task, body, _ = opened(folder, wanted)
    seconds = wanted.seconds or min(SECONDS.get(task, 8.0), 8.0)
    if file.suffix == ".gif" and seconds > LONGEST:
        raise ConfigError(f"seconds={seconds:g}: a GIF holds {LONGEST:g} s, out=film.mp4 as many as wanted")
    env = SkillEnv(task, body, 1, autoreset="same_step", randomise=0, seconds=seconds)
    every = max(round(0.04 / env.physics.dt), 1)

    def frames() -> Iterator[Image]:
        observed, _ = env.reset(seed=wanted.seed)
        for step in range(env.steps):
            if step % every == 0:
                yield env.frame(stick=wanted.stick)
            observed, *_ = env.step(policy(torch.from_numpy(observed)).numpy())

    try:
        write_film(frames(), file, 1 / (every * env.physics.dt))
    finally:
        env.close()
    return len(range(0, env.steps, every))
