"""Folds of many routers at once: what their parameters come to, with the kernels of about one router."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Fold = tuple[Tensor, Tensor]
Folding = Callable[..., tuple[list[Tensor], list[Tensor]]]


def batched(fold: Folding, parameters: list[tuple[Tensor, ...]]) -> list[Fold]:
    """The folds of R routers from their parameters, with the kernels of about one."""
    count = len(parameters)
    made = _Batched.apply(fold, count, *(p for alike in zip(*parameters, strict=True) for p in alike))
    return list(zip(made[:count], made[count:], strict=True))


class _Batched(torch.autograd.Function):
    """Differentiated by a graph of its own, so that parameters of routers that went unused get no gradient.

    And so that nothing is saved by autograd: gradient checkpointing must find its second run to save what the first
    one did, but the second finds the folds in the context's state.
    """

    @staticmethod
    def forward(ctx: Any, fold: Folding, count: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        wanted = any(ctx.needs_input_grad)
        runs = [
            [_stack(list(run)).requires_grad_(wanted) for _, run in groupby(parameters[i : i + count], key=_shape)]
            for i in range(0, len(parameters), count)
        ]
        with torch.set_grad_enabled(wanted), torch.autograd.graph.saved_tensors_hooks(_as_is, _as_is):
            made = [m for results in fold(*runs) for m in results]
        ctx.leaves, ctx.made, ctx.count = [leaf for run in runs for leaf in run], made, count
        ctx.set_materialize_grads(False)
        return tuple(part for m in made for part in _unstack(m.detach()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        made, count, outputs, start = ctx.made, ctx.count, [], 0
        for m in made:
            given, start = grads[start : start + len(m)], start + len(m)
            outputs.append(_stack([torch.zeros_like(m[0]) if g is None else g for g in given]))
        inner = torch.autograd.grad(made, ctx.leaves, outputs, retain_graph=True)
        used = [grads[i] is not None or grads[count + i] is not None for i in range(count)]
        parts = enumerate(part for g in inner for part in _unstack(g))
        wanted = ctx.needs_input_grad[2:]
        return None, None, *(part if wanted[i] and used[i % count] else None for i, part in parts)


def _shape(t: Tensor) -> torch.Size:
    return t.shape


def _stack(run: list[Tensor]) -> Tensor:
    """(n, ...) in at least float32."""
    return at_least_fp32(torch.cat(run)).view(len(run), *run[0].shape)


def _unstack(t: Tensor) -> tuple[Tensor, ...]:
    return t.flatten(0, 1).split_with_sizes([t.shape[1]] * len(t))


def _as_is(t: Tensor) -> Tensor:
    return t


def at_least_fp32(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float64) else t.float()
