"""Decoding: linears that read one input (q, k and v; gate and up) have it read, routed and weighted in one go.

With one token a step a module costs what its calls cost. So on a KV cache the routers' maps and the A's of such linears
are kept stacked, (G*P + G*R, d_in), and a step is one product of all, one gate over all, one multiply, and then a
product with B for each linear.

Which linears those are is seen while the cache's first tokens go through the model: the first forward computes each
linear by itself, as do forwards with gradients, in training, and under `torch.compile`. What is kept lives as long as
the cache, and is made anew when what it is made of changes (see `Seen`).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moesaic.host import Frame, Host
from moesaic.lora.factors import Factors
from moesaic.lora.mix import weigh
from moesaic.routing import Gate, Joint, Router, Routing, RoutingContext, Seen


class Linear(Protocol):
    """What is asked of an adapted linear."""

    host: Host
    moe_lora_A: Factors
    moe_lora_B: Factors
    moe_lora_scaling: Factors
    eval_gates: dict[str, Gate]

    def router(self, adapter: str) -> Router | None: ...

    def context(self, adapter: str, x: Tensor) -> RoutingContext: ...

    def record(self, adapter: str, x: Tensor, routing: Routing, context: RoutingContext) -> None: ...

    def only_weighs(self, adapter: str, x: Tensor) -> bool: ...

    def look(self, adapter: str, seen: Seen) -> None: ...


class Stacked(NamedTuple):
    """What is kept of a group's parameters."""

    weight: Tensor
    """(d_in, G*P + G*R): what the routers read, then the A's."""
    bias: Tensor | None
    """(G*P + G*R,), zero for the A's."""
    scaling: Tensor | None
    """(G, E) where experts have their own."""
    up: list[nn.Parameter]
    """The B's (E*r, d_out)."""
    routers: list[Router]
    gate: Gate
    width: int
    """P: what one router reads; 0 where it is more than a map of the input."""
    kept: dict[Any, Any]
    """What the routers' class makes of the same tensors."""


Part = tuple[Tensor, Tensor, bool, Routing | None]
"""A linear's `A x` with its weights (N, E*r), its B, whether the first is scaled, and its routing where recorded."""


@dataclass(eq=False)
class Group:
    """Linears of one adapter, alike, that were seen to read the same tensor."""

    adapter: str
    linears: list[Linear] = field(default_factory=list)
    made: tuple[torch.dtype, Stacked | None] | None = None
    """Of inputs of this dtype; None where it is to be made."""

    def takes(self, linear: Linear) -> bool:
        return self._kind(linear) == self._kind(self.linears[0])

    def low(self, x: Tensor, state: MutableMapping[Any, Any], *, recorded: bool) -> list[Part] | None:
        """What each linear goes on with, of x (..., d_in).

        None where they are to be left apart.
        """
        held = self._stacked(x)
        if held is None:
            return None
        first, routers, count = self.linears[0], held.routers, len(self.linears)
        z = first.host.in_float32(x)
        flat, split, joint = z.reshape(-1, z.shape[-1]), count * held.width, Joint(self._contexts(x), state, held.kept)
        product = torch.mm(flat, held.weight) if held.bias is None else torch.addmm(held.bias, flat, held.weight)
        if held.width:
            read = product[:, :split].view(*x.shape[:-1], count, held.width)
            logits = type(routers[0]).from_projections(routers, read, joint)
        else:
            logits = type(routers[0]).from_inputs(routers, z, joint)
        weights = held.gate.weights(logits)
        routings: list[Routing | None] = [None] * count
        if recorded:
            parts = (weights, held.gate(logits).probs, logits)
            routings = [Routing(*each) for each in zip(*(part.unbind(-2) for part in parts), strict=True)]
        weights = weights if held.scaling is None else weights * held.scaling
        low = weigh(product[:, split:], weights.flatten(0, -3), len(held.up[0]))
        scaled = held.scaling is not None
        return [(own, B, scaled, routing) for own, B, routing in zip(low.unbind(1), held.up, routings, strict=True)]

    def _routers(self) -> list[Router]:
        return [router for linear in self.linears if (router := linear.router(self.adapter)) is not None]

    def _contexts(self, x: Tensor) -> Callable[[], list[RoutingContext]]:
        return lambda: [linear.context(self.adapter, x) for linear in self.linears]

    def _stacked(self, x: Tensor) -> Stacked | None:
        if self.made is None or self.made[0] != x.dtype:
            alike = all(linear.only_weighs(self.adapter, x) and self.takes(linear) for linear in self.linears)
            self.made = x.dtype, self._stack(x) if alike else None
        return self.made[1]

    def _stack(self, x: Tensor) -> Stacked | None:
        maps: list[tuple[Tensor, Tensor | None]] = []
        if self._routers()[0].reads_by_projection:
            for router, context in zip(self._routers(), self._contexts(x)(), strict=True):
                projection = router.projection(context)
                if projection is None or (maps and len(projection[0]) != len(maps[0][0])):
                    return None
                maps.append(projection)
        down = [linear.moe_lora_A[self.adapter].detach() for linear in self.linears]
        weight = torch.cat([*(weight.to(down[0].dtype) for weight, _ in maps), *down])
        bias = scaling = None
        if any(own is not None for _, own in maps):
            each = [part.new_zeros(len(part)) if own is None else own for part, own in maps]
            bias = torch.cat([*(own.to(weight.dtype) for own in each), weight.new_zeros(sum(map(len, down)))])
        if self.adapter in self.linears[0].moe_lora_scaling:
            scaling = torch.stack([linear.moe_lora_scaling[self.adapter].detach() for linear in self.linears])
        up, gate = (
            [linear.moe_lora_B[self.adapter] for linear in self.linears],
            self.linears[0].eval_gates[self.adapter],
        )
        return Stacked(weight.t(), bias, scaling, up, self._routers(), gate, len(maps[0][0]) if maps else 0, {})

    def _kind(self, linear: Linear) -> tuple[Any, ...]:
        adapter, router = self.adapter, linear.router(self.adapter)
        A, B = linear.moe_lora_A[adapter], linear.moe_lora_B[adapter]
        own = adapter in linear.moe_lora_scaling
        return (
            type(router),
            router and router.num_experts,
            A.shape,
            len(B),
            A.dtype,
            A.device,
            own,
            linear.eval_gates[adapter],
        )


@dataclass(eq=False)
class Groups:
    """An adapter's, on the KV cache."""

    adapter: str
    of: dict[Linear, Group] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)

    def add(self, linear: Linear, x: Tensor, state: MutableMapping[Any, Any]) -> None:
        """Into the group of those that have just read x, where there is one for it; else into one of its own."""
        last, groups = state.get(Group, (None, []))
        if last is not x:
            groups = []
        alike = (g for g in groups if g.adapter == self.adapter and g.made is None and g.takes(linear))
        group = next(alike, None)
        if group is None:
            group = Group(self.adapter)
            groups.append(group)
        group.linears.append(linear)
        state[Group] = x, groups
        self.of[linear] = group
        linear.look(self.adapter, self.seen)

    def refresh(self, state: MutableMapping[Any, Any]) -> None:
        """Let go of what is kept where anything it was made of has changed: asked once a forward."""
        if self not in state and not self.seen.holds():
            seen = Seen()
            for linear, group in list(self.of.items()):
                group.made = None
                linear.look(self.adapter, seen)
            self.seen = seen  # last: copies of a cache, perhaps in other threads, share the groups
        state[self] = True


def low_rank(linear: Linear, adapter: str, x: Tensor, frame: Frame | None) -> tuple[Tensor, Tensor, bool] | None:
    """The linear's `A x` with its weights (N, E*r), of x (..., d_in), its B, and whether `A x` is scaled already.

    None where the linear is computed by itself.

    Without autocast. In the first forward on a KV cache: notes which linears read x.
    """
    if frame is None or not frame.keeps or torch.is_grad_enabled() or x.dim() < 2:
        return None
    groups: Groups | None = frame.memory.get((Group, adapter))
    if groups is None:
        groups = frame.memory[Group, adapter] = Groups(adapter)
    group, version = groups.of.get(linear), 0 if x.is_inference() else x._version
    if group is None:
        if linear.only_weighs(adapter, x):
            groups.add(linear, x, frame.state)
        return None
    made = frame.state.get(group)
    if made is None or made[0] is not x or made[1] != version or linear not in made[2]:
        groups.refresh(frame.state)
        parts = group.low(x, frame.state, recorded=linear.host.wants(adapter))
        if parts is None:
            return None
        frame.state[group] = made = x, version, dict(zip(group.linears, parts, strict=True))
    low, B, scaled, routing = made[2].pop(linear)
    if routing is not None:
        linear.record(adapter, x, routing, linear.context(adapter, x))
    return low, B, scaled
