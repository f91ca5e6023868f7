"""Scores of a trained run on held-out rows, per task, with the untrained base beside them.

Encoders answer through their heads. Causal models answer choices by log-likelihood of the choice given the prompt
(`accuracy`; `accuracy_per_byte` divides by the choice's length) and other rows by greedy generation (`exact_match`).
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from moesaic import causal, data, metrics
from moesaic.checkpoints import RunFolder, read_json, run_path, write_json
from moesaic.data import Example
from moesaic.embedded import load_model, resolve
from moesaic.encoder import EncoderCollator, EncoderForTasks, Layout
from moesaic.errors import AdapterError, ConfigError, DataError, first_line
from moesaic.precision import numerics
from moesaic.recipe import Recipe, adapter_config, load_recipe
from moesaic.results import command_line, versions
from moesaic.training import Prepared

logger = logging.getLogger(__name__)

LONGEST_ANSWER = 512


@dataclass
class EvalSettings:
    """Settings of `moesaic eval`; what is left out is the run's own."""

    split: str = "validation"
    data: str | None = None
    tasks: list[str] | None = None
    limit: int | None = None
    batch_size: int = 32
    base: bool = True


def evaluate_run(folder: str | Path, settings: EvalSettings | None = None, *, progress: bool = False) -> dict[str, Any]:
    """Score a finished run and write `eval-<split>.json` beside it; returns its content.

    Raises:
        ConfigError, DataError, AdapterError: no run, no such rows, or a damaged adapter.
    """
    settings = settings or EvalSettings()
    if settings.batch_size < 1:
        raise ConfigError(f"batch_size={settings.batch_size} must be at least 1")
    run = run_path(Path(folder).expanduser())
    recipe = load_recipe(str(run.recipe))
    examples = _examples(recipe, settings)
    prepared = load_run(run.path)
    scores = score(prepared, examples, batch_size=settings.batch_size, progress=progress)
    if settings.base:
        with prepared.model.disable_adapter():
            base = score(prepared, examples, batch_size=settings.batch_size, progress=progress)
        for task, figures in base.items():
            scores[task] |= {f"base_{k}": v for k, v in figures.items() if k in ("score", "matthews")}
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
        "command": command_line(),
        "versions": versions(),
    }
    write_json(run.path / f"eval-{settings.split}.json", results)
    return results


def load_run(folder: str | Path) -> Prepared:
    """Rebuild a run's model: base, heads, adapter.

    Raises:
        AdapterError: the adapter is damaged or belongs to another model or method.
    """
    from peft import PeftModel
    from transformers import set_seed

    run = run_path(Path(folder))
    recipe = load_recipe(str(run.recipe))
    if recipe.method != "lora":
        import moesaic.lora  # noqa: F401  registers the methods with PEFT
    stored = read_json(run.layout)
    plan = numerics(recipe.precision)
    base = load_model(recipe.model, dtype=plan.weights, attention=plan.attention)
    set_seed(recipe.seed)
    try:
        tasks = tuple(stored["tasks"])
        layout = Layout.from_dict(stored) if base.kind == "encoder" else None
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{run.layout} is damaged, or of a run on another model: {recipe.model} needs {error}"
        ) from None
    model = EncoderForTasks(base.model, layout) if layout else base.model
    try:
        _check_adapter(run, recipe)
        wrapped = PeftModel.from_pretrained(model, str(run.adapter))
        _check_tensors(run, wrapped)
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"{run.adapter} is damaged or does not fit {recipe.model}: {first_line(error)}") from None
    return Prepared(wrapped.eval().to(plan.device), base, tasks, layout, recipe)


def _check_adapter(run: RunFolder, recipe: Recipe) -> None:
    """Raise AdapterError where the run's adapter is not there, or not what its recipe says it is."""
    from peft import PeftConfig

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (run.adapter / name).is_file():
            raise AdapterError(f"{run.adapter} is damaged or does not fit {recipe.model}: it has no {name}")
    config: Any = PeftConfig.from_pretrained(str(run.adapter))
    if not isinstance(config, type(adapter_config(recipe))):
        raise AdapterError(
            f"{run.adapter} holds a {type(config).__name__}, but {run.recipe} says method={recipe.method}"
        )
    trained, now = config.base_model_name_or_path, resolve(recipe.model)
    if trained and Path(trained).name != Path(now).name:
        raise AdapterError(f"{run.adapter} was trained on {trained}, but {run.recipe} says model={recipe.model}")


def _check_tensors(run: RunFolder, model: Any) -> None:
    """Raise AdapterError where the file lacks tensors (PEFT would leave them at random) or holds others."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    there, wanted = load_file(run.adapter / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    odd = sorted(there.keys() ^ wanted.keys())
    if odd:
        raise AdapterError(
            f"{run.adapter} is damaged or does not fit: {len(odd)} tensors are on one side only, {odd[0]}"
        )
    broken = [name for name, tensor in there.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise AdapterError(f"{run.adapter} is damaged: {broken[0]} holds numbers that are not finite; train it again")


def score(
    prepared: Prepared, examples: Sequence[Example], *, batch_size: int = 32, progress: bool = False
) -> dict[str, Any]:
    """Figures per task: {"metric", "n", "score", "stderr"} and, for fixed label sets, {"majority", "matthews"}."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.task, []).append(example)
    for task, rows in groups.items():
        if len({bool(e.choices) for e in rows}) > 1:
            raise DataError(f"task '{task}' has rows with and without choices: give them two names")
    training = prepared.model.training
    prepared.model.eval()
    try:
        with torch.no_grad(), numerics(prepared.recipe.precision).context():
            return {
                t: _score_task(prepared, rows, _batches(rows, batch_size, t, progress)) for t, rows in groups.items()
            }
    finally:
        prepared.model.train(training)


def generate(prepared: Prepared, examples: Sequence[Example], *, max_new_tokens: int) -> list[str]:
    """Greedy answers of a causal model, in one batch padded on the left."""
    tokenizer = prepared.base.tokenizer
    rows = [causal.prompt_ids(e, tokenizer)[-prepared.recipe.max_length :] for e in examples]
    longest = max(len(r) for r in rows)
    device = prepared.model.device
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    out = prepared.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [str(text) for text in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]


def _examples(recipe: Recipe, settings: EvalSettings) -> list[Example]:
    source = settings.data or recipe.data
    if settings.data is None and Path(source).is_file():
        raise ConfigError(f"the run was trained on one file, {source}: say which rows to score with data=FILE.jsonl")
    examples = data.load(source, settings.split, tasks=settings.tasks or recipe.tasks, on_bad_lines=recipe.on_bad_lines)  # type: ignore[arg-type]
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


def _score_task(prepared: Prepared, rows: list[Example], batches: Iterator[list[Example]]) -> dict[str, Any]:
    if not rows[0].choices:
        hits = _exact_matches(prepared, rows, batches)
        share = sum(hits) / len(hits)
        return {
            "metric": "exact_match",
            "n": len(hits),
            "score": share,
            "stderr": metrics.standard_error(share, len(hits)),
        }
    figures: dict[str, Any] = {"metric": "accuracy", "n": len(rows)}
    gold, predicted, per_byte = [], [], []
    ask = _encoder_choices if prepared.layout is not None else _likelihood_choices
    for batch in batches:
        best, best_per_byte = ask(prepared, batch)
        gold += [e.label for e in batch]
        predicted += best
        per_byte += best_per_byte
    share = metrics.accuracy(predicted, gold)
    figures |= {"score": share, "stderr": metrics.standard_error(share, len(rows))}
    if per_byte:
        figures["accuracy_per_byte"] = metrics.accuracy(per_byte, gold)
    if len({e.choices for e in rows}) == 1:
        figures |= {"majority": metrics.majority_rate(gold), "matthews": metrics.matthews(predicted, gold)}
    return figures


def _encoder_choices(prepared: Prepared, batch: list[Example]) -> tuple[list[int], list[int]]:
    assert prepared.layout is not None
    collate = EncoderCollator(prepared.base.tokenizer, prepared.layout, max_length=prepared.recipe.max_length)
    inputs = {k: v.to(_device(prepared)) for k, v in collate(batch).items()}
    return prepared.model(**inputs).logits.argmax(-1).tolist(), []


def _likelihood_choices(prepared: Prepared, batch: list[Example]) -> tuple[list[int], list[int]]:
    """The likeliest choice of each row, by log-likelihood and by log-likelihood per byte."""
    tokenizer = prepared.base.tokenizer
    rows = []
    for example in batch:
        prompt = causal.prompt_ids(example, tokenizer)
        for choice in example.choices:
            answer = [*causal.answer_ids(example, choice, tokenizer), tokenizer.eos_token_id]
            head, answer = causal.fit(prompt, answer, prepared.recipe.max_length)
            rows.append({"input_ids": head + answer, "labels": [causal.IGNORED] * len(head) + answer})
    collated = causal.CausalCollator(tokenizer.pad_token_id)(rows)
    inputs = {k: v.to(_device(prepared)) for k, v in collated.items()}
    labels = inputs.pop("labels")[:, 1:]
    logits = prepared.model(**inputs).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=causal.IGNORED, reduction="none")
    totals = iter((-losses.sum(1)).tolist())
    best, per_byte = [], []
    for example in batch:
        scores = [next(totals) for _ in example.choices]
        lengths = [max(1, len(c.encode())) for c in example.choices]
        best.append(max(range(len(scores)), key=scores.__getitem__))
        per_byte.append(max(range(len(scores)), key=lambda i: scores[i] / lengths[i]))
    return best, per_byte


def _exact_matches(prepared: Prepared, rows: list[Example], batches: Iterator[list[Example]]) -> list[bool]:
    if prepared.layout is not None:
        raise DataError(f"task '{rows[0].task}' has rows without choices: an encoder cannot write an answer")
    tokenizer = prepared.base.tokenizer
    longest = max(len(causal.answer_ids(e, causal.answer_text(e), tokenizer)) for e in rows)
    hits = []
    for batch in batches:
        texts = generate(prepared, batch, max_new_tokens=min(longest + 8, LONGEST_ANSWER))
        for example, text in zip(batch, texts, strict=True):
            answer = None if example.answer is None else str(example.answer)
            hits.append(metrics.answers_match(text, causal.answer_text(example), answer))
    return hits


def _batches(rows: list[Example], size: int, task: str, progress: bool) -> Iterator[list[Example]]:
    """Batches of rows of like length, so that little is padding."""
    ordered = sorted(rows, key=lambda e: len(e.prompt))
    chunks: Any = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    if progress:
        from tqdm import tqdm

        chunks = tqdm(chunks, desc=task, leave=False)
    yield from chunks


def _device(prepared: Prepared) -> torch.device:
    return next(prepared.model.parameters()).device


def _mean(scores: dict[str, Any], key: str) -> float:
    return sum(s[key] for s in scores.values()) / len(scores)
