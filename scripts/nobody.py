"""Whose prompts `none_below=own` turns away, with seven real tasks and MiniLM: results/nobody.json.

    python scripts/nobody.py [seeds=0,1,2]

An expert of each task knows 100 of its training prompts, as `moesaic compose` takes them; no language model is run.
The tasks are folders of ../shared/data/tasks (or MOESAIC_DATA).
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import moesaic
from moesaic.adapters.prompts import PromptConfig, encoder_of
from moesaic.data import examples
from moesaic.data.causal import question
from moesaic.runs.results import command_line, versions
from moesaic.training.heads import TEXTS

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("MOESAIC_DATA") or ROOT.parent / "shared" / "data") / "tasks"
TASKS = ("arc_challenge", "arc_easy", "boolq", "cola", "gsm8k", "openbookqa", "sst2")
METHODS = {"retrieval": moesaic.RetrievalConfig, "glider": moesaic.GliderConfig}
ASKED = 200
"""Held-out prompts a task."""


def vectors(split: str, seed: int, count: int) -> dict[str, torch.Tensor]:
    found = {}
    for task in TASKS:
        prompts = sorted({question(row) for row in examples.load(str(DATA), split, tasks=[task])})
        found[task] = encoder_of("minilm")(random.Random(seed).sample(prompts, min(count, len(prompts))))
    return found


Vectors = dict[str, torch.Tensor]


def shares(config: type[PromptConfig], known: Vectors, asked: Vectors) -> dict[str, Any]:
    """By expert: the share of its own task's held-out prompts that it takes, and of every other task's."""
    found = {}
    for expert, rows in known.items():
        floor = config.floor_of(rows)
        library = torch.nn.functional.normalize(rows.mean(dim=0, keepdim=True), dim=-1) if config.by_mean else rows
        nearest = {task: (queries @ library.t()).amax(dim=-1) for task, queries in asked.items()}
        taken = {task: float((cosines >= floor).float().mean()) for task, cosines in nearest.items()}
        found[expert] = {"own": taken.pop(expert), "others": taken}
    return found


def main() -> None:
    given = dict(text.split("=", 1) for text in sys.argv[1:])
    seeds = [int(seed) for seed in given.get("seeds", "0,1,2").split(",")]
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {method: {} for method in METHODS}
    for seed in seeds:
        known, asked = vectors("train", seed, TEXTS), vectors("validation", seed, ASKED)
        for method, tables in cells.items():
            for expert, row in shares(METHODS[method], known, asked).items():
                tables.setdefault(expert, []).append(row)
    table = {
        method: {
            expert: {
                "own": [row["own"] for row in rows],
                "others": {task: statistics.mean(row["others"][task] for row in rows) for task in rows[0]["others"]},
            }
            for expert, rows in tables.items()
        }
        for method, tables in cells.items()
    }
    content = {"seeds": seeds, "asked": ASKED, "known": TEXTS, "taken": table}
    content |= {"command": f"python scripts/{command_line()}", "versions": versions()}
    (ROOT / "results" / "nobody.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
