"""Mix and match: one method's router, another's gate, the auxiliary losses of a third.

    HotMoEConfig's router with DynMoLE's gate and losses:
        CustomConfig(router_of="hotmoe", gate_of="dynmole")
    RMoE's recurrence under a linear router's logits:
        CustomConfig(router_of=["mola", "rmoe"], settings={"mola": {"aux_weight": 0.0}})

On the command line, parts are settings of the adapter, and so are the settings of each part, under its method's name:

    moesaic train custom data=tasks/ adapter.router_of=mola,rmoe adapter.gate_of=dynmole adapter.losses_of=dynmole,mola
        adapter.settings.dynmole.top_p=0.6 adapter.settings.rmoe.state_dim=32

`gate_of` left out is the first router's method, `losses_of` left out the gate's. `level=block` makes whole FFNs the
experts, as in MixLoRA: `router_of=uniform level=block` is such experts without routing. Every part is built by its own
method's config, from `settings` and from what all methods share; the logits of several routers are added up. A part
that changes between training and evaluation, or over the training, does so here too.

Departures: those of the parts; the whole is nobody's method.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError, suggest
from moesaic.lora.config import METHODS, MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.routing import AuxiliaryLoss, Gate, Router, RoutingContext, Site

_COMMON = ("r", "num_experts", "lora_alpha", "use_rslora", "lora_dropout", "top_k", "num_tasks")


class SumRouter(Router):
    """Logits of several routers, added up: `logits = sum_i router_i(h)`."""

    def __init__(self, routers: list[Router]) -> None:
        super().__init__(routers[0].num_experts)
        self.parts = nn.ModuleList(routers)

    @property
    def routers(self) -> list[Router]:
        return [part for part in self.parts if isinstance(part, Router)]

    def projection(self, context: RoutingContext | None = None) -> tuple[Tensor, Tensor | None] | None:
        """All parts' maps in one, where each reads `h` through one."""
        maps = [router.projection(context) if router.reads_by_projection else None for router in self.routers]
        known = [m for m in maps if m is not None]
        if len(known) < len(maps):
            return None
        biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in known]
        return torch.cat([weight for weight, _ in known]), torch.cat(biases)

    def from_projection(self, read: Tensor, context: RoutingContext | None = None) -> Tensor:
        widths = [len(p[0]) for p in (router.projection(context) for router in self.routers) if p is not None]
        parts = zip(self.routers, read.split(widths, dim=-1), strict=True)
        return _total([router.from_projection(part, context) for router, part in parts])

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        return _total([router.score(h, context) for router in self.routers])

    @torch.no_grad()
    def permute_experts_(self, order: Tensor) -> None:
        for router in self.routers:
            router.permute_experts_(order)


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _total(logits: list[Tensor]) -> Tensor:
    return torch.stack(logits).sum(dim=0) if len(logits) > 1 else logits[0]


@dataclass
class CustomConfig(MixtureConfig):
    """Settings of a recombination on top of `MixtureConfig`'s.

    Raises:
        ConfigError: a part is no method, or its settings do not fit.
    """

    method: ClassVar[str] = "custom"
    paper: ClassVar[str] = "mix and match"
    summary: ClassVar[str] = "one method's router, another's gate, the losses of a third"

    router_of: list[str] | str = field(
        default="mola", metadata={"help": "method whose router scores; of several, the logits are added up"}
    )
    gate_of: str | None = field(default=None, metadata={"help": "method whose gate weighs; the first router's if left"})
    losses_of: list[str] | str | None = field(
        default=None, metadata={"help": "methods whose auxiliary losses shape the router; the gate's if left"}
    )
    level: Literal["linear", "block"] = field(  # type: ignore[misc]
        default="linear", metadata={"help": "what an expert is: linear, a LoRA pair, or block, a whole FFN's pairs"}
    )
    settings: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "settings of the parts: method -> its own settings"}
    )
    top_k: int | None = field(default=None, metadata={"help": "experts a token, for all parts that have a top_k"})
    num_tasks: int | None = field(default=None, metadata={"help": "tasks, for parts that gate by task"})
    aux_weight: float = field(
        default=1.0, metadata={"help": "factor on the weights that the losses have of their own; 0 turns them off"}
    )

    def __post_init__(self) -> None:
        self._parts: dict[str, MixtureConfig] = {}
        names = (self.router_of, "" if self.gate_of is None else self.gate_of, self.losses_of or [])
        if isinstance(self.losses_of, (bool, int, float)) or not all(
            isinstance(n, str) or (isinstance(n, (list, tuple)) and _are_texts(n)) for n in names
        ):
            raise ConfigError("router_of, gate_of and losses_of must be names of methods, or lists of such names")
        if not isinstance(self.gate_of, (str, type(None))):
            raise ConfigError(f"gate_of={self.gate_of!r} must be the name of one method")
        if not self.routers_of:
            raise ConfigError("router_of is empty: name the method whose router scores")
        used = list(dict.fromkeys([*self.routers_of, self.gate_name, *self.losses_names]))
        for key, given in (("router_of", self.routers_of), ("losses_of", self.losses_names)):
            if len(set(given)) < len(given):
                raise ConfigError(f"{key}={','.join(given)} names one twice")
        if not isinstance(self.settings, dict) or not all(
            isinstance(v, dict) and _are_texts(v) for v in self.settings.values()
        ):
            raise ConfigError(f"settings={self.settings!r} must hold settings by method, as in settings.mola.top_k=2")
        for name in self.settings:
            if name not in used:
                raise ConfigError(f"settings.{name}: no part is of method {name!r}; the parts are {', '.join(used)}")
        for name in used:
            self.part(name)
        learns = any(self.part(name).kind.learns_routing for name in self.routers_of)
        self.kind = Kind(  # type: ignore[misc]
            weights="learned" if learns else "fixed",
            needs_tasks=any(part.kind.needs_tasks for part in self._parts.values()),
            needs_targets=any(self.part(name).kind.needs_targets for name in self.losses_names),
        )
        for name in self.losses_names:
            if self.routers_of != [name] and any(loss.needs_own_router for loss in self.part(name).losses()):
                raise ConfigError(
                    f"losses_of={name} and router_of={','.join(self.routers_of)} disagree: a loss of {name} reads its "
                    "own router"
                )
        if self.num_tasks is not None and self.num_tasks < 1:
            raise ConfigError(f"num_tasks={self.num_tasks} must be a whole number of at least 1")
        if self.top_k is not None and not any(hasattr(part, "top_k") for part in self._parts.values()):
            raise ConfigError(f"top_k={self.top_k} has no effect: none of {', '.join(used)} has one; leave it out")
        super().__post_init__()

    def _take_adapters(self) -> None:
        super()._take_adapters()
        if self.adapters is not None:
            self._parts = {name: self._build(name) for name in self._parts}  # with the adapters' number of experts

    @property
    def routers_of(self) -> list[str]:
        return [self.router_of] if isinstance(self.router_of, str) else list(self.router_of)

    @property
    def gate_name(self) -> str:
        return self.gate_of or self.routers_of[0]

    @property
    def losses_names(self) -> list[str]:
        if self.losses_of is None:
            return [self.gate_name]
        return [self.losses_of] if isinstance(self.losses_of, str) else list(self.losses_of)

    def part(self, name: str) -> MixtureConfig:
        """The config of the method that a part is taken from."""
        if name not in self._parts:
            self._parts[name] = self._build(name)
        return self._parts[name]

    def _build(self, name: str) -> MixtureConfig:
        known = {m for m, cls in METHODS.items() if cls is not type(self)}
        if name not in known:
            raise ConfigError(f"no router, gate or loss of {name!r} to recombine; {suggest(name, known)}")
        cls = METHODS[name]
        has, own = {f.name for f in fields(cls)}, self.settings.get(name, {})
        shared = sorted({f.name for f in fields(MixtureConfig)} & own.keys() - {"aux_weight"})
        if shared:
            raise ConfigError(
                f"settings.{name}.{shared[0]} has no effect: {shared[0]} is one for the whole mixture, set it beside "
                "router_of"
            )
        common = {key: getattr(self, key) for key in _COMMON if key in has and getattr(self, key) is not None}
        return cls(**{**common, **own})

    @property
    def files(self) -> list[str]:
        return [file for part in self._parts.values() for file in part.files]

    def experts_at(self, site: Site) -> int:
        return self.part(self.routers_of[0]).experts_at(site)

    def targets(self, prompts: list[str]) -> Tensor | None:
        """Those of the part whose loss compares with them."""
        taught = [name for name in self.losses_names if self.part(name).kind.needs_targets]
        return self.part(taught[0]).targets(prompts) if taught and self.aux_weight > 0 else None

    def router(self, site: Site) -> Router:
        routers = []
        for name in self.routers_of:
            part = self.part(name)
            before = {f.name: getattr(part, f.name) for f in fields(part)}
            routers.append(part.router(site))
            # what a part finds out while it builds is kept, as in its own config: a saved adapter needs no more
            found = {key: getattr(part, key) for key, value in before.items() if getattr(part, key) != value}
            if found:
                self.settings = {**self.settings, name: {**self.settings.get(name, {}), **found}}
        counts = {router.num_experts for router in routers}
        if len(counts) > 1:
            raise ConfigError(f"router_of={self.routers_of}: at {site.name} they score {sorted(counts)} experts")
        return SumRouter(routers) if len(routers) > 1 else routers[0]

    def gate(self) -> Gate:
        return self.part(self.gate_name).gate()

    def eval_gate(self) -> Gate:
        return self.part(self.gate_name).eval_gate()

    def losses(self) -> list[AuxiliaryLoss]:
        losses = [loss for name in self.losses_names for loss in self.part(name).losses()]
        for loss in losses:
            loss.weight *= self.aux_weight
        return losses

    def connect(self, routers: list[Router]) -> None:
        for index, name in enumerate(self.routers_of):
            own = [r.routers[index] if isinstance(r, SumRouter) else r for r in routers]
            self.part(name).connect(own)
