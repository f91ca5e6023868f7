"""How TopicLoRA's first stage is done, as people write it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from moesaic.errors import ConfigError

PACKAGED = "bigbench"
"""The vocabulary that comes along."""
WEIGHTS = ("jaccard", "cosine", "group", "separation")
_KINDS = {
    "str": "a text",
    "list[str] | None": "a list of texts or null",
    "int": "a whole number",
    "float": "a finite number",
}


LARGEST = 4096
"""Of experts and of a prototype's size: there are hundreds of topics, not more."""


@dataclass
class TopicSettings:
    """How stage 1 is done. `jaccard=0 cosine=0 group=0` takes the graph away, `separation=0` that term of the loss."""

    vocabulary: str = field(default=PACKAGED, metadata={"help": "bigbench, or a vocabulary's JSON file"})
    tasks: list[str] | None = field(
        default=None, metadata={"help": "JSON files: task -> its keywords, and keywords of your own"}
    )
    level: str = field(default="keyword", metadata={"help": "what a topic is: keyword or group"})
    encoder: str = field(default="minilm", metadata={"help": "minilm, hashing, or an encoder's folder or hub id"})
    num_experts: int = field(default=8, metadata={"help": "experts to place among the topics"})
    topic_dim: int = field(default=64, metadata={"help": "size of a prototype"})
    seed: int = field(default=0, metadata={"help": "of weights, clusters, dropout and sampled pairs"})
    steps: int = field(default=300, metadata={"help": "steps of Adam"})
    jaccard: float = field(default=1.0, metadata={"help": "weight of shared tasks in an edge"})
    cosine: float = field(default=0.5, metadata={"help": "weight of similar descriptions in an edge"})
    group: float = field(default=0.25, metadata={"help": "weight of a common group in an edge"})
    separation: float = field(default=1.0, metadata={"help": "weight of the term that parts the prototypes"})

    def check(self) -> None:
        """Raise ConfigError for a value of another kind, or a number that cannot be."""
        for f in dataclasses.fields(TopicSettings):
            if not is_kind(getattr(self, f.name), str(f.type)):
                raise ConfigError(f"{f.name}={getattr(self, f.name)!r} must be {_KINDS[str(f.type)]}")
        for name, least in (("num_experts", 1), ("topic_dim", 1), ("steps", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("num_experts", "topic_dim"):
            if getattr(self, name) > LARGEST:
                raise ConfigError(f"{name}={getattr(self, name)} must be at most {LARGEST}")
        if self.seed >= 2**32:
            raise ConfigError(f"seed={self.seed} must be between 0 and {2**32 - 1}")
        for name in WEIGHTS:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0")


def is_kind(value: Any, kind: str) -> bool:
    """Whether a value is of a kind in `_KINDS`; a switch is no number, and half a character no text."""
    if kind.startswith("list"):
        return value is None or (isinstance(value, (list, tuple)) and all(is_kind(v, "str") for v in value))
    if kind == "str":
        return isinstance(value, str) and value == value.encode(errors="ignore").decode()
    numbers = int if kind == "int" else (int, float)
    return isinstance(value, numbers) and not isinstance(value, bool) and -math.inf < value < math.inf
