"""What the prompt as a whole says of the experts, for methods that go by it: given, or read off the prompt's tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moesaic.host import masks
from moesaic.host.frames import Frame

Reader = Callable[[Tensor, Tensor | None], Tensor]
"""Routing scores (batch, E) from a forward's token ids (batch, tokens) and which of them are the prompt's."""

ANOTHER = (
    "the beginning of this prompt went through the model when the rest of it was not known, and was routed by itself: "
    "its answer may differ from one to the prompt as a whole. Open moesaic.routing_prompts(model, prompts) around both"
)


def find(frame: Frame, arguments: Mapping[str, Any], reader: Reader | None) -> None:
    """Put the scores into `frame`: those it has, those of the prompt that `generate` answers, or what the cache keeps.

    Without any of these, the ids so far are the prompt, until a token comes alone.
    """
    memory, told, ids = frame.memory, frame.told, arguments.get("input_ids")
    readable = reader is not None and isinstance(ids, Tensor) and not torch.compiler.is_compiling()
    if frame.scores is not None:
        pass
    elif frame.paged is not None:
        frame.scores = frame.paged.scores(ids, reader) if reader and isinstance(ids, Tensor) else None
    elif told is not None and told.scores is None and reader is not None and told.ids is not None:
        frame.scores = told.scores = reader(told.ids, told.mask)
        if memory.scores is not None and not _equal(memory.scores, told.scores):
            warnings.warn(ANOTHER, stacklevel=2)
    elif told is not None and told.scores is not None:
        frame.scores = told.scores
    elif memory.scores is not None and (frame.answering or not readable):
        frame.scores = memory.scores
    elif readable:
        assert reader is not None
        real = masks.two_d(arguments.get("attention_mask"), masks.num_tokens(arguments))
        memory.ids.append((ids, masks.given(frame.prompt, real, None, labels=frame.labelled)))  # type: ignore[arg-type]
        frame.scores = reader(*_joined(memory.ids))
        if memory.scores is not None and not _equal(memory.scores, frame.scores):
            warnings.warn(ANOTHER, stacklevel=2)
    memory.scores = frame.scores if frame.paged is None else None


def _joined(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    ids = torch.cat([part for part, _ in parts], dim=1)
    if all(real is None for _, real in parts):
        return ids, None
    return ids, torch.cat([torch.ones_like(part).bool() if real is None else real for part, real in parts], dim=1)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other.to(one))
