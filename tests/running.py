"""Short runs of tiny models, by the settings that tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesaic.runs.recipe import load_recipe
from moesaic.training.run import train

STEPS = 6


def settings(world: Path, kind: str, out: Path, *more: str) -> list[str]:
    """Of a run on a model and data of `tiny_folders.write_world`."""
    places = [f"model={world / kind}", f"data={world / f'{kind}-data'}", f"out={out}"]
    how = [f"steps={STEPS}", "batch_size=4", "warmup=2", "lr=0.01", "save_every=2", "adapter.lora_dropout=0.1"]
    return [*places, *how, *more]


def run(recipe: str, world: Path, kind: str, out: Path, *more: str, **how: Any) -> dict[str, Any]:
    return train(load_recipe(recipe, settings(world, kind, out, *more)), **how)
