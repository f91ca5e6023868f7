"""Scores of a trained run on held-out rows, per task, with the untrained base and what its routers did beside them."""

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesaic.data import examples as data
from moesaic.data.examples import Example
from moesaic.errors import AdapterError, ConfigError, first_line, path_of
from moesaic.evaluation.answers import answer, by_task, figures, generate
from moesaic.evaluation.settings import EvalSettings
from moesaic.models.embedded import load_model, resolve
from moesaic.models.encoder import HEADS, EncoderForTasks, Layout
from moesaic.models.precision import numerics
from moesaic.routing import RoutingTrace
from moesaic.runs.folder import RunFolder, read_json, run_path, write_json, write_text
from moesaic.runs.method import PLAIN
from moesaic.runs.recipe import Recipe, adapter_config, load_recipe
from moesaic.runs.results import command_line, versions
from moesaic.training.prepared import Prepared

__all__ = ["check_run", "evaluate_run", "generate", "load_run", "routing_figures", "score"]

logger = logging.getLogger(__name__)


def evaluate_run(folder: str | Path, settings: EvalSettings | None = None, *, progress: bool = False) -> dict[str, Any]:
    """Score a finished run; returns what is written to `eval-<split>.json` beside it.

    `predictions-<split>.jsonl` gets the answer to every row, for tests that pair two runs: {"task", "index" of the row
    within its task, "correct", "predicted"}.

    Raises:
        ConfigError, DataError, AdapterError: no run, no such rows, or a damaged adapter.
    """
    settings = settings or EvalSettings()
    if settings.batch_size < 1:
        raise ConfigError(f"batch_size={settings.batch_size} must be at least 1")
    run = run_path(path_of(folder))
    recipe = load_recipe(str(run.recipe))
    examples = _examples(recipe, settings)
    rows = by_task(examples)
    prepared = load_run(run.path)
    with _trace(prepared) as trace:
        answers = answer(prepared, examples, batch_size=settings.batch_size, progress=progress)
    scores = {task: figures(rows[task], found) for task, found in answers.items()}
    if settings.base:
        with prepared.model.disable_adapter():
            base = score(prepared, examples, batch_size=settings.batch_size, progress=progress)
        for task, found in base.items():
            scores[task] |= {f"base_{k}": v for k, v in found.items() if k in ("score", "matthews")}
    results = {
        "run": run.path.name,
        "method": recipe.method,
        "model": recipe.model,
        "seed": recipe.seed,
        "split": settings.split,
        "limit": settings.limit,
        "data_sha256": data.digest(examples),
        "tasks": scores,
        "mean": _mean(scores, "score"),
        **({"base_mean": _mean(scores, "base_score")} if settings.base else {}),
        "trainable_parameters": read_json(run.results).get("trainable_parameters") if run.finished else None,
        "routing": routing_figures(trace, prepared.tasks) if trace is not None and trace.modules else None,
        "command": command_line(),
        "versions": versions(),
    }
    lines = [json.dumps(a.to_dict(), ensure_ascii=False) + "\n" for found in answers.values() for a in found]
    write_text(run.path / f"predictions-{settings.split}.jsonl", "".join(lines))
    write_json(run.path / f"eval-{settings.split}.json", results)
    return results


def score(
    prepared: Prepared, examples: Sequence[Example], *, batch_size: int = 32, progress: bool = False
) -> dict[str, Any]:
    """Figures per task: {"metric", "n", "score", "stderr"} and, for fixed label sets, {"majority", "matthews"}."""
    rows = by_task(examples)
    answers = answer(prepared, examples, batch_size=batch_size, progress=progress)
    return {task: figures(rows[task], found) for task, found in answers.items()}


def routing_figures(trace: RoutingTrace, tasks: Sequence[str]) -> dict[str, Any]:
    """`RoutingTrace.to_dict` with tasks by name and dead experts counted; rounded, as thousands of shares are."""
    found = trace.to_dict()
    dead = len(found.pop("dead_experts"))
    found |= {"dead_experts": dead, "dead_share": dead / found["num_experts"]}
    found["by_task"] = {tasks[int(task)]: row for task, row in found["by_task"].items()}
    found["by_layer_and_task"] = {
        layer: {tasks[int(task)]: row for task, row in rows.items()}
        for layer, rows in found["by_layer_and_task"].items()
    }
    rounded: dict[str, Any] = _rounded(found)
    return rounded


def load_run(folder: str | Path) -> Prepared:
    """Rebuild a run's model: base, heads, adapter.

    Raises:
        AdapterError: the adapter is damaged or belongs to another model or method.
    """
    from peft import PeftModel
    from transformers import set_seed

    import moesaic.lora  # noqa: F401  registers the methods with PEFT

    run, recipe, stored = check_run(folder)
    plan = numerics(recipe.precision)
    base = load_model(recipe.model, dtype=plan.weights, attention=plan.attention)
    set_seed(recipe.seed)
    try:
        layout = Layout.from_dict(stored) if base.kind == "encoder" else None
    except KeyError as error:
        raise ConfigError(
            f"{run.layout} is damaged, or of a run on another model: {recipe.model} needs {error}"
        ) from None
    tasks = tuple(stored["tasks"])
    model = EncoderForTasks(base.model, layout) if layout else base.model
    try:
        wrapped = PeftModel.from_pretrained(model, str(run.adapter))
        _check_tensors(run, wrapped)
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"{run.adapter} is damaged or does not fit {recipe.model}: {first_line(error)}") from None
    return Prepared(wrapped.eval().to(plan.device), base, tasks, layout, recipe)


def check_run(folder: str | Path) -> tuple[RunFolder, Recipe, dict[str, Any]]:
    """A run, its recipe and its layout, whose files are there and fit each other; no model is loaded.

    Raises:
        ConfigError, AdapterError: one is missing, damaged or another run's.
    """
    run = run_path(path_of(folder))
    recipe = load_recipe(str(run.recipe))
    stored = _read_layout(run)
    _check_adapter(run, recipe)
    return run, recipe, stored


def _read_layout(run: RunFolder) -> dict[str, Any]:
    """What the run read off its data. Raises ConfigError where it cannot be what was written."""
    stored = read_json(run.layout)
    tasks = stored.get("tasks")
    trained = read_json(run.results).get("tasks", tasks) if run.finished else tasks
    try:
        if tasks is None or tasks != sorted({str(t) for t in tasks}) or tasks != trained:
            raise ConfigError("its tasks are not those that the run was trained on")
        if "labels" in stored:
            Layout.from_dict(stored)
    except (ConfigError, TypeError, AttributeError) as error:
        raise ConfigError(f"{run.layout} is damaged: {first_line(error)}; restore it, or train again") from None
    return stored


def _check_adapter(run: RunFolder, recipe: Recipe) -> None:
    """Raise AdapterError where the run's adapter is not there, or not what its recipe says it is."""
    from peft import PeftConfig

    from moesaic.lora.loading import check_tensors

    check_tensors(run.adapter)
    if not (run.adapter / "adapter_config.json").is_file():
        raise AdapterError(f"{run.adapter} is damaged: it has no adapter_config.json")
    try:
        config: Any = PeftConfig.from_pretrained(str(run.adapter))
    except Exception as error:
        raise AdapterError(f"{run.adapter}/adapter_config.json is damaged: {first_line(error)}") from None
    recipe = _without_sources(recipe, config)
    if not isinstance(config, type(adapter_config(recipe))):
        raise AdapterError(
            f"{run.adapter} holds a {type(config).__name__}, but {run.recipe} says method={recipe.method}"
        )
    trained, now = config.base_model_name_or_path, resolve(recipe.model)
    if trained and Path(trained).name != Path(now).name:
        raise AdapterError(f"{run.adapter} was trained on {trained}, but {run.recipe} says model={recipe.model}")
    _check_settings(run, recipe, config)


def _without_sources(recipe: Recipe, config: Any) -> Recipe:
    """A composed run's recipe as its adapter is by itself: the adapters that it was made of are not asked for."""
    experts = getattr(config, "experts", None)
    if experts is None:
        return recipe
    gone = (*config.unsaved, "target_modules", "layers_to_transform")
    kept = {key: value for key, value in recipe.adapter.items() if key not in gone}
    return replace(recipe, adapter={**kept, "experts": experts, "num_experts": len(experts)})


def _check_settings(run: RunFolder, recipe: Recipe, config: Any) -> None:
    """Raise AdapterError where the adapter's config has another value for a setting that the recipe gives."""
    wanted = adapter_config(recipe)
    kinds = [key for plain in PLAIN.values() for key in plain.settings] if recipe.method in PLAIN else []
    for key in dict.fromkeys([*recipe.adapter, *kinds]):
        asked, found = getattr(wanted, key), getattr(config, key)
        if not _is_as_asked(key, asked, found, tied=getattr(config, "ensure_weight_tying", False)):
            asked, found = (sorted(v) if isinstance(v, set) else v for v in (asked, found))
            raise AdapterError(
                f"{run.adapter}/adapter_config.json says {key}={found}, but {run.recipe} says adapter.{key}={asked}: "
                "restore the one that was changed"
            )


def _is_as_asked(key: str, asked: Any, found: Any, *, tied: bool) -> bool:
    """Whether a saved setting is the recipe's; PEFT and we fill some in, or write them anew, as the model is."""
    if key == "fan_in_fan_out":
        return True
    by_model = tied or asked is None or str(asked).lower() == "all-linear"
    if by_model and key in ("target_modules", "modules_to_save", "prototypes"):
        return True
    if key == "modules_to_save":
        return {*asked} - {HEADS} == {*(found or ())} - {HEADS}
    if key == "target_modules" and isinstance(asked, set) and isinstance(found, set):  # many are shortened to ends
        ends = tuple(f".{name}" for name in found)
        return len(found) <= len(asked) and all(f".{name}".endswith(ends) for name in asked)
    return bool(asked == found)


def _check_tensors(run: RunFolder, model: Any) -> None:
    """Raise AdapterError where the file lacks tensors (PEFT would leave them at random) or holds others."""
    from peft import get_peft_model_state_dict

    from moesaic.lora.loading import saved_tensors

    there, wanted = saved_tensors(run.adapter), get_peft_model_state_dict(model)
    odd = sorted(there.keys() ^ wanted.keys())
    if odd:
        raise AdapterError(
            f"{run.adapter} is damaged or does not fit: {len(odd)} tensors are on one side only, {odd[0]}"
        )


def _examples(recipe: Recipe, settings: EvalSettings) -> list[Example]:
    source = settings.data or recipe.data
    if not source:
        raise ConfigError("data is missing: data=FOLDER holds the rows to score, which the run itself does not name")
    if settings.data is None and Path(source).is_file():
        raise ConfigError(f"the run was trained on one file, {source}: say which rows to score with data=FILE.jsonl")
    tasks = settings.tasks or recipe.tasks or _named(recipe, source)
    examples = data.load(source, settings.split, tasks=tasks, on_bad_lines=recipe.on_bad_lines)  # type: ignore[arg-type]
    if settings.limit is None:
        return examples
    if settings.limit < 1:
        raise ConfigError(f"limit={settings.limit} must be at least 1")
    seen: dict[str, int] = {}
    kept = []
    for example in examples:
        seen[example.task] = seen.get(example.task, 0) + 1
        if seen[example.task] <= settings.limit:
            kept.append(example)
    return kept


def _named(recipe: Recipe, source: str) -> list[str] | None:
    """The tasks in a folder that are called as experts of adapters are; None where none is."""
    adapters, folder = recipe.adapter.get("adapters"), path_of(source)
    if not isinstance(adapters, dict) or not folder.is_dir():
        return None
    return sorted(name for name in map(str, adapters) if (folder / name).is_dir()) or None


def _trace(prepared: Prepared) -> Any:
    """A trace of a routed model's forwards, None of any other's, for a `with`."""
    if not prepared.routed:
        return nullcontext()
    from moesaic.host import trace

    return trace(prepared.model)


def _mean(scores: dict[str, Any], key: str) -> float:
    return sum(s[key] for s in scores.values()) / len(scores)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value
