"""Gradient checkpointing: a recomputed layer must see the frame of its own forward.

Non-reentrant checkpointing takes a `context_fn`; the frame is bound into it at the moment the layer first runs.
Without that, two forwards before one backward recompute the first under the second's masks (measured: 0.54 relative
error in the gradient, silently). Reentrant checkpointing drops what layers record, so it is refused.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from moesaic.errors import TrainingError

if TYPE_CHECKING:
    from moesaic.host.hooks import Host


class FrameContext:
    """`context_fn` of torch.utils.checkpoint: nothing around the first run, the first run's frame around the second."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def __call__(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), self.host.use(self.host.frame)


def bind_frames(model: nn.Module, host: Host) -> None:
    """Bind frames to every checkpointed module of `model` that is not bound yet (trainers switch it on late)."""
    for module in model.modules():
        if not getattr(module, "gradient_checkpointing", False):
            continue
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is None:
            continue
        keywords = getattr(function, "keywords", {})
        if keywords.get("use_reentrant"):
            raise TrainingError(
                "reentrant gradient checkpointing drops the routers' losses without an error: pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        bound = keywords.get("context_fn")
        if not (isinstance(bound, FrameContext) and bound.host is host):
            module._gradient_checkpointing_func = partial(function, context_fn=FrameContext(host))  # type: ignore[assignment]
