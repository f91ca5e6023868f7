"""Recipes: every run is a YAML file parsed into one dataclass, with `key=value` on top.

A name is a packaged recipe (`hotmoe`), a path a file (`my.yaml`). Settings of the adapter go under `adapter.`, and are
checked against the method's own config. An unknown key is an error that names the nearest valid one.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moesaic.errors import ConfigError, path_of, suggest
from moesaic.runs.method import OF_ADAPTERS, all_adapter_settings, check_follows, config_of
from moesaic.runs.settings import build, check_keys, lists, names, parse_overrides, read_yaml, texts
from moesaic.runs.sources import base_of, folders_of

if TYPE_CHECKING:
    from peft import PeftConfig

T = TypeVar("T")

logger = logging.getLogger(__name__)

PACKAGED = Path(__file__).parents[1] / "recipes"


@dataclass
class Recipe:
    """One training run. `out`, `overwrite` and `resume` say where and how; the rest says what, and is kept with it."""

    method: str = field(default="lora", metadata={"help": "lora, dora, rslora or a mixture (see `moesaic methods`)"})
    model: str = field(default="minilm", metadata={"help": "nano, minilm, smollm2, a folder, a GGUF file or a hub id"})
    data: str = field(default="", metadata={"help": "a file (JSONL, JSON, CSV, Parquet), a folder of tasks, a hub id"})
    tasks: list[str] | None = field(default=None, metadata={"help": "which tasks, comma-separated; all where left out"})
    steps: int = field(default=800, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=16, metadata={"help": "examples in a forward"})
    accumulation: int = field(default=1, metadata={"help": "forwards in a step"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    schedule: str = field(default="linear", metadata={"help": "linear, cosine, constant or constant_with_warmup"})
    warmup: int = field(
        default=50, metadata={"help": "steps from 0 to the peak; a tenth of all where it would be half of them or more"}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay"})
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm; 0 for no clipping"})
    temperature: float = field(
        default=float("inf"), metadata={"help": "task sampling n^(1/t): 1 proportional to size, inf equal"}
    )
    max_length: int = field(default=128, metadata={"help": "tokens a row, longer ones are cut"})
    prompts: str = field(
        default="auto",
        metadata={"help": "auto: in the tokenizer's chat template, if it has one; chat: in it; plain: as written"},
    )
    seed: int = field(default=0, metadata={"help": "of weights, order and dropout"})
    precision: str = field(default="auto", metadata={"help": "auto, bf16 (autocast) or fp32"})
    checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations (non-reentrant): slower, less memory"}
    )
    save_every: int = field(default=200, metadata={"help": "steps between checkpoints"})
    keep: int = field(default=2, metadata={"help": "checkpoints kept"})
    eval_every: int = field(default=0, metadata={"help": "steps between evaluations on held-out rows; 0 for none"})
    take: str = field(
        default="last", metadata={"help": "which adapter is kept: last, or best by held-out loss (needs eval_every)"}
    )
    report_to: list[str] | None = field(
        default=None, metadata={"help": "where figures go too: tensorboard, wandb, trackio, mlflow, …, comma-separated"}
    )
    on_bad_lines: str = field(default="error", metadata={"help": "error or skip"})
    match: str | None = field(
        default=None, metadata={"help": "solve the rank for as many trainable parameters as this recipe's"}
    )
    out: str = field(default="", metadata={"help": "run folder; runs/<method>-<model>-s<seed> where left out"})
    overwrite: bool = field(default=False, metadata={"help": "replace a finished run"})
    resume: str = field(default="auto", metadata={"help": "auto continues an unfinished run, never refuses to"})
    adapter: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "settings of the method's config: adapter.r=8 adapter.num_experts=4 …"}
    )

    def run_folder(self) -> Path:
        if self.out:
            return path_of(self.out)
        return Path("runs") / f"{self.method}-{Path(self.model).name}-s{self.seed}"

    def describes(self) -> dict[str, Any]:
        """What makes two runs the same run: all settings as they are used, but where and how."""
        how = ("out", "overwrite", "resume", "keep", "save_every", "report_to")
        return {k: v for k, v in asdict(self).items() if k not in how} | {"warmup": self.used_warmup()}

    def used_warmup(self) -> int:
        """The warm-up; a tenth of a run so short that it would be half of it or more."""
        return self.warmup if 2 * self.warmup < self.steps else self.steps // 10


_CHOICES = {
    "schedule": ("linear", "cosine", "constant", "constant_with_warmup"),
    "precision": ("auto", "bf16", "fp32"),
    "on_bad_lines": ("error", "skip"),
    "prompts": ("auto", "chat", "plain"),
    "resume": ("auto", "never"),
    "take": ("last", "best"),
}
_AT_LEAST = {
    "steps": 1, "batch_size": 1, "accumulation": 1, "warmup": 0, "max_length": 8, "save_every": 1, "keep": 1,
    "eval_every": 0,
}  # fmt: skip
_AT_MOST = {"steps": 100_000_000, "batch_size": 1_000_000, "accumulation": 1_000_000}
_MOST_ROWS = 10**15


def packaged() -> list[str]:
    """Names of the recipes that come with the package: a method's, or `papers/` and the method as its paper set it."""
    return [name for name in _names() if not name.startswith("pretrain/")]


def packaged_pretrainings() -> list[str]:
    """Names of the packaged recipes of `moesaic.runs.pretraining`."""
    return [name for name in _names() if name.startswith("pretrain/")]


def _names() -> list[str]:
    """Those of models; `skills/` is `moesaic.skills.running`'s."""
    names = (p.relative_to(PACKAGED).with_suffix("").as_posix() for p in PACKAGED.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("skills/"))


def recipe_file(name: str) -> Path:
    """A recipe's name or path, or a run folder, to its YAML file."""
    path = path_of(name)
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"no recipe file {path}")
        return path
    if name not in _names():
        raise ConfigError(f"no recipe '{name}'; {suggest(name, _names())}; or give the path of a .yaml file")
    return PACKAGED / f"{name}.yaml"


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and put `key=value` settings on top.

    Raises:
        ConfigError: an unknown recipe or key (naming the nearest), or a value that cannot be.
    """
    file = recipe_file(name)
    stored = read_yaml(file)
    given = parse_overrides(overrides, lists=lists(Recipe), texts=texts(Recipe))
    if given.get("keep") in ("last", "best"):
        raise ConfigError(
            f"keep is the number of checkpoints; take={given['keep']} says which adapter the run ends with"
        )
    if "method" in given and given["method"] != stored.get("method"):
        stored.pop("adapter", None)  # another method's settings
    for source, values in ((str(file), stored), ("settings", given)):
        check_keys(source, values, names(Recipe), of_adapters=all_adapter_settings)
    asked, own = given.pop("adapter", None) or {}, stored.pop("adapter", None) or {}
    if asked.get("adapters") or own.get("adapters"):
        check_follows(asked)
        own = {key: value for key, value in own.items() if key not in OF_ADAPTERS}
        if "model" not in {**stored, **given}:
            given["model"] = _base_of_adapters(asked.get("adapters") or own["adapters"])
    recipe = build(Recipe, stored, given, {"adapter": {**own, **asked}})
    check(recipe)
    used = recipe.used_warmup()
    if used != recipe.warmup and "warmup" in (given if file.is_relative_to(PACKAGED) else {**stored, **given}):
        logger.warning("warmup=%d is too long for steps=%d: taking %d", recipe.warmup, recipe.steps, used)
    return recipe


def _base_of_adapters(adapters: Any) -> str:
    from moesaic.lora.stored import read_expert

    found = base_of(map(read_expert, folders_of(adapters).values()))
    if not found:
        raise ConfigError("model is missing: the adapters do not say which base model they are for")
    return found


def parse_settings(cls: type[T], overrides: Sequence[str]) -> T:
    """`key=value` settings to a dataclass of plain fields. Raises ConfigError as `load_recipe` does."""
    given = parse_overrides(overrides, lists=lists(cls), texts=texts(cls))
    check_keys("settings", given, names(cls))
    return build(cls, given)


def check(recipe: Any) -> None:
    """Raise ConfigError for a value that cannot be, of a recipe of either kind.

    The adapter's settings are checked by `adapter_config`.
    """
    for key, options in _CHOICES.items():
        if getattr(recipe, key, options[0]) not in options:
            raise ConfigError(f"{key}={getattr(recipe, key)}; {suggest(str(getattr(recipe, key)), options)}")
    for key, least in _AT_LEAST.items():
        if getattr(recipe, key, least) < least:
            raise ConfigError(f"{key}={getattr(recipe, key)} must be at least {least}")
    for key, most in _AT_MOST.items():
        if getattr(recipe, key) > most:
            raise ConfigError(f"{key}={getattr(recipe, key)} must be at most {most:,}")
    rows = recipe.steps * recipe.batch_size * recipe.accumulation
    if rows > _MOST_ROWS:
        raise ConfigError(f"steps, batch_size and accumulation make {rows:,} rows, above {_MOST_ROWS:,}: lower one")
    for key in ("lr", "clip", "weight_decay"):
        if not math.isfinite(getattr(recipe, key)):
            raise ConfigError(f"{key}={getattr(recipe, key)} must be a finite number")
    if not 0 <= recipe.seed < 2**32:
        raise ConfigError(f"seed={recipe.seed} must be between 0 and {2**32 - 1}")
    if "\0" in recipe.out:
        raise ConfigError("out holds a NUL character, which no path can")
    for key in ("lr", "temperature"):
        if not getattr(recipe, key, 1) > 0:
            raise ConfigError(f"{key}={getattr(recipe, key)} must be above 0")
    if recipe.clip < 0 or recipe.weight_decay < 0:
        raise ConfigError("clip and weight_decay cannot be negative")
    if getattr(recipe, "take", "last") == "best" and not recipe.eval_every:
        raise ConfigError("take=best needs held-out losses to choose by: eval_every=N says every how many steps")


def as_used(recipe: Recipe) -> Recipe:
    """The recipe with the warm-up that it is trained with."""
    return replace(recipe, warmup=recipe.used_warmup())


def dump(settings: Any) -> str:
    """A resolved recipe, or another dataclass or dict of settings, as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(settings if isinstance(settings, dict) else asdict(settings)))


def adapter_config(recipe: Recipe, **defaults: Any) -> "PeftConfig":
    """The config of a recipe's method: see `config_of`."""
    return config_of(recipe.method, recipe.adapter, **defaults)
