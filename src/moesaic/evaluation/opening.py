"""Trained adapters, opened: a run folder, what PEFT, Trainer and SFTTrainer write, and the checkpoints of each."""

import logging
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesaic.errors import AdapterError, ConfigError, first_line, path_of
from moesaic.lora.checks import check_kinds
from moesaic.lora.config import MixtureConfig
from moesaic.lora.stored import adapter_in, tensor_shapes
from moesaic.models.embedded import embedded_name, load_model, resolve
from moesaic.models.encoder import HEADS, EncoderForTasks, Layout
from moesaic.models.precision import numerics
from moesaic.runs.folder import RunFolder, read_json, run_path
from moesaic.runs.method import PLAIN, methods
from moesaic.runs.recipe import Recipe, adapter_config, check, load_recipe
from moesaic.training.prepared import Prepared

logger = logging.getLogger(__name__)

LONGEST = 2048
"""Tokens of a row, where no recipe says how many and the model has no end to its positions."""


@dataclass(frozen=True)
class Opened:
    """An adapter whose files are there and fit each other.

    Attributes:
        place: the folder that was named, or the run that it lies in: where figures go.
        recipe: the run's, or what the adapter's config says of one; `told` names its file.
        layout: what a run read off its data: tasks, and labels of an encoder's heads. Empty where it is no run's.
        trained: what training came to, as the run says.
    """

    place: Path
    adapter: Path
    recipe: Recipe
    told: Path
    layout: dict[str, Any]
    trained: dict[str, Any]

    @property
    def of_run(self) -> bool:
        return bool(self.layout)


def open_adapter(folder: str | Path, *, model: str = "", prompts: str = "") -> Opened:
    """An adapter of any folder that holds one; no model is loaded.

    Args:
        folder: a run's, an adapter's, a Trainer's output folder, or a checkpoint of one.
        model: the base model, where the folder names none or one that lies elsewhere now.
        prompts: chat or plain, where the rows were given in another way than the run's, or the tokenizer's, says.

    Raises:
        ConfigError, AdapterError: a file is missing, damaged or another run's.
    """
    path = path_of(folder)
    adapter = None if (path / "recipe.yaml").is_file() else adapter_in(path)
    if not (adapter or (path / "recipe.yaml").is_file() or (path / "conversion.json").is_file()):
        raise ConfigError(
            f"{path} is not a run folder: it has no recipe.yaml, nor an adapter's: neither it nor a checkpoint-N in it "
            "has an adapter_config.json"
        )
    around = [] if adapter is None else [adapter.parent, adapter.parent.parent]
    run = next((place for place in around if (place / "recipe.yaml").is_file()), path if adapter is None else None)
    opened = _of_adapter(path, adapter, model) if adapter and not run else _of_run(run or path, adapter)
    asked: dict[str, Any] = {key: value for key, value in (("model", model), ("prompts", prompts)) if value}
    recipe = replace(opened.recipe, **asked)
    check(recipe)
    _check_adapter(opened, recipe, moved=bool(model))
    return replace(opened, recipe=recipe)


def load(opened: Opened, tasks: tuple[str, ...] = ()) -> Prepared:
    """Rebuild the model: base, heads, adapter.

    Args:
        tasks: those of the rows that it is for, where no run names its own.

    Raises:
        AdapterError: the adapter is damaged or belongs to another model or method.
    """
    from peft import PeftModel
    from transformers import set_seed

    import moesaic.lora  # noqa: F401  registers the methods with PEFT

    recipe = opened.recipe
    if opened.adapter.parent == opened.place and opened.adapter.name.startswith("checkpoint-"):
        logger.warning("%s: taking its newest checkpoint, %s", opened.place, opened.adapter.name)
    plan = numerics(recipe.precision)
    base = load_model(recipe.model, dtype=plan.weights, attention=plan.attention, tokenizer_from=_tokenizer(opened))
    set_seed(recipe.seed)
    if not opened.of_run:
        _check_needs(opened, base.kind)
    try:
        layout = Layout.from_dict(opened.layout) if base.kind == "encoder" else None
    except KeyError as error:
        raise ConfigError(
            f"{opened.place / 'layout.json'} is damaged, or of a run on another model: {recipe.model} needs {error}"
        ) from None
    model = EncoderForTasks(base.model, layout) if layout else base.model
    try:
        with warnings.catch_warnings():  # what is missing is an error here
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            wrapped = PeftModel.from_pretrained(model, str(opened.adapter))
        _check_tensors(opened.adapter, wrapped)
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"{opened.adapter} is damaged or does not fit {recipe.model}: {first_line(error)}") from None
    known = tuple(opened.layout["tasks"]) if opened.of_run else tasks
    return Prepared(wrapped.eval().to(plan.device), base, known, layout, recipe)


def load_run(folder: str | Path) -> Prepared:
    """`open_adapter` and `load` in one. Raises what they raise."""
    return load(open_adapter(folder))


def _of_run(folder: Path, adapter: Path | None) -> Opened:
    """A run; where `adapter` is one of its checkpoints, the run as it was then."""
    run = RunFolder(folder)
    if adapter in (None, run.adapter):
        run = run_path(folder)
    kept = adapter or run.adapter
    trained = read_json(run.results) if run.finished else {}
    if not run.finished and adapter in (None, run.adapter):
        logger.warning("%s is an unfinished run: its adapter may have had fewer steps than its recipe says", folder)
    place = folder if kept == run.adapter else kept
    return Opened(place, kept, load_recipe(str(run.recipe)), run.recipe, _read_layout(run, trained), trained)


def _of_adapter(path: Path, adapter: Path, model: str) -> Opened:
    """What an adapter says of itself, where no run is around it."""
    config = _read_config(adapter)
    base = model or str(config.base_model_name_or_path or "")
    if not base:
        raise ConfigError(f"{adapter / 'adapter_config.json'} names no base model: model=… does")
    recipe = Recipe(method=_method(adapter, config), model=embedded_name(base) or base, max_length=LONGEST)
    trained = {"trainable_parameters": sum(map(math.prod, tensor_shapes(adapter).values()))}
    return Opened(path, adapter, recipe, adapter / "adapter_config.json", {}, trained)


def _check_needs(opened: Opened, kind: str) -> None:
    """Raise ConfigError for what only a run folder can tell."""
    if kind == "encoder":
        raise ConfigError(f"{opened.place}: an encoder's heads are known by a run folder of `moesaic train` alone")
    config = _read_config(opened.adapter)
    if isinstance(config, MixtureConfig) and config.kind.needs_tasks:
        raise ConfigError(
            f"{opened.place}: {config.method} is told each row's task by its number, and which is which a run folder "
            "alone says: name that"
        )


def _method(adapter: Path, config: Any) -> str:
    """A config's method, as recipes name it."""
    known = methods()
    found = getattr(config, "method", None)
    if found in known:
        return str(found)
    if type(config) is not known["lora"]:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise AdapterError(f"{adapter} holds an adapter of type {kind!r}: neither LoRA nor a mixture of moesaic")
    kinds = [name for name, plain in PLAIN.items() if plain.settings and all(
        getattr(config, key) == value for key, value in plain.settings.items())]  # fmt: skip
    return kinds[0] if len(kinds) == 1 else "lora"


def _read_config(adapter: Path) -> Any:
    from peft import PeftConfig

    import moesaic.lora  # noqa: F401  registers the methods with PEFT

    try:
        found = PeftConfig.from_pretrained(str(adapter))
        if not isinstance(found, MixtureConfig):  # which checks itself
            check_kinds(found, but=("lora_alpha",))  # a whole number, PEFT says, and takes any
        return found
    except Exception as error:
        raise AdapterError(f"{adapter}/adapter_config.json is damaged: {first_line(error)}") from None


def _tokenizer(opened: Opened) -> str | None:
    """The folder of a tokenizer that a Trainer saved beside its adapter; None where the base's is meant."""
    near = (opened.adapter, opened.place)
    return next((str(p) for p in near if not opened.of_run and (p / "tokenizer_config.json").is_file()), None)


def _read_layout(run: RunFolder, trained: dict[str, Any]) -> dict[str, Any]:
    """What the run read off its data. Raises ConfigError where it cannot be what was written."""
    stored = read_json(run.layout)
    tasks = stored.get("tasks")
    try:
        if tasks is None or tasks != sorted({str(t) for t in tasks}) or tasks != trained.get("tasks", tasks):
            raise ConfigError("its tasks are not those that the run was trained on")
        if "labels" in stored:
            Layout.from_dict(stored)
    except (ConfigError, TypeError, AttributeError) as error:
        raise ConfigError(f"{run.layout} is damaged: {first_line(error)}; restore it, or train again") from None
    return stored


def _check_adapter(opened: Opened, recipe: Recipe, *, moved: bool) -> None:
    """Raise AdapterError where an adapter is not there, or not what its recipe says it is."""
    from moesaic.lora.loading import check_tensors

    check_tensors(opened.adapter)
    if not (opened.adapter / "adapter_config.json").is_file():
        raise AdapterError(f"{opened.adapter} is damaged: it has no adapter_config.json")
    config: Any = _read_config(opened.adapter)
    trained = config.base_model_name_or_path
    recipe = _without_sources(recipe, config)
    if not isinstance(config, methods()[recipe.method]):
        raise AdapterError(
            f"{opened.adapter} holds a {type(config).__name__}, but {opened.told} says method={recipe.method}"
        )
    now = resolve(recipe.model)
    if trained and trained != recipe.model and Path(trained).name != Path(now).name and not moved:
        raise AdapterError(f"{opened.adapter} was trained on {trained}, but {opened.told} says model={recipe.model}")
    if opened.of_run:
        _check_settings(opened, recipe, config)


def _without_sources(recipe: Recipe, config: Any) -> Recipe:
    """A composed run's recipe as its adapter is by itself: the adapters that it was made of are not asked for."""
    experts = getattr(config, "experts", None)
    if experts is None:
        return recipe
    gone = (*config.unsaved, "target_modules", "layers_to_transform")
    kept = {key: value for key, value in recipe.adapter.items() if key not in gone}
    return replace(recipe, adapter={**kept, "experts": experts, "num_experts": len(experts)})


def _check_settings(opened: Opened, recipe: Recipe, config: Any) -> None:
    """Raise AdapterError where the adapter's config has another value for a setting that the recipe gives."""
    wanted = adapter_config(recipe)
    kinds = [key for plain in PLAIN.values() for key in plain.settings] if recipe.method in PLAIN else []
    for key in dict.fromkeys([*recipe.adapter, *kinds]):
        asked, found = getattr(wanted, key), getattr(config, key)
        if not _is_as_asked(key, asked, found, tied=getattr(config, "ensure_weight_tying", False)):
            asked, found = (sorted(v) if isinstance(v, set) else v for v in (asked, found))
            raise AdapterError(
                f"{opened.adapter}/adapter_config.json says {key}={found}, but {opened.told} says "
                f"adapter.{key}={asked}: restore the one that was changed"
            )


def _is_as_asked(key: str, asked: Any, found: Any, *, tied: bool) -> bool:
    """Whether a saved setting is the recipe's; PEFT and we fill some in, or write them anew, as the model is."""
    if key == "fan_in_fan_out":
        return True
    if key == "instructions" and isinstance(asked, dict) and isinstance(found, dict):  # those that lacked were written
        return asked.items() <= found.items()
    by_model = tied or asked is None or str(asked).lower() == "all-linear"
    if by_model and key in ("target_modules", "modules_to_save", "prototypes"):
        return True
    if key == "modules_to_save":
        return {*asked} - {HEADS} == {*(found or ())} - {HEADS}
    if key == "target_modules" and isinstance(asked, set) and isinstance(found, set):  # many are shortened to ends
        ends = tuple(f".{name}" for name in found)
        return len(found) <= len(asked) and all(f".{name}".endswith(ends) for name in asked)
    return bool(asked == found)


def _check_tensors(adapter: Path, model: Any) -> None:
    """Raise AdapterError where the file lacks tensors (PEFT would leave them at random) or holds others."""
    from peft import get_peft_model_state_dict

    from moesaic.lora.loading import saved_tensors

    there, wanted = saved_tensors(adapter), get_peft_model_state_dict(model)
    odd = sorted(there.keys() ^ wanted.keys())
    if odd:
        raise AdapterError(f"{adapter} is damaged or does not fit: {len(odd)} tensors are on one side only, {odd[0]}")
