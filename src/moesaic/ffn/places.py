"""The layers of a model that experts can sit in, and those that do: found, counted, put in place."""

from __future__ import annotations

from typing import Any

from torch import nn

from moesaic.ffn.layer import ExpertLayer
from moesaic.ffn.split import Seat, seats
from moesaic.routing import Site


def is_top_k_router(module: nn.Module) -> bool:
    """Whether a module is what Transformers' mixtures choose their experts by."""
    return type(module).__name__.endswith("TopKRouter") and hasattr(module, "top_k")


def routed_layers(model: nn.Module) -> list[Any]:
    """What takes `top_k` experts a token: converted layers, and the top-k routers of models that are mixtures."""
    return [module for module in model.modules() if isinstance(module, ExpertLayer) or is_top_k_router(module)]


def active_parameters(model: nn.Module) -> int:
    """How many parameters a token uses: of a layer's experts, those that it takes."""
    idle = 0
    for module in model.modules():
        experts: Any = getattr(module, "experts", None)
        routes: Any = module if isinstance(module, ExpertLayer) else getattr(module, "gate", None)
        if isinstance(experts, nn.Module) and hasattr(routes, "top_k"):
            count = sum(p.numel() for p in experts.parameters())
            idle += count - count * routes.top_k // routes.num_experts
    return sum(p.numel() for p in model.parameters()) - idle


def expert_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """The converted layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertLayer)}


def put(model: nn.Module, seat: Seat, layer: nn.Module) -> None:
    """A layer in the place of a dense one; what stands around it (a dropout, a norm) stays."""
    if seat.is_gated:
        _set(model, seat.name, layer)
        return
    for name in (*seat.first, seat.activation):
        _set(model, f"{seat.name}.{name}", nn.Identity())
    _set(model, f"{seat.name}.{seat.last}", layer)


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def sites(model: nn.Module) -> list[tuple[Seat, Site]]:
    """The feed-forward layers of a model, and what their routers are told of their places."""
    found = seats(model)
    names = [seat.name if seat.is_gated else f"{seat.name}.{seat.last}" for seat in found]
    return [
        (seat, Site(name, seat.d_model, seat.d_model, layer=i, num_layers=len(found)))
        for i, (seat, name) in enumerate(zip(found, names, strict=True))
    ]
