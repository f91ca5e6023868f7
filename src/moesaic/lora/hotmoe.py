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
from parameters once a forward; the (tokens, E, d) tensor never exists.

Departures from the authors' code: the two losses switch independently (theirs turns both off with one flag); sequence
means leave padding out (theirs count it); earlier micro-batches for the similarity loss are kept by the loss, not in
the layer, so gradient checkpointing is safe; any model with linear layers works (theirs: Qwen2 only). Defaults are
those of their dataclass, with top-k and both losses on as in their training script, which for the rest uses E=5, a=256.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.errors import ConfigError
from moesaic.host import optimizer_steps
from moesaic.lora.config import MixtureConfig
from moesaic.routing import (
    AuxiliaryLoss,
    Gate,
    MutualInformation,
    Router,
    RoutingContext,
    Similarity,
    Site,
    Softmax,
    TopK,
    float_linear,
)

HIDDEN = 4
"""Width of the token-expert MLP, fixed in the authors' code."""


class HotMoERouter(Router, ABC):
    """What both kinds share: values, expert embeddings and the two attention projections."""

    shared = ("query.weight", "key.weight", "hidden.weight", "hidden.bias")

    def __init__(self, d_in: int, num_experts: int, *, expert_dim: int, attention_dim: int) -> None:
        super().__init__(num_experts)
        self.value = nn.Linear(d_in, num_experts)
        self.embedding = nn.Parameter(torch.randn(num_experts, expert_dim))
        self.norm = nn.LayerNorm([num_experts, expert_dim])
        self.query = nn.Linear(expert_dim, attention_dim, bias=False)
        self.key = nn.Linear(expert_dim, attention_dim, bias=False)
        self._cache: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def keys(self) -> tuple[Tensor, Tensor]:
        """(G (E, d), W_k G / sqrt(a) (E, a)) in the parameters' precision, at least float32."""
        norm = self.norm
        weight, bias = _at_least_fp32(norm.weight), _at_least_fp32(norm.bias)
        g = F.layer_norm(_at_least_fp32(self.embedding), list(norm.normalized_shape), weight, bias, norm.eps)
        return g, float_linear(self.key, g) / math.sqrt(self.key.out_features)

    @abstractmethod
    def fold(self) -> tuple[Tensor, Tensor]:
        """What attention needs beside the token, from parameters alone."""

    def folded(self) -> tuple[Tensor, Tensor]:
        """`fold()`, once a forward; in evaluation once until a parameter changes."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._cache = None
            return self.fold()
        versions = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters()]
        key = (optimizer_steps(), versions)
        if self._cache is None or self._cache[0] != key:
            self._cache = (key, self.fold())
        return self._cache[1]


class ExpertExpertRouter(HotMoERouter):
    """Attention among experts, the same for every token: a linear router with weight S W_v and bias S b."""

    def fold(self) -> tuple[Tensor, Tensor]:
        g, keys = self.keys()
        attention = torch.softmax(float_linear(self.query, g) @ keys.t(), dim=-1)
        return attention @ _at_least_fp32(self.value.weight), attention @ _at_least_fp32(self.value.bias)

    def projection(self, context: RoutingContext | None = None) -> tuple[Tensor, Tensor]:
        return self.folded()

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

    def fold(self) -> tuple[Tensor, Tensor]:
        """What takes [z, 1] to attention logits (E*E, 5) and to its variance (5, 5), stacked; and c (E*E, 1).

        Rows are ordered key first, (f, e): the softmax then runs over the first axis.
        """
        _, keys = self.keys()
        projected = keys @ _at_least_fp32(self.query.weight)
        expand = _at_least_fp32(self.expand)
        centred = expand - expand.mean(dim=(0, 1))
        gamma, beta = _at_least_fp32(self.norm.weight), _at_least_fp32(self.norm.bias)
        logits = torch.einsum("eij,fi->fej", gamma.unsqueeze(-1) * centred, projected).flatten(0, 1)
        flat = centred.flatten(0, 1)
        variance = flat.t() @ flat / len(flat)
        return torch.cat([logits, variance]), (projected @ beta.t()).reshape(-1, 1)

    def projection(self, context: RoutingContext | None = None) -> tuple[Tensor, Tensor] | None:
        """Values and MLP features in one map, unless dropout parts their inputs."""
        if self.training and self.dropout.p > 0:
            return None
        value, hidden = self.value, self.hidden
        return torch.cat([value.weight, hidden.weight]), torch.cat([value.bias, hidden.bias])

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        if self.training and self.dropout.p > 0:
            parts = float_linear(self.value, h), float_linear(self.hidden, self.dropout(h))
            return self.from_projection(torch.cat(parts, dim=-1), context)
        return super().score(h, context)

    def from_projection(self, read: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Tokens on the last axis throughout: a softmax over 8 experts is ten times faster across rows than in them."""
        num_experts = self.num_experts
        columns = read.reshape(-1, num_experts + HIDDEN).t().contiguous()
        value, z = columns.split([num_experts, HIDDEN])
        z = torch.cat([torch.relu(z), z.new_ones(1, z.shape[1])])
        folded, offset = (t.to(read.dtype) for t in self.folded())
        to_logits, to_variance = folded.split([num_experts**2, HIDDEN + 1])
        variance = (z * (to_variance @ z)).sum(dim=0, keepdim=True)
        logits = torch.addmm(offset, to_logits, z * (variance + self.norm.eps).rsqrt())
        attention = torch.softmax(logits.view(num_experts, num_experts, -1), dim=0)
        return (attention * value.unsqueeze(1)).sum(dim=0).t().reshape(*read.shape[:-1], num_experts)

    def extra_repr(self) -> str:
        return "token-expert"


def _at_least_fp32(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


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
    similarity_window: bool = field(
        default=True, metadata={"help": "compare with earlier micro-batches of the same step"}
    )
    center_hidden: bool = field(default=False, metadata={"help": "subtract the batch mean before comparing sequences"})
    aux_reduce: str = field(default="sum", metadata={"help": "sum or mean over routers"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ee_fraction <= 1:
            raise ConfigError(f"ee_fraction={self.ee_fraction} must be between 0 and 1")
        for name in ("expert_dim", "attention_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.aux_reduce not in ("sum", "mean"):
            raise ConfigError(f"aux_reduce={self.aux_reduce!r} must be 'sum' or 'mean'")

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

    def gate(self) -> Gate:
        if self.top_k is None:
            return Softmax()
        return TopK(self.top_k, normalize="softmax", temperature=self.gate_temperature)

    def losses(self) -> list[AuxiliaryLoss]:
        reduce: Any = self.aux_reduce
        losses: list[AuxiliaryLoss] = []
        if self.mutual_information:
            # The authors feed this term the gate's weights when the similarity term is on, else the dense softmax.
            source: Any = "weights" if self.similarity else "probs"
            losses.append(MutualInformation(self.aux_weight, source=source, reduce=reduce))
        if self.similarity:
            losses.append(
                Similarity(
                    self.aux_weight,
                    beta_similar=self.beta_similar,
                    beta_different=self.beta_different,
                    center_hidden=self.center_hidden,
                    window=self.similarity_window,
                    reduce=reduce,
                )
            )
        return losses
