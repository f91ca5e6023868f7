"""Recipes: every run is a YAML file parsed into one dataclass, with `key=value` on top.

A name is a packaged recipe (`hotmoe`), a path a file (`my.yaml`). Settings of the adapter go under `adapter.`, and are
checked against the method's own config. An unknown key is an error that names the nearest valid one.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moesaic.errors import ConfigError, first_line, suggest

if TYPE_CHECKING:
    from peft import PeftConfig

T = TypeVar("T")

PACKAGED = Path(__file__).parent / "recipes"


@dataclass
class Recipe:
    """One training run. `out`, `overwrite` and `resume` say where and how; the rest says what, and is kept with it."""

    method: str = field(default="lora", metadata={"help": "lora, or a routed method (see `moesaic methods`)"})
    model: str = field(default="minilm", metadata={"help": "nano, minilm, a local folder or a hub id"})
    data: str = field(default="", metadata={"help": "a JSONL file, a folder of tasks, or a hub id"})
    tasks: list[str] | None = field(default=None, metadata={"help": "which tasks, comma-separated; all where left out"})
    steps: int = field(default=800, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=16, metadata={"help": "examples in a forward"})
    accumulation: int = field(default=1, metadata={"help": "forwards in a step"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    schedule: str = field(default="linear", metadata={"help": "linear, cosine, constant or constant_with_warmup"})
    warmup: int = field(default=50, metadata={"help": "steps from 0 to the peak, below half of all"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay"})
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm; 0 for no clipping"})
    temperature: float = field(
        default=float("inf"), metadata={"help": "task sampling n^(1/t): 1 proportional to size, inf equal"}
    )
    max_length: int = field(default=128, metadata={"help": "tokens a row, longer ones are cut"})
    seed: int = field(default=0, metadata={"help": "of weights, order and dropout"})
    precision: str = field(default="auto", metadata={"help": "auto, bf16 (autocast) or fp32"})
    checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations (non-reentrant): slower, less memory"}
    )
    save_every: int = field(default=200, metadata={"help": "steps between checkpoints"})
    keep: int = field(default=2, metadata={"help": "checkpoints kept"})
    on_bad_lines: str = field(default="error", metadata={"help": "error or skip"})
    match: str | None = field(
        default=None, metadata={"help": "lora only: solve the rank for as many trainable parameters as this recipe's"}
    )
    out: str = field(default="", metadata={"help": "run folder; runs/<method>-<model>-s<seed> where left out"})
    overwrite: bool = field(default=False, metadata={"help": "replace a finished run"})
    resume: str = field(default="auto", metadata={"help": "auto continues an unfinished run, never refuses to"})
    adapter: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "settings of the method's config: adapter.r=8 adapter.num_experts=4 …"}
    )

    def run_folder(self) -> Path:
        if self.out:
            return Path(self.out).expanduser()
        return Path("runs") / f"{self.method}-{Path(self.model).name}-s{self.seed}"

    def describes(self) -> dict[str, Any]:
        """What makes two runs the same run: all settings but where and how."""
        return {k: v for k, v in asdict(self).items() if k not in ("out", "overwrite", "resume", "keep", "save_every")}


_CHOICES = {
    "schedule": ("linear", "cosine", "constant", "constant_with_warmup"),
    "precision": ("auto", "bf16", "fp32"),
    "on_bad_lines": ("error", "skip"),
    "resume": ("auto", "never"),
}
_AT_LEAST = {"steps": 1, "batch_size": 1, "accumulation": 1, "warmup": 0, "max_length": 8, "save_every": 1, "keep": 1}

_SET_BY_PEFT = {
    "task_type",
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}
"""Fields of a PEFT config that record what a run found; set by hand they would belie it."""


def packaged() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.stem for p in PACKAGED.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """A recipe's name or path, or a run folder, to its YAML file."""
    path = Path(name).expanduser()
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"no recipe file {path}")
        return path
    if name not in packaged():
        raise ConfigError(f"no recipe '{name}'; {suggest(name, packaged())}; or give the path of a .yaml file")
    return PACKAGED / f"{name}.yaml"


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and put `key=value` settings on top.

    Raises:
        ConfigError: an unknown recipe or key (naming the nearest), or a value that cannot be.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = recipe_file(name)
    try:
        stored: Any = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not a YAML file that can be read: {first_line(error)}") from None
    if not isinstance(stored, dict) or not stored:
        raise ConfigError(f"{file} must hold `key: value` lines")
    given = _parse_overrides(overrides)
    if "method" in given and given["method"] != stored.get("method"):
        stored.pop("adapter", None)  # another method's settings
    for source, values in ((str(file), stored), ("settings", given)):
        _check_keys(source, values)
    adapter = {**(stored.pop("adapter", None) or {}), **(given.pop("adapter", None) or {})}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), stored, given, {"adapter": adapter})
        recipe = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key}: {first_line(error)}" if key else first_line(error)) from None
    assert isinstance(recipe, Recipe)
    check(recipe)
    return recipe


def parse_settings(cls: type[T], overrides: Sequence[str]) -> T:
    """`key=value` settings to a dataclass of plain fields. Raises ConfigError as `load_recipe` does."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = _parse_overrides(overrides)
    _check_keys("settings", given, cls)
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), given))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'settings'}: {first_line(error)}") from None
    assert isinstance(settings, cls)
    return settings


def check(recipe: Recipe) -> None:
    """Raise ConfigError for a value that cannot be; the adapter's settings are checked by `adapter_config`."""
    for key, options in _CHOICES.items():
        if getattr(recipe, key) not in options:
            raise ConfigError(f"{key}={getattr(recipe, key)}; {suggest(str(getattr(recipe, key)), options)}")
    for key, least in _AT_LEAST.items():
        if getattr(recipe, key) < least:
            raise ConfigError(f"{key}={getattr(recipe, key)} must be at least {least}")
    for key in ("lr", "clip", "weight_decay"):
        if not math.isfinite(getattr(recipe, key)):
            raise ConfigError(f"{key}={getattr(recipe, key)} must be a finite number")
    if not 0 <= recipe.seed < 2**32:
        raise ConfigError(f"seed={recipe.seed} must be between 0 and {2**32 - 1}")
    if "\0" in recipe.out:
        raise ConfigError("out holds a NUL character, which no path can")
    for key in ("lr", "temperature"):
        if not getattr(recipe, key) > 0:
            raise ConfigError(f"{key}={getattr(recipe, key)} must be above 0")
    if recipe.clip < 0 or recipe.weight_decay < 0:
        raise ConfigError("clip and weight_decay cannot be negative")
    if recipe.match and recipe.method != "lora":
        raise ConfigError(
            f"match={recipe.match} solves the rank of plain LoRA; it cannot go with method={recipe.method}"
        )


def save_recipe(recipe: Recipe, file: Path) -> None:
    file.write_text(dump(recipe), encoding="utf-8")


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(asdict(recipe)))


def methods() -> dict[str, type]:
    """Name -> PEFT config class: plain LoRA and every registered mixture."""
    from peft import LoraConfig

    from moesaic.lora import METHODS

    return {"lora": LoraConfig, **METHODS}


def adapter_config(recipe: Recipe, **defaults: Any) -> "PeftConfig":
    """Build the method's PEFT config from `adapter.*`; `defaults` are used where the recipe is silent.

    Raises:
        ConfigError: an unknown method or key (naming the nearest), or a value the config refuses.
    """
    known = methods()
    if recipe.method not in known:
        raise ConfigError(f"no method '{recipe.method}'; {suggest(recipe.method, known)}")
    cls = known[recipe.method]
    valid = [f.name for f in fields(cls) if f.init and f.name not in _SET_BY_PEFT]
    for key in recipe.adapter:
        if key not in valid:
            raise ConfigError(f"method {recipe.method} has no setting adapter.{key}; {suggest(key, valid)}")
    settings = {**defaults, **recipe.adapter}
    for key in ("target_modules", "modules_to_save"):
        if isinstance(settings.get(key), str) and settings[key].isidentifier():
            settings[key] = [settings[key]]  # PEFT takes a bare text for a regular expression on whole paths
    try:
        config: PeftConfig = cls(**settings)
    except ConfigError:
        raise
    except (TypeError, ValueError, re.error) as error:
        raise ConfigError(f"adapter settings of {recipe.method}: {first_line(error)}") from None
    return config


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    import yaml

    given: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{text}' is not of the form key=value")
        try:
            parsed = yaml.safe_load(value) if value else ""
        except yaml.YAMLError:
            parsed = value
        if isinstance(parsed, str):
            parsed = _scalar(parsed)
        section, dot, name = key.partition(".")
        if dot and section == "adapter":
            given.setdefault("adapter", {})[name] = parsed
        else:
            given[key] = [parsed] if key == "tasks" and isinstance(parsed, (str, int, float)) else parsed
    return given


def _scalar(text: str) -> Any:
    """What YAML 1.1 leaves as text: `1e-3` and `inf` are numbers, `a,b` is a list."""
    if "," in text:
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return float(text)
    except ValueError:
        return text


def _check_keys(source: str, values: dict[str, Any], cls: Any = Recipe) -> None:
    valid = [f.name for f in fields(cls)]
    for key in values:
        if key not in valid:
            hint = "settings of the method go under adapter.; " if "." in str(key) else ""
            raise ConfigError(f"{source}: unknown key '{key}'; {hint}{suggest(str(key), valid)}")
    if not isinstance(values.get("adapter") or {}, dict):
        raise ConfigError(f"{source}: adapter must hold settings, such as adapter.r=8")
