"""SMEAR: soft merging of experts (Muqeeth, Liu and Raffel 2023, arXiv 2306.03745).

    w = softmax(LN(V) LN(mean_t x_t))                     the mean of the module's input over the prompt's real tokens
    y = W0 x + (sum_e w_e s_e B_e) (sum_e w_e A_e) x      factors are merged, so one LoRA is run a sequence

LN are layer norms with a weight each and no bias, that of the rows of V (E, d) from 0.01; so neither the input's size
nor V's changes the routing. In training each expert is dropped for a sequence with probability `expert_dropout`. The
router is trained through the merge; everything stays differentiable, and no token is routed apart from its sequence.
Merged factors have cross terms B_e A_f, which no sum of experts has.

Departures from the authors' code: experts are LoRA adapters that are trained already (theirs: adapters, trained
together with the router); in a causal model the mean is over what is read so far, so that no token sees those behind
it (theirs: encoder-decoders).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.lora.methods.sequence import mean_read
from moesaic.lora.tasks import NEVER
from moesaic.routing import Gate, Router, RoutingContext, Site, Softmax


class SMEARRouter(Router):
    """`LN(V) LN(mean_s h_s)` over the prompt, or over what is read of it in a causal model."""

    shared = ("input_norm.weight", "weight_norm.weight")
    by_prompt = True

    def __init__(self, d_in: int, num_experts: int, *, causal: bool, expert_dropout: float = 0.0) -> None:
        super().__init__(num_experts)
        self.causal = causal
        self.linear = nn.Linear(d_in, num_experts, bias=False)
        self.input_norm = nn.LayerNorm(d_in, bias=False)
        self.weight_norm = nn.LayerNorm(d_in, bias=False)
        nn.init.constant_(self.weight_norm.weight, 0.01)
        self.expert_dropout = nn.Dropout(expert_dropout)

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        means = mean_read(h, context or RoutingContext(), self, causal=self.causal)
        size = h.shape[-1:]
        asked = F.layer_norm(means, size, self.input_norm.weight.to(h.dtype))
        rows = F.layer_norm(self.linear.weight.to(h.dtype), size, self.weight_norm.weight.to(h.dtype))
        return self.dropped(F.linear(asked, rows))

    def dropped(self, logits: Tensor) -> Tensor:
        """Logits (rows, ..., E) without the experts that are dropped for a row; one at least stays."""
        if not self.training or self.expert_dropout.p == 0:
            return logits
        gone = self.expert_dropout(logits.new_ones(len(logits), logits.shape[-1])) == 0
        gone = gone & ~gone.all(dim=-1, keepdim=True)
        return logits.masked_fill(gone.view(len(logits), *[1] * (logits.dim() - 2), -1), NEVER)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, {'running' if self.causal else 'whole'} mean"


@dataclass
class SMEARConfig(MixtureConfig):
    """Settings of SMEAR on top of `MixtureConfig`'s."""

    method: ClassVar[str] = "smear"
    paper: ClassVar[str] = "SMEAR (TMLR 2024, arXiv 2306.03745)"
    summary: ClassVar[str] = "a router by sequence merges the adapters' factors into one LoRA"
    kind: ClassVar[Kind] = Kind(experts="adapters", merges_factors=True)

    expert_dropout: float = field(default=0.1, metadata={"help": "share of experts that are dropped for a sequence"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.expert_dropout < 1:
            raise ConfigError(f"expert_dropout={self.expert_dropout} must be at least 0 and below 1")

    def router(self, site: Site) -> Router:
        return SMEARRouter(site.d_in, self.num_experts, causal=site.causal, expert_dropout=self.expert_dropout)

    def gate(self) -> Gate:
        return Softmax()
