"""`moesaic skill train | blend | eval | play | export`: control policies as experts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.cli.show import print_json, show
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError, path_of, suggest
from moesaic.skills.running import Look, SkillRun, load_look, load_run

ACTIONS = ("train", "blend", "eval", "play", "export")

_ABOUT = """A skill is learned once; a blend learns, joint by joint, which skill to listen to and what to ask of it.
What is not given is as `recipes/skills/BODY/TASK.yaml` has it, where there is one.
Skills: walk, reach, squat, step. Tasks: far_reach, button_press, box_push, package_lift, football_shoot (or any skill).

  moesaic skill train task=walk                                     a skill, or a task from nothing (flat PPO)
  moesaic skill blend task=far_reach skills=runs/walk-flat-s0,runs/reach-flat-s0
  moesaic skill blend task=far_reach skills=… kind=scalar           or switch, mcp
  moesaic skill eval runs/far-reach-per-joint-s0 runs/far-reach-flat-s0     how well, and how it moves
  moesaic skill play runs/far-reach-per-joint-s0 out=film.gif       a film (.gif, .mp4)
  moesaic skill export runs/far-reach-per-joint-s0 out=policy.onnx"""


@verb(
    "skill",
    "control policies as experts: train, blend, eval, play, export",
    group="skills",
    place=97,
    settings=[
        Section(SkillRun, "settings of train and blend (key=value):"),
        Section(Look, "settings of eval, play and export (key=value):"),
    ],
    operands={"action": "train, blend, eval, play or export"},
    takes="key=value | FOLDER",
    about=lambda: _ABOUT,
)
def run(action: str, arguments: list[str], *, as_json: bool = False) -> int | None:
    """Raises MoesaicError of the kind that fits; nothing that is there is lost."""
    if action not in ACTIONS:
        raise ConfigError(f"skill {action}: no such action; {suggest(action, ACTIONS)}")
    from moesaic.skills.body import needed

    needed()
    _one_thread()
    if action in ("train", "blend"):
        _train(load_run(arguments, blends=action == "blend"), as_json)
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
    print(f"how well it does: moesaic skill eval {_typed(wanted.folder())}")


def _typed(folder: Path) -> str:
    """As a shell takes it; a path with = in it would be a setting."""
    return shlex.quote(f"folders={folder}" if "=" in str(folder) else str(folder))


def _eval(wanted: Look, as_json: bool) -> None:
    from moesaic.report.skills import grids, page
    from moesaic.report.text import table
    from moesaic.runs.folder import check_writable, write_text
    from moesaic.skills.looking import measured, opened

    for folder in wanted.folders:
        opened(folder, wanted)
        check_writable(path_of(folder) / "report.html", f"{folder}/report.html")
    found = [measured(folder, wanted) for folder in wanted.folders]
    if as_json:
        print_json(found)
    else:
        show(*(table(grid) for grid in grids(found)))
    for folder, result in zip(wanted.folders, found, strict=True):
        write_text(path_of(folder) / "report.html", page([result]))
    if not as_json:
        for folder in wanted.folders:
            print(f"figures, and of a blend the weights by joint over time: {path_of(folder) / 'report.html'}")


def _play(wanted: Look, as_json: bool) -> None:
    from moesaic.skills.looking import film

    file = _file(wanted, "film.gif")
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
