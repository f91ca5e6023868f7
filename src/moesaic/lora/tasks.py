"""Task ids as a router reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing import RoutingContext

NEVER = -1e4
"""A logit whose softmax is exactly 0 beside one of 0, in float32 as in float64."""


def row_ids(h: Tensor, context: RoutingContext | None, *, limit: int | None, setting: str) -> Tensor:
    """The task id of each row of `h` (rows, ..., d), shaped (rows, 1, ...) to be expanded over tokens.

    Args:
        limit: ids must be below it, where it is given; `setting` names what it comes from.
    Raises:
        ConfigError: there are no task ids, or one that is out of range.
    """
    if context is None or context.task_ids is None:
        raise ConfigError(
            "this method gates by task id: give routing_task_ids in the batch (a Trainer drops that column unless "
            "remove_unused_columns=False), or run inside moesaic.routing_tasks(model, task_ids=[...])"
        )
    ids = context.task_ids
    checked = ("task ids below", limit)
    if limit is not None and not torch.compiler.is_compiling() and checked not in context.state:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= limit:
            raise ConfigError(f"task id {high if high >= limit else low} is not below {setting}={limit}")
        context.state.setdefault(checked, True)
    return ids.to(h.device).view(-1, *[1] * (h.dim() - 2))


def own_expert(h: Tensor, context: RoutingContext | None, task_of: Tensor) -> Tensor:
    """True where an expert is that of the row's task: (rows, 1, ..., E) for `task_of` (E,), each expert's task id.

    Raises:
        ConfigError: there are no task ids, or one of a task that no expert has.
    """
    compiling = torch.compiler.is_compiling()
    ids = row_ids(h, context, limit=None if compiling else int(task_of.max()) + 1, setting="num_experts")
    own = ids.unsqueeze(-1) == task_of
    if not compiling and not bool(own.any(dim=-1).all()):
        stray = int(ids[~own.any(dim=-1)].flatten()[0])
        raise ConfigError(f"no expert was trained on the task of id {stray}")
    return own
