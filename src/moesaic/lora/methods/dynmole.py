"""DynMoLE: dynamic mixture of LoRA experts, routed by the entropy of the router (Li et al. 2025, arXiv 2504.00661;
mechanics from the first author's code, the paper's body was not at hand).

    p = softmax(G h),  H = Tsallis entropy of p over its maximum,  H_q(p) = (1 - sum_e p_e^q) / (q - 1)
    kept = every expert if H > entropy_threshold, else the first keep_top_k of p and those within cumulative top_p
    weights = p on the kept, not renormalised,  y = W0 x + (alpha/r) sum_e w_e B_e A_e x
    L = L_task + entropy_coef * mean_t H_t + balance_coef * E sum_e f_e P_e,  f_e = mean_t w_te,  P_e = mean_t p_te

Uncertain tokens see every expert, certain ones few; the entropy term makes routers certain, the balance term spreads
them. f_e is probability mass, so it has a gradient, and the balance term may fall below 1 (unlike Switch's).

Departures from the authors' code: both losses are one a router, averaged, and padding never counts (theirs join the
tokens of all layers, so that layers balance each other, and count padding in the entropy: `legacy_concat`); the
experts of a layer share one dropout mask; every linear is a target unless told otherwise (theirs: gate, up and down
projections). As in theirs, entropy_eps lowers H by about 4e-4 at the default index, by far more as the index nears 1:
set it to 0 there. `f_mode="hard_topk"` counts the first keep_top_k in place of mass, another reading of the paper.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.routing import AuxiliaryLoss, EntropyHybrid, LinearRouter, Record, Router, Site
from moesaic.routing.entropy import EntropyType, generalised_entropy
from moesaic.routing.losses import stacks

FMode = Literal["mass", "hard_topk"]


class RouterEntropy(AuxiliaryLoss):
    """Mean entropy of a token's probabilities over its maximum, as `gate` measures it.

    With `concat` one mean over the tokens of all routers, padding included.
    """

    def __init__(self, weight: float, gate: EntropyHybrid, *, concat: bool = False) -> None:
        super().__init__(weight, reduce="mean")
        self.gate = gate
        self.concat = concat

    def per_router(self, records: Sequence[Record], step: Hashable) -> Iterator[Tensor]:
        gate, groups = self.gate, stacks(records, "probs")
        values = [generalised_entropy(gate.kind, stack.values, gate.q, eps=gate.eps) for stack in groups]
        if self.concat:
            yield torch.cat([v.flatten() for v in values]).mean(dim=0, keepdim=True)
            return
        for stack, value in zip(groups, values, strict=True):
            yield stack.mean(value)


class MassBalance(AuxiliaryLoss):
    """`E * sum_e f_e P_e`, P_e the mean probability and f_e the mean weight ("mass") or share of top-k slots.

    1 for uniform rows and for balanced certain ones, E for a collapsed router; weights that sum to less than 1 lower
    it. With `concat` f and P are means over the tokens of all routers, so that layers balance each other.
    """

    def __init__(self, weight: float, *, top_k: int, f_mode: FMode = "mass", concat: bool = False) -> None:
        super().__init__(weight, reduce="mean")
        self.top_k = top_k
        self.f_mode = f_mode
        self.concat = concat

    def per_router(self, records: Sequence[Record], step: Hashable) -> Iterator[Tensor]:
        shares: list[Tensor] = []
        means: list[Tensor] = []
        tokens: list[Tensor | int] = []
        for weights, probs in zip(stacks(records, "weights"), stacks(records, "probs"), strict=True):
            used = weights.values if self.f_mode == "mass" else self.slots(probs.values)
            shares.append(weights.mean(used))
            means.append(probs.mean(probs.values))
            tokens.append(probs.values.shape[1] if probs.mask is None else probs.mask.sum())
        if self.concat:
            shares, means = over_all(shares, tokens), over_all(means, tokens)
        for share, mean in zip(shares, means, strict=True):
            yield mean.shape[-1] * (share * mean).sum(dim=-1)

    def slots(self, probs: Tensor) -> Tensor:
        """1/k on the k most probable experts of each row, 0 elsewhere; no gradient."""
        chosen = probs.detach().topk(self.top_k, dim=-1).indices
        return torch.zeros_like(probs).scatter(-1, chosen, 1 / self.top_k)


def over_all(parts: Sequence[Tensor], tokens: Sequence[Tensor | int]) -> list[Tensor]:
    """One mean (1, E) over the tokens of all routers, from means (R, E) over that many tokens each."""
    totals = [n * part.sum(dim=0, keepdim=True) for n, part in zip(tokens, parts, strict=True)]
    count = sum(n * len(part) for n, part in zip(tokens, parts, strict=True))
    return [torch.cat(totals).sum(dim=0, keepdim=True) / (count + 1e-8)]


@dataclass
class DynMoLEConfig(MixtureConfig):
    """Settings of DynMoLE on top of `MixtureConfig`'s. Defaults are the authors' for LLaMA."""

    method: ClassVar[str] = "dynmole"
    paper: ClassVar[str] = "DynMoLE (arXiv 2504.00661)"
    summary: ClassVar[str] = "all experts for uncertain tokens, a leading few for the rest"

    r: int = field(default=24, metadata={"help": "rank of one expert"})
    num_experts: int = field(default=6, metadata={"help": "experts in each adapted layer"})
    lora_alpha: float = field(default=48, metadata={"help": "scaling numerator: alpha/r, or alpha/sqrt(r) with rslora"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout on the experts' input"})
    keep_top_k: int = field(default=2, metadata={"help": "experts a certain token keeps at least"})
    top_p: float = field(default=0.75, metadata={"help": "probability mass within which a certain token keeps experts"})
    include_crossing: bool = field(default=False, metadata={"help": "keep the expert that crosses top_p too"})
    entropy_threshold: float = field(
        default=0.9, metadata={"help": "entropy, over its maximum, above which a token keeps all; from 1 on none does"}
    )
    entropy_index: float = field(default=1.1, metadata={"help": "index q of the entropy, above 0 to 2; 1 is Shannon's"})
    entropy_type: EntropyType = field(default="tsallis", metadata={"help": "tsallis or renyi"})
    entropy_eps: float = field(default=1e-5, metadata={"help": "added to probabilities before their entropy"})
    aux_weight: float = field(default=1.0, metadata={"help": "factor on both auxiliary losses; 0 turns them off"})
    entropy_coef: float = field(default=0.01, metadata={"help": "weight of the entropy loss"})
    balance_coef: float = field(default=0.001, metadata={"help": "weight of the balance loss"})
    f_mode: FMode = field(
        default="mass", metadata={"help": "balance counts weights (mass) or the first keep_top_k (hard_topk)"}
    )
    legacy_concat: bool = field(
        default=False, metadata={"help": "losses over all layers' tokens at once, as in the authors' code"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("entropy_coef", "balance_coef"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0; 0 turns that loss off")

    def router(self, site: Site) -> Router:
        return LinearRouter(site.d_in, self.experts_at(site))

    def gate(self) -> EntropyHybrid:
        return EntropyHybrid(
            self.keep_top_k,
            self.top_p,
            self.entropy_threshold,
            self.entropy_index,
            self.entropy_type,
            self.entropy_eps,
            self.include_crossing,
        )

    def losses(self) -> list[AuxiliaryLoss]:
        entropy, balance = self.aux_weight * self.entropy_coef, self.aux_weight * self.balance_coef
        losses: list[AuxiliaryLoss] = []
        if entropy > 0:
            losses.append(RouterEntropy(entropy, self.gate(), concat=self.legacy_concat))
        if balance > 0:
            losses.append(MassBalance(balance, top_k=self.keep_top_k, f_mode=self.f_mode, concat=self.legacy_concat))
        return losses
