"""Scores of a trained run on held-out rows, per task, with the untrained base and what its routers did beside them."""

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from moesaic.data import examples as data
from moesaic.data.examples import Example
from moesaic.errors import ConfigError, path_of
from moesaic.evaluation.answers import answer, by_task, figures, generate
from moesaic.evaluation.opening import Opened, load, open_adapter
from moesaic.evaluation.samples import samples
from moesaic.evaluation.settings import EvalSettings
from moesaic.routing import RoutingTrace
from moesaic.runs.folder import write_json, write_text
from moesaic.runs.recipe import Recipe
from moesaic.runs.results import command_line, versions
from moesaic.training.prepared import Prepared

__all__ = ["evaluate_run", "generate", "routing_figures", "score"]

logger = logging.getLogger(__name__)


def evaluate_run(
    adapter: str | Path | Opened,
    settings: EvalSettings | None = None,
    *,
    progress: bool = False,
    looked_at: bool = False,
) -> dict[str, Any]:
    """Score a trained adapter, by its folder or opened; returns what is written to `eval-<split>.json` in its folder.

    `predictions-<split>.jsonl` gets the answer to every row, for tests that pair two runs: {"task", "index" of the row
    within its task, "correct", "predicted"}.

    Args:
        looked_at: write `samples-<split>.json` as well, a few answers with their routing, for `report.html`.

    Raises:
        ConfigError, DataError, AdapterError: no run, no such rows, or a damaged adapter.
    """
    settings = settings or EvalSettings()
    if settings.batch_size < 1:
        raise ConfigError(f"batch_size={settings.batch_size} must be at least 1")
    opened = adapter
    if not isinstance(opened, Opened):
        opened = open_adapter(opened, model=settings.model, prompts=settings.prompts)
    recipe = opened.recipe
    examples = _examples(recipe, settings)
    rows = by_task(examples)
    prepared = load(opened, tuple(sorted(rows)))
    with _trace(prepared) as trace:
        answers = answer(prepared, examples, batch_size=settings.batch_size, progress=progress)
    scores = {task: figures(rows[task], found) for task, found in answers.items()}
    if settings.base:
        with prepared.model.disable_adapter():
            base = score(prepared, examples, batch_size=settings.batch_size, progress=progress)
        for task, found in base.items():
            scores[task] |= {f"base_{k}": v for k, v in found.items() if k in ("score", "matthews")}
    results = {
        "run": opened.place.name,
        "method": recipe.method,
        "model": recipe.model,
        "seed": recipe.seed,
        "split": settings.split,
        **({"file": Path(settings.data).name} if settings.data and Path(settings.data).is_file() else {}),
        "limit": settings.limit,
        "data_sha256": data.digest(examples),
        "tasks": scores,
        "mean": _mean(scores, "score"),
        **({"base_mean": _mean(scores, "base_score")} if settings.base else {}),
        "trainable_parameters": opened.trained.get("trainable_parameters"),
        "routing": routing_figures(trace, prepared.tasks) if trace is not None and trace.modules else None,
        "command": command_line(),
        "versions": versions(),
    }
    lines = [json.dumps(a.to_dict(), ensure_ascii=False) + "\n" for found in answers.values() for a in found]
    if looked_at:
        write_json(opened.place / f"samples-{settings.split}.json", {"rows": samples(prepared, rows, answers)})
    write_text(opened.place / f"predictions-{settings.split}.jsonl", "".join(lines))
    write_json(opened.place / f"eval-{settings.split}.json", results)
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
    for key in ("by_layer_and_task", "by_module_and_task"):
        found[key] = {at: {tasks[int(task)]: row for task, row in rows.items()} for at, rows in found[key].items()}
    rounded: dict[str, Any] = _rounded(found)
    return rounded


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
