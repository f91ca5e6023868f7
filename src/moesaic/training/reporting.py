"""Where else a run's figures go: Transformers' integrations with TensorBoard, Weights & Biases and others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesaic.errors import ConfigError, first_line, suggest
from moesaic.runs.folder import RunFolder


def check_reports(names: Sequence[str] | None) -> None:
    """Raise ConfigError for an integration that Transformers does not have, or whose package is not installed."""
    if not reports(names):
        return
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in reports(names):
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"report_to={name}; {suggest(name, INTEGRATION_TO_CALLBACK)}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except Exception as error:  # each says in its own way what it lacks
            raise ConfigError(f"report_to={name} cannot be used here: {first_line(error)}") from None


def reports(names: Sequence[str] | None) -> list[str]:
    """The integrations that a `report_to` names; `none` is none, as Transformers has it."""
    return [name for name in names or () if name != "none"]


def into_folder(trainer: Any, folder: RunFolder) -> None:
    """Let TensorBoard's files lie in the run folder, where TENSORBOARD_LOGGING_DIR names no other place."""
    from transformers.integrations import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder.path / "tensorboard")
