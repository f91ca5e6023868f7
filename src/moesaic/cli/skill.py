"""`moesaic skill train | blend | eval | play | export`: control policies as experts."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.cli.show import print_json, show
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError, path_of, suggest
from moesaic.runs.recipe import dump
from moesaic.runs.settings import names
from moesaic.skills.running import TAKES, Look, SkillRun, load_look, load_run

_NAMES = {*names(Look)}
ACTIONS = ("train", "blend", "eval", "play", "export")

_ABOUT = """A skill is learned once; a blend learns, joint by joint, which skill to listen to and what to ask of it.
What is not given is as the recipe of the task has it, which --dry-run prints.
Skills: walk, reach, squat, step. Tasks: far_reach, button_press, box_push, package_lift, football_shoot (or any skill).

  moesaic skill train walk                                          a skill, or a task from nothing (flat PPO)
  moesaic skill train walk steps=2000000                            more of it, once it is finished
  moesaic skill blend far_reach skills=runs/walk-flat-s0,runs/reach-flat-s0
  moesaic skill blend far_reach skills=… kind=mcp                   or scalar, switch
  moesaic skill eval runs/far-reach-per-joint-s0 runs/far-reach-flat-s0     how well, and how it moves
  moesaic skill play runs/far-reach-per-joint-s0 out=film.gif       a film (.gif, .mp4)
  moesaic skill export runs/far-reach-per-joint-s0 out=policy.onnx"""


@verb(
    "skill",
    "control policies as experts: train, blend, eval, play, export",
    group="skills",
    place=97,
    settings=[
        Section(SkillRun, "settings of train (key=value):", but=("skills", "kind"), actions=("train",)),
        Section(SkillRun, "settings of blend (key=value):", actions=("blend",)),
        *(
            Section(Look, f"settings of {action} (key=value):", but=_NAMES - TAKES[action], actions=(action,))
            for action in ("eval", "play", "export")
        ),
    ],
    dry_run="of train and blend: print the resolved settings and stop",
    operands={"action": "train, blend, eval, play or export"},
    takes="key=value | FOLDER",
    about=lambda: _ABOUT,
)
def run(action: str, arguments: list[str], *, as_json: bool = False, dry_run: bool = False) -> int | None:
    """Raises MoesaicError of the kind that fits; nothing that is there is lost."""
    if action not in ACTIONS:
        raise ConfigError(f"skill {action}: no such action; {suggest(action, ACTIONS)}")
    from moesaic.skills.simulator import needed

    needed()
    _one_thread()
    if action in ("train", "blend"):
        wanted = load_run(arguments, blends=action == "blend")
        if dry_run:
            print(dump(wanted), end="")
        else:
            _train(wanted, as_json)
    else:
        {"eval": _eval, "play": _play, "export": _export}[action](load_look(arguments, action), as_json)
    return None


def _one_thread() -> None:
    """Networks as small as these are slower on two threads than on one, and far slower where a core is busy."""
    import os

    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _train(wanted: SkillRun, as_json: bool) -> None:
    from moesaic.skills.training import train

    results = train(wanted)
    if as_json:
        print_json(results)
        return
    print(f"{wanted.folder()}: {results['steps']:,} steps in {results['cpu_seconds']:.0f} CPU seconds, "
          f"reward {results['last'].get('reward', 0):.4f} a step")  # fmt: skip
    if results["diverged"]:
        print(f"bodies that diverged and were begun anew: {results['diverged']:,} (timestep of the MJCF, gains)")
    print(f"how it learned: {wanted.folder() / 'report.html'}")
    print(f"how well it does: moesaic skill eval {_typed(wanted.folder())}")


def _typed(folder: Path) -> str:
    """As a shell takes it; a path with = in it would be a setting."""
    return shlex.quote(f"folders={folder}" if "=" in str(folder) else str(folder))


def _eval(wanted: Look, as_json: bool) -> None:
    from moesaic.report.skills import grids, page
    from moesaic.report.text import table
    from moesaic.runs.folder import check_writable, write_text, writing
    from moesaic.skills.looking import measured, opened

    several = len(wanted.folders) > 1 or bool(wanted.out)
    pages = {path_of(folder) / "report.html": [number] for number, folder in enumerate(wanted.folders)}
    if several:
        pages[_page(wanted)] = [*range(len(wanted.folders))]
    for folder in wanted.folders:
        opened(folder, wanted)
    for file in pages:
        _check_page(file)
        check_writable(file, str(file))
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for folder in wanted.folders:
        _tell(f"{folder}: {wanted.rollouts} rollouts")
        found.append(measured(folder, wanted))
    if as_json:
        print_json(found)
    else:
        show(*(table(grid) for grid in grids(found)))
    for file, numbers in pages.items():
        write_text(file, page([found[number] for number in numbers]))
    if not as_json:
        shown = "side by side" if several else "figures, learning, and of a blend who is listened to when"
        print(f"{shown}: {next(reversed(pages))}")


def _page(wanted: Look) -> Path:
    """Where several are shown side by side. Raises ConfigError for a file that is no page."""
    file = path_of(wanted.out or "report.html")
    if file.suffix != ".html":
        raise ConfigError(f"out={file} must end in .html")
    return file


def _check_page(file: Path) -> None:
    """Raise ConfigError for a file that is something else than a page of ours."""
    from moesaic.report.page import is_page

    if file.exists() and not is_page(file, "moesaic skill"):
        raise ConfigError(f"{file} is already there, and is no page of `moesaic skill`: move it, or name another")


def _tell(said: str) -> None:
    """What takes a while, said before it does."""
    print(said, file=sys.stderr, flush=True)


def _play(wanted: Look, as_json: bool) -> None:
    from moesaic.skills.looking import film

    file = _file(wanted, "film.gif")
    _tell(f"filming {_only(wanted)}{'' if wanted.stick else '; stick=true draws lines, and is quicker'}")
    frames = film(_only(wanted), wanted, file)
    _said({"file": str(file), "frames": frames}, as_json)


def _export(wanted: Look, as_json: bool) -> None:
    from moesaic.runs.folder import check_writable
    from moesaic.skills.export import to_onnx
    from moesaic.skills.saving import load

    file = _file(wanted, "policy.onnx")
    check_writable(file, f"out={file}")
    to_onnx(load(_only(wanted)), file)
    _said({"file": str(file)}, as_json)


def _only(wanted: Look) -> str:
    if len(wanted.folders) > 1:
        raise ConfigError(f"one run at a time, and {len(wanted.folders)} are given")
    return wanted.folders[0]


def _file(wanted: Look, name: str) -> Path:
    return path_of(wanted.out or str(path_of(_only(wanted)) / name))


def _said(facts: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(dict(facts))
    else:
        print(f"written: {facts['file']}")
