"""A split that needs no training: shared experts from activation rates, the rest clustered, an analytic router (CMoE,
Pei et al. 2025, arXiv 2502.04416).

    h(x)  = act(x^ G^^T) * (x^ U^^T)            ^: rows of length 1
    c_n   = which of q tokens have neuron n among their K_a largest |h|           (q,), 0 or 1
    shared: the neurons with the highest mean of c; experts: the others, in clusters of one size by |c_n - centre|_1
    scores = |act(x G^_R^T) * (x U^_R^T)|,      R: of each cluster the neuron nearest to its centre
    y = shared(x) + sum over the k experts with the highest scores of E_i(x)

Clusters begin at the neurons with the highest rates, and are assigned by an exact linear assignment, `iterations` times
(the authors' code: once). Plain layers (GPT-2, BERT) have no G: h(x) = act(x^ U^^T + b).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moesaic.errors import ConfigError, MissingDependency
from moesaic.ffn.layer import Activation, ExpertLayer, GatedExperts, PlainExperts, bank_of
from moesaic.ffn.method import Method, setting
from moesaic.ffn.places import put, sites
from moesaic.ffn.split import Dense, Seat, cut, even, read, seats
from moesaic.ffn.watching import Text, batches_of, evaluating, tokens_of, watching
from moesaic.host import Host
from moesaic.routing import Router, RoutingContext, Site, TopK


@dataclass
class Groups:
    """Neurons of one layer: the shared ones (s,), the experts' (N, f), and of each expert the representative (N,)."""

    shared: Tensor
    experts: Tensor
    representatives: Tensor


class AnalyticRouter(Router):
    """The representatives' own magnitudes: `|act(x G_R^T) * (x U_R^T)|`, float32."""

    def __init__(self, d_in: int, num_experts: int, activation: Activation, *, gated: bool) -> None:
        super().__init__(num_experts)
        self.activation = activation
        self.up = nn.Parameter(torch.zeros(num_experts, d_in))
        self.bias = None if gated else nn.Parameter(torch.zeros(num_experts))
        self.gate = nn.Parameter(torch.zeros(num_experts, d_in)) if gated else None

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        up = F.linear(h, self.up.to(h.dtype), None if self.bias is None else self.bias.to(h.dtype))
        if self.gate is None:
            return self.activation(up).abs()
        return (self.activation(F.linear(h, self.gate.to(h.dtype))) * up).abs()

    @torch.no_grad()
    def take(self, dense: Dense, representatives: Tensor) -> None:
        self.up.copy_(F.normalize(dense.up[representatives].float(), dim=1))
        if self.gate is not None and dense.gate is not None:
            self.gate.copy_(F.normalize(dense.gate[representatives].float(), dim=1))
        if self.bias is not None and dense.up_bias is not None:
            self.bias.copy_(dense.up_bias[representatives])


@torch.no_grad()
def markers(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, active: int = 10, tokens: int = 4096
) -> dict[str, Tensor]:
    """c of each layer (q, d_ff), as booleans, of at most `tokens` real tokens; `active` is K_a.

    Raises:
        ConfigError: for a model without feed-forward layers of a known kind, or no token.
    """
    found: dict[str, list[Tensor]] = {seat.name: [] for seat in seats(model)}
    running: dict[str, Tensor] = {}

    def mark(seat: Seat, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = F.normalize(args[0].flatten(0, -2)[running["real"].flatten()].float(), dim=-1)
        dense = read(model, seat)
        up = F.linear(x, F.normalize(dense.up.float(), dim=1), None if dense.up_bias is None else dense.up_bias.float())
        if dense.gate is None:
            size = dense.activation(up).abs()
        else:
            size = (dense.activation(F.linear(x, F.normalize(dense.gate.float(), dim=1))) * up).abs()
        top = size.topk(min(active, size.shape[1]), dim=1).indices
        found[seat.name].append(torch.zeros_like(size, dtype=torch.bool).scatter_(1, top, True).cpu())

    read_so_far = 0
    with evaluating(model), watching(model, mark, first=True):
        for batch in batches:
            ids, running["real"] = tokens_of(model, batch)
            model(input_ids=ids, attention_mask=running["real"].long(), use_cache=False)
            read_so_far += int(running["real"].sum())
            if read_so_far >= tokens:
                break
    if not read_so_far:
        raise ConfigError("there is no token to calibrate on: give some text")
    return {name: torch.cat(parts)[:tokens] for name, parts in found.items()}


def _assignment() -> Any:
    """scipy's solver of assignments. Raises MissingDependency."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingDependency("scipy", "train") from None
    return linear_sum_assignment


def group(marks: Tensor, num_experts: int, shared_experts: int, *, iterations: int = 1) -> Groups:
    """Neurons (d_ff) of marks (q, d_ff) into `shared_experts` of `num_experts` equal parts, and clusters.

    Raises:
        ConfigError: where `num_experts` does not divide d_ff.
    """
    assign = _assignment()
    columns = marks.float().t()
    width = even(len(columns), num_experts).shape[1]
    routed = num_experts - shared_experts
    order = columns.mean(dim=1).argsort(descending=True, stable=True)
    common, rest = order[: width * shared_experts], order[width * shared_experts :]
    points = columns[rest]
    centres, assigned = points[:routed].clone(), torch.zeros(len(rest), dtype=torch.long)
    for _ in range(iterations):
        far = torch.cdist(points, centres, p=1)
        slots = far.repeat_interleave(width, dim=1).numpy()
        now = torch.from_numpy(assign(slots)[1]) // width
        if torch.equal(now, assigned):
            break
        assigned = now
        centres = torch.stack([points[assigned == i].mean(dim=0) for i in range(routed)])
    members = torch.stack([rest[assigned == i] for i in range(routed)])
    near = torch.cdist(columns[members], centres[:, None], p=1).squeeze(-1).argmin(dim=1)
    return Groups(common.sort().values, members.sort(dim=1).values, members[torch.arange(routed), near])


@dataclass
class CMoE(Method):
    """Experts of a dense Llama, Qwen, Mistral, GPT-2 or BERT without training: `num_experts` equal parts of each
    feed-forward layer, of which `shared_experts` serve every token and a router chooses `top_k` of the rest.

        method = CMoE(num_experts=8, shared_experts=2, top_k=2)
        convert(model, method, **method.parts(model, {"all": ids}))      # ids (n, T): some thousand tokens

    Raises ConfigError for settings that cannot be. Pei et al. 2025, arXiv 2502.04416.
    """

    name: ClassVar[str] = "cmoe"
    summary: ClassVar[str] = "shared experts by activation rates, the rest clustered, an analytic router: no training"
    paper: ClassVar[str] = "CMoE (arXiv 2502.04416)"
    takes: ClassVar[tuple[str, ...]] = ("groups",)

    num_experts: int = setting(8, "parts of the layer, the shared ones counted; a divisor of d_ff")
    shared_experts: int = setting(2, "parts that every token takes")
    top_k: int = setting(2, "of the others, how many a token takes")

    def __post_init__(self) -> None:
        super().__post_init__()
        routed = self.num_experts - self.shared_experts
        if self.shared_experts < 0 or not 1 <= self.top_k <= routed:
            raise ConfigError(
                f"num_experts={self.num_experts}, shared_experts={self.shared_experts} and top_k={self.top_k}: "
                "top_k of the experts that are not shared"
            )

    def layer(self, model: PreTrainedModel, seat: Seat, site: Site, host: Host) -> ExpertLayer:
        dense = read(model, seat)
        bank = bank_of(seat)
        width, routed = even(seat.d_ff, self.num_experts).shape[1], self.num_experts - self.shared_experts

        def of(n: int, f: int) -> GatedExperts | PlainExperts:
            return bank(model.config, n, seat.d_model, f, dense.activation)

        made = ExpertLayer(
            site,
            AnalyticRouter(seat.d_model, routed, dense.activation, gated=seat.is_gated),
            TopK(self.top_k),
            of(routed, width),
            host,
            bias=dense.bias,
            combine="sum",
            shared=of(1, width * self.shared_experts) if self.shared_experts else None,
        )
        return made.to(dense.up.device, dense.up.dtype).train(model.training)

    def parts(self, model: PreTrainedModel, text: Text, *, batch_size: int = 8, seed: int = 0) -> dict[str, Any]:
        """`groups` of neurons by layer, by their markers on a row of each domain in turn; nothing is drawn."""
        _assignment()  # before the model reads anything
        in_turn = chain.from_iterable(zip_longest(*(batches_of(rows, 1) for rows in text.values())))
        found = markers(model, filter(None, in_turn))
        return {"groups": {name: group(marks, self.num_experts, self.shared_experts) for name, marks in found.items()}}

    def install(self, model: PreTrainedModel, host: Host) -> None:
        for seat, site in sites(model):
            put(model, seat, self.layer(model, seat, site, host))

    def convert(self, model: PreTrainedModel, host: Host, *, groups: Mapping[str, Groups]) -> None:  # type: ignore[override]
        if groups.keys() != {seat.name for seat in seats(model)}:
            raise ConfigError("groups are of another model: its feed-forward layers go by other names")
        made = []
        for seat, site in sites(model):
            layer, dense, found = self.layer(model, seat, site, host), read(model, seat), groups[seat.name]
            layer.experts.fill(cut(dense, found.experts))
            if layer.shared is not None:
                layer.shared.fill(cut(dense, found.shared[None]))
            router = layer.gate
            assert isinstance(router, AnalyticRouter)
            router.take(dense, found.representatives)
            made.append((seat, layer))
        for seat, layer in made:
            put(model, seat, layer)
