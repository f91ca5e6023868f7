"""Recipes of language models that are trained from nothing: one of Transformers' architectures, a method in it, text.

A recipe with `architecture` is one of these; `moesaic train` takes both kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, path_of
from moesaic.runs.recipe import PACKAGED, check, recipe_file
from moesaic.runs.settings import build, check_keys, lists, names, parse_overrides, read_yaml, texts

__all__ = ["Pretraining", "is_pretraining", "load_pretraining"]


@dataclass
class Pretraining:
    """One pre-training. `out`, `overwrite` and `resume` say where and how; the rest says what, and is kept with it."""

    name: str = field(default="", metadata={"help": "what it is called; names the run folder"})
    architecture: str = field(
        default="llama", metadata={"help": "llama, mixtral, qwen3_moe, gpt2, …: Transformers' own"}
    )
    config: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "its size: config.hidden_size=128 config.num_hidden_layers=4 …"}
    )
    method: str = field(
        default="", metadata={"help": "what is done to its feed-forward layers: smoe-dropout or rmoe; nothing if empty"}
    )
    experts: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "the method's settings: experts.num_experts=16 experts.top_k=2 …"}
    )
    k_schedule: str = field(
        default="",
        metadata={"help": "k over the steps: linear, cosine, exp, multi_step, their -down, constant, elastic"},
    )
    k_min: int = field(default=1, metadata={"help": "fewest experts a token takes in the schedule"})
    k_max: int = field(default=1, metadata={"help": "most"})
    domains: Any = field(
        default=None, metadata={"help": "sources of text, comma-separated, or {NAME: SOURCE}; all that is generated"}
    )
    tokenizer: str = field(default="nano", metadata={"help": "of which model"})
    length: int = field(default=128, metadata={"help": "tokens a row"})
    steps: int = field(default=1500, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=16, metadata={"help": "rows in a forward"})
    accumulation: int = field(default=1, metadata={"help": "forwards in a step"})
    lr: float = field(default=2e-3, metadata={"help": "peak learning rate"})
    schedule: str = field(default="cosine", metadata={"help": "linear, cosine, constant or constant_with_warmup"})
    warmup: int = field(default=100, metadata={"help": "steps from 0 to the peak, below half of all"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay"})
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm; 0 for no clipping"})
    held_out: int = field(default=64, metadata={"help": "rows of each domain that are scored at the end"})
    seed: int = field(default=0, metadata={"help": "of weights, text and order"})
    precision: str = field(default="auto", metadata={"help": "auto, bf16 (autocast) or fp32"})
    checkpointing: bool = field(default=False, metadata={"help": "recompute activations: slower, less memory"})
    save_every: int = field(default=500, metadata={"help": "steps between checkpoints"})
    keep: int = field(default=1, metadata={"help": "checkpoints kept"})
    report_to: list[str] | None = field(
        default=None, metadata={"help": "where figures go too: tensorboard, wandb, …, comma-separated"}
    )
    out: str = field(default="", metadata={"help": "run folder; runs/<name>-s<seed> where left out"})
    overwrite: bool = field(default=False, metadata={"help": "replace a finished run"})
    resume: str = field(default="auto", metadata={"help": "auto continues an unfinished run, never refuses to"})

    def run_folder(self) -> Path:
        return path_of(self.out) if self.out else Path("runs") / f"{self.name or self.architecture}-s{self.seed}"

    def describes(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        how = ("out", "overwrite", "resume", "keep", "save_every", "report_to")
        return {k: v for k, v in asdict(self).items() if k not in how}

    def used_warmup(self) -> int:
        return self.warmup if 2 * self.warmup < self.steps else self.steps // 10


def is_pretraining(name: str) -> bool:
    """Whether a recipe's name, file or run folder is of this kind. Raises ConfigError where there is none."""
    return "architecture" in read_yaml(recipe_file(name))


def load_pretraining(name: str, overrides: Sequence[str] = ()) -> Pretraining:
    """Read a recipe and put `key=value` settings on top.

    Raises:
        ConfigError: an unknown recipe or key (naming the nearest), or a value that cannot be.
    """
    file = recipe_file(name)
    stored = read_yaml(file)
    given = parse_overrides(
        overrides, lists=lists(Pretraining), texts=texts(Pretraining), sections=("config", "experts")
    )
    if "method" in given and given["method"] != stored.get("method"):
        stored.pop("experts", None)  # another method's settings
    for source, values in ((str(file), stored), ("settings", given)):
        check_keys(source, values, names(Pretraining))
    for key in ("config", "experts"):
        for values in (stored, given):
            if not isinstance(values.get(key, {}), dict | None):
                raise ConfigError(f"{key}={values[key]!r} must be settings of its own, such as {key}.name=value")
    nested = {key: {**(stored.pop(key, None) or {}), **(given.pop(key, None) or {})} for key in ("config", "experts")}
    recipe = build(
        Pretraining, {"name": Path(name).stem} if file.is_relative_to(PACKAGED) else {}, stored, given, nested
    )
    check(recipe)
    if recipe.length < 8 or recipe.held_out < 1:
        raise ConfigError(f"length={recipe.length} must be at least 8 and held_out={recipe.held_out} at least 1")
    if recipe.k_schedule and not 1 <= recipe.k_min <= recipe.k_max:
        raise ConfigError(f"k_min={recipe.k_min} and k_max={recipe.k_max}: 1 <= k_min <= k_max")
    return recipe
