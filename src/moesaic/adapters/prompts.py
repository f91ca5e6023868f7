"""What a prompt as a whole says of the experts: texts kept for each expert, encoded, and compared with the prompt's.

The texts' vectors are computed once and kept with the adapter; the prompt's are computed when it comes, by the same
encoder. They reach the routers as `routing_scores` (rows, E): from the batch, from `moesaic.routing_prompts`, or,
where nobody gives them, read off the tokens with the base model's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import cycle, islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.errors import ConfigError, TrainingError, suggest
from moesaic.host import routing_scores
from moesaic.lora.config import MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.lora.methods.topics import encoders
from moesaic.routing import Gate, Router, Routing, RoutingContext
from moesaic.routing.router import keep

NOBODY = -1e4
"""Stands for the score of an expert that a prompt is too far from: finite, so that no softmax is undefined."""
REFUSED = 0.01
"""Share of an expert's own rows that lie below its own floor."""


class TokenReader:
    """Routing scores off a forward's tokens: decoded, encoded, compared."""

    def __init__(self, config: Any, model: nn.Module) -> None:
        self.config = config
        self.name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.name)
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"method {self.config.method} reads prompts, and the tokenizer of {self.name or 'this model'!r} cannot "
                "be loaded to read them off the tokens: run inside moesaic.routing_prompts(model, prompts)"
            ) from error

    def __call__(self, ids: Tensor, prompt: Tensor | None) -> Tensor:
        rows = [row if prompt is None else row[prompt[i]] for i, row in enumerate(ids)]
        texts = self.tokenizer.batch_decode([row.tolist() for row in rows], skip_special_tokens=True)
        scores = self.config.scores(texts)
        assert isinstance(scores, Tensor)
        return scores.to(ids.device)


@contextmanager
def routing_prompts(model: nn.Module, prompts: Sequence[str]) -> Iterator[None]:
    """Tell a mixture that routes by the prompt as a whole what the prompts are, one a row.

    with moesaic.routing_prompts(model, ["Sort the list: 3 1 2"]):
        model.generate(...)

    Raises:
        ConfigError: the active mixture does not route by prompts.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError("prompts must be texts, one a row")
    peft = next((m for m in model.modules() if hasattr(m, "peft_config") and hasattr(m, "active_adapter")), None)
    config: Any = None if peft is None else peft.peft_config[peft.active_adapter]  # type: ignore[index]
    scores = config.scores(list(prompts)) if isinstance(config, MixtureConfig) else None
    if scores is None:
        raise ConfigError("this mixture does not route by prompts: only glider and retrieval do")
    with routing_scores(model, scores):
        yield


def too_far(scores: Tensor, floors: Sequence[float] | None) -> Tensor | None:
    """Which experts a prompt is too far from, of its scores (..., E); None where nothing is."""
    return None if floors is None else scores < scores.new_tensor(floors)


def scores_of(context: RoutingContext | None, h: Tensor, num_experts: int) -> Tensor:
    """The prompt's scores for `h` (rows, tokens, d): (rows, 1, E) or by token. Raises ConfigError without any."""
    if context is None or context.scores is None:
        raise ConfigError(
            "this method routes by the prompt as a whole, which nobody told: run inside "
            "moesaic.routing_prompts(model, prompts), or give routing_scores in the batch"
        )
    if context.scores.shape[-1] != num_experts:
        raise ConfigError(f"routing_scores has {context.scores.shape[-1]} columns for {num_experts} experts")
    if context.scores.dim() > 2:
        return context.scores.to(h)
    return context.scores.to(h).view(len(context.scores), *[1] * (h.dim() - 2), num_experts)


@cache
def encoder_of(name: str) -> encoders.Encoder:
    """An encoder by name, loaded once a process."""
    return encoders.encoder(name)


@dataclass(frozen=True)
class OrNobody(Gate):
    """The weights of `gate`, but none at all where every expert is too far: the base answers alone."""

    gate: Gate

    def __call__(self, logits: Tensor) -> Routing:
        found = self.gate(logits)
        near = (logits > NOBODY / 2).any(dim=-1, keepdim=True)
        return replace(found, weights=found.weights * near, probs=found.probs * near)

    @property
    def top_k(self) -> int | None:
        return self.gate.top_k

    @property
    def sums_to_one(self) -> bool:
        return False

    def check(self, num_experts: int) -> None:
        self.gate.check(num_experts)


class Library(nn.Module):
    """Unit vectors of texts, (E, n, m): n of each expert, one repeated where it has fewer."""

    def __init__(self, num_experts: int, per_expert: int, dim: int) -> None:
        super().__init__()
        self.vectors: Tensor
        keep(self, "vectors", torch.zeros(num_experts, per_expert, dim))

    def cosines(self, queries: Tensor) -> Tensor:
        """The largest cosine (N, E) of each query (N, m) with an expert's texts."""
        vectors = self.vectors.float()
        found = queries.to(vectors) @ vectors.flatten(0, 1).t()
        return found.view(len(queries), *vectors.shape[:2]).amax(dim=-1)


@dataclass
class PromptConfig(MixtureConfig):
    """Settings of methods that compare prompts with texts of each expert."""

    kind: ClassVar[Kind] = Kind(experts="adapters")
    unsaved: ClassVar[tuple[str, ...]] = (*MixtureConfig.unsaved, "texts")
    by_mean: ClassVar[bool] = False
    """Whether an expert is the mean of its texts, and not each of them."""

    encoder: str = field(
        default="minilm", metadata={"help": "encodes texts and prompts: minilm, hashing, or a folder or hub id"}
    )
    texts: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "texts of each expert, by its name: encoded and kept as vectors"}
    )
    none_below: float | str | None = field(
        default=None,
        metadata={
            "help": "cosine below which an expert does not answer, and where none is left the base does alone; own: "
            "each expert's, which 99 of 100 of its own rows reach; left out: the nearest answers whatever is asked"
        },
    )
    floors: list[float] | None = field(
        default=None, metadata={"help": "filled in from none_below and saved: the cosine that each expert asks for"}
    )
    library: list[int] | None = field(
        default=None,
        metadata={"help": "filled in from texts and saved: how many vectors an expert has, and their size"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._vectors: Tensor | None = None
        self._check_texts()
        self._check_floor()
        texts = self.expert_texts()
        if self.store is None or not texts:
            return
        self._vectors = self.encoded(texts)
        self.library = list(self._vectors.shape[1:])
        if self.none_below == "own":
            self.floors = self._own_floors()
        elif self.none_below is not None:
            self.floors = [float(self.none_below)] * len(self._vectors)

    def encoded(self, texts: dict[str, list[str]]) -> Tensor:
        """Unit vectors (E, n, m) of the experts' texts, in their order, one repeated where it has fewer; or of means.

        Raises:
            ConfigError: an expert has none, or there is no such expert.
        """
        lacking = [name for name in self.experts or () if not texts.get(name)]
        strange = next((name for name in texts if name not in (self.experts or ())), None)
        if strange is not None:
            raise ConfigError(f"there is no adapter {strange!r} to have {self.told_by}; {suggest(strange, lacking)}")
        if lacking:
            raise ConfigError(f"every adapter needs {self.told_by}, by its name: {lacking[0]!r} has none")
        most = max(map(len, texts.values()))
        rows = [list(islice(cycle(texts[name]), most)) for name in self.experts or ()]
        vectors = encoder_of(self.encoder)([text for row in rows for text in row]).view(len(rows), most, -1)
        return F.normalize(vectors.mean(dim=1, keepdim=True), dim=-1) if self.by_mean else vectors

    def _check_floor(self) -> None:
        """Raise ConfigError where `none_below` is nothing to compare a cosine with."""
        given = self.none_below
        number = isinstance(given, int | float) and not isinstance(given, bool) and -1 <= given <= 1
        if given not in (None, "own") and not number:
            raise ConfigError(f"none_below={given!r} must be a cosine between -1 and 1, or own")

    def _own_floors(self) -> list[float]:
        """For each expert, the cosine that all but `REFUSED` of its own rows have with the others of its rows.

        Raises:
            ConfigError: an expert has too few rows to tell.
        """
        assert self._vectors is not None
        floors = []
        for name, known in zip(self.experts or (), self._vectors, strict=True):
            texts = list(dict.fromkeys((self.texts or {}).get(name, [])))
            if len(texts) < 2:
                raise ConfigError(f"none_below=own is calibrated on rows of each adapter's task: {name!r} has too few")
            queries = encoder_of(self.encoder)(texts)
            floors.append(self.floor_of(queries, None if self.told_by == "texts" else known))
        return floors

    @classmethod
    def floor_of(cls, rows: Tensor, told: Tensor | None = None) -> float:
        """The cosine that all but `REFUSED` of an expert's own rows (n, m) have with it, each left out of it itself.

        Args:
            told: what stands for the expert instead of its rows (k, m).
        """
        if told is not None:
            near = (rows @ told.t()).amax(dim=-1)
        elif cls.by_mean:
            near = (F.normalize(rows.sum(dim=0, keepdim=True) - rows, dim=-1) * rows).sum(dim=-1)
        else:
            near = (rows @ rows.t()).fill_diagonal_(-1.0).amax(dim=-1)
        return float(near.quantile(REFUSED, interpolation="lower"))

    def near(self, gate: Gate) -> Gate:
        """`gate`, which leaves the base alone where that is asked for."""
        return gate if self.none_below is None else OrNobody(gate)

    @property
    def told_by(self) -> str:
        """The setting that texts of experts come from."""
        return "texts"

    def _check_texts(self) -> None:
        """Raise ConfigError where texts are not lists of texts by expert."""
        given = self.texts
        if given is not None and not (
            isinstance(given, dict)
            and given
            and all(
                isinstance(rows, (list, tuple)) and all(isinstance(row, str) for row in rows) for rows in given.values()
            )
        ):
            raise ConfigError("texts must hold lists of texts by expert, {NAME: [TEXT, …], …}")

    def expert_texts(self) -> dict[str, list[str]]:
        return self.texts or {}

    def connect(self, routers: list[Router]) -> None:
        """One library for all, registered in the first router alone."""
        if self.library is None:
            raise ConfigError(
                f"method {self.method} compares prompts with texts of each adapter, and there are none: "
                "texts={NAME: [TEXT, …]} gives them; in a command, data=… with rows of each adapter's task does "
                "(its run's, or the one that it is named as)"
            )
        self._library = Library(self.num_experts, *self.library)
        if self._vectors is not None:
            self._library.vectors.copy_(self._vectors)
        routers[0].add_module("library", self._library)

    def scores(self, prompts: list[str]) -> Tensor:
        queries = encoder_of(self.encoder)(prompts)
        if queries.shape[-1] != self._library.vectors.shape[-1]:
            raise ConfigError(
                f"encoder={self.encoder} gives vectors of {queries.shape[-1]}, and the adapter's texts were encoded to "
                f"{self._library.vectors.shape[-1]}: it is not the encoder that they were encoded with"
            )
        return self._library.cosines(queries.to(self._library.vectors.device))

    def reader(self, model: Any) -> TokenReader:
        return TokenReader(self, model)
