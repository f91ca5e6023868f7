"""What both acts of the demo do: train a run or find it trained, and say figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.cli.demo.settings import DemoSettings
    from moesaic.data.examples import Example
    from moesaic.runs.recipe import Recipe
    from moesaic.training.prepared import Prepared

TARGETS = ["gate_proj", "up_proj", "down_proj"]


def recipe_of(
    method: str,
    out: Path,
    data: Path,
    settings: DemoSettings,
    *,
    steps: int,
    adapter: dict[str, Any],
    batch_size: int = 48,
    **more: Any,
) -> Recipe:
    """A run on the demo's lists."""
    from moesaic.runs.recipe import Recipe

    return Recipe(
        method=method,
        model="nano",
        data=str(data),
        out=str(out),
        steps=steps,
        batch_size=batch_size,
        lr=settings.lr,
        warmup=min(20, steps // 4),
        max_length=64,
        seed=settings.seed,
        save_every=50,
        adapter=adapter,
        **more,
    )


def trained(recipe: Recipe) -> dict[str, Any]:
    """The results of a recipe's run, which is trained unless it is there already."""
    from moesaic.runs.folder import RunFolder, read_json
    from moesaic.training.run import train

    folder = RunFolder(recipe.run_folder())
    return read_json(folder.results) if folder.finished else train(recipe, progress=False)


def answers_of(prepared: Prepared, rows: list[Example]) -> dict[str, tuple[float, str]]:
    """By task: the share of rows that are right, and what is said to the first."""
    from moesaic.evaluation.answers import answer

    return {
        task: (sum(row.correct for row in found) / len(found), str(found[0].predicted).strip())
        for task, found in answer(prepared, rows, batch_size=150).items()
    }


def mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def standard_error(first: float, second: float, rows: int) -> float:
    """Of the difference of two shares of as many rows each."""
    return math.sqrt((first * (1 - first) + second * (1 - second)) / rows)


def level(first: float, second: float, rows: int) -> bool:
    """Whether two shares differ by less than two standard errors."""
    return abs(first - second) <= 2 * standard_error(first, second, rows)
