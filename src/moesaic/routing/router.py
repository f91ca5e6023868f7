"""Routers: a hidden state in, one logit per expert out.

A router is a `torch.nn.Module` that reads the input of the layer it belongs to and whatever the
`RoutingContext` adds to it. Its logits are always float32, whatever autocast or the base model's dtype say:
bf16 logits change which experts are picked (measured: 0.2 % of top-2 sets).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.routing.sums import TokenSums


class _AutocastOff:
    """`torch.autocast(kind, enabled=False)` within autocast, without its checks and its cache."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *raised: object) -> None:
        torch.set_autocast_enabled(self.kind, True)


_UNTOUCHED: AbstractContextManager[None] = nullcontext()


def no_autocast(kind: str) -> AbstractContextManager[None]:
    """Autocast off on a kind of device; nothing to be done where it is."""
    if not torch.is_autocast_enabled(kind):
        return _UNTOUCHED
    return torch.autocast(kind, enabled=False) if torch.compiler.is_compiling() else _AutocastOff(kind)


@dataclass(frozen=True)
class Site:
    """Where a router sits: all that is known of its place before any data is seen."""

    name: str
    d_in: int
    d_out: int
    layer: int = 0
    num_layers: int = 1
    causal: bool = True
    """Whether a token must not see those behind it: no, only where the whole model cannot generate."""

    @property
    def reads_the_cache(self) -> bool:
        """Whether it runs over all that the KV cache holds: latent attention keeps keys and values compressed."""
        return self.name.endswith("kv_b_proj")


@dataclass
class RoutingContext:
    """What a router may see beside its own input, for one call.

    Shapes: `mask`, `prompt` and `sequences` have the input's leading shape, `task_ids` is (batch,), `targets` and
    `scores` (batch, E).
    """

    site: Site | None = None
    mask: Tensor | None = None
    """True where a token is real, False on padding; None if every token is."""
    sequences: Tensor | None = None
    """Which sequence of a packed batch a token belongs to, counted over the batch; None: one sequence a row."""
    prompt: Tensor | None = None
    """True where a token was given: real, and no answer; all of a sequence that has no such. None if all are."""
    task_ids: Tensor | None = None
    targets: Tensor | None = None
    """What each sequence's routing should be like (batch, E), from a teacher; see `routing_targets`."""
    scores: Tensor | None = None
    """What each sequence's prompt as a whole says of the experts: (batch, E), see `routing_scores`; or by token."""
    progress: float = 1.0
    """Share of the training that is done, for routers and losses that change with it; 1 where nobody tells."""
    state: MutableMapping[Any, Any] = field(default_factory=dict)
    """Handed from layer to layer within one forward. Write each key once (`setdefault`)."""
    whole: bool = False
    """Whether that forward is one of the whole model, so that what is made once for all layers is of use to all."""
    memory: MutableMapping[Any, Any] = field(default_factory=dict)
    """Kept for as long as one KV cache lives: scores computed at prefill, read at every decoding step."""
    sums: TokenSums = field(default_factory=TokenSums)
    """Sums over a sequence's tokens up to each, those that lie in the KV cache included."""


Map = tuple[Tensor, Tensor | None]
"""Weight (P, d_in) and bias (P,) of what is read of an input."""

_TOGETHER = {
    "from_projection": "from_projections",
    "score": "from_inputs",
    "forward": "from_inputs",
}
"""What a router does alone, and what it does with others: who overrides the one does not inherit the other."""


@dataclass
class Joint:
    """What routers that read one input may see and keep."""

    contexts: Callable[[], list[RoutingContext]]
    """Makes each router's context: not needed by all."""
    state: MutableMapping[Any, Any] = field(default_factory=dict)
    """The contexts' own."""
    kept: dict[Any, Any] = field(default_factory=dict)
    """For what is made of the routers' own tensors: empty whenever one of these has changed."""


class Identity:
    """Equal to itself alone. torch.compile takes no `object()` for a key."""


class Router(nn.Module):
    """Scores experts: `h (..., d_in) -> logits (..., num_experts)`, float32.

    Most routers read `h` through one linear map and go on from there: they say which in `projection`, and a layer may
    then compute it together with its own products (a product of 8 columns costs far more than its share). A router
    that reads `h` otherwise overrides `score`.

    Every parameter and buffer has the experts on its first axis, save those named in `shared`; so experts can be
    permuted, added or dropped without knowing the method.
    """

    shared: ClassVar[tuple[str, ...]] = ()
    by_prompt: ClassVar[bool] = False
    """Whether it asks which tokens are the prompt's, or what the prompt says as a whole."""
    by_task: ClassVar[bool] = False
    """Whether it asks for task ids outside of training too."""
    reads_by_projection: ClassVar[bool] = False
    """Whether `projection` tells all: set by defining it, and unset by overriding `score` alone further down."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "projection" in vars(cls):
            cls.reads_by_projection = True
        elif {"score", "forward"} & vars(cls).keys():
            cls.reads_by_projection = False
        for alone, together in _TOGETHER.items():
            if alone in vars(cls) and together not in vars(cls):
                setattr(cls, together, vars(Router)[together])

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.identity = Identity()
        """Which router it is: the replicas that `nn.DataParallel` makes of one share it, deep copies do not."""

    def keep(self, name: str, values: Tensor) -> None:
        """Hold values that are not trained as a parameter, so that whoever copies an adapter's parameters has them."""
        keep(self, name, values)

    def freeze_kept(self) -> None:
        """Turn off what is kept: whoever trains an adapter turns all of it on."""
        for module in self.modules():
            for name in getattr(module, "kept", ()):
                getattr(module, name).requires_grad_(False)

    def forward(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        with no_autocast(h.device.type):
            return self.score(h if h.dtype == torch.float64 else h.float(), context)

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Logits (..., E) from float32 (or float64) `h` (..., d_in), autocast already off."""
        projection = self.projection(context)
        assert projection is not None, f"{type(self).__name__} has no projection, so it must override score"
        weight, bias = projection
        bias = None if bias is None else bias.to(h.dtype)
        return self.from_projection(F.linear(h, weight.to(h.dtype), bias), context)

    def projection(self, context: RoutingContext | None = None) -> Map | None:
        """Weight (P, d_in) and bias (P,) of the map through which `h` is read; None while it is not one linear map.

        In decoding it is kept on the KV cache until one of the router's tensors changes.
        """
        return None

    def maps(self, context: RoutingContext | None = None) -> tuple[Map, Map | None] | None:
        """`projection`, where need be in two parts, the second of what the experts' dropout has left of the input.

        What is read by both, one behind the other, is what `from_projection` takes.
        """
        projection = self.projection(context)
        return None if projection is None else (projection, None)

    def from_projection(self, read: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Logits (..., E) from the projected input (..., P), autocast off; the projection itself by default."""
        return read

    @classmethod
    def from_projections(cls, routers: Sequence[Self], read: Tensor, joint: Joint) -> Tensor:
        """Logits (..., G, E) of G routers of this class that read one input, each through its own map: (..., G, P).

        Without gradients, in evaluation.
        """
        if cls.from_projection is Router.from_projection:
            return read
        each = zip(routers, read.unbind(-2), joint.contexts(), strict=True)
        return torch.stack([router.from_projection(part, context) for router, part, context in each], dim=-2)

    @classmethod
    def from_inputs(cls, routers: Sequence[Self], h: Tensor, joint: Joint) -> Tensor:
        """Logits (..., G, E) of G routers of this class that read one input (..., d_in) by more than a map."""
        each = zip(routers, joint.contexts(), strict=True)
        return torch.stack([router(h, context) for router, context in each], dim=-2)

    def read_experts(self, A: Tensor, B: Tensor) -> None:
        """Told once, before any forward, of experts that are trained already: A (E*r, d_in) and B (E*r, d_out)."""

    @torch.no_grad()
    def permute_experts_(self, order: Tensor) -> None:
        """Renumber the experts: new expert i is the old `order[i]`."""
        for name, values in (*self.named_parameters(), *self.named_buffers()):
            if name not in self.shared:
                values.copy_(values[order])


def keep(module: nn.Module, name: str, values: Tensor) -> None:
    """What `Router.keep` does, for a module within a router."""
    module.register_parameter(name, nn.Parameter(values, requires_grad=False))
    module.kept = (*getattr(module, "kept", ()), name)  # type: ignore[assignment]


class SharingRouter(Router):
    """A router that may use another's modules instead of its own: the other alone counts and saves them."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.owners: dict[str, object] = {}

    def use(self, name: str, owner: SharingRouter) -> None:
        """Take `owner`'s module `name` instead of one's own, unregistered."""
        delattr(self, name)
        object.__setattr__(self, name, getattr(owner, name))
        self.owners[name] = owner.identity

    def owner(self, name: str) -> object:
        """The identity of the router whose module it uses."""
        return self.owners.get(name, self.identity)

    def module(self, name: str, passed: MutableMapping[Any, Any]) -> Any:
        """One's own module, or the owner's as it runs in this forward, where it may be a replica.

        Args:
            passed: the forward's `RoutingContext.state`.
        """
        own = getattr(self, name)
        if name not in self.owners:
            return passed.setdefault((self.identity, name), own)
        return passed.get((self.owners[name], name), own)


class LinearRouter(Router):
    """`logits = W h (+ b)`: the router of Shazeer et al. 2017, Switch (Fedus et al. 2022), MoLA (Gao et al. 2024)."""

    def __init__(self, d_in: int, num_experts: int, *, bias: bool = False) -> None:
        super().__init__(num_experts)
        self.linear = nn.Linear(d_in, num_experts, bias=bias, dtype=torch.float32)

    def projection(self, context: RoutingContext | None = None) -> tuple[Tensor, Tensor | None]:
        return self.linear.weight, self.linear.bias

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}"


def float_linear(linear: nn.Linear, h: Tensor) -> Tensor:
    """A linear layer on float32 `h`, computed in float32 (float64 stays float64) whatever its weights were cast to."""
    bias = None if linear.bias is None else linear.bias.to(h.dtype)
    return F.linear(h, linear.weight.to(h.dtype), bias)


def by_router(read: Tensor, weights: Tensor) -> Tensor:
    """Each of G routers' products: read (..., G, P) by its own of the weights (G, P, n), in one: (..., G, n)."""
    rows = read.reshape(-1, *read.shape[-2:]).transpose(0, 1)
    return torch.bmm(rows, weights).transpose(0, 1).unflatten(0, read.shape[:-2])
