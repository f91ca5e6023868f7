"""Settings of `moesaic convert`, which gives a model that is trained already feed-forward layers made of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moesaic.errors import ConfigError
from moesaic.runs.settings import build, check_keys, lists, names, parse_overrides, texts

MOST = 1_000_000
"""Rows in a forward."""


@dataclass
class Conversion:
    """What is converted, on which text, and where to."""

    method: str = field(default="", metadata={"help": "given as the first word: read-me, cmoe, smoe-dropout, rmoe"})
    model: str = field(default="", metadata={"help": "nano, smollm2, a folder, a GGUF file or a hub id"})
    domains: Any = field(
        default=None,
        metadata={"help": "sources of text, comma-separated, or {NAME: SOURCE}: read-me makes an expert of each"},
    )
    experts: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "the method's settings: experts.num_experts=8 experts.top_k=2 …"}
    )
    tune: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "read-me's training: tune.rounds=2 tune.router_steps=100 tune.expert_steps=200 …"},
    )
    length: int = field(default=256, metadata={"help": "tokens a row"})
    rows: int = field(default=64, metadata={"help": "most rows of a domain that are counted and learned from"})
    held_out: int = field(default=16, metadata={"help": "rows of a domain for the perplexities before and after"})
    batch_size: int = field(default=8, metadata={"help": "rows in a forward"})
    seed: int = field(default=0, metadata={"help": "of generated text, the router and the order"})
    precision: str = field(default="auto", metadata={"help": "of tuning: auto, bf16 (autocast) or fp32"})
    dtype: str = field(default="float32", metadata={"help": "of the weights that are written: float32 or bfloat16"})
    out: str = field(default="converted", metadata={"help": "folder to write"})
    overwrite: bool = field(default=False, metadata={"help": "replace it if it is there"})

    def describes(self) -> dict[str, Any]:
        """What makes two conversions the same one."""
        return {k: v for k, v in asdict(self).items() if k not in ("out", "overwrite")}


def load_conversion(method: str, arguments: Sequence[str]) -> Conversion:
    """`key=value` settings to a conversion. Raises ConfigError as `load_recipe` does."""
    given = parse_overrides(arguments, lists=lists(Conversion), texts=texts(Conversion), sections=("experts", "tune"))
    check_keys("settings", given, [name for name in names(Conversion) if name != "method"])
    settings = build(Conversion, {"method": method}, given)
    if not settings.model:
        raise ConfigError("model is missing: model=smollm2, a folder or a hub id")
    for key, least in (("length", 8), ("rows", 1), ("held_out", 1), ("batch_size", 1)):
        if getattr(settings, key) < least:
            raise ConfigError(f"{key}={getattr(settings, key)} must be at least {least}")
    if settings.batch_size > MOST:
        raise ConfigError(f"batch_size={settings.batch_size} must be at most {MOST:,}")
    if settings.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype={settings.dtype}; known: float32, bfloat16")
    if settings.precision not in ("auto", "bf16", "fp32"):
        raise ConfigError(f"precision={settings.precision}; known: auto, bf16, fp32")
    return settings
