"""Training: what routers and A's read of one input is one product for all linears that read it.

q, k and v read one tensor, gate and up another. So the maps of their routers and their A's are stacked, one product
forwards and two backwards for all of them: products of 64 to 72 columns each run far below a CPU's pace. With dropout
it is one for the maps, and one for the A's.

Which linears do goes by their names, so that a run that is resumed computes as one that was not: one that turns out to
read another tensor reads it alone, and in later forwards so do its neighbours. A forward and what checkpointing runs
again of it go by the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.host import Host
from moesaic.routing import Map, RoutingContext


class Wanted(NamedTuple):
    """What a linear has to read of its input: its router's map, and A."""

    mapping: Map
    of_dropped: Map | None
    """What the router reads of the input as dropout has left it."""
    A: Tensor
    context: RoutingContext


class Reader(Protocol):
    """What is asked of an adapted linear."""

    host: Host
    cross: bool

    def reads(self, adapter: str, x: Tensor, z: Tensor) -> Wanted | None: ...

    def dropped(self, adapter: str, z: Tensor, x: Tensor) -> Tensor: ...


_FAMILIES = re.compile(
    r"(?P<attention>(q|k|v|query|key|value)(_proj|_lin|_linear)?|w[qkv])|(?P<ffn>gate_proj|up_proj|w1|w3|wi_0|wi_1)"
)


def neighbours(readers: Mapping[str, Reader]) -> dict[Any, tuple[Any, ...]]:
    """Linear -> all that by their names read what it reads, itself included: q, k and v, or gate and up, of one module.

    Keys and values of cross-attention read the encoder's tokens, the queries do not.
    """
    found: dict[Any, list[Any]] = {}
    for name, reader in readers.items():
        parent, _, leaf = name.rpartition(".")
        if kind := _FAMILIES.fullmatch(leaf):
            found.setdefault((parent, kind.lastgroup, reader.cross), []).append(reader)
    return {reader: group for group in map(tuple, found.values()) if len(group) > 1 for reader in group}


class Read(NamedTuple):
    """What one linear goes on with: its router's map of x (..., P), `A x` (N, E*r), and its router's context."""

    mapped: Tensor
    low: Tensor
    context: RoutingContext


def read(reader: Reader, adapter: str, x: Tensor, z: Tensor) -> Read | None:
    """Of a linear's input x, which A reads as z; None where its router does not read a map of x, in the dtype of A."""
    host, together = reader.host, (reader,)
    frame, left = host.frame, {}
    if frame is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        version = (0 if x.is_inference() else x._version), torch._C._current_graph_task_id()
        state, key = frame.state, (read, adapter)
        of, when, left = state.get(key, (None, None, {}))
        if of is x and when == version and reader in left:
            return cast(Read, left.pop(reader))
        group = frame.neighbours.get(reader, together)
        if reader in left:  # its neighbours read another tensor
            host.neighbours = {one: others for one, others in host.neighbours.items() if others is not group}
        else:
            together, left = group, {}
            state[key] = x, version, left
    own = reader.reads(adapter, x, z)
    if own is None:
        return None
    wanted, dropped = {reader: own}, reader.dropped(adapter, z, x)
    for other in together:
        parts = None if other is reader else other.reads(adapter, x, z)
        if parts is not None and other.dropped(adapter, z, x) is dropped:
            wanted[other] = parts
    left.update(zip(wanted, _read(host, list(wanted.values()), x, z, dropped), strict=True))
    return cast(Read, left.pop(reader))


def _read(host: Host, wanted: Sequence[Wanted], x: Tensor, z: Tensor, dropped: Tensor) -> list[Read]:
    maps, only = [own.mapping for own in wanted], [own.A for own in wanted]
    late = [own.of_dropped for own in wanted if own.of_dropped is not None]
    downs = [(A, None) for A in only]
    features: list[Tensor] = []
    if torch.is_autocast_enabled(z.device.type):
        wide = host.in_float32(x)
        found = products_in_bf16(x, wide, maps, [] if dropped is not z else only)
        mapped, lows = found[: len(maps)], found[len(maps) :]
        if not lows:
            found = products_in_bf16(dropped, dropped.float() if late else None, late, only)
            features, lows = found[: len(late)], found[len(late) :]
    elif dropped is z:
        found = products(z, [part for pair in zip(maps, downs, strict=True) for part in pair])
        mapped, lows = found[::2], found[1::2]
    else:
        mapped, found = products(z, maps), products(dropped, [*late, *downs])
        features, lows = found[: len(late)], found[len(late) :]
    rest = iter(features)
    mapped = [
        own if wants.of_dropped is None else torch.cat((own, next(rest)), dim=1)
        for own, wants in zip(mapped, wanted, strict=True)
    ]
    return [
        Read(read.view(*x.shape[:-1], read.shape[-1]), low, own.context)
        for read, low, own in zip(mapped, lows, wanted, strict=True)
    ]


def in_bf16(kind: str) -> bool:
    """Whether this is training under bf16 autocast, eager."""
    wanted = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return wanted and torch.get_autocast_dtype(kind) == torch.bfloat16


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
    for part, bias in zip(found, biases, strict=False):
        if bias is not None:
            part.add_(bias[None])  # a compiler writes a short vector's numbers out: as many kernels as linears
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


def products_in_bf16(x: Tensor, wide: Tensor | None, maps: Sequence[Map], downs: Sequence[Tensor]) -> list[Tensor]:
    """Under bf16 autocast: each map of x (N, P) in float32, then each `x A^T` (N, R) in bf16.

    What goes back to x is one product of bf16 for all. A map's own gradient is in float32, as its logits are.

    Args:
        wide: x in float32; needed for maps alone.
    """
    weights, biases = [weight for weight, _ in maps], [bias for _, bias in maps]
    wide = None if wide is None else wide.detach()
    return list(_ProductsInBf16.apply(x, wide, len(maps), *weights, *downs, *biases))


class _ProductsInBf16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wide: Tensor | None, count: int, *parts: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = cast(tuple[Tensor, ...], parts[: len(parts) - count]), parts[len(parts) - count :]
        ctx.save_for_backward(x, *weights)
        ctx.count = count
        found: tuple[Tensor, ...] = ()
        with torch.autocast(x.device.type, enabled=False):
            if wide is not None and count:
                found += _products(wide, [weight.float() for weight in weights[:count]], biases)
            if downs := [_bf16(A) for A in weights[count:]]:
                found += _products(_bf16(x), downs, ())
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        count, wanted = ctx.count, ctx.needs_input_grad
        flat, asked = x.reshape(-1, x.shape[-1]), wanted[3 : 3 + len(weights)]
        to_x = None
        if wanted[0]:
            narrow = torch.cat([_bf16(grad) for grad in grads], dim=1)
            to_x = torch.mm(narrow, torch.cat([_bf16(weight) for weight in weights])).view(x.shape).to(x.dtype)
        each: list[Tensor | None] = [None] * len(weights)
        if any(asked[:count]):
            each[:count] = _to_weights(grads[:count], flat, torch.float32)
        if any(asked[count:]):
            each[count:] = _to_weights(grads[count:], flat, torch.bfloat16)
        to_weights = (
            own.to(weight.dtype) if own is not None and needed else None
            for own, weight, needed in zip(each, weights, asked, strict=True)
        )
        biases = wanted[3 + len(weights) :]
        return (
            to_x,
            None,
            None,
            *to_weights,
            *(g.sum(dim=0) if b else None for g, b in zip(grads, biases, strict=False)),
        )


def _to_weights(grads: Sequence[Tensor], flat: Tensor, dtype: torch.dtype) -> list[Tensor]:
    stacked = torch.mm(torch.cat(list(grads), dim=1).to(dtype).t(), flat.to(dtype))
    return list(stacked.split_with_sizes([grad.shape[1] for grad in grads]))


def _bf16(t: Tensor) -> Tensor:
    return t if t.dtype == torch.bfloat16 else t.bfloat16()
