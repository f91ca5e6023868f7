"""Skills, and what blends of them come to: results/skills.jsonl, a line a cell.

    python scripts/skills.py skills | tasks | more | humanoid [workers=N] [seeds=0,1,2]

Cells that are there are not run again. Policies lie in runs/skills (or MOESAIC_SKILLS), where blends find them.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILE = ROOT / "results" / "skills.jsonl"
PLACE = Path(os.environ.get("MOESAIC_SKILLS") or ROOT / "runs" / "skills")
SKILLS = ("walk", "reach", "squat", "step")
ARMS = ("per_joint", "scalar", "switch", "mcp", "flat")
STEPS = {"walk": 2_000_000, "reach": 1_200_000, "squat": 1_000_000, "step": 1_500_000}
BLENDING = 800_000
FLAT = 1.25
"""Steps of flat PPO for one of a blend: what takes as long."""
TABLES: dict[str, list[tuple[str, str]]] = {
    "skills": [(name, "flat") for name in SKILLS],
    "tasks": [(task, arm) for task in ("far_reach", "button_press", "football_shoot") for arm in ARMS],
    "more": [(task, arm) for task in ("box_push", "package_lift") for arm in ARMS],
}


def measure(table: str, task: str, arm: str, seed: int) -> dict[str, Any]:
    """One cell: a policy trained, and SkillBench's figures of it."""
    import torch

    from moesaic.runs.results import versions
    from moesaic.skills.looking import measured
    from moesaic.skills.running import Look, SkillRun
    from moesaic.skills.tasks import find
    from moesaic.skills.training import train

    torch.set_num_threads(1)
    blended = [] if arm == "flat" else [str(PLACE / f"{name}-flat-s{seed}") for name in find(task).skills]
    steps = STEPS.get(task) or int(BLENDING * (FLAT if arm == "flat" else 1))
    folder = PLACE / f"{task}-{arm}-s{seed}"
    wanted = SkillRun(
        task=task, skills=blended, kind=arm if blended else "per_joint", steps=steps, seed=seed, out=str(folder)
    )
    if not (folder / "results.json").is_file():
        train(wanted, command="python scripts/skills.py", progress=False)
    trained = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    found = measured(str(folder), Look(folders=[str(folder)]))
    left_out = ("routing", "trained", "run")
    return {
        "table": table, "task": task, "arm": arm, "seed": seed, "steps": trained["steps"],
        "cpu_seconds": trained["cpu_seconds"], "trainable": trained["trainable"], "diverged": trained["diverged"],
        **{name: value for name, value in found.items() if name not in left_out},
        "versions": versions(("mujoco", "torch")),
    }  # fmt: skip


def main() -> None:
    name, *rest = sys.argv[1:] or [""]
    given = dict(text.split("=", 1) for text in rest if "=" in text)
    if name not in TABLES or given.keys() - {"workers", "seeds"} or len(given) < len(rest):
        sys.exit(__doc__)
    seeds = [int(text) for text in given.get("seeds", "0,1,2").split(",")]
    done = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.is_file() else []
    there = {(c["table"], c["task"], c["arm"], c["seed"]) for c in done}
    left = [(name, *cell, seed) for seed in seeds for cell in TABLES[name] if (name, *cell, seed) not in there]
    with ProcessPoolExecutor(
        int(given.get("workers", 1)), mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        running = {pool.submit(measure, *cell): cell for cell in left}
        for number, future in enumerate(as_completed(running), 1):
            found = future.result()
            lead = found["errors"][found["leads"]]["mean"]
            print(f"{number} of {len(left)}: {', '.join(map(str, running[future]))}: {found['leads']} {lead:.3f}, "
                  f"survival {found['survival']:.2f}, {found['cpu_seconds']:.0f} s", flush=True)  # fmt: skip
            with FILE.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
