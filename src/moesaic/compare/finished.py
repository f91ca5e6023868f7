"""Cells of a comparison that have ended, and what the files of one hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moesaic.compare.verdicts import Kind
from moesaic.errors import ConfigError, first_line
from moesaic.runs.folder import read_json


@dataclass(frozen=True)
class Cell:
    """One arm with one seed: a run folder, or the reason why there is none; `modules` are those adapted, as a text."""

    arm: str
    method: str
    kind: Kind
    modules: str
    seed: int
    lr: float
    status: Literal["done", "failed", "pending"]
    error: str | None
    folder: Path


@dataclass(frozen=True)
class Run:
    """What a finished cell's files hold. `correct` is each task's rows in order, 1 for right."""

    cell: Cell
    results: dict[str, Any]
    scores: dict[str, Any]
    correct: dict[str, list[int]]
    losses: list[tuple[int, float]]

    @property
    def mean(self) -> float:
        return float(self.scores["mean"])


def read_files(cell: Cell, split: str) -> Run:
    """Read a finished cell's files. Raises ConfigError for one that is missing or damaged."""
    results, scores = read_json(cell.folder / "results.json"), read_json(cell.folder / f"eval-{split}.json")
    file = cell.folder / f"predictions-{split}.jsonl"
    correct: dict[str, dict[int, int]] = {}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            correct.setdefault(row["task"], {})[row["index"]] = int(row["correct"])
        rows = {task: [found[i] for i in range(len(found))] for task, found in correct.items()}
        if {task: len(found) for task, found in rows.items()} != {t: s["n"] for t, s in scores["tasks"].items()}:
            raise ValueError(f"its rows are not those of eval-{split}.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is missing or damaged: {first_line(error)}") from None
    return Run(cell, results, scores, rows, _losses(cell.folder / "metrics.jsonl"))


def _losses(file: Path) -> list[tuple[int, float]]:
    """Task loss by step: what was logged without the auxiliary loss. Empty where there is no log."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [(int(r["step"]), float(r["loss"])) for r in rows if "eval_loss" not in r]
    except (OSError, ValueError, KeyError, TypeError):
        return []
