"""What `moesaic compare` can be told."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moesaic.data.examples import SPLITS
from moesaic.errors import ConfigError, MissingDependency, path_of, suggest
from moesaic.runs.method import all_adapter_settings
from moesaic.runs.recipe import Recipe, check
from moesaic.runs.settings import build, check_keys, lists, names, parse_overrides, read_yaml, texts

FILE = "compare.yaml"
"""A comparison's settings in its folder."""
BY_CELL = frozenset({"method", "seed", "out", "resume", "overwrite", "match", "adapter"})
"""Settings of a recipe that a comparison gives each run."""
_CHOICES = {"match": ("trainable_params", "rank", "none"), "engine": ("local", "ray"), "split": SPLITS}


@dataclass
class CompareSettings:
    """Settings of `moesaic compare`; those of a recipe (model, data, tasks, steps, lr …) are taken beside them."""

    methods: list[str] = field(
        default_factory=list, metadata={"help": "an arm each, comma-separated, such as lora,mola"}
    )
    baseline: str = field(default="lora", metadata={"help": "arm that the others are compared with; added if missing"})
    controls: bool = field(default=True, metadata={"help": "beside a mixture, also the arms uniform, oracle and bound"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "a run each for every arm"})
    match: str = field(
        default="trainable_params",
        metadata={
            "help": "what is equal in all arms: trainable_params, rank (experts x r, as whole ranks come), or none"
        },
    )
    budget: str | None = field(
        default=None,
        metadata={"help": "the arm, or the number, others are matched to; the largest mixture if left out"},
    )
    lrs: list[float] = field(
        default_factory=list, metadata={"help": "learning rates tried with every arm: the best on validation is taken"}
    )
    tune_steps: int | None = field(default=None, metadata={"help": "steps of a trial; a quarter of steps if left out"})
    tune_seed: int = field(default=1000, metadata={"help": "seed of the trials"})
    limit: int | None = field(default=None, metadata={"help": "rows a task that a trial is scored on"})
    eval_limit: int | None = field(default=None, metadata={"help": "rows a task that a run is scored on; all of split"})
    split: str = field(default="validation", metadata={"help": "rows that runs are scored on; test keeps trials apart"})
    arms: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "one arm's settings, arms.mola.top_k=1; a new arm, arms.x.method=mola"}
    )
    adapter: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "settings of all arms that know them: adapter.num_experts=4 …"}
    )
    engine: str = field(default="local", metadata={"help": "local (processes here) or ray (a cluster's)"})
    workers: int = field(default=1, metadata={"help": "local processes side by side"})
    threads: int | None = field(
        default=None,
        metadata={"help": "threads a process; if left out OMP_NUM_THREADS, or the cores shared out, or 1 with ray"},
    )
    gpus: float = field(default=0.0, metadata={"help": "ray: GPUs, or the part of one, that a run takes"})
    out: str = field(default="runs/compare", metadata={"help": "folder; a comparison there is continued"})
    overwrite: bool = field(default=False, metadata={"help": "replace the comparison in out"})

    @property
    def tuned(self) -> bool:
        """Whether there are learning rates to choose from."""
        return len(self.lrs) > 1

    def trial_steps(self, steps: int) -> int:
        """The steps of a trial, where a run has `steps`."""
        return self.tune_steps or max(1, steps // 4)


def load(arguments: Sequence[str]) -> tuple[CompareSettings, Recipe]:
    """The comparison's settings, and the recipe that its arms share.

    Raises:
        ConfigError: a file that cannot be read, an unknown key (naming the nearest), or a value that cannot be.
    """
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise ConfigError(f"one file of settings at most, not {' and '.join(files)}; settings are given as key=value")
    own, shared = names(CompareSettings), [name for name in names(Recipe) if name not in BY_CELL]
    layers = [(str(file), _stored(file)) for file in files]
    known_lists = [*lists(CompareSettings), *lists(Recipe)]
    known_texts = [*texts(CompareSettings), *texts(Recipe)]
    overrides = [a for a in arguments if "=" in a]
    layers.append(("settings", parse_overrides(overrides, lists=known_lists, texts=known_texts)))
    for source, values in layers:
        check_keys(source, values, [*own, *shared], of_adapters=all_adapter_settings)
    kinds = {f.name: str(f.type) for cls in (Recipe, CompareSettings) for f in fields(cls)}
    for source, values in layers:
        for key, value in values.items():
            if value is None and "None" not in kinds[key]:
                raise ConfigError(f"{source}: {key}=null: leave it out, to have what it is by default")
    given = [values for _, values in layers]
    settings = build(CompareSettings, *({k: v for k, v in values.items() if k in own} for values in given))
    recipe = build(Recipe, *({k: v for k, v in values.items() if k not in own} for values in given))
    check(recipe)
    _check(settings)
    if path_of(settings.out) == Path():
        settings.out = str(Path.cwd())
    if settings.lrs and ("lr" in given[-1] or recipe.lr != Recipe.lr):
        raise ConfigError(f"lr={recipe.lr:g} and lrs={','.join(map(str, settings.lrs))} disagree: leave one out")
    return settings, recipe


def _stored(name: str) -> dict[str, Any]:
    """The settings in a file, or of the comparison in a folder, which is where it goes on then."""
    path = path_of(name)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"no file {file}: give a .yaml file of settings, a comparison's folder, or key=value alone")
    return read_yaml(file) | ({"out": str(path)} if path.is_dir() else {})


def _check(settings: CompareSettings) -> None:
    for key, options in _CHOICES.items():
        if getattr(settings, key) not in options:
            raise ConfigError(f"{key}={getattr(settings, key)}; {suggest(str(getattr(settings, key)), options)}")
    if not settings.methods and not settings.arms:
        raise ConfigError("methods is missing: methods=lora,hotmoe names what is compared (see `moesaic methods`)")
    if not settings.seeds:
        raise ConfigError("seeds is empty: seeds=0,1,2 makes three runs of every arm")
    if not all(isinstance(name, str) for name in settings.methods):
        raise ConfigError(f"methods={settings.methods} must be names of methods")
    if len({f"{lr:g}" for lr in settings.lrs}) < len(settings.lrs):
        raise ConfigError(f"lrs={','.join(map(str, settings.lrs))} differ by less than their names do: leave one out")
    for key in ("methods", "seeds", "lrs"):
        values = getattr(settings, key)
        if len(set(values)) < len(values):
            raise ConfigError(f"{key}={','.join(map(str, values))} names one twice")
    if not all(0 <= seed < 2**32 for seed in (*settings.seeds, settings.tune_seed)):
        raise ConfigError(f"seeds and tune_seed must be between 0 and {2**32 - 1}")
    if not all(lr > 0 and math.isfinite(lr) for lr in settings.lrs):
        raise ConfigError(f"lrs={','.join(map(str, settings.lrs))} must be finite numbers above 0")
    for key in ("tune_steps", "limit"):
        if getattr(settings, key) is not None and not settings.tuned:
            other = "; eval_limit is that of the runs" if key == "limit" else ""
            raise ConfigError(
                f"{key}={getattr(settings, key)} is of trials, and there are none without rates to choose from "
                f"(lrs=3e-4,1e-3): leave it out{other}"
            )
    for key in ("tune_steps", "limit", "eval_limit", "workers", "threads"):
        if getattr(settings, key) is not None and getattr(settings, key) < 1:
            raise ConfigError(f"{key}={getattr(settings, key)} must be at least 1")
    if settings.gpus < 0:
        raise ConfigError(f"gpus={settings.gpus} cannot be negative")
    if settings.gpus and settings.engine == "local":
        raise ConfigError(f"gpus={settings.gpus:g} needs engine=ray: with engine=local, all runs share what there is")
    if not settings.out.strip():
        raise ConfigError("out is empty: name a folder")
    if "\0" in settings.out:
        raise ConfigError("out holds a NUL character, which no path can")
    if settings.engine == "ray" and find_spec("ray") is None:
        raise MissingDependency("ray", "ray")
