"""The files of scores that a cell is taken at its word for, if they are of the planned rows and agree."""

import json
import math
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError
from moesaic.runs.folder import read_json, reading


def is_of(file: Path, rows_sha256: str, *, base: bool) -> bool:
    """Whether an `eval-<split>.json` is there and of these rows, with the untrained base where that is wanted.

    One that cannot be read counts as such: it is for `mean_of` to refuse.
    """
    if not file.is_file():
        return False
    try:
        found = read_json(file)
    except ConfigError:
        return True
    return found.get("data_sha256") == rows_sha256 and (not base or "base_mean" in found)


def mean_of(file: Path, predictions: Path) -> float:
    """The mean score in an `eval-<split>.json`.

    Raises:
        ConfigError: a figure in it cannot be, or is not what the others, or the predictions, come to.
    """
    found = read_json(file)
    with reading(file):
        correct = _correct(predictions)
        tasks: dict[str, dict[str, Any]] = found["tasks"]
        if tasks.keys() != correct.keys():
            raise ConfigError(f"{file} is damaged: its tasks are not those of {predictions.name}")
        for task, figures in tasks.items():
            for key, value in figures.items():
                if key not in ("metric", "n"):
                    _check_number(f"{file}: {key} of {task}", value, least=-1 if key.endswith("matthews") else 0)
            rows = correct[task]
            if figures["n"] != len(rows) or not _equal(figures["score"], sum(rows) / len(rows)):
                raise ConfigError(f"{file} is damaged: n and score of {task} are not those of {predictions.name}")
        for prefix in ("", "base_") if "base_mean" in found else ("",):
            _check_number(f"{file}: {prefix}mean", found[f"{prefix}mean"], least=0)
            if not _equal(found[f"{prefix}mean"], sum(f[f"{prefix}score"] for f in tasks.values()) / len(tasks)):
                raise ConfigError(f"{file} is damaged: {prefix}mean is not the mean of the tasks' {prefix}score")
        return float(found["mean"])


def _correct(predictions: Path) -> dict[str, list[bool]]:
    """By task, which rows were answered right."""
    found: dict[str, list[bool]] = {}
    with reading(predictions):
        for line in predictions.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if not isinstance(row["correct"], bool):
                raise TypeError("'correct' must be true or false")
            found.setdefault(row["task"], []).append(row["correct"])
    return found


def _check_number(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 1:
        raise ConfigError(f"{name}={value!r} must be a number from {least} to 1")


def _equal(one: float, other: float) -> bool:
    return math.isclose(one, other, abs_tol=1e-9)
