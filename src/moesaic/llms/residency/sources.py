"""Local models that an engine may load: what they take, known before, and how they are loaded and moved.

Before a load, models that were evicted are collected: modules and hooks that know each other would keep them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """A model that can be loaded.

    Attributes:
        bytes: that it takes in memory, as its files say.
        load: loads it into ordinary memory; called in a thread.
        measure: bytes that a loaded one takes.
        move: takes a loaded one to a device, "cpu" for back; called in a thread.
    """

    bytes: int
    load: Callable[[], Any]
    measure: Callable[[Any], int]
    move: Callable[[Any, str], object]


def of_run(folder: str | Path) -> Source:
    """A run, a composition or an adapter, as `moesaic serve` takes it: loaded, a `Prepared`.

    Raises:
        MoesaicError: of the kind that fits, where a file is missing, damaged or another run's.
    """
    from moesaic.evaluation.opening import load, open_adapter
    from moesaic.models.precision import numerics

    opened = open_adapter(folder)
    taken = _outline_bytes(opened.recipe.model, numerics(opened.recipe.precision).weights)
    trained = 4 * int(opened.trained.get("trainable_parameters", 0))  # PEFT keeps adapters in float32

    def loaded() -> Any:
        gc.collect()
        prepared = load(opened)
        _move(prepared, "cpu")
        return prepared

    return Source(taken + trained, loaded, held_bytes, _move)


def of_base(name: str) -> Source:
    """A base model by its name or folder, as it is, in float32: loaded, a `LoadedModel`. Raises ConfigError."""
    import torch

    from moesaic.models.embedded import load_model

    def loaded() -> Any:
        gc.collect()
        return load_model(name)

    return Source(_outline_bytes(name, torch.float32), loaded, held_bytes, _move)


def held_bytes(loaded: Any) -> int:
    """Of a loaded model's parameters and buffers, shared ones once."""
    parts = [*loaded.model.parameters(), *loaded.model.buffers()]
    return sum(part.numel() * part.element_size() for part in parts)


def _outline_bytes(name: str, dtype: Any) -> int:
    """Of a base model in a type of numbers, read off its configuration."""
    from moesaic.models.embedded import load_outline

    outline = load_outline(name).model
    buffers = sum(part.numel() * part.element_size() for part in outline.buffers())
    return int(sum(part.numel() for part in outline.parameters()) * dtype.itemsize + buffers)


def _move(loaded: Any, device: str) -> None:
    loaded.model.to(device)
