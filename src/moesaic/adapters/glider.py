"""GLIDER: a global router by instructions and PHATGOOSE's local gates (Li et al. 2024, arXiv 2410.07172).

    s_global = cos(encode(prompt), encode(instruction_e))                        one a sequence, the same for all layers
    s = LN(x) LN(V)^T / sqrt(d) + alpha * s_global,   w = softmax over the top_k largest
    alpha = alpha_high where max_e s_global > threshold, else alpha_low            (alpha="adaptive")

An expert's instruction is one sentence that says what its task is. `alpha_high` makes a difference of .05 in the cosine
worth 5 logits, so that a prompt which is known goes to its expert; `alpha_low` breaks ties for one that is not. The
threshold depends on the encoder, so that it is calibrated where rows of the experts' tasks are known: `calibrated`
leaves each expert out in turn, and takes the value that best tells prompts whose expert is there from those whose
expert is not. The adaptive rule is reported of the paper; the released code sets alpha by hand (100 on tasks that
experts were trained on, 3 on others).

Instructions are given, or written by a language model from three rows of the expert's task; without either, the mean of
rows of its task stands for it, which tells tasks apart better than the nearest row does. A prompt is compared as it is,
or by the instruction that the language model writes of it.

Departures from the authors' code: the adaptive alpha of the paper (theirs sets it by hand), with a threshold that is
calibrated; where neither instructions nor a language model are given, the mean of rows stands for an instruction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from moesaic.adapters.instructions import Instructor
from moesaic.adapters.phatgoose import GateRouter, OwnSigmoid
from moesaic.adapters.prompts import NOBODY, PromptConfig, encoder_of, scores_of, too_far
from moesaic.errors import ConfigError
from moesaic.lora.kind import Kind
from moesaic.lora.stored import LARGEST
from moesaic.routing import Gate, Router, RoutingContext, Site, TopK

THRESHOLD = 0.8
"""Where nothing is known to calibrate it on."""


class GliderRouter(GateRouter):
    """Local correlations plus alpha times the prompt's cosines; in training PHATGOOSE's gates."""

    by_prompt = True

    def __init__(
        self,
        d_in: int,
        num_experts: int,
        task_of: list[int] | None = None,
        *,
        alpha: float | None,
        high: float,
        low: float,
        threshold: float,
        floors: list[float] | None = None,
    ) -> None:
        super().__init__(d_in, num_experts, task_of)
        self.floors = floors
        self.alpha, self.high, self.low, self.threshold = alpha, high, low, threshold

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        logits = super().score(h, context)
        if self.training or (self.alpha == 0 and self.floors is None):
            return logits
        scores = scores_of(context, h, self.num_experts)
        far = too_far(scores, self.floors)
        found = logits if self.alpha == 0 else logits + self.weighed(scores)
        return found if far is None else found.masked_fill(far, NOBODY)

    def weighed(self, scores: Tensor) -> Tensor:
        """alpha times the scores (..., E), alpha by the largest of them where it is adaptive."""
        if self.alpha is not None:
            return self.alpha * scores
        known = scores.amax(dim=-1, keepdim=True) > self.threshold
        return torch.where(known, self.high, self.low) * scores


def calibrated(scores: Tensor, owners: Tensor) -> float:
    """The threshold for the largest score that best tells prompts whose expert is there from those whose is not.

    Args:
        scores: (P, E) of prompts. owners: (P,) each prompt's expert. Its column is left out to see a prompt that no
            expert knows.
    """
    known = scores.amax(dim=-1)
    novel = scores.scatter(-1, owners.unsqueeze(-1), -torch.inf).amax(dim=-1)
    values = torch.cat([known, novel[novel.isfinite()]]).unique()
    if scores.shape[-1] < 2 or len(values) < 2:
        return THRESHOLD
    between = (values[1:] + values[:-1]) / 2
    right = (known > between.unsqueeze(-1)).float().mean(dim=-1) + (novel <= between.unsqueeze(-1)).float().mean(dim=-1)
    return float(between[right.argmax()])


@dataclass
class GliderConfig(PromptConfig):
    """Settings of GLIDER on top of `MixtureConfig`'s. Its training needs `routing_task_ids`: each row's expert."""

    method: ClassVar[str] = "glider"
    paper: ClassVar[str] = "GLIDER (EMNLP 2025, arXiv 2410.07172)"
    summary: ClassVar[str] = "instructions compared with the prompt, and a trained gate for each adapter"

    unsaved: ClassVar[tuple[str, ...]] = (*PromptConfig.unsaved, "instruct_url", "instruct_model", "instruct_cache")
    """The endpoint is not saved, so that an adapter from elsewhere sends nobody's prompts anywhere."""
    by_mean: ClassVar[bool] = True
    kind: ClassVar[Kind] = Kind(experts="adapters of one task")

    top_k: int | None = field(default=None, metadata={"help": "experts a token; two where left out"})
    instructions: dict[str, str] | None = field(
        default=None, metadata={"help": "one sentence by expert that says what its task is"}
    )
    instruct_url: str | None = field(
        default=None,
        metadata={"help": "OpenAI-compatible endpoint that writes instructions; never saved with the adapter"},
    )
    instruct_model: str | None = field(default=None, metadata={"help": "the model's name at instruct_url"})
    instruct_cache: str | None = field(default=None, metadata={"help": "folder where its answers are kept"})
    alpha: float | str = field(default="adaptive", metadata={"help": "weight of the global score, or adaptive"})
    alpha_high: float = field(default=100.0, metadata={"help": "adaptive: for prompts that some expert knows"})
    alpha_low: float = field(default=3.0, metadata={"help": "adaptive: for others"})
    threshold: float | None = field(
        default=None,
        metadata={"help": "adaptive: cosine above which a prompt is known; calibrated on texts, or .8, where left out"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.alpha, (int, float)) and abs(self.alpha) <= LARGEST
        if self.alpha != "adaptive" and not number:
            raise ConfigError(f"alpha={self.alpha!r} must be a number of at most {LARGEST:g}, or adaptive")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold} must be between -1 and 1, as cosines are")
        if (self.instruct_url is None) != (self.instruct_model is None):
            raise ConfigError("instruct_url and instruct_model go together: an endpoint, and a model's name there")
        if self.threshold is None:
            probes = self.texts if self.store is not None and self.alpha == "adaptive" else None
            self.threshold = THRESHOLD if probes is None else self._calibrated(probes)

    def _calibrated(self, texts: dict[str, list[str]]) -> float:
        """`calibrated` on texts of the experts' tasks, as they are: a saved adapter has no endpoint to rewrite them."""
        assert self._vectors is not None
        own = [list(dict.fromkeys(texts[name])) for name in self.experts or ()]
        if self.instructions is None and min(map(len, own)) < 2:
            return THRESHOLD
        queries = encoder_of(self.encoder)([text for found in own for text in found])
        owners = torch.repeat_interleave(torch.tensor([len(found) for found in own]))
        return calibrated(queries @ self._vectors[:, 0].t(), owners)

    def _check_texts(self) -> None:
        super()._check_texts()
        told = self.instructions
        if told is not None and not (
            isinstance(told, dict) and told and all(isinstance(text, str) and text.strip() for text in told.values())
        ):
            raise ConfigError(
                "instructions must be one text by expert; on the command line a text with a comma or a colon is quoted "
                "twice: 'adapter.instructions.NAME=\"…\"'"
            )

    def expert_texts(self) -> dict[str, list[str]]:
        if self.instruct_url and self.store is not None:
            given = self.instructions or {}
            lacking = [name for name in self.experts or () if name not in given]
            if lacking and not self.texts:
                return {}  # to be written once there are rows
            written = self.instructor([(self.texts or {}).get(name, []) for name in lacking])
            self.instructions = {**given, **dict(zip(lacking, written, strict=True))}
        if self.instructions is not None:
            return {name: [text] for name, text in self.instructions.items()}
        return self.texts or {}

    @property
    def told_by(self) -> str:
        return "texts" if self.instructions is None else "instructions"

    @property
    def instructor(self) -> Instructor:
        cache = None if self.instruct_cache is None else Path(self.instruct_cache)
        return Instructor(self.instruct_url or "", self.instruct_model or "", cache)

    def written(self, prompts: list[str]) -> list[str]:
        """What is compared: the instruction that the endpoint writes of each prompt, or the prompt as it is."""
        return self.instructor([[prompt] for prompt in prompts]) if self.instruct_url else prompts

    def scores(self, prompts: list[str]) -> Tensor:
        return super().scores(self.written(prompts))

    def router(self, site: Site) -> Router:
        alpha = None if self.alpha == "adaptive" else float(self.alpha)
        return GliderRouter(
            site.d_in,
            self.num_experts,
            self.task_of,
            alpha=alpha,
            high=self.alpha_high,
            low=self.alpha_low,
            threshold=THRESHOLD if self.threshold is None else self.threshold,
            floors=self.floors,
        )

    def gate(self) -> Gate:
        return OwnSigmoid()

    def eval_gate(self) -> Gate:
        return self.near(TopK(min(2, self.num_experts) if self.top_k is None else self.top_k, normalize="sum"))
