"""Checkpoints of Transformers' trainers that are whole: a mark is the last file of each, and others are removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesaic.errors import TrainingError, first_line
from moesaic.runs.folder import discard, write_json

MARK = "whole.json"


def marking() -> Any:
    """A callback that marks checkpoints; it comes after all others that write into them."""
    from transformers import TrainerCallback

    class Marking(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARK, {"step": state.global_step})

    return Marking()


def last_whole(place: Path, say: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest that is whole; those that a kill or a full disk left are removed."""
    found = None
    for folder in place.glob("checkpoint-*") if place.is_dir() else ():
        if not (folder / MARK).is_file():
            say(f"{folder} was not written whole, and is removed")
            discard(folder)
        elif found is None or step_of(folder) > step_of(found):
            found = folder
    return found


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def train(trainer: Any, last: Path | None) -> None:
    """Train, from a checkpoint where there is one, and not a step more where that is the last.

    Raises:
        TrainingError: it is damaged.
    """
    from transformers import PrinterCallback, TrainerCallback, TrainerState

    begun = [last is None]

    class Begun(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            begun[0] = True

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Begun())
    try:
        if last is not None and step_of(last) >= trainer.args.max_steps:  # Trainer would make another step
            trainer._load_from_checkpoint(str(last))
            trainer.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        else:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except Exception as error:  # whatever torch, JSON and safetensors make of damage
        if begun[0]:
            raise
        raise TrainingError(
            f"{last} is damaged ({first_line(error)}): remove it to go on from the one before it, or overwrite=true"
        ) from None
