"""Experts that are whole feed-forward networks, sharing the frozen one: the linears of an FFN work together.

    y = sum_e w_e FFN_e(x),   FFN_e = the frozen FFN with W + scaling B_e A_e in place of each of its W

Between its first linears (those that read the FFN's input) and its last one an FFN has nothing but elementwise
operations. So the first linears *expand* their output to one row a routed pair of token and expert, the model's own
code goes on from there, and the last one *combines* the rows again. Nothing of the model is replaced, whatever its FFN.

Sharing is exact: the first linears' frozen product is the same for all experts of a token; the last one is linear, so
its frozen product is made once, of the weighted sum: fewer products than k separate FFNs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError, TrainingError
from moesaic.host import Host
from moesaic.lora.factors import Factors
from moesaic.lora.mix import by_expert, choose
from moesaic.lora.pairs import Pairs, down, kernel_for, spread, weighted_sum
from moesaic.routing import Gate


class Linear(Protocol):
    """What a block needs of the adapted linears it is handed."""

    name: str
    base_layer: nn.Module
    host: Host
    scaling: dict[str, float]
    backends: dict[str, Any]
    moe_lora_B: Factors

    def route(self, adapter: str, x: Tensor) -> tuple[Gate, Tensor]: ...

    def expert_operands(self, adapter: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass
class Pass:
    """One run of an FFN, from its first linears to its last."""

    pairs: Pairs
    weights: Tensor
    """(N, k), zero where a token has fewer pairs."""
    leading: torch.Size
    """Leading shape of the FFN's input."""
    total: Tensor | None
    """Sum of each token's weights (N, 1); None where the gate makes it 1."""
    expanded: set[str] = field(default_factory=set)
    """The first linears that have run."""


@dataclass
class FeedForward:
    """One FFN of the model under one adapter; its linears share the object.

    The first of `first` has the router. A pass lives in the frame from whichever of them runs first until `last`
    takes it; checkpointing's second run of the FFN makes its own.
    """

    name: str
    first: tuple[str, ...]
    last: str
    owner: Linear | None = None

    def forward(self, layer: Linear, adapter: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layer.name == self.last:
            return self._combine(layer, adapter, x, *args, **kwargs)
        return self._expand(layer, adapter, x, *args, **kwargs)

    def _expand(self, layer: Linear, adapter: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., d_in) -> (1, ..., P, d_out), one row a pair, as many axes as x."""
        passes, key = self._passes(layer), (self.name, adapter)
        if key not in passes or layer.name in passes[key].expanded:
            passes[key] = self._route(layer, adapter, x)
        passes[key].expanded.add(layer.name)
        pairs = passes[key].pairs
        base = layer.base_layer(x, *args, **kwargs)
        z, A, B = layer.expert_operands(adapter, x)
        m, kernel = _by_expert(B, pairs), kernel_for(z, layer.backends[adapter])
        if _in_rank_space(layer, adapter, z, pairs):
            every = torch.nn.functional.linear(z, A).view(-1, m.shape[1])
            low = every.index_select(0, pairs.cell)
        else:
            low = down(z.index_select(0, pairs.token), _by_expert(A, pairs), pairs, kernel)
        rows = spread(base.reshape(-1, base.shape[-1]), low * layer.scaling[adapter], m, pairs, kernel)
        return rows.view(*[1] * (x.dim() - 2), *rows.shape)

    def _combine(self, layer: Linear, adapter: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (1, ..., P, d_in) -> (..., d_out)."""
        run = self._passes(layer).pop((self.name, adapter), None)
        if run is None or run.expanded != set(self.first):
            raise TrainingError(f"{layer.name} ran before the other linears of its FFN: mixtures of FFNs need them all")
        pairs, rows = run.pairs, x.reshape(-1, x.shape[-1])
        if len(rows) != len(pairs):
            raise ConfigError(
                f"{self.name} changed the number of rows between its linears ({len(pairs)} to {len(rows)}), so "
                "its FFN cannot be an expert: leave it out of target_modules"
            )
        weights = run.weights if run.total is None else run.weights / run.total.clamp(min=1e-12)
        mean = weighted_sum(rows, weights, pairs)
        out = layer.base_layer(mean.view(*run.leading, -1), *args, **kwargs)
        flat = out.reshape(-1, out.shape[-1])
        if run.total is not None:
            flat = flat * run.total.to(flat.dtype)
        z, A, B = layer.expert_operands(adapter, rows)
        kernel = kernel_for(z, layer.backends[adapter])
        low = down(z, _by_expert(A, pairs), pairs, kernel)
        low = low * (pairs.by_row(run.weights) * layer.scaling[adapter])[:, None].to(low.dtype)
        if _in_rank_space(layer, adapter, z, pairs):
            every = low.new_zeros(len(flat) * len(pairs.ends), low.shape[-1]).index_copy(0, pairs.cell, low)
            delta = every.view(len(flat), -1) @ B
        else:
            delta = pairs.collect(spread(None, low, _by_expert(B, pairs), pairs, kernel))
        return (flat + delta.to(flat.dtype)).view(out.shape)

    def _route(self, layer: Linear, adapter: str, x: Tensor) -> Pass:
        assert self.owner is not None
        owner = layer if layer.name == self.owner.name else self.owner  # the layer at hand may be the owner's replica
        gate, weights = owner.route(adapter, x)
        flat = weights.reshape(-1, weights.shape[-1])
        total = None if gate.sums_to_one else flat.sum(dim=-1, keepdim=True)
        pairs, chosen = Pairs.of(flat, gate.top_k)
        return Pass(pairs, chosen, x.shape[:-1], total)

    def _passes(self, layer: Linear) -> dict[Any, Pass]:
        frame = layer.host.frame
        if frame is None:
            raise TrainingError(
                f"{layer.name} was called outside of its model's forward, where the linears of its FFN cannot find "
                "each other: call the model"
            )
        passes: dict[Any, Pass] = frame.state.setdefault(FeedForward, {})
        return passes


def _by_expert(m: Tensor, pairs: Pairs) -> Tensor:
    return by_expert(m, len(pairs.ends))


def _in_rank_space(layer: Linear, adapter: str, z: Tensor, pairs: Pairs) -> bool:
    """Whether every expert's low-rank product is made for every token, on the side where rows are tokens."""
    backend = layer.backends[adapter]
    B = layer.moe_lora_B[adapter]
    top_k = pairs.slots.shape[1]
    return backend == "rank" or (backend == "auto" and choose(z, B, len(pairs.ends), top_k) == "rank")
