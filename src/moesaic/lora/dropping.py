"""Dropout (Srivastava et al. 2014) of a block's input, drawn once for all linears that read it.

On a CPU most of dropout's time is its random numbers: 16 bits an element do, off 64-bit numbers that are drawn whole.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_LEVELS = 2**16


def drop(z: Tensor, p: float) -> Tensor:
    """Each element 0 with probability p, to 2^-17, or else divided by what is kept on average."""
    level = round(p * _LEVELS)
    if not z.is_cpu or torch.compiler.is_compiling() or not 0 < level < _LEVELS:
        return F.dropout(z, p, training=True)
    return cast(Tensor, _Drop.apply(z, level))


def drop_once(z: Tensor, p: float, of: Tensor, passed: MutableMapping[Any, Any] | None) -> Tensor:
    """`drop`, drawn once for all that read the same tensor.

    Args:
        z: `of` itself, or in another dtype.
        passed: the forward's `RoutingContext.state`; None outside of one.
    """
    if passed is None or torch.compiler.is_compiling():
        return drop(z, p)
    # What checkpointing runs again within a backward draws for itself, in the order of the first time.
    what = 0 if of.is_inference() else of._version, torch.is_grad_enabled(), torch._C._current_graph_task_id()
    key = drop, p, z.dtype
    made = passed.get(key)
    if made is None or made[0] is not of or made[1] != what:
        passed[key] = made = of, what, drop(z, p)
    return cast(Tensor, made[2])


def kept(shape: torch.Size, level: int) -> Tensor:
    """True with probability 1 - level / 2^16."""
    count = shape.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return bits.view(torch.int16)[:count].view(shape) >= level - _LEVELS // 2


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, level: int) -> Tensor:
        mask = kept(z.shape, level)
        ctx.save_for_backward(mask)
        ctx.share = 1 - level / _LEVELS
        return torch.where(mask, z, 0).div_(ctx.share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, grad, 0).div_(ctx.share), None
