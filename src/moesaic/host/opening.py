"""A frame as it opens: what the model was called with, which tokens are given, and what its cache holds of others."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moesaic.host import masks
from moesaic.host.carrier import share_of_step
from moesaic.host.frames import Frame
from moesaic.host.memory import CachedSums, Memory, memory_of
from moesaic.host.paged import Paged, is_paged
from moesaic.host.prompts import Prompt
from moesaic.routing import TokenSums

NEGATIVE = (
    "generate runs a second sequence (a negative prompt) without a cache, where its prompt and answer cannot be told "
    "apart: routing by the prompt counts both. Let generate use its cache"
)


class Known(Protocol):
    """Whoever knows what was opened around the forward, and what routers ask."""

    told: Any
    pinned_tasks: Any
    pinned_scores: Any
    traces: Any
    readers: Any
    batched: frozenset[tuple[int, ...]]

    def asks(self, what: str, /) -> bool: ...


def of_stack(stack: nn.Module, known: Known) -> Frame:
    """A stack that is called on its own: T5's encoder in `generate`, a vision tower before the model is called."""
    frame = _frame(stack, known)
    frame.parts = None if known.told is None else known.told.parts
    return frame


def of_model(model: nn.Module, arguments: Mapping[str, Any], known: Known) -> Frame:
    frame, past = _frame(model, known), masks.past_length(arguments)
    frame.labelled = arguments.get("labels") is not None
    frame.share = share_of_step(model, arguments)
    frame.complete = arguments.get("encoder_outputs") is None and isinstance(past, int) and past == 0
    frame.tokens, frame.parts = masks.num_tokens(arguments), masks.parts_of(model, arguments)
    frame.prompt = masks.unlabelled(model, arguments)
    frame.keeps = not torch.compiler.is_compiling() and not (frame.training and frame.grad)
    if is_paged(arguments):
        frame.keeps = False
        if known.asks("by_prompt"):
            frame.paged = Paged(arguments, known.batched)
            frame.prompt, frame.sums = frame.paged.prompt, frame.paged.sums
    elif frame.keeps:
        assert not isinstance(past, torch.Tensor)  # only a compiled forward's is
        _remember(frame, model, arguments, past, known)
    return frame


def _frame(module: nn.Module, known: Known) -> Frame:
    # Made by name here: torch.compile cannot call a dataclass's default factory that is a class.
    made = Memory(), TokenSums()
    frame = Frame(training=module.training, grad=torch.is_grad_enabled(), memory=made[0], sums=made[1])
    frame.task_ids, frame.scores = known.pinned_tasks, known.pinned_scores
    return frame


def _judged(
    memory: Memory, arguments: Mapping[str, Any], past: int | None, told: Prompt, *, cached: bool
) -> Prompt | None:
    """The prompt that `generate` was told, if it is this sequence's."""
    if not cached or memory.judged is not told:
        ids = arguments.get("input_ids")
        its = told.begins(
            ids if isinstance(ids, Tensor) and ids.dim() == 2 else None, memory.length if past is None else past
        )
        if not its and not cached:
            warnings.warn(NEGATIVE, stacklevel=2)
        memory.judged, memory.prompt = told, told if its else None
    return memory.prompt


def _remember(frame: Frame, model: nn.Module, arguments: Mapping[str, Any], past: int | None, known: Known) -> None:
    """Go on from what the cache's tokens came to; tokens behind the prompt are answers."""
    told = known.told
    cache, has_encoder = masks.cache_of(arguments), masks.is_encoder_decoder(model)
    if cache is not None:
        frame.memory = memory_of(cache)
    frame.told = told
    if told is not None and not has_encoder:
        frame.told = _judged(frame.memory, arguments, past, told, cached=cache is not None)
    length = None if frame.told is None or has_encoder else frame.told.length
    count = frame.memory.open(past, frame.tokens, length)
    frame.answering = frame.tokens is not None and count == 0
    frame.sums = CachedSums(frame.memory, answering=frame.answering)
    is_seen = frame.training or known.traces or known.readers or known.asks("by_prompt")
    if frame.prompt is None and not has_encoder and is_seen:
        frame.prompt = masks.leading(count, arguments)
