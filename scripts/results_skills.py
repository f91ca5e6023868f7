"""What skills and blends of them came to: a block of docs/skillblender.md and a picture."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import skills
from pages import Blocks, Pictures, seeds, spread, table

from moesaic.report import charts
from moesaic.report.page import alone

NAMES = {
    "per_joint": "per joint (paper)", "scalar": "one weight a skill", "switch": "one skill at a time",
    "mcp": "product of Gaussians", "flat": "flat PPO",
}  # fmt: skip
UNITS = {"velocity": "m/s"}
GOALS = {"walk": 0.15, "reach": 0.08, "squat": 0.06, "step": 0.08}
DRAWN = ("far_reach", "per_joint")
Cells = dict[tuple[str, str], list[dict[str, Any]]]
"""By task and arm, a cell a seed."""


def cells(results: Path, name: str) -> Cells:
    """Of a table, in its order."""
    file = results / "skills.jsonl"
    found: Cells = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        cell = json.loads(line)
        if cell["table"] == name:
            found[cell["task"], cell["arm"]].append(cell)
    return {key: sorted(found[key], key=lambda c: c["seed"]) for key in skills.TABLES[name] if key in found}


def mean_error(cell: Mapping[str, Any]) -> float:
    return float(cell["errors"][cell["leads"]]["mean"])


def learned(results: Path, name: str, title: str) -> list[str]:
    """The skills of a body."""
    found = cells(results, name)
    if not found:
        return []
    rows = []
    for (task, _), of in found.items():
        unit = UNITS.get(of[0]["leads"], "m")
        rows.append([
            task, f"{of[0]['leads']}, {unit}", spread([mean_error(c) for c in of], 3), f"{GOALS[task]}",
            spread([100 * c["survival"] for c in of]), spread([100 * c["success"] for c in of]),
            spread([c["tilt"] for c in of], 3), f"{of[0]['steps'] / 1e6:.1f}",
            spread([c["cpu_seconds"] for c in of], 0),
        ])  # fmt: skip
    header = ["skill", "error of", "error", "goal", "survival, %", "success, %", "tilt, rad", "million steps", "CPU s"]
    return [
        f"**{title}**, {seeds(map(len, found.values()))}, 128 rollouts each: mean error just before another "
        f"goal is drawn, ± the standard deviation over seeds. Command: `python scripts/skills.py {name}`.", "",
        *table(header, rows), "",
    ]  # fmt: skip


def compared(results: Path, name: str, title: str) -> list[str]:
    """Tasks by every arm."""
    found = cells(results, name)
    if not found:
        return []
    rows, before = [], {key[0]: of for key, of in cells(results, "skills").items()}
    for (task, arm), of in found.items():
        taught = sum(statistics.mean(c["cpu_seconds"] for c in before[skill]) for skill in of[0]["skills"])
        rows.append([
            task, NAMES[arm], spread([mean_error(c) for c in of], 3), spread([100 * c["success"] for c in of]),
            spread([100 * c["survival"] for c in of]), spread([c["tilt"] for c in of], 3),
            spread([c["jerk"] for c in of], 3), spread([c["jolt"] for c in of], 3),
            spread([c["cpu_seconds"] for c in of], 0), f"{taught:.0f}",
        ])  # fmt: skip
    header = ["task", "policy", "error, m", "success, %", "survival, %", "tilt, rad", "action change²", "jolt, m/s",
              "CPU s", "skills' CPU s"]  # fmt: skip
    return [
        f"**{title}**, {seeds(map(len, found.values()))}, 128 rollouts each. No regularisers in any task's "
        f"reward. Flat PPO takes {skills.FLAT:g} times a blend's steps, for about as much time; what "
        "the skills had taken stands beside. "
        f"Command: `python scripts/skills.py {name}`.", "", *table(header, rows), "", *verdict(found), "",
    ]  # fmt: skip


def verdict(found: Cells) -> list[str]:
    """What was expected of the paper's blend, and what came of it."""
    said = []
    for task in dict.fromkeys(task for task, _ in found):
        of = {arm: found[task, arm] for arm in NAMES if (task, arm) in found}
        means = {arm: statistics.mean(map(mean_error, its)) for arm, its in of.items()}
        best = min(means, key=means.__getitem__)
        others = [arm for arm in ("per_joint", "mcp") if arm in of]
        if "flat" not in of or not others:
            continue
        ratios = [
            f"{times(of, arm, 'jerk')} the change of action, {times(of, arm, 'jolt')} the jolt and "
            f"{times(of, arm, 'tilt')} the tilt of {NAMES[arm]}"
            for arm in others
        ]
        said.append(f"- {task}: least error by {NAMES[best]}; flat PPO has {', and '.join(ratios)}.")
    return said


def times(of: Mapping[str, list[dict[str, Any]]], arm: str, name: str) -> str:
    """How much more flat PPO has of it than another policy."""
    flat, other = (statistics.mean(cell[name] for cell in of[which]) for which in ("flat", arm))
    return f"{flat / other:.1f} times"


def speed(results: Path) -> list[str]:
    """What a control step costs."""
    file = results / "skill-speed.json"
    if not file.is_file():
        return []
    arms = json.loads(file.read_text(encoding="utf-8"))["arms"]
    bare = arms["bare rollout"]["per_cpu_second"]["all"]
    rows = [
        [arm, spread(of["per_cpu_second"]["all"], 0), spread(of["per_second"]["all"], 0),
         spread([a / b for a, b in zip(of["per_cpu_second"]["all"], bare, strict=True)], 2)]
        for arm, of in arms.items()
    ]  # fmt: skip

    def beside(arm: str, other: str, per: str = "per_cpu_second") -> str:
        pairs = zip(arms[arm][per]["all"], arms[other][per]["all"], strict=True)
        return f"{statistics.mean(a / b for a, b in pairs):.2f}"

    plain, dummy, own = (
        "SyncVectorEnv, a plain environment",
        "SB3 PPO, DummyVecEnv, a plain environment",
        "our PPO, flat",
    )
    return [
        f"**What a control step costs**: control steps of all environments together, {len(bare)} rounds in turn, one "
        "torch thread. Of PPO, what is learned from them counts, too. A plain environment is one body, written by hand "
        "for Gymnasium, that senses less. Command: `python scripts/skill_speed.py`.", "",
        *table(["", "a CPU second", "a second", "of bare rollout"], rows), "",
        f"Our environment takes {beside('ours', plain)} times SyncVectorEnv's steps a CPU second, "
        f"{beside('ours, 2 threads', plain, 'per_second')} times a second on two threads. Our PPO takes "
        f"{beside(own, dummy)} times (a blend {beside('our PPO, blend', dummy)} times) those of Stable-Baselines3 over "
        f"DummyVecEnv, {beside(own, 'SB3 PPO, our VecEnv')} times those of Stable-Baselines3 over ours: most "
        f"of a step is MuJoCo's, {beside(own, 'bare rollout')} of whose bare speed is left.", "",
    ]  # fmt: skip


def block(results: Path) -> str:
    """What stands between the marks of the page."""
    return "\n".join([
        *learned(results, "skills", "The four skills of MiniHumanoid"),
        *compared(results, "tasks", "Three tasks, five policies"), *compared(results, "more", "Two more tasks"),
        *learned(results, "humanoid", "The 3-D body, one longer run"), *speed(results),
    ]).rstrip()  # fmt: skip


def weights(results: Path) -> str:
    of = cells(results, "tasks").get(DRAWN)
    if not of:
        return ""
    cell = of[0]
    over = {joint: [part[row][0] for part in cell["weights"]] for row, joint in enumerate(cell["joints"])}
    name, other = cell["skills"]
    drawn = charts.shares(
        {"": over}, title=f"FarReach: weight of {name} by joint, over {cell['seconds']:g} s", over="",
        of=f"time / {cell['seconds'] / len(cell['weights']):.2f} s",
        description=f"The rest is {other}'s. Mean over {cell['rollouts']} rollouts.", equal=1 / len(cell["skills"]),
    )  # fmt: skip
    return alone(drawn)


BLOCKS: Blocks = {"skillblender.md": {"skills": ("skills.jsonl", block)}}
PICTURES: Pictures = {"skillblender.svg": ("skills.jsonl", weights)}
