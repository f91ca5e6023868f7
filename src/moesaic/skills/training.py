"""From a run's settings to a trained policy in its folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from moesaic.errors import AdapterError, ConfigError, MoesaicError, first_line, suggest
from moesaic.runs.folder import atomic_folder, check_writable, discard, locked, read_json, write_json, writing
from moesaic.runs.results import command_line, count_trainable, versions
from moesaic.runs.settings import build, differences
from moesaic.runs.states import read_state, write_state
from moesaic.skills.environment import SkillEnv
from moesaic.skills.policy import Policy
from moesaic.skills.ppo import PPO, PPOSettings
from moesaic.skills.running import SkillRun
from moesaic.skills.saving import MODEL, load_skill, save
from moesaic.skills.skill import Skill, relies_on
from moesaic.skills.skillblender import SkillBlender

SETTINGS, CHECKPOINT, METRICS, RESULTS = "settings.json", "checkpoint", "metrics.jsonl", "results.json"
VERSION = 1
PACKAGES = ("mujoco", "gymnasium", "numpy")
SPEAKS = 2.0
"""Seconds after which progress is told, and from one time to the next."""


def made(wanted: SkillRun, env: SkillEnv) -> Skill | SkillBlender:
    """The actor that a run trains. Raises as `load_skill` and `SkillBlender` do."""
    relies = relies_on(env.senses)
    torch.manual_seed(wanted.seed)
    if not wanted.blends:
        sizes = env.senses.command_dim, env.senses.shared_dim, env.body.dim
        return Skill(wanted.task, relies, *sizes, wanted.hidden, env.task.bounds)
    skills = [load_skill(folder, relies) for folder in wanted.skills]
    return SkillBlender(skills, env.senses.command_dim, wanted.hidden, wanted.kind)


def train(wanted: SkillRun, *, command: str | None = None, progress: bool | None = None) -> dict[str, Any]:
    """Train it, or go on where it was interrupted; returns what is written to results.json.

    Raises:
        MoesaicError: of the kind that fits; nothing that is there is lost.
        KeyboardInterrupt: after a checkpoint, when interrupted.
    """
    known = {f.name for f in fields(PPOSettings)}
    if unknown := wanted.ppo.keys() - known:
        raise ConfigError(f"ppo.{min(unknown)}: no such setting; {suggest(min(unknown), known)}")
    settings = build(PPOSettings, wanted.ppo)
    folder = wanted.folder()
    check_writable(folder, f"out={folder}")
    if (folder / RESULTS).is_file() and not wanted.overwrite:
        raise ConfigError(f"{folder} holds a finished run; overwrite=true replaces it, out=… goes elsewhere")
    env = SkillEnv(
        wanted.task, wanted.body, wanted.num_envs, threads=wanted.threads, autoreset="same_step",
        randomise=wanted.randomise,
    )  # fmt: skip
    try:
        actor = made(wanted, env)
        critic_dim = env.reset(seed=wanted.seed)[1]["privileged"].shape[1]
        policy = Policy(actor, env.body.dim, critic_dim, wanted.critic_hidden, wanted.init_std)
        ppo = PPO(env, policy, settings, seed=wanted.seed)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            seconds = _begin(folder, wanted, ppo)
            seconds, last = _rounds(folder, wanted, ppo, seconds, sys.stderr.isatty() if progress is None else progress)
            results = {
                "task": wanted.task, "kind": wanted.kind if wanted.blends else "flat", "seed": wanted.seed,
                "steps": ppo.taken, "cpu_seconds": seconds, "diverged": env.diverged,
                "trainable": count_trainable(policy), "last": last, "settings": wanted.describes(),
                "command": command or command_line(),
                "versions": versions(PACKAGES),
            }  # fmt: skip
            ppo.settle()
            actor.std = policy.log_std.detach().exp()
            save(actor, folder / MODEL, {k: results[k] for k in ("task", "steps", "seed", "settings", "versions")})
            write_json(folder / RESULTS, results)
            discard(folder / CHECKPOINT)
    finally:
        env.close()
    return results


def _begin(folder: Path, wanted: SkillRun, ppo: PPO) -> float:
    """Take up what was interrupted; CPU seconds that it had taken."""
    file = folder / SETTINGS
    there = (folder / CHECKPOINT).is_dir() and not wanted.overwrite
    if there and file.is_file() and (changed := differences(read_json(file), wanted.describes())):
        raise ConfigError(f"{folder} holds an unfinished run with {changed}: set it back to go on, or overwrite=true")
    write_json(file, wanted.describes())
    if not there:
        discard(folder / CHECKPOINT)
        (folder / METRICS).write_text("", encoding="utf-8")
        return 0.0
    try:
        arrays, values = read_state(folder / CHECKPOINT, version=VERSION)
        ppo.restore(arrays, values)
        seconds, lines = float(values["seconds"]), int(values["lines"])
    except MoesaicError as error:
        raise AdapterError(f"{folder / CHECKPOINT}: {error}; overwrite=true begins anew") from None
    except Exception as error:  # whatever a damaged file makes
        raise AdapterError(
            f"{folder / CHECKPOINT} is damaged: {first_line(error)}; overwrite=true begins anew"
        ) from None
    kept = (folder / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)[:lines]
    (folder / METRICS).write_text("".join(kept), encoding="utf-8")
    return seconds


def _rounds(folder: Path, wanted: SkillRun, ppo: PPO, seconds: float, tells: bool) -> tuple[float, dict[str, float]]:
    """Rounds until there were enough steps; CPU seconds in all, and the last round's figures."""
    began, spoke = time.process_time() - seconds, time.monotonic()
    lines = sum(1 for _ in (folder / METRICS).open(encoding="utf-8"))
    figures: dict[str, float] = {}

    def keep() -> None:
        with atomic_folder(folder / CHECKPOINT) as place:
            arrays, values = ppo.state()
            more = {"seconds": time.process_time() - began, "lines": lines}
            write_state(place, arrays, {**values, **more}, version=VERSION)

    try:
        with (folder / METRICS).open("a", encoding="utf-8") as log:
            while ppo.taken < wanted.steps:
                figures = ppo.iterate()
                lines += 1
                log.write(json.dumps({"steps": ppo.taken, **figures, "seconds": time.process_time() - began}) + "\n")
                log.flush()
                if lines % wanted.every == 0:
                    keep()
                if tells and time.monotonic() - spoke > SPEAKS:
                    spoke = time.monotonic()
                    print(told(wanted, ppo, figures), end="\r", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        keep()
        raise KeyboardInterrupt(
            f"stopped after {ppo.taken:,} steps, which are kept; the same command goes on"
        ) from None
    return time.process_time() - began, figures


def told(wanted: SkillRun, ppo: PPO, figures: Mapping[str, float]) -> str:
    return (
        f"{wanted.task}: {ppo.taken:,} of {wanted.steps:,} steps, reward {figures['reward']:.4f}, "
        f"falls {100 * figures['falls']:.2f} % of steps"
    )
