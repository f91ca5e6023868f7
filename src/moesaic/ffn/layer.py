"""One feed-forward layer made of experts: a router, a gate, a bank of experts, and the output's bias.

    y = sum_j w_j E_{i_j}(x) + b,        weights w and index i (T, k) from the router's logits by the gate

The bank has the layout of Transformers' own MoE models, `gate_up_proj` (N, 2f, d) and `down_proj` (N, d, f), and runs
on their `experts_implementation`: eager, batched_mm, grouped_mm (their default) and what else is registered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, use_experts_implementation

from moesaic.ffn.split import Seat, Slices
from moesaic.host import Host
from moesaic.routing import Record, Router, Site, TopK, no_autocast

NAME = "ffn"
"""What a host calls these experts, where it calls others by their adapter's name."""
Activation = Callable[[Tensor], Tensor]


class _Fitting(ExpertsInterface):
    """Transformers' own, except that `grouped_mm` gives way to one product over all experts where a CPU is faster so,
    and to the loop where its kernel would raise."""

    def get_interface(self, experts_implementation: str, default: Callable[..., Tensor]) -> Callable[..., Tensor]:
        chosen = cast(Callable[..., Tensor], ALL_EXPERTS_FUNCTIONS.get_interface(experts_implementation, default))
        if experts_implementation != "grouped_mm":
            return chosen
        return lambda bank, *routed: _best(bank, chosen, default, *routed)


_INTERFACE = _Fitting()
WHOLE = 0.75
"""Share of the experts from which on one product over all of them is faster than one for each group of tokens.

Measured on a CPU, forward and backward: 0.54 to 1.2 of grouped_mm's time at three quarters, 0.35 to 0.88 at all.
"""


def _best(bank: Any, grouped: Any, loop: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    if x.device.type == "cpu" and index.shape[-1] >= WHOLE * bank.num_experts:
        return cast(Tensor, bank.whole(x, index, weights))
    return cast(Tensor, (grouped if fits(bank.down_proj) else loop)(bank, x, index, weights))


def fits(weight: Tensor) -> bool:
    """Whether `grouped_mm` takes a bank (N, d, f): no float64, and strides of whole 16 bytes."""
    lanes = 16 // weight.element_size()
    return (
        weight.numel() > 0
        and weight.dtype != torch.float64
        and weight.shape[1] % lanes == 0
        and weight.shape[2] % lanes == 0
    )


class _Bank(nn.Module, ABC):
    """N experts of width f: x (T, d), index (T, k) and weights (T, k) to (T, d)."""

    down_proj: nn.Parameter

    def __init__(self, config: Any, num_experts: int, d_model: int, width: int, activation: Activation) -> None:
        super().__init__()
        self.num_experts, self.d_model, self.width = num_experts, d_model, width
        self.act_fn = activation

    @abstractmethod
    def one(self, expert: int, x: Tensor) -> Tensor:
        """What one expert makes of x (n, d)."""

    def loop(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The definition: one expert after the other, on the tokens that are routed to it."""
        out = torch.zeros_like(x)
        for expert in index.unique().tolist():
            token, place = torch.where(index == expert)
            made = self.one(expert, x[token]) * weights[token, place, None]
            out = out.index_add(0, token, made.to(out.dtype))
        return out

    @abstractmethod
    def hidden(self, x: Tensor) -> Tensor:
        """The hidden units of all experts, (T, N, f)."""

    def whole(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """All experts as one dense layer, those that are not taken weighted 0."""
        by_expert = weights.new_zeros(len(x), self.num_experts).scatter(1, index, weights)
        weighed = self.hidden(x) * by_expert.to(x.dtype)[..., None]
        return F.linear(weighed.flatten(1), self.down_proj.transpose(0, 1).flatten(1))

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, width={self.width}"


@use_experts_implementation(experts_interface=_INTERFACE)
class GatedExperts(_Bank):
    """E_i(x) = (act(x Wg_i^T) * (x Wu_i^T)) Wd_i^T."""

    def __init__(self, config: Any, num_experts: int, d_model: int, width: int, activation: Activation) -> None:
        super().__init__(config, num_experts, d_model, width, activation)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, d_model))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, width))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.loop(x, index, weights)

    def hidden(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(1, (self.num_experts, -1)).chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def one(self, expert: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, self.down_proj[expert])

    @torch.no_grad()
    def fill(self, slices: Slices) -> None:
        assert slices.gate is not None
        self.gate_up_proj.copy_(torch.cat([slices.gate, slices.up], dim=1))
        self.down_proj.copy_(slices.down)

    def slices(self) -> Slices:
        gate, up = self.gate_up_proj.detach().chunk(2, dim=1)
        return Slices(gate, up, None, self.down_proj.detach())


@use_experts_implementation(experts_interface=_INTERFACE, has_gate=False, has_bias=True)
class PlainExperts(_Bank):
    """E_i(x) = act(x Wu_i^T + bu_i) Wd_i^T."""

    def __init__(self, config: Any, num_experts: int, d_model: int, width: int, activation: Activation) -> None:
        super().__init__(config, num_experts, d_model, width, activation)
        self.up_proj = nn.Parameter(torch.empty(num_experts, width, d_model))
        self.up_proj_bias = nn.Parameter(torch.zeros(num_experts, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, width))

    @property
    def down_proj_bias(self) -> Tensor:
        """The output's bias is the layer's; Transformers' backends ask for one of each expert."""
        return self.down_proj.new_zeros(1).expand(self.num_experts, self.d_model)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.loop(x, index, weights)

    def hidden(self, x: Tensor) -> Tensor:
        made = F.linear(x, self.up_proj.flatten(0, 1), self.up_proj_bias.flatten())
        return self.act_fn(made).unflatten(1, (self.num_experts, -1))

    def one(self, expert: int, x: Tensor) -> Tensor:
        hidden = self.act_fn(F.linear(x, self.up_proj[expert], self.up_proj_bias[expert]))
        return F.linear(hidden, self.down_proj[expert])

    @torch.no_grad()
    def fill(self, slices: Slices) -> None:
        self.up_proj.copy_(slices.up)
        self.down_proj.copy_(slices.down)
        if slices.up_bias is not None:
            self.up_proj_bias.copy_(slices.up_bias)

    def slices(self) -> Slices:
        return Slices(None, self.up_proj.detach(), self.up_proj_bias.detach(), self.down_proj.detach())


def bank_of(seat: Seat) -> type[GatedExperts | PlainExperts]:
    """The kind of bank that a layer's experts make."""
    return GatedExperts if seat.is_gated else PlainExperts


class ExpertLayer(nn.Module):
    """x (B, T, d) to y of the same shape, in the place of a dense feed-forward layer.

    `combine="sum"` gives each expert that the gate takes the weight 1: with all of them the layer is the dense one
    whose neurons they part. It needs a gate that takes the same number of experts for every token. `shared` is a bank
    of one expert that every token takes beside those.
    """

    def __init__(
        self,
        site: Site,
        router: Router,
        gate: TopK,
        experts: GatedExperts | PlainExperts,
        host: Host,
        *,
        bias: Tensor | None = None,
        combine: str = "softmax",
        shared: GatedExperts | PlainExperts | None = None,
    ) -> None:
        super().__init__()
        self.site, self.routing_gate, self.host, self.combine = site, gate, host, combine
        self.gate, self.experts, self.shared = router, experts, shared
        self.stack = ""
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @property
    def num_experts(self) -> int:
        """Those that the router chooses among."""
        return self.experts.num_experts

    @property
    def top_k(self) -> int:
        return self.routing_gate.k

    @top_k.setter
    def top_k(self, k: int) -> None:
        gate = TopK(k, self.routing_gate.normalize, self.routing_gate.temperature)
        gate.check(self.experts.num_experts)
        self.routing_gate = gate

    def forward(self, x: Tensor) -> Tensor:
        self.host.called(self.site.name)
        weights, index = self.route(x)
        flat = x.reshape(-1, x.shape[-1])
        out = self.experts(flat, index.flatten(0, -2), weights.flatten(0, -2).to(x.dtype))
        if self.shared is not None:
            all_of_it = index.new_zeros(len(flat), 1), flat.new_ones(len(flat), 1)
            out = out + self.shared(flat, *all_of_it)  # called, for hooks that bring its weights
        return (out if self.bias is None else out + self.bias).view(x.shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and index (..., k) of x (..., d); recorded if anybody asks."""
        context = self.host.context(self.site, self.stack, False, x)
        logits = self.gate(self.host.in_float32(x), context)
        with no_autocast(x.device.type):
            routing = self.routing_gate(logits)
        if self.host.wants(NAME):
            self.host.record(NAME, Record.of(self.site, routing, context, self.gate))
        if self.combine == "sum":  # by logits, as weights that are next to nothing are all 0
            logits, index = routing.logits.topk(self.top_k, dim=-1)
            return torch.ones_like(logits), index
        return routing.weights.topk(self.top_k, dim=-1)
