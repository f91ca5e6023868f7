"""The heads of encoders that adapters were trained with, united: an expert answers its task with its own head.

A run of `moesaic train` on an encoder keeps, beside its LoRA, heads for its tasks: one for each set of labels, and one
scorer for all tasks whose choices vary. United, each task has the head it was trained with, and a task that none was
trained on the scorer that training starts from, the cosine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from moesaic.data.causal import question
from moesaic.data.examples import Example
from moesaic.errors import AdapterError, ConfigError
from moesaic.lora.stored import StoredExpert
from moesaic.models.encoder import HEADS, EncoderForTasks, Layout
from moesaic.runs.folder import read_json

TEXTS = 100
"""Prompts that stand for an expert."""

_PREFIX = f"base_model.model.{HEADS}."
_NAMES = ("weight", "bias", "diagonal", "log_scale")


def united(experts: Sequence[StoredExpert], tasks: Sequence[str] = ()) -> Layout:
    """The layout of all experts' tasks and of others.

    Raises:
        AdapterError: an expert has no heads of this kind, or two have heads for one task.
    """
    owners: dict[str, StoredExpert] = {}
    labels: dict[str, tuple[str, ...]] = {}
    scorers: dict[str, int] = {}
    for number, expert in enumerate(experts, 1):
        layout = layout_of(expert)
        for task in layout.tasks:
            if task in owners:
                raise AdapterError(
                    f"{owners[task].folder} and {expert.folder} both have a head for task {task!r}: take one of them"
                )
            owners[task] = expert
            if task in layout.labels:
                labels[task] = layout.labels[task]
            else:
                scorers[task] = number
    return Layout(tuple(sorted({*owners, *tasks})), dict(sorted(labels.items())), scorers)


def layout_of(expert: StoredExpert) -> Layout:
    """Which heads an expert was trained with."""
    file = expert.folder.parent / "layout.json"
    lacking = [name for name in _NAMES if _PREFIX + name not in expert.extras]
    if lacking or not file.is_file():
        raise AdapterError(
            f"{expert.folder} is no adapter of a `moesaic train` run on an encoder, so its tasks have no heads here: "
            "name such runs"
        )
    try:
        return Layout.from_dict(read_json(file))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AdapterError(f"{file} is damaged: {error}") from None


def tasks_of(expert: StoredExpert) -> tuple[str, ...]:
    """The tasks that an expert was trained on: those of its run, else the one of its name."""
    file = expert.folder.parent / "layout.json"
    found = read_json(file).get("tasks") if file.is_file() else None
    return tuple(map(str, found)) if isinstance(found, list) else (expert.name,)


def task_ids(experts: Sequence[StoredExpert], tasks: Sequence[str]) -> list[int] | None:
    """Each expert's task as a position in `tasks`; None unless every expert has exactly one of them."""
    own = [tasks_of(expert) for expert in experts]
    known = all(len(found) == 1 and found[0] in tasks for found in own)
    return [tasks.index(found[0]) for found in own] if known else None


def texts_of(experts: Sequence[StoredExpert], examples: Sequence[Example], *, seed: int) -> dict[str, list[str]] | None:
    """Prompts of each expert's tasks, `TEXTS` of them at most, by its name; None where there are no rows at all.

    Raises:
        ConfigError: some experts have rows, and another has none.
    """
    if not examples:
        return None
    found = {}
    for expert in experts:
        own = set(tasks_of(expert))
        prompts = sorted({question(e) for e in examples if e.task in own})
        found[expert.name] = random.Random(seed).sample(prompts, min(TEXTS, len(prompts)))
    lacking = next((name for name, prompts in found.items() if not prompts), None)
    if lacking is not None:
        tasks = ", ".join(sorted({e.task for e in examples}))
        raise ConfigError(
            f"there are no rows of adapter {lacking!r}: those of data are of {tasks}; an adapter is named as its task, "
            "'adapters={TASK: FOLDER, …}'"
        )
    return found


@torch.no_grad()
def load(model: EncoderForTasks, experts: Sequence[StoredExpert]) -> None:
    """Give a model of the united layout the heads that its experts were trained with."""
    heads: Any = model.task_heads
    for number, expert in enumerate(experts, 1):
        layout = layout_of(expert)
        weight, bias, diagonal, log_scale = expert.tensors([_PREFIX + name for name in _NAMES])
        for own, task in enumerate(layout.labels):
            row, size = list(model.layout.labels).index(task), len(layout.labels[task])
            heads.weight[row, :size], heads.bias[row, :size] = weight[own, :size], bias[own, :size]
        if number in model.layout.scorers.values():
            heads.diagonal[number], heads.log_scale[number] = diagonal[0], log_scale[0]
