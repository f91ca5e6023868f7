"""Skills, and what blends of them come to: results/skills.jsonl, a line a cell.

    python scripts/skills.py skills | tasks | more | humanoid [workers=N] [seeds=0,1,2]

Cells that are there are not run again. Policies lie in runs/skills (or MOESAIC_SKILLS), where blends find them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lines

ROOT = Path(__file__).parents[1]
FILE = ROOT / "results" / "skills.jsonl"
PLACE = Path(os.environ.get("MOESAIC_SKILLS") or ROOT / "runs" / "skills")
SKILLS = ("walk", "reach", "squat", "step")
ARMS = ("per_joint", "scalar", "switch", "mcp", "flat")
FLAT = 1.25
"""Steps of flat PPO for one of a blend: what takes as long."""
TABLES: dict[str, list[tuple[str, str]]] = {
    "skills": [(name, "flat") for name in SKILLS],
    "tasks": [(task, arm) for task in ("far_reach", "button_press", "football_shoot") for arm in ARMS],
    "more": [(task, arm) for task in ("box_push", "package_lift") for arm in ARMS],
    "humanoid": [("walk", "flat")],
}


def measure(table: str, task: str, arm: str, seed: int) -> dict[str, Any]:
    """One cell: a policy trained, and SkillBench's figures of it."""
    import torch

    from moesaic.runs.results import versions
    from moesaic.skills.looking import measured
    from moesaic.skills.running import Look, load_run
    from moesaic.skills.tasks import find
    from moesaic.skills.training import train

    torch.set_num_threads(1)
    blended = [] if arm == "flat" else [str(PLACE / f"{name}-flat-s{seed}") for name in find(task).skills]
    folder = PLACE / f"{'humanoid-' * (table == 'humanoid')}{task}-{arm}-s{seed}"
    given = [f"task={task}", f"seed={seed}", f"out={folder}"]
    if table == "humanoid":
        given.append("body=humanoid")
    if blended:
        given += [f"kind={arm}", f"skills={','.join(blended)}"]
    elif task not in SKILLS:
        given.append(f"steps={int(FLAT * load_run(given, blends=False).steps)}")
    wanted = load_run(given, blends=bool(blended))
    if not (folder / "results.json").is_file():
        train(wanted, command="python scripts/skills.py", progress=False)
    trained = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    found = measured(str(folder), Look(folders=[str(folder)]))
    left_out = {"routing", "trained", "learning", "run", "seed", *(["weights"] if seed else [])}
    return {
        "table": table, "task": task, "arm": arm, "seed": seed, "steps": trained["steps"],
        "cpu_seconds": trained["cpu_seconds"], "trainable": trained["trainable"], "diverged": trained["diverged"],
        **{name: value for name, value in found.items() if name not in left_out},
        "versions": versions(("mujoco", "torch")),
    }  # fmt: skip


def said(cell: dict[str, Any]) -> str:
    lead = cell["errors"][cell["leads"]]["mean"]
    return f"{cell['leads']} {lead:.3f}, survival {cell['survival']:.2f}, {cell['cpu_seconds']:.0f} s"


if __name__ == "__main__":
    lines.make(FILE, TABLES, ("task", "arm"), measure, said, __doc__)
