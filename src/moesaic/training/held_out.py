"""Held-out loss while a run trains, and the adapter at its least."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from moesaic.data import examples as data
from moesaic.errors import DataError, first_line, path_of
from moesaic.runs.recipe import Recipe

ROWS = 256
"""At most so many rows are held out; of more, a sample that is the same for every seed."""
BEST = "best.safetensors"


def load_held_out(recipe: Recipe, tasks: Collection[str]) -> list[data.Example]:
    """The rows of the data's validation split that `eval_every` scores, of the tasks that are trained.

    Raises:
        DataError: there are none; the message says how to have some.
    """
    asked, place = f"eval_every={recipe.eval_every}", path_of(recipe.data)
    if place.is_file() or (place.is_dir() and not data.has_split(place, "validation", recipe.tasks)):
        raise DataError(
            f"{asked} needs rows that are not trained on, and data={recipe.data} has no validation split: put "
            "train.jsonl and validation.jsonl into one folder and name that, or leave eval_every out"
        )
    try:
        found = data.load(recipe.data, "validation", tasks=recipe.tasks, on_bad_lines=recipe.on_bad_lines)  # type: ignore[arg-type]
    except DataError as error:
        raise DataError(f"{asked} reads the validation split: {first_line(error)}") from None
    found = [example for example in found if example.task in tasks]
    if not found:
        raise DataError(f"{asked}: no row of data={recipe.data}'s validation split is of {', '.join(sorted(tasks))}")
    if len(found) <= ROWS:
        return found
    return [found[i] for i in sorted(random.Random(0).sample(range(len(found)), ROWS))]


class HeldOut:
    """Batches that are scored alike every time, and what they tell.

    Args:
        rows: what `collate` takes.
        by_token: every labelled token counts alike, as in a causal model's loss; else every row.
    """

    def __init__(
        self, rows: Sequence[Any], collate: Callable[[Any], dict[str, Tensor]], *, batch_size: int, by_token: bool
    ) -> None:
        self.batches = [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
        self.by_token = by_token

    @torch.no_grad()
    def loss(self, trainer: Any) -> float:
        """The mean loss of a trainer's model in evaluation mode; the training's random numbers stay as they are."""
        total, counted = 0.0, 0
        devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            for batch in self.batches:
                labels = batch["labels"]
                number = int((labels[:, 1:] >= 0).sum()) if self.by_token else len(labels)
                inputs = trainer._prepare_inputs(dict(batch))
                with trainer.compute_loss_context_manager():
                    total += number * float(trainer.compute_loss(trainer.model_wrapped, inputs))
                counted += number
        return total / max(counted, 1)


@dataclass(frozen=True)
class Best:
    """The adapter as it was when its held-out loss was least. Checkpoints carry it, so that a resumed run knows it."""

    step: int
    loss: float
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, model: Any, step: int, loss: float) -> Best:
        from peft import get_peft_model_state_dict

        held = get_peft_model_state_dict(model, save_embedding_layers=False)
        return cls(step, loss, {name: value.detach().to("cpu", copy=True) for name, value in held.items()})

    def write(self, folder: Path) -> None:
        save_file(self.weights, folder / BEST, metadata={"step": str(self.step), "loss": repr(self.loss)})

    @classmethod
    def read(cls, folder: Path) -> Best:
        """Raises whatever damage makes."""
        with safe_open(folder / BEST, framework="pt") as file:
            told = file.metadata()
            weights = {name: file.get_tensor(name) for name in [*file.keys()]}
            return cls(int(told["step"]), float(told["loss"]), weights)

    def put_back(self, model: Any) -> None:
        """Make the model's adapter this one."""
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, self.weights)


class Evaluates(TrainerCallback):
    """Asks for an evaluation every so many steps, and after the last."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = state.global_step % self.every == 0 or state.global_step == state.max_steps
