"""Parameters of which FSDP has a part on each rank, read outside the layer that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter; its gradient is the mean over ranks, as FSDP's is, and goes to the parts."""
    gather: Callable[..., Tensor] | None = getattr(parameter, "full_tensor", None)
    if gather is None:
        return parameter
    from torch.distributed.tensor import Partial

    sharded: Any = parameter
    return gather(grad_placements=[Partial("avg")] * sharded.device_mesh.ndim)
