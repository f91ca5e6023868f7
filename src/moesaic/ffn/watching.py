"""What runs through the feed-forward layers of a dense model, seen by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.errors import ConfigError
from moesaic.ffn.split import seats

Text = Mapping[str, Tensor]
"""By domain, rows (n, T) of token ids."""


def batches_of(rows: Tensor, size: int) -> Iterator[dict[str, Tensor]]:
    """Rows (n, T) of whole tokens in batches of `size`."""
    return ({"input_ids": batch} for batch in rows.split(size))


def check_reads_text(model: PreTrainedModel) -> None:
    """Raise ConfigError for models of which text alone does not run every feed-forward layer."""
    if model.config.is_encoder_decoder or model.config.get_text_config() is not model.config:
        raise ConfigError(
            f"{type(model).__name__} is made of several parts, not all of which read text: give one that is a language "
            "model alone"
        )


@contextmanager
def watching(model: PreTrainedModel, hook: Callable[..., Any], *, first: bool = False) -> Iterator[None]:
    """Inside, `hook(seat, module, args)` runs before the last linear of every layer, or before its `first`.

    Raises:
        ConfigError: for models that `check_reads_text` refuses.
    """
    check_reads_text(model)
    handles = [
        model.get_submodule(f"{seat.name}.{seat.first[0] if first else seat.last}").register_forward_pre_hook(
            partial(hook, seat)
        )
        for seat in seats(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside, and what there was before afterwards."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def tokens_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A batch's ids and which of them are real, both (B, T), where the model is."""
    ids, real = batch["input_ids"].to(model.device), batch.get("attention_mask")
    return ids, torch.ones_like(ids, dtype=torch.bool) if real is None else real.to(ids.device).bool()
