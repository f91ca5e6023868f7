"""Routers that are linked over depth: a recurrent cell tells each how those below it have routed (RMoE, Qiu et al.,
ICLR 2025, arXiv 2408.06793).

    x' = P_i x,   h_i = cell(x', h_{i-1}),   logits = G_i h_i         one cell for all layers, h_0 = 0

The recurrence runs over the layers of one token: nothing crosses positions, and nothing is kept between forwards.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moesaic.routing.router import Joint, RoutingContext, SharingRouter, Site, by_router, float_linear

Cell = Literal["gru", "rnn", "lstm"]
Recurrence = Literal["full", "detach", "none"]

_CELLS: dict[str, type[nn.RNNCellBase]] = {"gru": nn.GRUCell, "rnn": nn.RNNCell, "lstm": nn.LSTMCell}
_STEPS: dict[str, Any] = {"gru": torch.gru_cell, "rnn": torch.rnn_tanh_cell, "lstm": torch.lstm_cell}
_DEALT = re.compile(r"\bexperts\.\d+\.")


class State(NamedTuple):
    """What a layer hands upwards: the cell's state (h, or an LSTM's h and c), each (..., p), and logits (..., E)."""

    cell: tuple[Tensor, ...]
    logits: Tensor


class Share(NamedTuple):
    """One router's part of what several have made together, (..., G, p)."""

    whole: State
    place: int

    @property
    def state(self) -> State:
        cell, logits = self.whole
        return State(tuple(part.select(-2, self.place) for part in cell), logits.select(-2, self.place))


class RecurrentRouter(SharingRouter):
    """`logits = G h`, with h the state of a recurrent cell that has run through the layers below.

    A router is born with a cell of its own; `use` puts that of another in its place. Without a context, in the lowest
    layer, and where the layer below saw tokens of another shape, the state starts at zero.

    Args:
        recurrence: "full"; "detach" stops the gradient at the state from below; "none" starts each layer at zero.
        residual_alpha: share of the logits of the layer below that is added to the layer's own.
        residual_detach: stop the gradient there.
        head: from the state (..., p) to logits (..., E); G of the paper where None.
    """

    shared = ("projector.weight", "cell.weight_ih", "cell.weight_hh", "cell.bias_ih", "cell.bias_hh")
    projector: nn.Linear
    cell: nn.RNNCellBase

    def __init__(
        self,
        site: Site,
        num_experts: int,
        *,
        state_dim: int,
        cell: Cell = "gru",
        recurrence: Recurrence = "full",
        residual_alpha: float = 0.0,
        residual_detach: bool = False,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__(num_experts)
        self.layer, self.chain = site.layer, chain_of(site)
        self.dealt = bool(_DEALT.search(self.chain))
        self.kind, self.recurrence = cell, recurrence
        self.residual_alpha, self.residual_detach = residual_alpha, residual_detach
        self.projector = nn.Linear(site.d_in, state_dim, bias=False)
        self.cell = _CELLS[cell](state_dim, state_dim)  # type: ignore[call-arg]
        self.head = nn.Linear(state_dim, num_experts, bias=False) if head is None else head
        nn.init.normal_(self.projector.weight, std=0.02)
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=0.02)

    def projection(self, context: RoutingContext | None = None) -> tuple[Tensor, None]:
        return self.module("projector", {} if context is None else context.state).weight, None

    def from_projection(self, read: Tensor, context: RoutingContext | None = None) -> Tensor:
        passed: MutableMapping[Any, Any] = {} if context is None else context.state
        below = self.below(passed, read)
        state = self.step(read, below.cell if below is not None and self.recurrence != "none" else None, passed)
        logits = float_linear(self.head, state[0]) if isinstance(self.head, nn.Linear) else self.head(state[0])
        if below is not None and self.residual_alpha:
            handed = below.logits.detach() if self.residual_detach else below.logits
            logits = logits + self.residual_alpha * handed.to(logits)
        passed.setdefault((self.owner("cell"), self.chain, self.layer), State(state, logits))
        return logits

    @classmethod
    def from_projections(cls, routers: Sequence[Self], read: Tensor, joint: Joint) -> Tensor:
        """One step of the cell for all, whose states stay together: so do the routers of the layer above find them."""
        first, passed, kept = routers[0], joint.state, joint.kept
        if "chains" not in kept:
            alike = len({router.setting for router in routers}) == 1
            kept["chains"] = alike, first.owner("cell"), tuple(router.chain for router in routers)
        alike, owner, chains = kept["chains"]
        below: State | None = passed.get((owner, chains, first.layer - 1))
        apart = not alike
        if below is None:
            levels = {router.nearest(passed) for router in routers}
            below = passed.get((owner, chains, next(iter(levels))))
            apart = apart or len(levels) > 1 or (below is None and levels != {None})
        if apart:
            return super().from_projections(routers, read, joint)
        below = below if below is not None and below.cell[0].shape == read.shape else None
        if "weights" not in kept:
            each = torch.stack([router.head.weight for router in routers if isinstance(router.head, nn.Linear)])
            cell = joined(first.cell) if first.kind == "gru" else None
            kept["weights"] = each.to(read.dtype).transpose(1, 2), cell
        heads, cell = kept["weights"]
        passed.setdefault((owner, False), cell)
        state = first.step(read, below.cell if below is not None and first.recurrence != "none" else None, passed)
        logits = by_router(state[0], heads)
        if below is not None and first.residual_alpha:
            logits = logits + first.residual_alpha * below.logits
        whole = State(state, logits)
        passed.setdefault((owner, chains, first.layer), whole)
        for i, chain in enumerate(chains):
            passed.setdefault((owner, chain, first.layer), Share(whole, i))
        return logits

    @property
    def setting(self) -> Hashable:
        """What routers must agree in to take a step together; a router that cannot agrees with none."""
        plain = isinstance(self.head, nn.Linear) and self.head.bias is None and not self.dealt
        return self.owner("cell"), self.layer, self.kind, self.recurrence, self.residual_alpha, plain or object()

    def nearest(self, passed: MutableMapping[Any, Any]) -> int | None:
        """The nearest lower layer of the chain that has handed on a state."""
        owner = self.owner("cell")
        return next((n for n in range(self.layer - 1, -1, -1) if (owner, self.chain, n) in passed), None)

    def below(self, passed: MutableMapping[Any, Any], read: Tensor) -> State | None:
        """The state of the nearest lower layer of the chain; None if there is none, or not of these tokens."""
        if self.dealt:  # tokens that a model's own experts were dealt: others in each layer
            return None
        found: State | Share | None = passed.get((self.owner("cell"), self.chain, self.nearest(passed)))
        found = found.state if isinstance(found, Share) else found
        return found if found is not None and found.cell[0].shape == read.shape else None

    def step(
        self, read: Tensor, below: tuple[Tensor, ...] | None, passed: MutableMapping[Any, Any]
    ) -> tuple[Tensor, ...]:
        """One step of the cell, over all tokens at once, from the state below or from zero: the new state.

        On the CPU torch's GRU is a dozen kernels, and two dozen backwards; elsewhere it is fused.
        """
        lstm, x = self.kind == "lstm", read.reshape(-1, read.shape[-1])
        if below is None:
            before = [torch.zeros_like(x)] * (2 if lstm else 1)
        else:
            before = [(t.detach() if self.recurrence == "detach" else t).to(x).view_as(x) for t in below]
        if self.kind == "gru" and x.is_cpu and not torch.compiler.is_compiling():
            key = self.owner("cell"), torch.is_grad_enabled()
            joint = passed.get(key) or passed.setdefault(key, joined(self.module("cell", passed)))
            operands = x, before[0], *(t.to(x) for t in joint)
            after = (_GRUStep.apply(*operands) if torch.is_grad_enabled() else gru_step(*operands)[0],)
        else:
            made = _STEPS[self.kind](
                x, before if lstm else before[0], *(w.to(x) for w in _weights(self.module("cell", passed)))
            )
            after = made if lstm else (made,)
        return tuple(t.view(read.shape) for t in after)

    def extra_repr(self) -> str:
        return f"{self.kind}, state={self.cell.hidden_size}"


def _weights(cell: nn.RNNCellBase) -> tuple[Tensor, ...]:
    """By name: the replicas of `nn.DataParallel` have no registered parameters."""
    return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


def joined(cell: nn.RNNCellBase) -> tuple[Tensor, Tensor]:
    """A GRU's weights (4p, 2p) over [x, h] and biases (4p,): reset, update, and the two halves of the new state."""
    by_x, by_h, b_x, b_h = _weights(cell)
    p = cell.hidden_size
    nothing = by_x.new_zeros(p, p)
    rows = [[by_x[: 2 * p], by_h[: 2 * p]], [by_x[2 * p :], nothing], [nothing, by_h[2 * p :]]]
    weight = torch.cat([torch.cat(row, dim=1) for row in rows])
    return weight, torch.cat([b_x[: 2 * p] + b_h[: 2 * p], b_x[2 * p :], b_h[2 * p :]])


def gru_step(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """`torch.gru_cell` in one product: h' = n + z (h - n), n = tanh(n_x + r n_h); and what its backward needs."""
    p = x.shape[1]
    both = torch.cat([x, h], dim=1)
    gates, new, by_h = torch.addmm(bias, both, weight.t()).split_with_sizes([2 * p, p, p], dim=1)
    gates = gates.sigmoid()
    reset, update = gates.split_with_sizes([p, p], dim=1)
    new = torch.addcmul(new, reset, by_h).tanh_()
    return torch.lerp(new, h, update), both, gates, new, by_h


class _GRUStep(torch.autograd.Function):
    """`gru_step` with its gradient written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        after, *kept = gru_step(x, h, weight, bias)
        ctx.save_for_backward(*kept, weight)
        return after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        both, gates, new, by_h, weight = ctx.saved_tensors
        p = new.shape[1]
        reset, update = gates.split_with_sizes([p, p], dim=1)
        kept = grad * update
        to_new = torch.ops.aten.tanh_backward(grad - kept, new)
        to_update = grad * (both[:, p:] - new)
        to_gates = torch.ops.aten.sigmoid_backward(torch.cat([to_new * by_h, to_update], dim=1), gates)
        flow = torch.cat([to_gates, to_new, to_new * reset], dim=1)
        to_x, to_h = torch.mm(flow, weight).split_with_sizes([p, p], dim=1)
        return to_x, kept.add_(to_h) if ctx.needs_input_grad[1] else None, flow.t().mm(both), flow.sum(dim=0)


def chain_of(site: Site) -> str:
    """The site's name without its layer: what it shares with the like module of every other layer."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", site.name, count=1)
