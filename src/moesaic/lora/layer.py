"""MixtureLinear: a frozen linear with a mixture of LoRA experts beside it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moesaic.errors import ConfigError
from moesaic.host import Host
from moesaic.lora.mix import mix
from moesaic.routing import Gate, Record, Router, Site, pool

if TYPE_CHECKING:
    from moesaic.lora.config import MixtureConfig

_CROSS_ATTENTION = re.compile(r"cross_?att|EncDecAttention|encoder_attn", re.IGNORECASE)
_KEY_OR_VALUE = re.compile(r"^(k|v|key|value|k_proj|v_proj|key_proj|value_proj|kv_proj|c_attn)$")


def features(base: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of anything linear: nn.Linear, GPT-2's Conv1D, a quantised stand-in; None for the rest."""
    if isinstance(base, Conv1D):
        return base.weight.shape[0], base.weight.shape[1]
    if isinstance(base, nn.Bilinear):
        return None
    d_in, d_out = getattr(base, "in_features", None), getattr(base, "out_features", None)
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) and callable(base) else None


class MixtureLinear(nn.Module, BaseTunerLayer):
    """`base(x) + scaling * sum_e w_e(x) B_e A_e dropout(x)`, with w from a router and a gate.

    Per adapter: `moe_lora_A` (E*r, d_in), `moe_lora_B` (E*r, d_out) and `moe_lora_router`. A target in
    `lora_target_modules` has one expert and no router: plain LoRA.
    """

    adapter_layer_names = ("moe_lora_A", "moe_lora_B", "moe_lora_router")
    other_param_names = ("sites", "gates", "scaling", "dropout", "backends")

    def __init__(self, base_layer: nn.Module, host: Host) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.host = host
        self.moe_lora_A = nn.ParameterDict()
        self.moe_lora_B = nn.ParameterDict()
        self.moe_lora_router = nn.ModuleDict()
        self.sites: dict[str, Site] = {}
        self.gates: dict[str, Gate] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.backends: dict[str, Any] = {}
        self.stack = ""
        self.cross = False
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter: str, config: MixtureConfig, site: Site, *, routed: bool) -> None:
        """Add an adapter. A is kaiming-uniform over the stacked matrix, B zero: the mixture starts as the base."""
        num_experts = config.experts_at(site) if routed else 1
        rows = num_experts * config.r
        self.moe_lora_A[adapter] = nn.Parameter(torch.empty(rows, site.d_in))
        self.moe_lora_B[adapter] = nn.Parameter(torch.zeros(rows, site.d_out))
        nn.init.kaiming_uniform_(self.moe_lora_A[adapter], a=5**0.5)
        if routed:
            router = config.router(site)
            if router.num_experts != num_experts:
                raise ConfigError(f"the router of {site.name} scores {router.num_experts} experts, not {num_experts}")
            gate = config.gate()
            gate.check(num_experts)
            self.moe_lora_router[adapter] = router
            self.gates[adapter] = gate
        self.sites[adapter] = site
        self.scaling[adapter] = config.scaling
        self.dropout[adapter] = config.lora_dropout
        self.backends[adapter] = config.backend
        leaf = site.name.rpartition(".")[2]
        self.cross = bool(_CROSS_ATTENTION.search(site.name)) and bool(_KEY_OR_VALUE.match(leaf))
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return out
        for adapter in self.active_adapters:
            if adapter in self.moe_lora_A:
                out = self._add_adapter(adapter, x, out)
        return out

    def _add_adapter(self, adapter: str, x: Tensor, out: Tensor) -> Tensor:
        A, B = self.moe_lora_A[adapter], self.moe_lora_B[adapter]
        self.host.called(self.sites[adapter].name)
        weights, top_k = None, None
        if adapter in self.moe_lora_router:
            weights, top_k = self.route(adapter, x)
        z = x if torch.is_autocast_enabled(x.device.type) else self._cast_input_dtype(x, A.dtype)
        if self.training and self.dropout[adapter] > 0:
            z = nn.functional.dropout(z, self.dropout[adapter])
        scaling = self.scaling[adapter]
        weights = z.new_full((*z.shape[:-1], 1), scaling) if weights is None else weights * scaling
        return mix(z, A, B, weights, base=out, backend=self.backends[adapter], top_k=top_k)

    def route(self, adapter: str, x: Tensor) -> tuple[Tensor, int | None]:
        """Weights (..., E) in float32 and their number a row if fixed; records them if somebody asks."""
        router, host, site = self.moe_lora_router[adapter], self.host, self.sites[adapter]
        assert isinstance(router, Router)
        context = host.context(site, self.stack, self.cross, x)
        logits = router(x, context)
        with torch.autocast(x.device.type, enabled=False):
            routing = self.gates[adapter](logits)
        if host.wants(adapter):
            hidden = None
            if host.needs_hidden(adapter):
                with torch.no_grad():
                    hidden = pool(x.float(), context.mask, context.sequences)
            host.record(adapter, Record(site, routing, context.mask, context.sequences, context.task_ids, hidden))
        return routing.weights, routing.top_k

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ConfigError("a token-routed mixture cannot be merged into the base weight: its delta differs by token")

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def __repr__(self) -> str:
        if not self.sites:
            return f"MixtureLinear({self.base_layer})"
        adapter = next(iter(self.sites))
        site, rows = self.sites[adapter], self.moe_lora_A[adapter].shape[0]
        router = self.moe_lora_router[adapter] if adapter in self.moe_lora_router else None
        experts = router.num_experts if isinstance(router, Router) else 1
        kind = type(router).__name__ + (f"[{router.extra_repr()}]" if router.extra_repr() else "") if router else "none"
        return f"MixtureLinear(in={site.d_in}, out={site.d_out}, experts={experts}, r={rows // experts}, router={kind})"
