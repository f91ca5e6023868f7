"""Training: what routers and A's read of one input is one product for all linears that read it.

q, k and v read one tensor, gate and up another. So the maps of their routers and their A's are stacked, one product
forwards and two backwards for all of them: products of 64 to 72 columns each run far below a CPU's pace. With dropout
it is one for the maps, and one for the A's.

Which linears read together is seen in the first forward of training, and holds for the next: whoever turns out to read
another tensor reads it alone. A forward and what checkpointing runs again of it go by the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.host import Host

Map = tuple[Tensor, Tensor | None]
"""Weight (P, d) and bias (P,) of what a router reads."""


class Reader(Protocol):
    """What is asked of an adapted linear."""

    host: Host

    def reads(self, adapter: str, x: Tensor, z: Tensor) -> tuple[Map, Tensor] | None: ...

    def dropped(self, adapter: str, z: Tensor, x: Tensor) -> Tensor: ...


class Read(NamedTuple):
    """What one linear goes on with: its router's map of x (..., P), and `A x` (N, E*r)."""

    mapped: Tensor
    low: Tensor


def read(reader: Reader, adapter: str, x: Tensor, z: Tensor) -> Read | None:
    """Of a linear's input x, which A reads as z; None where its router does not read a map of x, in the dtype of A."""
    own = reader.reads(adapter, x, z)
    frame = reader.host.frame
    if own is None or frame is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None if own is None else _read([reader], [own], adapter, x, z)[0]
    version = (0 if x.is_inference() else x._version), torch._C._current_graph_task_id()
    state, key = frame.state, (read, adapter)
    made = state.get(key)
    if made is not None and made[0] is x and made[1] == version and reader in made[2]:
        return cast(Read, made[2].pop(reader))
    together = frame.neighbours.get((adapter, reader))
    if together is None and not getattr(reader, "_is_replica", False):
        _note(reader, adapter, x, frame)
    if together is None or together[0] is not reader:
        return _read([reader], [own], adapter, x, z)[0]
    each = [other.reads(adapter, x, z) for other in together]
    found = [(other, wanted) for other, wanted in zip(together, each, strict=True) if wanted is not None]
    parts = _read([other for other, _ in found], [wanted for _, wanted in found], adapter, x, z)
    state[key] = x, version, dict(zip((other for other, _ in found), parts, strict=True))
    return cast(Read, state[key][2].pop(reader))


def _read(
    readers: Sequence[Reader], wanted: Sequence[tuple[Map, Tensor]], adapter: str, x: Tensor, z: Tensor
) -> list[Read]:
    maps, downs = [own for own, _ in wanted], [(A, None) for _, A in wanted]
    dropped = readers[0].dropped(adapter, z, x)
    if dropped is z:
        found = products(z, [part for pair in zip(maps, downs, strict=True) for part in pair])
        pairs = list(zip(found[::2], found[1::2], strict=True))
    else:
        pairs = list(zip(products(z, maps), products(dropped, downs), strict=True))
    return [Read(mapped.view(*x.shape[:-1], mapped.shape[-1]), low) for mapped, low in pairs]


def _note(reader: Reader, adapter: str, x: Tensor, frame: Any) -> None:
    """That a linear has read x, in the group of those that just have."""
    last, group = frame.state.get((_note, adapter), (None, []))
    if last is not x or reader in group:
        group = []
    group.append(reader)
    frame.state[_note, adapter] = x, group
    frame.noted[adapter, reader] = group


def products(x: Tensor, parts: Sequence[Map]) -> list[Tensor]:
    """`x W^T + b` (N, n) for each (W, b), as one product: x (..., d), W (n, d) in any dtype."""
    weights = [weight if weight.dtype == x.dtype else weight.to(x.dtype) for weight, _ in parts]
    biases = [bias for _, bias in parts]
    if torch.is_grad_enabled():
        return list(_Products.apply(x, len(parts), *weights, *biases))
    return list(_products(x, weights, biases))


def _products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    product = torch.mm(x.reshape(-1, x.shape[-1]), torch.cat(list(weights)).t())
    found = product.split_with_sizes([len(weight) for weight in weights], dim=1)
    for part, bias in zip(found, biases, strict=True):
        if bias is not None:
            part.add_(bias)
    return found


class _Products(torch.autograd.Function):
    """Keeps none of the stacked matrix: it is made again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *parts: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = cast(tuple[Tensor, ...], parts[:count]), parts[count:]
        ctx.save_for_backward(x, *weights)
        return _products(x, weights, biases)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        count, wanted = len(weights), ctx.needs_input_grad
        grad = torch.cat(grads, dim=1)
        to_x = torch.mm(grad, torch.cat(weights)).view(x.shape) if wanted[0] else None
        to_weights: Sequence[Tensor | None] = [None] * count
        if any(wanted[2 : 2 + count]):
            stacked = torch.mm(grad.t(), x.reshape(-1, x.shape[-1]))
            to_weights = stacked.split_with_sizes([len(weight) for weight in weights])
        to_biases = (own.sum(dim=0) if asked else None for own, asked in zip(grads, wanted[2 + count :], strict=True))
        return (
            to_x,
            None,
            *(own if asked else None for own, asked in zip(to_weights, wanted[2:], strict=False)),
            *to_biases,
        )
