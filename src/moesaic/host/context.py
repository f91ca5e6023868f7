"""What a user opens around a model: a trace of the routing, or fixed task ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.host.fitting import checked_ids, checked_scores
from moesaic.host.hooks import find_host
from moesaic.host.prompts import Prompt
from moesaic.routing import RoutingTrace


@contextmanager
def trace(model: nn.Module, *, keep_weights: bool = False) -> Iterator[RoutingTrace]:
    """Record what the routers of `model` do.

        with moesaic.trace(model) as t:
            model.generate(...)
        t.utilisation(), t.entropy(), t.dead_experts()

    Args:
        keep_weights: also keep every weight tensor (see `RoutingTrace.weights`).
    """
    host = find_host(model)
    names = next((host.names[adapter] for adapter in host.active() if adapter in host.names), [])
    collected = RoutingTrace(keep_weights=keep_weights, names=names)
    host.traces.append(collected)
    try:
        yield collected
    finally:
        host.traces.remove(collected)


@contextmanager
def routing_tasks(model: nn.Module, *, task_ids: Tensor | Sequence[int]) -> Iterator[None]:
    """Fix the task ids (batch,) that routers and traces see, where they cannot be passed as a batch key.

    with moesaic.routing_tasks(model, task_ids=[0, 0, 1]):
        model.generate(...)
    """
    host = find_host(model)
    try:
        ids = torch.as_tensor(task_ids)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"task_ids={task_ids!r} must be whole numbers, one a row") from None
    previous, host.pinned_tasks = host.pinned_tasks, checked_ids(ids, "task_ids")
    try:
        yield
    finally:
        host.pinned_tasks = previous


@contextmanager
def routing_scores(model: nn.Module, scores: Tensor) -> Iterator[None]:
    """Fix what the prompts say of the experts (batch, E), for methods that route by the prompt as a whole.

    with moesaic.routing_prompts(model, prompts):  # computes them
        model.generate(...)
    """
    host = find_host(model)
    previous, host.pinned_scores = host.pinned_scores, checked_scores(scores, "scores")
    try:
        yield
    finally:
        host.pinned_scores = previous


@contextmanager
def routing_prompt_length(model: nn.Module, length: int) -> Iterator[None]:
    """Tell methods that route by the prompt where it ends, in a decoding loop of your own: `generate` knows by itself.

        with moesaic.routing_prompt_length(model, input_ids.shape[1]):
            ...  # chunks, guesses, no cache: what comes behind `length` tokens is an answer

    Args:
        length: tokens a row, padding and what is in the cache included.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ConfigError(f"routing_prompt_length={length!r} must be a whole number of tokens, at least 1")
    host = find_host(model)
    previous, host.told = host.told, Prompt(length)
    try:
        yield
    finally:
        host.told = previous


def set_training_progress(model: nn.Module, progress: float) -> None:
    """Tell methods that change over the training how far it is, from 0 to 1: in a loop of your own, before each step.

    `RoutedTrainerMixin` does it. Where nobody does, they act as at the end of it.
    """
    if not isinstance(progress, (int, float)) or not 0 <= progress <= 1:
        raise ConfigError(f"progress={progress!r} must be between 0 and 1: the share of the training that is done")
    find_host(model).progress = progress


def router_aux_loss(model: nn.Module) -> Tensor | None:
    """Auxiliary loss of the last training forward, for loops that compute their loss from logits; None without one.

    It is already weighted: add it to the loss as it is. Taking it twice gives None.
    """
    return find_host(model).take_aux()
