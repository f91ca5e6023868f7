"""MixtureLinear: a frozen linear with a mixture of LoRA experts beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from moesaic.errors import ConfigError
from moesaic.host import Frame, Host
from moesaic.host.fitting import in_three
from moesaic.lora import reading
from moesaic.lora.block import FeedForward
from moesaic.lora.dropping import drop_once
from moesaic.lora.factors import Factors
from moesaic.lora.mix import (
    Backend,
    choose,
    expand,
    merge_and_expand,
    mix,
    thin,
    weigh_and_expand,
)
from moesaic.lora.together import low_rank
from moesaic.routing import Gate, Record, Router, Routing, RoutingContext, Seen, Site, no_autocast

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


def reads_the_encoder(name: str) -> bool:
    """Whether a module makes keys or values of cross-attention: its tokens are the encoder's."""
    leaf = name.rpartition(".")[2]
    return bool(_CROSS_ATTENTION.search(name)) and bool(_KEY_OR_VALUE.match(leaf))


@dataclass(frozen=True)
class LayerSettings:
    """What a config says of the layer at one site."""

    site: Site
    num_experts: int
    rank: int
    """Of one expert."""
    shares_down: bool
    make_router: Callable[[], Router] | None
    """None where the layer gets one plain LoRA. Called after A is drawn, for runs with one seed to draw alike."""
    make_gates: Callable[[], tuple[Gate, Gate]]
    """The gates of training and of evaluation."""
    scaling: float
    dropout: float
    backend: Backend
    merges_factors: bool
    are_trained: bool
    """The experts are trained already: frozen, with a scaling each."""
    trained: tuple[Tensor, Tensor, Tensor] | None
    """Then their A, B and scalings, where they are at hand; else they are loaded later."""
    inference_mode: bool


NOT_MERGED = (
    "a mixture cannot be merged into the base weights: routed, its change differs by token, and unload() gives the "
    "base back; a static one of adapters is written as one LoRA by `moesaic export`"
)


class MixtureLinear(nn.Module, BaseTunerLayer):
    """`base(x) + scaling * sum_e w_e(x) B_e A_e dropout(x)`, with w from a router and a gate.

    The experts of a linear share a dropout mask, and so do the linears that read the same x.

    Per adapter: `moe_lora_A` (E*r, d_in; r where experts share it), `moe_lora_B` (E*r, d_out), `moe_lora_router`,
    each named `<kind>.<adapter>.…`.
    A target in `lora_target_modules` has one expert and no router: plain LoRA. Where experts are whole FFNs, each
    linear of one does its part in `FeedForward`, and the first of them has the router.
    """

    adapter_layer_names = ("moe_lora_A", "moe_lora_B", "moe_lora_scaling", "moe_lora_router")
    other_param_names = ("sites", "gates", "eval_gates", "scaling", "moe_lora_dropout", "backends", "blocks")

    def __init__(self, base_layer: nn.Module, host: Host) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.host = host
        self.moe_lora_A = Factors()
        self.moe_lora_B = Factors()
        self.moe_lora_scaling = Factors()
        self.moe_lora_router = nn.ModuleDict()
        self.moe_lora_dropout = nn.ModuleDict()
        self.in_features: int | None
        self.out_features: int | None
        self.in_features, self.out_features = features(base_layer) or (None, None)
        self.cast_input_dtype_enabled = True
        self.sites: dict[str, Site] = {}
        self.gates: dict[str, Gate] = {}
        self.eval_gates: dict[str, Gate] = {}
        self.scaling: dict[str, float] = {}
        self.backends: dict[str, Any] = {}
        self.blocks: dict[str, FeedForward] = {}
        self.merging: set[str] = set()
        self.name = ""
        self.stack = ""
        self.cross = False
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.train(base_layer.training)

    def update_layer(self, adapter: str, settings: LayerSettings, *, block: FeedForward | None = None) -> None:
        """Add an adapter. A is kaiming-uniform over the stacked matrix, B zero: the mixture starts as the base."""
        site, num_experts, rank = settings.site, settings.num_experts, settings.rank
        down_rows = rank if settings.shares_down else num_experts * rank
        self.moe_lora_A[adapter] = nn.Parameter(torch.empty(down_rows, site.d_in))
        self.moe_lora_B[adapter] = nn.Parameter(torch.zeros(num_experts * rank, site.d_out))
        nn.init.kaiming_uniform_(self.moe_lora_A[adapter], a=5**0.5)
        if block is not None:
            self.blocks[adapter] = block
            if site.name == block.first[0]:
                block.owner = self
        if settings.make_router is not None and (block is None or block.owner is self):
            router = settings.make_router()
            if router.num_experts != num_experts:
                raise ConfigError(f"the router of {site.name} scores {router.num_experts} experts, not {num_experts}")
            self.moe_lora_router[adapter] = router.train(self.training)
            self.gates[adapter], self.eval_gates[adapter] = settings.make_gates()
            for gate in (self.gates[adapter], self.eval_gates[adapter]):
                gate.check(num_experts)
        if settings.merges_factors:
            self.merging.add(adapter)
        if settings.are_trained:
            self._freeze_experts(adapter, settings)
        self.name = site.name
        self.sites[adapter] = site
        self.scaling[adapter] = settings.scaling
        self.moe_lora_dropout[adapter] = nn.Dropout(settings.dropout).train(self.training)
        self.backends[adapter] = settings.backend
        self.cross = reads_the_encoder(site.name)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=settings.inference_mode)

    def _freeze_experts(self, adapter: str, settings: LayerSettings) -> None:
        """Experts that are trained already: read from their adapters, or loaded later, with a scaling each."""
        router = self.router(adapter)
        assert router is not None
        self.moe_lora_scaling[adapter] = nn.Parameter(torch.ones(router.num_experts), requires_grad=False)
        self.frozen_peft_weight_names = {
            **self.frozen_peft_weight_names,
            adapter: ("moe_lora_A", "moe_lora_B", "moe_lora_scaling"),
        }
        if settings.trained is None:
            return
        A, B, scaling = settings.trained
        with torch.no_grad():
            for own, read in zip(
                (self.moe_lora_A, self.moe_lora_B, self.moe_lora_scaling), (A, B, scaling), strict=True
            ):
                own[adapter].copy_(read)
            router.read_experts(A, B)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the base layer's device alone: PEFT would also round to its dtype what was loaded in float32."""
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if device is None or device.type == "meta":  # of an outline: what an adapter holds stays
            return
        for holder in (self.moe_lora_A, self.moe_lora_B, self.moe_lora_scaling):
            if adapter_name in holder and not holder[adapter_name].is_meta:
                holder.move(adapter_name, device=device)
        router = self.router(adapter_name)
        if router is not None and not any(t.is_meta for t in (*router.parameters(), *router.buffers())):
            router.to(device)

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        super()._freeze_non_trainable_peft_weights(adapter_names)
        for router in self.moe_lora_router.values():
            cast(Router, router).freeze_kept()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        frame = self.host.called(self.name)
        adapters = [] if self.disable_adapters else [a for a in self.active_adapters if a in self.moe_lora_A]
        for adapter in adapters:
            if adapter in self.blocks:
                if len(adapters) > 1:
                    raise ConfigError(f"{', '.join(adapters)} cannot be active together: experts of one are whole FFNs")
                return self.blocks[adapter].forward(self, adapter, x, *args, **kwargs)
        out = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            out = self._add_adapter(adapter, x, out, frame)
        return out

    def _add_adapter(self, adapter: str, x: Tensor, out: Tensor, frame: Frame | None) -> Tensor:
        if x.dim() > 3:
            rows = in_three(x, self.host.view(self.stack, self.cross).tokens)
            flat = out.reshape(*rows.shape[:-1], out.shape[-1])
            return self._add_adapter(adapter, rows, flat, frame).view(out.shape)
        kind = x.device.type
        under_autocast = torch.is_autocast_enabled(kind)
        if under_autocast and not thin(x, self.moe_lora_A[adapter]):
            return self._mixed(adapter, x, x, out, few=False)
        with no_autocast(kind):
            found = low_rank(self, adapter, x, frame)
            if found is not None:
                low, B, scaled = found
                return expand(low, B, out, scaling=1.0 if scaled else self.scaling[adapter])
            A, x = self.moe_lora_A[adapter], self.host.in_float32(x) if under_autocast else x
            return self._mixed(adapter, x, self._cast_input_dtype(x, A.dtype), out, few=thin(x, A))

    def _mixed(self, adapter: str, x: Tensor, z: Tensor, out: Tensor, *, few: bool) -> Tensor:
        """`out` with the adapter's experts added, of the input x, which they read as z.

        With `few` tokens, copying A behind the router's map takes longer than a product of its own.
        """
        A, B, scaling = self.moe_lora_A[adapter], self.moe_lora_B[adapter], self.scaling[adapter]
        router = self.router(adapter)
        if router is None:
            z = self.dropped(adapter, z, x)
            return mix(z, A, B, z.new_full((*z.shape[:-1], 1), scaling), base=out, backend=self.backends[adapter])
        if adapter in self.merging:
            weights = self._weights(adapter, x, router, self.context(adapter, x))
            low = F.linear(self.dropped(adapter, z, x).reshape(-1, z.shape[-1]), A)
            return merge_and_expand(low, B, weights, self._scaling_of(adapter), out)
        if not few and (found := reading.read(self, adapter, x, z)) is not None:
            low = found.low
            weights = self._weights(adapter, x, router, found.context, found.mapped)
        elif self._in_rank_space(adapter, router, z) and not self._drops(adapter):
            weights = self._weights(adapter, x, router, self.context(adapter, x))
            low = F.linear(z.reshape(-1, z.shape[-1]), A)
        else:
            weights = self._scaled(adapter, self._weights(adapter, x, router, self.context(adapter, x)))
            z = self.dropped(adapter, z, x)
            return mix(z, A, B, weights, base=out, backend=self.backends[adapter], top_k=self._gate_of(adapter).top_k)
        if adapter in self.moe_lora_scaling:
            return weigh_and_expand(low, B, self._scaled(adapter, weights), out)
        return weigh_and_expand(low, B, weights, out, scaling=scaling)

    def _scaled(self, adapter: str, weights: Tensor) -> Tensor:
        """Weights (..., E) times the experts' scalings, one for all or one each."""
        return weights * self._scaling_of(adapter)

    def _scaling_of(self, adapter: str) -> Tensor | float:
        return self.moe_lora_scaling[adapter] if adapter in self.moe_lora_scaling else self.scaling[adapter]

    @staticmethod
    def _unwatched(router: Router) -> bool:
        """Whether a router's map may be computed together with A: it says which, and nobody watches it."""
        return router.reads_by_projection and not router._forward_pre_hooks and not router._forward_hooks

    def _is_dense(self, adapter: str, router: Router, z: Tensor) -> bool:
        B, backend = self.moe_lora_B[adapter], self.backends[adapter]
        return backend == "rank" or (
            backend == "auto" and choose(z, B, router.num_experts, self._gate_of(adapter).top_k) == "rank"
        )

    def _in_rank_space(self, adapter: str, router: Router, z: Tensor) -> bool:
        """Whether A reads in the dtype of what the router reads, and all experts of every token are computed."""
        if torch.is_autocast_enabled(z.device.type) or z.dtype not in (torch.float32, torch.float64):
            return False
        return self.moe_lora_B[adapter].dtype == z.dtype and self._is_dense(adapter, router, z)

    def reads(self, adapter: str, x: Tensor, z: Tensor) -> reading.Wanted | None:
        """The router's map and A, where both are products of the layer's input x, which A reads as z; else None."""
        router = self.router(adapter)
        if router is None or adapter in self.merging or not self._unwatched(router):
            return None
        A = self.moe_lora_A[adapter]
        if type(A) not in (nn.Parameter, Tensor) or A.device != z.device:  # sharded, for example
            return None
        if torch.is_autocast_enabled(z.device.type):
            fits = reading.in_bf16(z.device.type) and self._is_dense(adapter, router, z)
        else:
            fits = A.dtype == z.dtype and self._in_rank_space(adapter, router, z)
        if not fits:
            return None
        context = self.context(adapter, x)
        with no_autocast(z.device.type):
            maps = router.maps(context)
        if maps is None or (maps[1] is not None and not self._drops(adapter)):
            return None
        return reading.Wanted(*maps, A, context)

    def only_weighs(self, adapter: str, x: Tensor) -> bool:
        """Whether all that is done to x here is to weigh `A x`: in evaluation, in rank space, watched by nobody."""
        router = self.router(adapter)
        if router is None or self.training or router.training or router._forward_pre_hooks or router._forward_hooks:
            return False
        if self._forward_pre_hooks or self.disable_adapters or adapter not in self.active_adapters:
            return False  # it may read another tensor, or nothing
        if not vars(router).keys().isdisjoint(("forward", "score")) or adapter in self.merging or self._drops(adapter):
            return False
        A, B = self.moe_lora_A[adapter], self.moe_lora_B[adapter]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        here = type(A) is type(B) is nn.Parameter and A.device == x.device and A.shape[-1] == x.shape[-1]
        return here and A.dtype == B.dtype == dtype and self._is_dense(adapter, router, A)

    def look(self, adapter: str, seen: Seen) -> None:
        """Have all looked at that a step's weighting of `A x` depends on beside x. B is read anew each time."""
        if self.router(adapter) is None:  # the adapter has left
            return
        for setting in ("training", "eval_gates", "_active_adapter", "_disable_adapters"):
            seen.value(vars(self), setting)
        seen.may_grow(self._forward_pre_hooks)
        for factors in (self.moe_lora_A, self.moe_lora_B, self.moe_lora_scaling):
            if adapter in factors:
                seen.value(factors._modules, adapter)
                seen.inside(factors.get_submodule(adapter), written=factors is not self.moe_lora_B)
        seen.module(self.moe_lora_router._modules, adapter)
        seen.value(self.moe_lora_dropout._modules, adapter)
        dropout = vars(self.moe_lora_dropout[adapter])
        for settings, key in ((self.eval_gates, adapter), (self.backends, adapter), (dropout, "training")):
            seen.value(settings, key)
        if dropout["training"]:
            seen.value(dropout, "p")

    def context(self, adapter: str, x: Tensor) -> RoutingContext:
        """What the adapter's router may see of the running forward, for this layer's input."""
        return self.host.context(self.sites[adapter], self.stack, self.cross, x)

    def route(self, adapter: str, x: Tensor) -> tuple[Gate, Tensor]:
        """The gate and its weights (..., E) for this layer's input, without a product of experts."""
        router = self.router(adapter)
        assert router is not None
        context = self.context(adapter, x)
        return self._gate_of(adapter), self._weights(adapter, x, router, context)

    def expert_operands(self, adapter: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The experts' input (N, d_in) with dropout, A and B, all in the dtype their products are made in."""
        A, B = self.moe_lora_A[adapter], self.moe_lora_B[adapter]
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else A.dtype
        z = x if x.dtype == dtype else x.to(dtype)
        return self.dropped(adapter, z, x).reshape(-1, z.shape[-1]), A.to(dtype), B.to(dtype)

    def dropped(self, adapter: str, z: Tensor, x: Tensor) -> Tensor:
        """z with dropout: the layer's input x, perhaps in another dtype."""
        if not self._drops(adapter):
            return z
        frame, module = self.host.frame, cast(nn.Dropout, self.moe_lora_dropout[adapter])
        return drop_once(z, module.p, x, None if frame is None else frame.state)

    def _drops(self, adapter: str) -> bool:
        """Whether dropout does anything: its number is the module's, which trainers set to 0."""
        module: Any = self.moe_lora_dropout[adapter]
        return bool(module.training and module.p > 0)

    def router(self, adapter: str) -> Router | None:
        """The adapter's router in this layer; None where it is not there, or is plain LoRA here."""
        return cast("Router | None", self.moe_lora_router._modules.get(adapter))

    def _gate_of(self, adapter: str) -> Gate:
        return (self.gates if self.training else self.eval_gates)[adapter]

    def _weights(
        self, adapter: str, x: Tensor, router: Router, context: RoutingContext, read: Tensor | None = None
    ) -> Tensor:
        """Weights (..., E) of the layer's input, or of what the router `read` of it; recorded if anybody asks."""
        host, gate = self.host, self._gate_of(adapter)
        recorded = host.wants(adapter)
        with no_autocast(x.device.type):
            logits = router(host.in_float32(x), context) if read is None else router.from_projection(read, context)
            routing = gate(logits) if recorded or torch.is_grad_enabled() else None
            weights = routing.weights if routing and torch.is_grad_enabled() else gate.weights(logits)
        if recorded and routing:
            self.record(adapter, x, replace(routing, weights=weights), context)
        return weights

    def record(self, adapter: str, x: Tensor, routing: Routing, context: RoutingContext) -> None:
        """Tell whoever asks of this layer's routing of x."""
        host = self.host
        record = Record.of(self.sites[adapter], routing, context, self.router(adapter))
        if host.needs_hidden(adapter):
            record.hidden = host.sequence_means(x, context)
        if host.needs_experts(adapter):
            record.experts = lambda: (self.moe_lora_A[adapter], self.moe_lora_B[adapter])
        host.record(adapter, record)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ConfigError(NOT_MERGED)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def __repr__(self) -> str:
        if not self.sites:
            return f"MixtureLinear({self.base_layer})"
        adapter = next(iter(self.sites))
        site, rows = self.sites[adapter], self.moe_lora_B[adapter].shape[0]
        router = self.router(adapter)
        experts = router.num_experts if router is not None else 1
        kind = type(router).__name__ + (f"[{router.extra_repr()}]" if router.extra_repr() else "") if router else "none"
        return f"MixtureLinear(in={site.d_in}, out={site.d_out}, experts={experts}, r={rows // experts}, router={kind})"
