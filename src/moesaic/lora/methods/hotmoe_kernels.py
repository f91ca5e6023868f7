"""What HotMoE's routers compute, in few kernels: folds of many routers at once, and the attention of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

HIDDEN = 4
"""Width of the token-expert MLP, fixed in the authors' code."""

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


def token_attention(columns: Tensor, to_logits: Tensor, to_variance: Tensor) -> tuple[Tensor, ...]:
    """Logits (E, N) of [u, z, 1, 1] (E+6, N), worked on in place, and what the backward needs of them."""
    num_experts = len(columns) - HIDDEN - 2
    value, y = columns.split_with_sizes([num_experts, HIDDEN + 2])
    z = y.relu_()[:-1]
    scale = (z * torch.mm(to_variance, z)).sum(dim=0).rsqrt_()
    z *= scale
    attention = torch.softmax(torch.mm(to_logits, y).view(num_experts, num_experts, -1), dim=0)
    return (attention * value.unsqueeze(1)).sum(dim=0), scale, attention


def by_column(read: Tensor) -> Tensor:
    """[u, z] of tokens (..., E+4) as the columns [u, z, 1, 1] (E+6, N)."""
    return F.pad(read.reshape(-1, read.shape[-1]).t(), (0, 0, 0, 2), value=1.0)


def by_row(folds: Sequence[Fold], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of G token-expert routers' folds: what takes z to [M z, L^T z] (G, 4, E*E+5), its bias, and c (G, 1, E*E).

    L L^T is the variance's quadratic form V, so that std([z, 1]) is the length of L^T [z, 1].
    """
    to_logits, variance = (torch.stack(parts) for parts in zip(*folds, strict=True))
    values, vectors = torch.linalg.eigh(variance.double())
    length = values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.transpose(1, 2)
    both = torch.cat([to_logits[..., :-1], length.to(to_logits.dtype)], dim=1).to(dtype).transpose(1, 2)
    return both[:, :-1], both[:, -1:], to_logits[..., -1].unsqueeze(1).to(dtype)


def token_attention_by_row(read: Tensor, weight: Tensor, bias: Tensor, constant: Tensor) -> Tensor:
    """`token_attention` of G routers that read one input: [u, z] (..., G, E+4) -> logits (..., G, E).

    For few tokens: half the kernels, by routers and then tokens, with experts last.
    """
    num_experts = read.shape[-1] - HIDDEN
    rows = read.reshape(-1, *read.shape[-2:]).transpose(0, 1)
    value, z = rows.split_with_sizes([num_experts, HIDDEN], dim=-1)
    asked, scaled = torch.baddbmm(bias, z.relu(), weight).split_with_sizes([num_experts**2, HIDDEN + 1], dim=-1)
    logits = torch.addcdiv(constant, asked, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True))
    attention = torch.softmax(logits.unflatten(-1, (num_experts, num_experts)), dim=-2)
    return torch.matmul(value.unsqueeze(-2), attention).squeeze(-2).transpose(0, 1).unflatten(0, read.shape[:-2])


class TokenAttention(torch.autograd.Function):
    """Logits (..., E) from values and MLP features, read (..., E+4) = [u, z], and a token-expert router's fold.

    Tokens are on the last axis throughout: a softmax over 8 experts is ten times faster across rows than in them.
    With y = [z~ s, 1] and s = 1 / std(z~), S = softmax(M y) over its first axis and logits_e = sum_f S_fe u_f, so that
    dL/d(M y)_fe = S_fe g_e (u_f - logits_e).
    """

    @staticmethod
    def forward(ctx: Any, read: Tensor, to_logits: Tensor, to_variance: Tensor) -> Tensor:
        columns = by_column(read)
        logits, scale, attention = token_attention(columns, to_logits, to_variance)
        ctx.save_for_backward(columns, scale, attention, logits, to_logits, to_variance)
        return logits.t().view(*read.shape[:-1], len(logits))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        columns, scale, attention, logits, to_logits, to_variance = ctx.saved_tensors
        value, y = columns.split_with_sizes([len(logits), HIDDEN + 2])
        z = y[:-1]
        flow = attention * grad.reshape(-1, len(logits)).t().contiguous()
        to_value = flow.sum(dim=1)
        flow = flow.mul_(value.unsqueeze(1) - logits).view(len(to_logits), -1)
        to_z = torch.mm(to_logits[:, :-1].t(), flow)
        along = (to_z * z).sum(dim=0)
        to_quadratic = torch.addmm(to_variance, z * along, z.t(), beta=0, alpha=-0.5)
        to_z = torch.addcmul(to_z, along, torch.mm(to_variance, z), value=-1).mul_(scale)
        to_features = torch.ops.aten.threshold_backward(to_z[:-1], z[:-1], 0)
        to_read = torch.cat([to_value, to_features]).t().view(*grad.shape[:-1], len(logits) + HIDDEN)
        return to_read, torch.mm(flow, y.t()), to_quadratic
