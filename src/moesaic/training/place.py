"""Where a run is written, and whether what is there already stands in its way or is gone on with."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import Any

from moesaic.errors import ConfigError
from moesaic.runs.folder import RunFolder, check_writable, read_json
from moesaic.runs.recipe import Recipe
from moesaic.training.prepared import load_examples

logger = logging.getLogger(__name__)


def check_place(folder: RunFolder, *, overwrite: bool, longer: bool = False) -> None:
    """Refuse, before anything is read, a place that `RunFolder.prepared` would refuse in the end, and several ranks."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a run is one process: for several, start a script with a trainer of your own by torchrun "
            "(docs/training.md, Several processes)"
        )
    path = folder.path
    check_writable(path.absolute(), f"out={path}")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"out={path} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not folder.recipe.is_file():
        raise ConfigError(f"out={path} holds files that are not a run's; name another folder")
    if folder.finished and not overwrite and not longer:
        raise ConfigError(
            f"{path} holds a finished run; more steps=… go on with it, overwrite=true replaces it, out=… goes elsewhere"
        )


def is_longer(folder: RunFolder, recipe: Recipe) -> bool:
    """Whether more steps are asked of a finished run than it took.

    Raises:
        ConfigError: the checkpoint that it ended with is gone, or it was trained on other data.
        DataError: the data that is asked for now cannot be read.
    """
    if recipe.overwrite or not folder.finished or not folder.recipe.is_file():
        return False
    _check_data(folder, recipe)
    done = read_json(folder.results).get("steps")
    if recipe.resume == "never" or not isinstance(done, int) or not 0 < done < recipe.steps:
        return False
    if done > max(folder.steps(), default=0):
        raise ConfigError(
            f"{folder.path} holds a finished run of {done} steps without the checkpoint that it ended with: "
            f"overwrite=true makes all {recipe.steps} steps anew, out=… elsewhere"
        )
    return True


def _check_data(folder: RunFolder, recipe: Recipe) -> None:
    """A mistake in `data` is told before anyone is led to replace the run."""
    before = recipe.data
    with suppress(ConfigError):  # a recipe that is damaged names no data
        before = folder.load(str(folder.recipe)).data
    if before != recipe.data:
        load_examples(recipe)
        raise ConfigError(
            f"{folder.path} holds a finished run with data={before}, now {recipe.data}; overwrite=true replaces it, "
            "out=… goes elsewhere"
        )


def tell_longer(folder: RunFolder, recipe: Recipe, step: int) -> None:
    """Say that a finished run is gone on with, and what it is not."""
    bent = (
        f"; from here on lr is schedule={recipe.schedule}'s over {recipe.steps} steps, so the result is not that of "
        f"one run of {recipe.steps}"
    )
    bent = "" if recipe.schedule.startswith("constant") else bent
    logger.warning("%s: going on from step %d to %d%s", folder.path, step, recipe.steps, bent)


def plain(recipe: Any) -> dict[str, Any]:
    """The recipe's description as it reads after a trip through YAML."""
    from omegaconf import OmegaConf

    described = OmegaConf.to_container(OmegaConf.create(recipe.describes()))
    assert isinstance(described, dict)
    return {str(k): v for k, v in described.items()}
