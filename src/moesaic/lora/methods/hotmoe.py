"""HotMoE: hybrid routing for a mixture of LoRA experts (AAAI 2026; no full text is public, mechanics from the
authors' code).

    u = W_v h + b                                  the ordinary linear score, used as attention value    (..., E)
    G = LN(Emb)                                    expert embeddings, one LayerNorm over both axes       (E, d)
    lower layers    S = softmax((W_q G)(W_k G)^T / sqrt(a))         attention among experts              (E, E)
    higher layers   D = LN(MLP(h)),  S = softmax((W_q D)(W_k G)^T / sqrt(a))   token-conditioned queries (..., E, E)
    both            logits = S u,  p = softmax(logits),  weights = softmax(top-k(p) / 0.1)

Layer l of L (from 0) is a lower one if (l+1)/L <= ee_fraction. Losses: mutual information (balanced overall, certain
per token) and similarity (sequences with like hidden states route alike), summed over routers, times aux_weight.

Computed by exact folds. Expert-expert: logits = (S W_v) h + S b, one linear router. Token-expert: D is affine in the
four ReLU features z, so with z~ = [z, 1] the attention logits are M z~ / std(z~) + c with M (E, E, 5) and c (E, E) made
from parameters once a forward; the (tokens, E, d) tensor never exists. The equations as they stand above, unfolded, are
tests/naive_hotmoe.py, which this file is tested against in values, losses and gradients.

Both losses are over all micro-batches of the optimizer step so far, the earlier ones detached (`step_window`): a
micro-batch of one task may so go to one expert, as long as the step is balanced.

Departures from the authors' code: the two losses switch independently (theirs turns both off with one flag); padding
is left out (theirs counts it in sequence means); the token-expert MLP and the experts share a dropout mask (theirs:
one each); earlier micro-batches are kept by the loss, not in the layer, so gradient checkpointing is safe;
accumulating n micro-batches weighs the losses once a step (theirs: in full for each, so n times: their script's
accumulation of 5 makes aux_weight=0.01 a fifth of theirs here); any model with linear layers works (theirs: Qwen2
only). Defaults are those of their dataclass, with top-k and both losses on as in their training script, which for the
rest uses E=5, a=256.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.lora.dropping import drop_once
from moesaic.lora.methods.hotmoe_kernels import (
    HIDDEN,
    Fold,
    TokenAttention,
    at_least_fp32,
    batched,
    by_column,
    by_row,
    token_attention,
    token_attention_by_row,
)
from moesaic.routing import (
    AuxiliaryLoss,
    Gate,
    Joint,
    Map,
    MutualInformation,
    Router,
    RoutingContext,
    Seen,
    Similarity,
    Site,
    Softmax,
    TopK,
    float_linear,
)
from moesaic.routing.losses import Reduce, Source


class HotMoERouter(Router, ABC):
    """What both kinds share: values, expert embeddings and the two attention projections.

    What routing needs beside the token is a fold of the parameters, made once a forward for all routers of the kind
    in an adapter: `group` holds them, unregistered.
    """

    shared = ("query.weight", "key.weight", "hidden.weight", "hidden.bias")

    def __init__(self, d_in: int, num_experts: int, *, expert_dim: int, attention_dim: int) -> None:
        super().__init__(num_experts)
        self.value = nn.Linear(d_in, num_experts)
        self.embedding = nn.Parameter(torch.randn(num_experts, expert_dim))
        self.norm = nn.LayerNorm([num_experts, expert_dim])
        self.query = nn.Linear(expert_dim, attention_dim, bias=False)
        self.key = nn.Linear(expert_dim, attention_dim, bias=False)
        self.group: list[HotMoERouter] = [self]

    @abstractmethod
    def folds(self) -> tuple[Tensor, ...]:
        """The parameters that the fold is made of, in the order of `fold_stacked`."""

    @abstractmethod
    def fold_stacked(self, *runs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What routing needs beside the token, of R routers at once.

        Each of the parameters comes in runs of one shape, stacked (n, ...), n adding up to R; so do the results.
        """

    def parts(self) -> tuple[Tensor, ...]:
        norm = self.norm
        return self.embedding, norm.weight, norm.bias, self.key.weight, self.query.weight

    def attended(self, *runs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """G (R, E, d), and W_q^T W_k G / sqrt(a) (R, E, d), whose products with what asks are attention's logits."""
        [embedding], [gamma], [beta], [key], [query] = runs
        g = torch.addcmul(beta, F.layer_norm(embedding, embedding.shape[1:], eps=self.norm.eps), gamma)
        return g, torch.bmm(torch.bmm(g, key.transpose(1, 2)) / math.sqrt(key.shape[1]), query)

    def folded(self, context: RoutingContext | None) -> Fold:
        """This router's fold: made once for a forward, and while decoding once for a KV cache."""
        if context is None or torch.compiler.is_compiling() or getattr(self, "_is_replica", False):
            return self.fold()
        key = _key(self)
        if not self.decodes:
            return self._made(context)
        held: tuple[Seen, Fold] | None = context.memory.get(key)
        if held is None or not held[0].holds():
            held = context.memory[key] = Seen(), self._made(context)
            held[0].inside(self)
        return held[1]

    def _made(self, context: RoutingContext) -> Fold:
        key = _key(self)
        if context.whole and key not in context.state:
            self.fold_group(context.state)
        return cast(Fold, context.state[key]) if context.whole else self.fold()

    @property
    def decodes(self) -> bool:
        """Whether what is made of parameters may be kept on a KV cache."""
        return not self.training and not torch.is_grad_enabled()

    def fold(self) -> Fold:
        """The fold of this router alone."""
        [first], [second] = self.fold_stacked(*([at_least_fp32(p).unsqueeze(0)] for p in self.folds()))
        return first.squeeze(0), second.squeeze(0)

    def fold_group(self, state: MutableMapping[Any, Any]) -> None:
        """Folds of the group into `state`; of those alone whose parameters are here as this router's are (FSDP)."""
        parts = {router: router.folds() for router in self.group}
        kinds = {r: [(type(p), p.dtype, p.device, p.shape[:1]) for p in part] for r, part in parts.items()}
        alike = [router for router in self.group if kinds[router] == kinds[self]]
        made = batched(self.fold_stacked, [parts[router] for router in alike])
        for router, fold in zip(alike, made, strict=True):
            state.setdefault(_key(router), fold)


class ExpertExpertRouter(HotMoERouter):
    """Attention among experts, the same for every token: a linear router with weight S W_v and bias S b."""

    def folds(self) -> tuple[Tensor, ...]:
        return *self.parts(), self.value.weight, self.value.bias

    def fold_stacked(self, *runs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Weight (R, E, d_in) and bias (R, E)."""
        values, [bias] = runs[5:]
        g, asked = self.attended(*runs[:5])
        attention = torch.softmax(torch.bmm(g, asked.transpose(1, 2)), dim=-1)
        each = attention.split_with_sizes([len(value) for value in values])
        weights = [torch.bmm(s, value) for s, value in zip(each, values, strict=True)]
        return weights, [torch.bmm(attention, bias.unsqueeze(-1)).squeeze(-1)]

    def projection(self, context: RoutingContext | None = None) -> tuple[Tensor, Tensor]:
        return self.folded(context)

    def extra_repr(self) -> str:
        return "expert-expert"


class TokenExpertRouter(HotMoERouter):
    """Attention from token-conditioned experts to experts, one (E, E) matrix a token."""

    def __init__(
        self, d_in: int, num_experts: int, *, expert_dim: int, attention_dim: int, dropout: float = 0.0
    ) -> None:
        super().__init__(d_in, num_experts, expert_dim=expert_dim, attention_dim=attention_dim)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(d_in, HIDDEN)
        bound = 1 / math.sqrt(HIDDEN)
        self.expand = nn.Parameter(torch.empty(num_experts, expert_dim, HIDDEN + 1).uniform_(-bound, bound))

    def folds(self) -> tuple[Tensor, ...]:
        return *self.parts(), self.expand

    def fold_stacked(self, *runs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What takes [z, 1] / std, 1 to attention logits, [M, c] (R, E*E, 6); and [z, 1] to its variance (R, 5, 5).

        Rows are ordered key first, (f, e): the softmax then runs over the first axis. The variance is a quadratic
        form; the norm's epsilon is in its constant term.
        """
        [gamma], [beta], [expand] = runs[1], runs[2], runs[5]
        asked = self.attended(*runs[:5])[1]
        centred = expand - expand.mean(dim=(1, 2), keepdim=True)
        scaled = torch.cat([gamma.unsqueeze(-1) * centred, beta.unsqueeze(-1)], dim=-1)
        logits = torch.bmm(asked, scaled.transpose(1, 2).flatten(2)).view(len(asked), -1, HIDDEN + 2)
        flat = centred.flatten(1, 2)
        count, row = flat.shape[1], (0, 0, 0, 1)
        # The epsilon as a row of its own, padded: a compiler takes that for constant where parameters are.
        parts = F.pad(flat[..., :-1], row), F.pad(flat[..., -1:], row, value=(count * self.norm.eps) ** 0.5)
        rows = torch.cat(parts, dim=-1)
        variance = torch.bmm(rows.transpose(1, 2), rows) / count
        return [logits], [variance]

    @property
    def drops(self) -> bool:
        return self.training and self.dropout.p > 0

    def projection(self, context: RoutingContext | None = None) -> tuple[Tensor, Tensor] | None:
        """Values and MLP features in one map, unless dropout parts their inputs."""
        return None if self.drops else self.read_map()

    def maps(self, context: RoutingContext | None = None) -> tuple[Map, Map | None] | None:
        """With dropout: values of the input, MLP features of what is left of it."""
        if not self.drops:
            return super().maps(context)
        return (self.value.weight, self.value.bias), (self.hidden.weight, self.hidden.bias)

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        if self.drops:
            dropped = drop_once(h, self.dropout.p, h, None if context is None else context.state)
            parts = float_linear(self.value, h), float_linear(self.hidden, dropped)
            return self.from_projection(torch.cat(parts, dim=-1), context)
        return super().score(h, context)

    def from_projection(self, read: Tensor, context: RoutingContext | None = None) -> Tensor:
        fold = (t if t.dtype == read.dtype else t.to(read.dtype) for t in self.folded(context))
        if torch.is_grad_enabled():
            return cast(Tensor, TokenAttention.apply(read, *fold))
        return token_attention(by_column(read), *fold)[0].t().view(*read.shape[:-1], self.num_experts)

    @classmethod
    def from_projections(cls, routers: Sequence[Self], read: Tensor, joint: Joint) -> Tensor:
        if "folds" not in joint.kept:
            folds = [router.folded(context) for router, context in zip(routers, joint.contexts(), strict=True)]
            joint.kept["folds"] = by_row(folds, read.dtype)
        return token_attention_by_row(read, *joint.kept["folds"])

    def read_map(self) -> tuple[Tensor, Tensor]:
        """Weight (E+4, d_in) and bias (E+4,) of the map to [u, z]."""
        value, hidden = self.value, self.hidden
        return torch.cat([value.weight, hidden.weight]), torch.cat([value.bias, hidden.bias])

    def extra_repr(self) -> str:
        return "token-expert"


def _key(router: HotMoERouter) -> Any:
    """Where a router's fold is in the context's state; what was made without gradients is not for those with."""
    return HotMoERouter, router, torch.is_grad_enabled()


@dataclass
class HotMoEConfig(MixtureConfig):
    """Settings of HotMoE on top of `MixtureConfig`'s."""

    method: ClassVar[str] = "hotmoe"
    paper: ClassVar[str] = "HotMoE (AAAI 2026)"
    summary: ClassVar[str] = "attention among experts in lower layers, from tokens to experts in higher ones"

    use_rslora: bool = field(default=True, metadata={"help": "scale by alpha/sqrt(r), as the authors do"})
    lora_dropout: float = field(
        default=0.1, metadata={"help": "dropout on the experts' and the token-expert MLP's input"}
    )
    top_k: int | None = field(default=2, metadata={"help": "experts a token; null mixes all of them"})
    gate_temperature: float = field(
        default=0.1, metadata={"help": "temperature of the softmax over the kept probabilities"}
    )
    expert_dim: int = field(default=256, metadata={"help": "size d of an expert embedding"})
    attention_dim: int = field(default=32, metadata={"help": "size a of queries and keys"})
    ee_fraction: float = field(
        default=0.5, metadata={"help": "share of layers, from the bottom, with expert-expert attention"}
    )
    ee_layers: list[int] | None = field(default=None, metadata={"help": "exactly these layers instead of ee_fraction"})
    mutual_information: bool = field(default=True, metadata={"help": "the balanced-and-certain loss"})
    similarity: bool = field(default=True, metadata={"help": "the like-sequences-route-alike loss"})
    beta_similar: float = field(default=1.0, metadata={"help": "pull of like sequences"})
    beta_different: float = field(default=1.5, metadata={"help": "push of unlike sequences"})
    step_window: bool = field(
        default=True, metadata={"help": "both losses see the earlier micro-batches of the same step"}
    )
    center_hidden: bool = field(default=False, metadata={"help": "subtract the batch mean before comparing sequences"})
    aux_reduce: Reduce = field(default="sum", metadata={"help": "sum or mean over routers"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ee_fraction <= 1:
            raise ConfigError(f"ee_fraction={self.ee_fraction} must be between 0 and 1")
        for name in ("expert_dim", "attention_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")

    def is_expert_expert(self, site: Site) -> bool:
        if self.ee_layers is not None:
            beyond = [layer for layer in self.ee_layers if not 0 <= layer < site.num_layers]
            if beyond:
                raise ConfigError(f"ee_layers={self.ee_layers}: this model's layers are 0 to {site.num_layers - 1}")
            return site.layer in self.ee_layers
        return (site.layer + 1) / site.num_layers <= self.ee_fraction

    def router(self, site: Site) -> Router:
        sizes = {"expert_dim": self.expert_dim, "attention_dim": self.attention_dim}
        if self.is_expert_expert(site):
            return ExpertExpertRouter(site.d_in, self.num_experts, **sizes)
        return TokenExpertRouter(site.d_in, self.num_experts, dropout=self.lora_dropout, **sizes)

    def connect(self, routers: list[Router]) -> None:
        """Routers of one kind fold together, those of one width side by side."""
        found = [router for router in routers if isinstance(router, HotMoERouter)]
        groups: dict[Any, list[HotMoERouter]] = {}
        for router in sorted(found, key=lambda router: router.value.in_features):
            router.group = groups.setdefault(type(router), [])
            router.group.append(router)

    def gate(self) -> Gate:
        if self.top_k is None:
            return Softmax()
        return TopK(self.top_k, normalize="softmax", temperature=self.gate_temperature)

    def losses(self) -> list[AuxiliaryLoss]:
        losses: list[AuxiliaryLoss] = []
        if self.mutual_information:
            # The authors feed this term the gate's weights when the similarity term is on, else the dense softmax.
            source: Source = "weights" if self.similarity else "probs"
            losses.append(
                MutualInformation(self.aux_weight, source=source, reduce=self.aux_reduce, window=self.step_window)
            )
        if self.similarity:
            losses.append(
                Similarity(
                    self.aux_weight,
                    beta_similar=self.beta_similar,
                    beta_different=self.beta_different,
                    center_hidden=self.center_hidden,
                    window=self.step_window,
                    reduce=self.aux_reduce,
                )
            )
        return losses
