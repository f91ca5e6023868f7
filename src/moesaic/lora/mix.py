"""The one forward of a mixture of LoRA experts.

    y = sum_e w_e B_e A_e x

There is no nonlinearity between A and B, so the weights commute into rank space:

    y = ((w (x) 1_r) * (x A^T)) B        two matrix products of rank E*r and one multiply

exact for every gate. `A` is (E*r, d_in), `B` is (E*r, d_out); expert e owns rows e*r to (e+1)*r of both, so that
the flat view and the (E, r, d) view are both free. Where all experts share one down projection (HydraLoRA), `A` is
(r, d_in) alone.

| backend | work | when |
| --- | --- | --- |
| `reference` | a loop over experts, one token set each | tests; float64; the definition |
| `rank` | every expert on every token, in rank space | E*r small: the default |
| `grouped` | only routed (token, expert) pairs, sorted by expert, `grouped_mm` | E*r large and weights sparse |

Where `auto` would take `grouped` for pairs of a few of the experts alone, as in decoding with many, each pair reads its
own expert (`gathered`): shapes are static and nothing waits for the device. Measured on a CPU, one token of 256 experts
of rank 16: 0.09 ms, `grouped` 0.52, `rank` 1.7; past an eighth of the experts `grouped` is faster.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn import functional as F

from moesaic.errors import ConfigError
from moesaic.lora.crossover import limit, runs_grouped

Backend = Literal["auto", "reference", "rank", "grouped"]
Way = Literal["auto", "reference", "rank", "grouped", "gathered"]

THIN = 2**19
"""Multiplications by A up to which a CPU is faster in float32 than in bf16, whose kernels have a price a call: with a
single token four times at d=576 and E*r=32, twice at d=4096 and 64, and alike at this many."""


def mix(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weights: Tensor | None = None,
    *,
    base: Tensor | None = None,
    backend: Backend = "auto",
    top_k: int | None = None,
) -> Tensor:
    """Mixture of LoRA experts, added to `base` when given.

    Args:
        x: input (..., d_in).
        A: down projections (E*r, d_in), or one for all experts (r, d_in).
        B: up projections (E*r, d_out).
        weights: (..., E), scaling folded in; None is a single expert of weight 1 (plain LoRA).
        base: (..., d_out), the frozen layer's output; not modified.
        backend: one of the table above, or "auto".
        top_k: non-zero weights a row, when known. Only "auto" reads it. The grouped backend skips zero weights, so
            they get no gradient there. Where `grouped_mm` does not run, all experts are computed, with one warning.

    Returns:
        (..., d_out) in the dtype of `base`, or of the product without it.
    """
    if weights is None:
        weights = x.new_ones(*x.shape[:-1], 1)
    num_experts = weights.shape[-1] if weights.dim() else 0
    _check_shapes(x, A, B, weights, base)
    if B.shape[0] % num_experts or A.shape[0] not in (B.shape[0], B.shape[0] // num_experts):
        raise ConfigError(
            f"B {tuple(B.shape)} must have E*r rows and A {tuple(A.shape)} as many, or r: weights have E={num_experts}"
        )
    way: Way = choose(x, B, num_experts, top_k) if backend == "auto" else backend
    if backend == "grouped" and not torch.compiler.is_compiling() and not runs_grouped(x.device.type, dtype_of(x)):
        way = "rank"
    flat_x, flat_w = x.reshape(-1, x.shape[-1]), weights.reshape(-1, num_experts)
    flat_base = None if base is None else base.reshape(-1, B.shape[-1])
    if way == "rank":
        out = rank_space(flat_x, A, B, flat_w, flat_base)
    elif way == "grouped":
        out = grouped(flat_x, A, B, flat_w, flat_base)
    elif way == "gathered":
        out = gathered(flat_x, A, B, flat_w, flat_base, top_k=cast(int, top_k))
    elif way == "reference":
        out = reference(flat_x, A, B, flat_w, flat_base)
    else:
        raise ConfigError(f"unknown backend {backend!r}: choose one of {', '.join(get_args(Backend))}")
    return out.view(*x.shape[:-1], B.shape[-1])


def _check_shapes(x: Tensor, A: Tensor, B: Tensor, weights: Tensor, base: Tensor | None) -> None:
    """Raise ConfigError for what would broadcast or be read out of place: each backend would do it in its own way."""
    if A.dim() != 2 or B.dim() != 2 or x.dim() < 1 or x.shape[-1] != A.shape[-1]:
        shapes = f"x {tuple(x.shape)}, A {tuple(A.shape)} and B {tuple(B.shape)}"
        raise ConfigError(f"{shapes} must be (..., d_in), (E*r, d_in) and (E*r, d_out)")
    if weights.shape[:-1] != x.shape[:-1] or weights.dim() < 1 or weights.shape[-1] < 1:
        raise ConfigError(f"weights {tuple(weights.shape)} must be {(*x.shape[:-1], 'E')}: a row for each of x")
    if base is not None and base.shape != (*x.shape[:-1], B.shape[-1]):
        raise ConfigError(f"base {tuple(base.shape)} must be {(*x.shape[:-1], B.shape[-1])}")


def choose(x: Tensor, B: Tensor, num_experts: int, top_k: int | None) -> Literal["rank", "grouped", "gathered"]:
    """Rank space, unless the weights are known to be sparse and E*r is past the crossover."""
    kind, dtype = x.device.type, dtype_of(x)
    if top_k is None or 2 * top_k > num_experts or B.shape[0] <= limit(kind, dtype):
        return "rank"
    if not torch.is_grad_enabled() and 8 * top_k * (x.numel() // x.shape[-1]) <= num_experts:
        return "gathered"
    if dtype == torch.float64 or torch.compiler.is_compiling() or not runs_grouped(kind, dtype):
        return "rank"
    return "grouped"


def dtype_of(x: Tensor) -> torch.dtype:
    """That of a product with x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def thin(x: Tensor, A: Tensor) -> bool:
    """Few tokens, as in decoding on a CPU: neither bf16 nor a copy of A behind a router's map pays for them.

    Where a compiler takes weights for constants, the copy is made once.
    """
    if x.device.type != "cpu" or A.dtype != torch.float32 or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() and inductor.freezing:
        return False
    return x.numel() * A.shape[0] <= THIN


def reference(x: Tensor, A: Tensor, B: Tensor, weights: Tensor, base: Tensor | None = None) -> Tensor:
    """The definition, one expert at a time: x (N, d_in), weights (N, E) -> (N, d_out)."""
    num_experts = weights.shape[-1]
    out = x.new_zeros(len(x), B.shape[-1])
    downs = A.chunk(num_experts) if len(A) == len(B) else [A] * num_experts
    experts = zip(downs, B.chunk(num_experts), weights.unbind(-1), strict=True)
    for a, b, w in experts:
        out = out + w[:, None].to(x.dtype) * ((x @ a.t()) @ b)
    return out if base is None else base + out.to(base.dtype)


def rank_space(x: Tensor, A: Tensor, B: Tensor, weights: Tensor, base: Tensor | None = None) -> Tensor:
    """All experts on all tokens, weighted between the two products."""
    return weigh_and_expand(F.linear(x, A), B, weights, base)


def weigh_and_expand(
    z: Tensor, B: Tensor, weights: Tensor, base: Tensor | None = None, *, scaling: float = 1.0
) -> Tensor:
    """The second half of rank space: z = x A^T (N, E*r or r) is weighted and taken up by B, then added to `base`.

    `weights` (..., E) and `base` (..., d_out) may have more axes than z.
    """
    under_autocast = torch.is_autocast_enabled(z.device.type)
    alike = base is not None and base.dtype == z.dtype == B.dtype and not under_autocast
    if base is not None and alike and not torch.compiler.is_compiling():
        weights, flat = weights.to(z.dtype), base.reshape(len(z), base.shape[-1])
        if torch.is_grad_enabled():
            added = cast(Tensor, _WeighAndExpand.apply(z, weights, B, flat, scaling))
        else:
            added = torch.addmm(flat, _weigh(z, weights, len(B)), B, alpha=scaling)
        return added.view(base.shape)  # a view made within a function may not be worked on in place
    z = _weigh(z, (weights if scaling == 1.0 else weights * scaling).to(z.dtype), len(B))
    if base is None:
        return z @ B
    if base.dtype == z.dtype and under_autocast and not torch.compiler.is_compiling():
        return torch.addmm(base.reshape(len(z), base.shape[-1]), z, B).view(base.shape)
    return base + (z @ B).to(base.dtype).view(base.shape)


def merge_and_expand(z: Tensor, B: Tensor, weights: Tensor, scaling: Tensor | float, base: Tensor) -> Tensor:
    """Factors merged before they meet: `(sum_e w_e s_e B_e) (sum_e w_e A_e) x`, from z = x A^T (N, E*r).

    With cross terms between experts, which no sum of experts has. s are the experts' scalings (E,), or one for all.
    """
    tokens, num_experts = len(z), weights.shape[-1]
    each = weights.reshape(tokens, num_experts, 1).to(z.dtype)
    low = (z.view(tokens, num_experts, -1) * each).sum(dim=1)
    return weigh_and_expand(low, B, weights * scaling, base)


def _weigh(z: Tensor, weights: Tensor, rows: int) -> Tensor:
    """z (N, E*r) times weights (..., E), each weight over its expert's r columns; z (N, r) is every expert's."""
    return weigh(z, weights.reshape(len(z), 1, weights.shape[-1]), rows).view(len(z), rows)


def weigh(z: Tensor, weights: Tensor, rows: int) -> Tensor:
    """z (N, G*E*r) times weights (N, G, E), each weight over its expert's r columns: (N, G, E*r), with E*r = `rows`.

    z (N, G*r) is every expert's.
    """
    tokens, groups, num_experts = weights.shape
    rank = rows // num_experts
    each = z.view(tokens, groups, z.shape[-1] // (groups * rank), rank) * weights.unsqueeze(-1)
    return each.view(tokens, groups, rows)


def expand(z: Tensor, B: Tensor, base: Tensor, *, scaling: float) -> Tensor:
    """`base + scaling z B` of weighted z (N, E*r) and base (..., d_out), without autograd or autocast."""
    if base.dtype == z.dtype:
        return torch.addmm(base.reshape(len(z), base.shape[-1]), z, B, alpha=scaling).view(base.shape)
    return base + torch.addmm(z.new_empty(()), z, B, beta=0, alpha=scaling).to(base.dtype).view(base.shape)


class _WeighAndExpand(torch.autograd.Function):
    """`base + scaling * weigh(z, w) B`, keeping z and w alone: the weighted z is made again in the backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weights: Tensor, B: Tensor, base: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(z, weights, B)
        ctx.scaling = scaling
        low = _weigh(z, weights, len(B))
        return torch.addmm(base, low, B, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weights, B = ctx.saved_tensors
        to_z, to_weights, to_b, to_base = ctx.needs_input_grad[:4]
        tokens, num_experts = len(z), weights.shape[-1]
        rank = len(B) // num_experts
        flat, parts = grad.reshape(tokens, grad.shape[-1]), z.view(tokens, z.shape[-1] // rank, rank)
        each = weights.reshape(tokens, num_experts, 1)
        grad_z = grad_weights = grad_b = None
        if to_z or to_weights:
            unread = z if z.shape[-1] == len(B) else z.new_empty(())
            back = torch.addmm(unread, flat, B.t(), beta=0, alpha=ctx.scaling).view(tokens, num_experts, rank)
            if to_z:
                grad_z = back * each
                grad_z = (grad_z.sum(dim=1) if parts.shape[1] < back.shape[1] else grad_z).view(z.shape)
            if to_weights:
                grad_weights = (back * parts).sum(dim=-1).view(weights.shape)
        if to_b:
            low = (parts * each).view(tokens, len(B))
            grad_b = torch.addmm(B, low.t(), flat, beta=0, alpha=ctx.scaling)
        return grad_z, grad_weights, grad_b, grad if to_base else None, None


def grouped(x: Tensor, A: Tensor, B: Tensor, weights: Tensor, base: Tensor | None = None) -> Tensor:
    """Only the pairs of token and expert whose weight is not zero, sorted by expert."""
    dtype = dtype_of(x)
    x, A, B = x.to(dtype), A.to(dtype), B.to(dtype)
    num_experts, d_out = weights.shape[-1], B.shape[-1]
    shared = len(A) < len(B)
    a, b = by_expert(A, 1 if shared else num_experts), by_expert(B, num_experts)
    a, b, x = pad_strides(a), pad_strides(b), pad_strides(x)

    expert, token = weights.t().nonzero(as_tuple=True)
    ends = torch.bincount(expert, minlength=num_experts).cumsum(0).to(torch.int32)
    w = weights[token, expert].to(x.dtype)
    z = (x @ a[0].t())[token] if shared else F.grouped_mm(x[token], a.transpose(-1, -2), offs=ends)
    y = F.grouped_mm(z * w[:, None], b, offs=ends)[:, :d_out]
    if base is None:
        base = x.new_zeros(len(x), d_out)
    return base.index_add(0, token, y.to(base.dtype))


def gathered(x: Tensor, A: Tensor, B: Tensor, weights: Tensor, base: Tensor | None = None, *, top_k: int) -> Tensor:
    """Each of the N*k pairs of token and expert reads its own expert: for few of them."""
    num_experts = weights.shape[-1]
    chosen = weights.abs().topk(top_k, dim=-1).indices
    w = weights.gather(-1, chosen).to(x.dtype)
    b = by_expert(B, num_experts)[chosen].flatten(1, 2).to(x.dtype)
    if len(A) < len(B):
        z = F.linear(x, A.to(x.dtype)).unsqueeze(1)
    else:
        a = by_expert(A, num_experts)[chosen].flatten(1, 2).to(x.dtype)
        z = torch.bmm(a, x.unsqueeze(-1)).view(len(x), top_k, -1)
    low = (z * w.unsqueeze(-1)).view(len(x), 1, -1)
    out = torch.bmm(low, b).squeeze(1)
    return out if base is None else base + out.to(base.dtype)


def by_expert(m: Tensor, num_experts: int) -> Tensor:
    """(E*r, d) as (E, r, d). Not by `unflatten`, which no compiler follows on a parameter."""
    return m.view(num_experts, -1, m.shape[-1])


def pad_strides(m: Tensor) -> Tensor:
    """(N, r) or (E, r, d), every axis but the first padded with zeros: `grouped_mm` asks for strides of 16 bytes."""
    lanes = 16 // m.element_size()
    missing = [-size % lanes for size in m.shape[:0:-1]]
    return F.pad(m, [side for n in missing for side in (0, n)]) if any(missing) else m
