"""RMoE on models that are mixtures already (Mixtral, Qwen3-MoE, OLMoE): routers linked over depth instead of theirs.

    x' = P_i x,   h_i = GRU(x', h_{i-1}),   logits_i = G_i h_i,   then what the model's own router does with logits

`routing/recurrent.py` has the equations. Each `mlp.gate` becomes a router of the model's own kind, so that its
`router_logits`, balance loss and experts backends go on as they did. For training from scratch, and for a trained
model whose rest is frozen.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moesaic.errors import ConfigError
from moesaic.ffn.layer import NAME
from moesaic.ffn.method import Method, setting
from moesaic.ffn.places import is_top_k_router
from moesaic.host import Host
from moesaic.routing import Record, Routing, Site, no_autocast
from moesaic.routing.recurrent import Cell, Recurrence, RecurrentRouter


class CosineHead(nn.Module):
    """XMoE's router (Chi et al. 2022): cosines of a narrow view of the state to the experts' embeddings, over tau."""

    def __init__(self, state_dim: int, num_experts: int, *, dim: int, temperature: float = 0.3) -> None:
        super().__init__()
        self.down = nn.Linear(state_dim, dim, bias=False)
        self.embeddings = nn.Parameter(torch.randn(num_experts, dim) * 0.02)
        self.temperature = nn.Parameter(torch.tensor(temperature))

    def forward(self, state: Tensor) -> Tensor:
        down = F.normalize(F.linear(state, self.down.weight.to(state.dtype)), dim=-1)
        return down @ F.normalize(self.embeddings.to(state.dtype), dim=-1).t() / self.temperature.abs().clamp(min=0.01)


class RecurrentGate(nn.Module):
    """In front of a model's own top-k router class: x (T, d) to logits (T, N), weights (T, k) and index (T, k)."""

    top_k: int
    num_experts: int

    def __init__(self, gate: Any, router: RecurrentRouter, site: Site, host: Host) -> None:
        nn.Module.__init__(self)
        self.top_k, self.num_experts, self.hidden_dim = gate.top_k, gate.num_experts, gate.hidden_dim
        self.norm_topk_prob = getattr(gate, "norm_topk_prob", True)  # Mixtral has no such setting, and does
        self.recurrent, self.site, self.host, self.stack = router, site, host, ""

    @property
    def weight(self) -> Tensor:
        """G (N, p), which the model initialises as it would its own router's."""
        head = self.recurrent.head
        return head.embeddings if isinstance(head, CosineHead) else cast(nn.Linear, head).weight

    def __reduce__(self) -> Any:
        """Copied and pickled by the class that its own was made of."""
        return _blank, (type(self).__mro__[2],), vars(self)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.host.called(self.site.name)
        x = hidden_states.reshape(-1, self.hidden_dim)
        context = self.host.context(self.site, self.stack, False, x)
        logits = self.recurrent(x, context)
        with no_autocast(x.device.type):
            probs, weights, index = _taken(logits, self.top_k, renormalised=self.norm_topk_prob)
            if self.host.wants(NAME):
                routing = Routing(torch.zeros_like(probs).scatter(-1, index, weights), probs, logits)
                self.host.record(NAME, Record.of(self.site, routing, context, self.recurrent))
        return logits.to(x.dtype), weights.to(x.dtype), index


@torch.no_grad()
def _check_is_plain(gate: Any) -> None:
    """Raise ConfigError for a router that does more with its logits than softmax, top-k and a renormalisation."""
    own = copy.deepcopy(gate).to("cpu", torch.float32)
    torch.nn.init.normal_(own.weight, generator=(draw := torch.Generator().manual_seed(0)))
    x = torch.randn(16, own.hidden_dim, generator=draw)
    logits = F.linear(x, own.weight)
    weights, index = _taken(logits, own.top_k, renormalised=getattr(own, "norm_topk_prob", True))[1:]
    try:
        plain = all(map(torch.allclose, own(x), (logits, weights, index)))
    except (TypeError, ValueError, RuntimeError):  # it takes or gives other things
        plain = False
    if not plain:
        raise ConfigError(
            f"{type(gate).__name__} is no plain top-k router (softmax, the k largest, renormalised or not), which is "
            "all that RMoE stands in for"
        )


def _taken(logits: Tensor, k: int, *, renormalised: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (T, N), and the weights and index (T, k) of the k largest."""
    probs = logits.softmax(dim=-1)
    weights, index = probs.topk(k, dim=-1)
    return probs, weights / weights.sum(dim=-1, keepdim=True) if renormalised else weights, index


@cache
def _gate_class(base: type) -> type[RecurrentGate]:
    return type(f"Recurrent{base.__name__}", (RecurrentGate, base), {"__module__": __name__})


def _blank(base: type) -> RecurrentGate:
    made = _gate_class(base)
    return made.__new__(made)


def gates(model: nn.Module) -> list[tuple[str, Any]]:
    """The top-k routers of a mixture's layers, in the model's order.

    Raises:
        ConfigError: where it has none of a known kind.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if is_top_k_router(module) and hasattr(module, "hidden_dim")
    ]
    if not found:
        raise ConfigError(
            f"{type(model).__name__.removeprefix('Moesaic')} has no routers to link: RMoE goes on models that are "
            "mixtures (Mixtral, Qwen3-MoE, OLMoE)"
        )
    return found


@dataclass
class RMoE(Method):
    """Routers linked over depth, in place of those of a Mixtral, Qwen-MoE or OLMoE; the paper's ablations are settings.

        convert(model, RMoE(state_dim=128))

    Raises ConfigError for settings that cannot be. Qiu et al. 2025, arXiv 2408.06793.
    """

    name: ClassVar[str] = "rmoe"
    dense: ClassVar[bool] = False
    summary: ClassVar[str] = "routers linked over depth by a GRU, for models that are mixtures already"
    paper: ClassVar[str] = "RMoE (ICLR 2025, arXiv 2408.06793)"

    state_dim: int = setting(128, "p, the size of the recurrent state")
    cell: Cell = setting("gru", "gru, rnn or lstm")
    recurrence: Recurrence = setting("full", "full, detach (no gradient to lower layers) or none (each starts at zero)")
    residual_alpha: float = setting(0.0, "r-alpha, the share of the lower layer's logits that is added")
    residual_detach: bool = setting(False, "no gradient through these")
    shared_projector: bool = setting(False, "one P for all layers")
    shared_head: bool = setting(False, "one G for all layers; with recurrence=none and one P a stateless shared router")
    head: Literal["linear", "cosine"] = setting("linear", "linear, or cosine (XMoE's)")
    cosine_dim: int = setting(16, "of the cosine's view")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state_dim < 1 or self.cosine_dim < 1:
            raise ConfigError(f"state_dim={self.state_dim} and cosine_dim={self.cosine_dim} must be at least 1")

    def install(self, model: PreTrainedModel, host: Host) -> None:
        found = gates(model)
        for gate in {type(gate): gate for _, gate in found}.values():
            if not gate.weight.is_meta:  # else it is read from a folder, and was not when that was made
                _check_is_plain(gate)
        routers: list[RecurrentRouter] = []
        for number, (name, gate) in enumerate(found):
            experts, width = gate.num_experts, gate.hidden_dim
            site = Site(name, width, experts, layer=number, num_layers=len(found))
            router = RecurrentRouter(
                site,
                experts,
                state_dim=self.state_dim,
                cell=self.cell,
                recurrence=self.recurrence,
                residual_alpha=self.residual_alpha,
                residual_detach=self.residual_detach,
                head=CosineHead(self.state_dim, experts, dim=self.cosine_dim) if self.head == "cosine" else None,
            )
            shares = {"cell": True, "projector": self.shared_projector, "head": self.shared_head}
            for part in (part for part, wanted in shares.items() if wanted and routers):
                router.use(part, routers[0])
            routers.append(router)
            placed = _gate_class(type(gate))(gate, router, site, host)  # type: ignore[arg-type]
            placed.to(gate.weight.device, gate.weight.dtype).train(gate.training)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, placed)

    def convert(self, model: PreTrainedModel, host: Host, **parts: Any) -> None:
        self.install(model, host)
