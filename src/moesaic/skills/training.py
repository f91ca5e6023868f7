"""From a run's settings to a trained policy in its folder."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.errors import AdapterError, ConfigError, TrainingError, first_line
from moesaic.report.skills import learning_page
from moesaic.runs.folder import (
    atomic_folder,
    check_writable,
    locked,
    read_json,
    reading,
    write_json,
    write_text,
    writing,
)
from moesaic.runs.pace import Pace
from moesaic.runs.places import RESULTS, check_ours, check_same, check_unfinished, prepare
from moesaic.runs.results import command_line, count_trainable, versions
from moesaic.runs.states import read_state, write_state
from moesaic.skills.body import load_body
from moesaic.skills.environment import SkillEnv
from moesaic.skills.policy import Policy
from moesaic.skills.ppo import PPO, settings_of
from moesaic.skills.running import SkillRun
from moesaic.skills.saving import MODEL, load_skill, model_of, save
from moesaic.skills.skill import Skill, relies_on
from moesaic.skills.skillblender import SkillBlender

logger = logging.getLogger(__name__)

CHECKPOINT, METRICS, REPORT = "checkpoint", "metrics.jsonl", "report.html"
VERSION = 1
PACKAGES = ("mujoco", "gymnasium", "numpy")
SPEAKS = 2.0
"""Seconds from one time that progress is told to the next on a terminal."""
State = tuple[dict[str, NDArray[Any]], dict[str, Any]]
UNSTABLE = 0.2
"""Of a round's steps, the share in which bodies may diverge."""


def made(wanted: SkillRun, env: SkillEnv) -> Skill | SkillBlender:
    """The actor that a run trains. Raises as `load_skill` and `SkillBlender` do."""
    relies = relies_on(env.senses)
    torch.manual_seed(wanted.seed)
    if not wanted.blends:
        sizes = env.senses.command_dim, env.senses.shared_dim, env.body.dim
        return Skill(wanted.task, relies, *sizes, wanted.hidden, env.task.bounds)
    places = [model_of(folder).resolve() for folder in wanted.skills]
    if len(set(places)) < len(places):
        raise ConfigError(f"skills={','.join(wanted.skills)} names the same twice")
    if into := [own for own, place in zip(wanted.skills, places, strict=True) if _holds(wanted.folder(), place)]:
        raise ConfigError(f"out={wanted.folder()} is where {into[0]} lies, which is to be blended: name another")
    skills = [load_skill(folder, relies) for folder in wanted.skills]
    if len(skills) == 1:
        usual = f": {wanted.task} is for {' and '.join(env.task.skills)}" if env.task.skills else ""
        logger.warning("a blend of one skill has nothing to weigh%s", usual)
    return SkillBlender(skills, env.senses.command_dim, wanted.hidden, wanted.kind)


def _holds(folder: Path, place: Path) -> bool:
    return folder.resolve() in (place, *place.parents)


def train(wanted: SkillRun, *, command: str | None = None, progress: bool = True) -> dict[str, Any]:
    """Train it, or go on where it was interrupted; returns what is written to results.json.

    Raises:
        MoesaicError: of the kind that fits; nothing that is there is lost.
        KeyboardInterrupt: after a checkpoint, when interrupted.
    """
    settings = settings_of(wanted.ppo)
    folder = wanted.folder()
    check_writable(folder, f"out={folder}")
    check_ours(folder, "a skill's run", {"task", "kind", "body"})
    if fault := load_body(wanted.body).fault():
        logger.warning("body=%s does not stand in its default pose: %s", wanted.body, fault)
    longer = _goes_on(folder, wanted)
    if not longer:
        check_unfinished(folder, overwrite=wanted.overwrite)
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
            described = {**wanted.describes(), "relies": relies_on(env.senses), "manifest": env.body.beyond()}
            if longer:
                check_same(folder, described, "a finished run")
            else:
                prepare(
                    folder, described, (CHECKPOINT, MODEL, REPORT), overwrite=wanted.overwrite,
                    unfinished=(folder / CHECKPOINT).is_dir(),
                )  # fmt: skip
            seconds, last = _begin(folder, wanted, ppo)
            (folder / RESULTS).unlink(missing_ok=True)
            seconds, last = _rounds(folder, wanted, ppo, seconds, last, progress)
            results = {
                "task": wanted.task, "kind": wanted.kind if wanted.blends else "flat", "seed": wanted.seed,
                "steps": ppo.taken, "cpu_seconds": seconds, "diverged": env.diverged,
                "trainable": count_trainable(policy), "last": last, "settings": asdict(wanted),
                "command": command or command_line(),
                "versions": versions(PACKAGES),
            }  # fmt: skip
            ppo.settle()
            actor.std = policy.log_std.detach().exp()
            save(actor, folder / MODEL, {k: results[k] for k in ("task", "steps", "seed", "settings", "versions")})
            write_text(folder / REPORT, learning_page(results, rounds(folder)))
            write_json(folder / RESULTS, results)
    finally:
        env.close()
    return results


def _goes_on(folder: Path, wanted: SkillRun) -> bool:
    """Whether more steps are asked of a finished run than it took."""
    if wanted.overwrite or not (folder / RESULTS).is_file() or not (folder / CHECKPOINT).is_dir():
        return False
    with reading(folder / RESULTS):
        return int(read_json(folder / RESULTS).get("steps", 0)) < wanted.steps


def _begin(folder: Path, wanted: SkillRun, ppo: PPO) -> tuple[float, dict[str, float]]:
    """Take up what was interrupted, or begin; CPU seconds that it had taken, and the last round's figures."""
    place, log = folder / CHECKPOINT, folder / METRICS
    if not place.is_dir():
        write_text(log, "")
        return 0.0, {}
    try:
        arrays, values = read_state(place, version=VERSION)
        ppo.restore(arrays, values)
        seconds, lines, last = float(values["seconds"]), int(values["lines"]), {**values.get("last", {})}
    except Exception as error:  # whatever a damaged file makes
        raise AdapterError(f"{place} cannot be taken up: {first_line(error)}; overwrite=true begins anew") from None
    kept = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if log.is_file() else []
    write_text(log, "".join(kept[:lines]))
    return seconds, last


def _rounds(
    folder: Path, wanted: SkillRun, ppo: PPO, seconds: float, figures: dict[str, float], tells: bool
) -> tuple[float, dict[str, float]]:
    """Rounds until there were enough steps; CPU seconds in all, and the last round's figures."""
    began, spoke = time.process_time() - seconds, time.monotonic()
    lines = (folder / METRICS).read_text(encoding="utf-8", errors="replace").count("\n")
    terminal, pace = sys.stderr.isatty(), Pace(wanted.steps, ppo.taken)

    def whole() -> State:
        arrays, values = ppo.state()
        return arrays, {**values, "seconds": time.process_time() - began, "lines": lines, "last": figures}

    def keep(state: State) -> None:
        with writing(folder / CHECKPOINT), atomic_folder(folder / CHECKPOINT) as place:
            write_state(place, *state, version=VERSION)

    state = whole()
    try:
        while ppo.taken < wanted.steps:
            diverged = ppo.env.diverged
            figures = ppo.iterate()
            if ppo.env.diverged - diverged > UNSTABLE * ppo.settings.steps * wanted.num_envs:
                raise TrainingError(
                    f"{ppo.env.diverged - diverged} bodies diverged in {ppo.settings.steps} steps of "
                    f"{wanted.num_envs}: the MJCF of body={wanted.body} needs a smaller timestep or weaker gains"
                )
            lines += 1
            _log(folder / METRICS, {"steps": ppo.taken, **figures, "seconds": time.process_time() - began})
            state = whole()
            if lines % wanted.every == 0:
                keep(state)
            if tells and (time.monotonic() - spoke > SPEAKS if terminal else pace.due(ppo.taken)):
                spoke = time.monotonic()
                print(told(wanted, ppo, figures), end="\r" if terminal else "\n", file=sys.stderr, flush=True)
        keep(state)
    except KeyboardInterrupt:
        keep(state)  # of the last whole round
        raise KeyboardInterrupt(
            f"stopped after {state[1]['taken']:,} steps, which are kept; the same command goes on"
        ) from None
    return time.process_time() - began, figures


def _log(file: Path, told: Mapping[str, float]) -> None:
    with writing(file), file.open("a", encoding="utf-8") as log:
        log.write(json.dumps(told) + "\n")


def rounds(folder: Path, most: int = 60) -> list[list[float]]:
    """What a run's metrics say of its learning, in at most so many points: steps, reward, falls; none without any."""
    file = folder / METRICS
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            told = json.loads(line)
            found.append([float(told[name]) for name in ("steps", "reward", "falls")])
        except (ValueError, TypeError, KeyError):  # cut short
            continue
    if len(found) < 2:
        return []
    parts = np.array_split(np.array(found), min(most, len(found)))
    return [[float(part[-1, 0]), *part[:, 1:].mean(axis=0).tolist()] for part in parts]


def told(wanted: SkillRun, ppo: PPO, figures: Mapping[str, float]) -> str:
    return (
        f"{wanted.task}: {ppo.taken:,} of {wanted.steps:,} steps, reward {figures['reward']:.4f}, "
        f"falls {100 * figures['falls']:.2f} % of steps"
    )
