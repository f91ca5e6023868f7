"""SMEAR: soft merging of experts (Muqeeth, Liu and Raffel 2023, arXiv 2306.03745).

    w = softmax(W mean_t x_t + b)                         the mean of the module's input over the prompt's real tokens
    y = W0 x + (sum_e w_e s_e B_e) (sum_e w_e A_e) x      factors are merged, so one LoRA is run a sequence

The router is trained through the merge; everything stays differentiable, and no token is routed apart from its
sequence. Merged factors have cross terms B_e A_f, which no sum of experts has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moesaic.lora.config import MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.lora.methods.sequence import SequenceRouter
from moesaic.routing import Gate, Router, Site, Softmax


@dataclass
class SMEARConfig(MixtureConfig):
    """Settings of SMEAR: `MixtureConfig`'s."""

    method: ClassVar[str] = "smear"
    paper: ClassVar[str] = "SMEAR (TMLR 2024, arXiv 2306.03745)"
    summary: ClassVar[str] = "a router by sequence merges the adapters' factors into one LoRA"
    kind: ClassVar[Kind] = Kind(experts="adapters", merges_factors=True)

    def router(self, site: Site) -> Router:
        return SequenceRouter(site.d_in, self.num_experts, causal=site.causal)

    def gate(self) -> Gate:
        return Softmax()
