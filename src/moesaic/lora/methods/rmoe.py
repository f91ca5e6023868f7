"""RMoE: a router that remembers how the layers below routed (ICLR 2025, arXiv 2408.06793), over LoRA experts.

    x'_i = P_i x_i                               what layer i reads of its input (eq. 2)                  (..., p)
    h_i = GRU(x'_i, h_{i-1}),  h_0 = 0           one recurrent cell for the whole adapter (eq. 3-5)       (..., p)
    logits_i = G_i h_i                           (eq. 6);  weights = top-k(softmax) / sum of the kept     (..., E)

The recurrence runs over depth, token by token: nothing passes between positions or between forwards, so no KV cache
holds any of it. States go from layer to layer in `RoutingContext.state`; a layer without a router hands on what is
below it. The paper's ablations are settings: `recurrence` ("none" is its NP), `cell`, `shared_projector`, and
`residual_alpha` (its r-alpha), which adds alpha times the logits of the layer below, their own residual included.

Departures from the authors' code: the experts are LoRA pairs beside linears, not feed-forward networks, so each kind of
module (every q_proj, every up_proj, ...) has its own chain of states over depth, all under the one cell; p is 32 and
not 128, for a router at each linear; P and G start at N(0, 0.02), which the release leaves uninitialised; the balance
loss is one for each router, summed, without padding, and 1 when balanced (the release: one over the tokens of all
layers and padding, k when balanced). `RecurrentRouter` needs nothing of the config, so its logits can be added to those
of another router.

The router is `routing/recurrent.py`, where the GRU's step is written out with its two products joined; the equations
gate by gate are `naive_step` and `naive_chain` in tests/test_rmoe.py, which it is tested against, gradients included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.routing import AuxiliaryLoss, Gate, Router, Site, SwitchBalance, TopK
from moesaic.routing.recurrent import Cell, Recurrence, RecurrentRouter


@dataclass
class RMoEConfig(MixtureConfig):
    """Settings of RMoE on top of `MixtureConfig`'s."""

    method: ClassVar[str] = "rmoe"
    paper: ClassVar[str] = "RMoE (ICLR 2025, arXiv 2408.06793)"
    summary: ClassVar[str] = "a GRU over depth, shared by all layers, tells each router how those below have routed"

    top_k: int = field(default=2, metadata={"help": "experts a token"})
    state_dim: int = field(default=32, metadata={"help": "size p of the recurrent state; 128 in the paper"})
    cell: Cell = field(default="gru", metadata={"help": "gru, rnn or lstm"})
    recurrence: Recurrence = field(
        default="full", metadata={"help": "full, detach (no gradient to lower layers) or none (each starts at zero)"}
    )
    shared_projector: bool = field(default=False, metadata={"help": "one projector P for all layers of a chain"})
    residual_alpha: float = field(default=0.0, metadata={"help": "share of the lower layer's logits that is added"})
    residual_detach: bool = field(default=False, metadata={"help": "no gradient through the added logits"})
    aux_weight: float = field(default=0.01, metadata={"help": "weight of the Switch balance loss; 0 turns it off"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state_dim < 1:
            raise ConfigError(f"state_dim={self.state_dim} must be at least 1")

    def router(self, site: Site) -> Router:
        return RecurrentRouter(
            site,
            self.experts_at(site),
            state_dim=self.state_dim,
            cell=self.cell,
            recurrence=self.recurrence,
            residual_alpha=self.residual_alpha,
            residual_detach=self.residual_detach,
        )

    def connect(self, routers: list[Router]) -> None:
        """One cell for all; with `shared_projector`, one projector for the routers of a chain and width."""
        owners: dict[Any, RecurrentRouter] = {}
        for router in routers:
            assert isinstance(router, RecurrentRouter)
            wanted = {"cell": "cell"}
            if self.shared_projector:
                wanted["projector"] = f"{router.chain} {router.projector.in_features}"
            for name, key in wanted.items():
                owner = owners.setdefault(key, router)
                if owner is not router:
                    router.use(name, owner)

    def gate(self) -> Gate:
        return TopK(self.top_k, normalize="sum")

    def losses(self) -> list[AuxiliaryLoss]:
        return [SwitchBalance(self.aux_weight)]
