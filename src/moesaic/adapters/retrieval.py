"""Retrieval: the expert whose training inputs are nearest to the prompt answers it, and no other.

    w = one-hot of argmax_e max_i cos(encode(prompt), encode(text_ei))

The baseline of PHATGOOSE (Muqeeth et al. 2024, arXiv 2402.05859) and, with means instead of the nearest, LoraRetriever
(Zhao et al. 2024, arXiv 2406.16989). No training; the encoder stands beside the model.

Departures from the authors' code: an expert has as many texts as are given (theirs: 1000), and `top_k` may mix several.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from moesaic.adapters.prompts import NOBODY, PromptConfig, scores_of, too_far
from moesaic.lora.kind import Kind
from moesaic.routing import Gate, Router, Routing, RoutingContext, Site, TopK


class ScoreRouter(Router):
    """The prompt's scores, the same for each of its tokens."""

    by_prompt = True

    def __init__(self, num_experts: int, floors: list[float] | None = None) -> None:
        super().__init__(num_experts)
        self.floors = floors

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        scores = scores_of(context, h, self.num_experts)
        far = too_far(scores, self.floors)
        scores = scores if far is None else scores.masked_fill(far, NOBODY)
        return scores.expand(*h.shape[:-1], self.num_experts)


class Chosen(TopK):
    """Scores are compared, and no logits: what is not chosen has no probability."""

    def __call__(self, logits: Tensor) -> Routing:
        found = super().__call__(logits)
        return replace(found, probs=found.weights)


@dataclass
class RetrievalConfig(PromptConfig):
    """Settings of retrieval on top of `MixtureConfig`'s."""

    method: ClassVar[str] = "retrieval"
    paper: ClassVar[str] = "PHATGOOSE's baseline (arXiv 2402.05859)"
    summary: ClassVar[str] = "the adapter whose training inputs are nearest to the prompt, for all of it"
    kind: ClassVar[Kind] = Kind(experts="adapters", weights="fixed")

    top_k: int = field(default=1, metadata={"help": "experts a prompt"})

    def router(self, site: Site) -> Router:
        return ScoreRouter(self.num_experts, self.floors)

    def gate(self) -> Gate:
        return self.near(Chosen(self.top_k))
