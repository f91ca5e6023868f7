"""Routed pairs of token and expert, for experts with a nonlinearity inside: every pair has a row of its own.

The rows of a block's inner activations are sorted by expert, so that expert e's rows are one slice and its product with
them one matrix product. Matrices are (E, r, F) for down and up projections alike, as `A` (E*r, d_in) and `B`
(E*r, d_out) hold them.

    spread         tokens -> pairs    row_p = base_t(p) + z_p M_e(p)        the first linears of a block
    weighted_sum   pairs -> tokens    sum_t = sum_{p of t} w_p row_p        before the last linear's frozen product
    down           pairs -> rank      z_p = row_p M_e(p)^T                  the last linear's LoRA

| kernel | products | when |
| --- | --- | --- |
| `grouped` | `grouped_mm`, on rows padded to its strides; on a CPU a loop over experts | wherever it runs |
| `masked` | every expert's, on every pair | backend="reference"; float64; `torch.compile` but for bf16 |
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.lora.crossover import runs_grouped
from moesaic.lora.mix import Backend, pad_strides

Kernel = Literal["grouped", "masked"]


@dataclass
class Pairs:
    """P pairs of N tokens and E experts, sorted by expert."""

    order: Tensor
    """(P,): which of the (N * k) choices a row belongs to."""
    slots: Tensor
    """(N, k): the row of each choice; the token's first row where `keep` is False."""
    keep: Tensor | None
    """(N, k): False on choices without a row, of gates that do not choose the same number for every token."""
    token: Tensor
    expert: Tensor
    ends: Tensor
    """(E,) int32: where each expert's rows end."""

    @classmethod
    def of(cls, weights: Tensor, top_k: int | None) -> tuple[Pairs, Tensor]:
        """Pairs of the non-zero weights (N, E), and those weights (N, k); `top_k` is k where it is always that."""
        num_experts = weights.shape[-1]
        k = top_k or max(1, int((~(weights <= 0)).sum(dim=-1).max()))
        top, chosen = weights.topk(k, dim=-1)
        keep = None if top_k else ~(top <= 0)  # what is no number is kept: it shows in the loss
        expert = (chosen if keep is None else chosen.masked_fill(~keep, num_experts)).flatten()
        order = expert.argsort(stable=True)
        slots = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).view(-1, k)
        if keep is not None:
            slots, order = torch.where(keep, slots, slots[:, :1]), order[: int(keep.sum())]
        expert = expert[order]
        ends = torch.searchsorted(expert, torch.arange(num_experts, device=order.device), right=True).to(torch.int32)
        return cls(order, slots, keep, order // k, expert, ends), top

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each expert, read from the device."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()

    def split(self, rows: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Each expert's rows."""
        return rows.split_with_sizes(self.sizes, dim)

    @property
    def cell(self) -> Tensor:
        """(P,): index of each pair in a (N * E) table."""
        return self.token * len(self.ends) + self.expert

    def by_row(self, weights: Tensor) -> Tensor:
        """Weights (N, k) in the order of the rows (P,)."""
        return weights.flatten().index_select(0, self.order)

    def collect(self, rows: Tensor) -> Tensor:
        """Sum of each token's rows: (P, F) -> (N, F). By gathers: adding at indices is not deterministic on a GPU."""
        total = rows.index_select(0, self.slots[:, 0])
        for j in range(1, self.slots.shape[1]):
            part = rows.index_select(0, self.slots[:, j])
            total += part if self.keep is None else part * self.keep[:, j, None]
        return total


def kernel_for(rows: Tensor, backend: Backend) -> Kernel:
    """The kernel for these rows. Tracing knows `grouped_mm` for bf16 alone."""
    if backend == "reference" or (rows.dtype == torch.float64 and backend != "grouped"):
        return "masked"
    if torch.compiler.is_compiling():
        return "grouped" if rows.dtype == torch.bfloat16 else "masked"
    return "grouped" if runs_grouped(rows.device.type, rows.dtype) else "masked"


def spread(base: Tensor | None, z: Tensor, m: Tensor, pairs: Pairs, kernel: Kernel) -> Tensor:
    """`base[token] + z M_e`: base (N, F), z (P, r), m (E, r, F) -> (P, F), in the dtype of base."""
    if kernel == "masked":
        product = (_mask(pairs, z) * z.unsqueeze(1)).flatten(1) @ m.flatten(0, 1)
        return product if base is None else base[pairs.token] + product.to(base.dtype)
    return cast(Tensor, _Spread.apply(base, z, m, pairs))


def down(rows: Tensor, m: Tensor, pairs: Pairs, kernel: Kernel) -> Tensor:
    """`rows M_e^T`: rows (P, F), m (E, r, F) -> (P, r)."""
    if kernel == "masked":
        every = (rows @ m.flatten(0, 1).t()).view(len(rows), len(m), -1)
        return (_mask(pairs, rows) * every).sum(dim=1)
    return cast(Tensor, _Down.apply(rows, m, pairs))


def weighted_sum(rows: Tensor, weights: Tensor, pairs: Pairs) -> Tensor:
    """Each token's rows times its weights (N, k), which sum to 1: (P, F) -> (N, F).

    Computed as the first row plus weighted differences from it, so that equal rows give that row, bit for bit.
    """
    return cast(Tensor, _WeightedSum.apply(rows, weights, pairs))


def _mask(pairs: Pairs, like: Tensor) -> Tensor:
    """(P, E, 1): 1 at each pair's expert."""
    return F.one_hot(pairs.expert, len(pairs.ends)).unsqueeze(-1).to(like.dtype)


class _Spread(torch.autograd.Function):
    """Keeps z and M alone: the rows themselves are kept by whoever reads them."""

    @staticmethod
    def forward(ctx: Any, base: Tensor | None, z: Tensor, m: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(z, m)
        ctx.pairs = pairs
        return _up(z, m, pairs, onto=None if base is None else base.index_select(0, pairs.token))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, m = ctx.saved_tensors
        to_base, to_z, to_m = ctx.needs_input_grad[:3]
        to_product = grad.to(z.dtype)
        return (
            ctx.pairs.collect(grad) if to_base else None,
            _down(to_product, m, ctx.pairs) if to_z else None,
            _outer(z, to_product, ctx.pairs) if to_m else None,
            None,
        )


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, m: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(rows, m)
        ctx.pairs = pairs
        return _down(rows, m, pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, m = ctx.saved_tensors
        to_rows, to_m = ctx.needs_input_grad[:2]
        return (
            _up(grad, m, ctx.pairs) if to_rows else None,
            _outer(grad, rows, ctx.pairs) if to_m else None,
            None,
        )


class _WeightedSum(torch.autograd.Function):
    """The gradient is that of the plain weighted sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.pairs = pairs
        first = rows.index_select(0, pairs.slots[:, 0])
        total = first.clone()
        for j in range(1, weights.shape[1]):
            part = rows.index_select(0, pairs.slots[:, j])
            total.addcmul_(part.sub_(first), weights[:, j, None].to(rows.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights = ctx.saved_tensors
        pairs = ctx.pairs
        spread_grad = grad.index_select(0, pairs.token)
        grad_weights = None
        if ctx.needs_input_grad[1]:
            dots = (spread_grad * rows).sum(dim=-1, dtype=weights.dtype)
            grad_weights = dots.new_zeros(weights.numel()).index_copy_(0, pairs.order, dots).view(weights.shape)
        grad_rows = spread_grad.mul_(pairs.by_row(weights)[:, None].to(rows.dtype))
        return grad_rows, grad_weights, None


# -- the three grouped products ---------------------------------------------------------------------------------------


def _up(z: Tensor, m: Tensor, pairs: Pairs, onto: Tensor | None = None) -> Tensor:
    """z (P, r), m (E, r, F) -> (P, F), added to `onto` in place where given."""
    if not _loops(z):
        out = F.grouped_mm(pad_strides(z), pad_strides(m), offs=pairs.ends)[:, : m.shape[-1]]
        return out if onto is None else onto.add_(out)
    adds = onto is not None and onto.dtype == z.dtype
    out = cast(Tensor, onto) if adds else z.new_empty(len(z), m.shape[-1])
    for part, low, each in zip(pairs.split(out), pairs.split(z), m.unbind(), strict=True):
        torch.addmm(part, low, each, out=part, beta=int(adds))
    return out if adds or onto is None else onto.add_(out)


def _down(rows: Tensor, m: Tensor, pairs: Pairs) -> Tensor:
    """rows (P, F), m (E, r, F) -> (P, r)."""
    if not _loops(rows):
        return F.grouped_mm(pad_strides(rows), pad_strides(m).transpose(-1, -2), offs=pairs.ends)[:, : m.shape[1]]
    out = rows.new_empty(len(rows), m.shape[1])
    for part, high, each in zip(pairs.split(out), pairs.split(rows), m.transpose(1, 2).unbind(), strict=True):
        torch.mm(high, each, out=part)
    return out


def _outer(z: Tensor, rows: Tensor, pairs: Pairs) -> Tensor:
    """z (P, r), rows (P, F) -> (E, r, F): each expert's z^T rows."""
    if not _loops(z):
        out = F.grouped_mm(pad_strides(z).t(), pad_strides(rows), offs=pairs.ends)
        return out[:, : z.shape[-1], : rows.shape[-1]]
    out = z.new_empty(len(pairs.ends), z.shape[-1], rows.shape[-1])
    for each, low, high in zip(out.unbind(), pairs.split(z.t(), dim=1), pairs.split(rows), strict=True):
        torch.mm(low, high, out=each)
    return out


def _loops(rows: Tensor) -> bool:
    """Whether experts are looped over: torch's CPU kernel does so too, with twice the operators and no adding."""
    return rows.is_cpu and not torch.compiler.is_compiling()
