"""`moesaic demo`: plain LoRA against HotMoE at equal trainable parameters, on the embedded model, in minutes.

Six tasks ask for different answers to the same list of digits; only a cue word after the list tells them apart. The
demo trains both, scores them and the untrained base on lists that neither has seen, and shows what the router did.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError, path_of

if TYPE_CHECKING:
    from rich.console import Console

    from moesaic.data.examples import Example
    from moesaic.training.prepared import Prepared

EXPERTS, RANK = 4, 2
TARGETS = ["gate_proj", "up_proj", "down_proj"]


@dataclass
class DemoSettings:
    """Settings of `moesaic demo`."""

    out: str = field(default="runs/demo", metadata={"help": "run folder; an earlier demo there is replaced"})
    steps: int = field(default=400, metadata={"help": "optimizer steps of each run"})
    lr: float = field(default=1e-2, metadata={"help": "peak learning rate of both"})
    seed: int = field(default=0, metadata={"help": "of data, weights and order"})
    train_per_task: int = field(default=2000, metadata={"help": "training lists a task"})
    test_per_task: int = field(default=150, metadata={"help": "held-out lists a task"})


@verb(
    "demo",
    "plain LoRA against HotMoE on six small tasks, in minutes",
    group="mixtures",
    place=10,
    settings=[Section(DemoSettings)],
)
def run(overrides: list[str], *, as_json: bool = False) -> None:
    """Train, score, show, and write the figures to `<out>/results.json`.

    Raises:
        ConfigError: an unknown setting, or `out` is a folder that holds something else.
    """
    import torch
    from rich.console import Console

    from moesaic.runs.folder import write_json
    from moesaic.runs.recipe import Recipe, check, parse_settings
    from moesaic.runs.results import command_line, versions

    settings = parse_settings(DemoSettings, overrides)
    for name in ("train_per_task", "test_per_task"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)} must be at least 1")
    check(Recipe(steps=settings.steps, lr=settings.lr, seed=settings.seed))  # before an earlier demo is replaced
    torch.set_num_threads(1)  # products this small are slower on two threads than on one
    console = Console(stderr=as_json)
    started = time.perf_counter()
    folder = _fresh_folder(path_of(settings.out))
    _write_data(folder / "data", settings)
    runs = {}
    for name, recipe in _recipes(folder, settings).items():
        console.print(f"training {name}: {settings.steps} steps of {recipe.batch_size}")
        runs[name] = _train(recipe)
    console.print("scoring base, LoRA and HotMoE on held-out lists")
    results: dict[str, Any] = {
        "settings": {k: getattr(settings, k) for k in settings.__dataclass_fields__},
        "runs": runs,
        **_score(folder),
        "seconds": round(time.perf_counter() - started, 1),
        "command": command_line(),
        "versions": versions(),
    }
    write_json(folder / "results.json", results)
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        _show(console, results, folder)


def _fresh_folder(folder: Path) -> Path:
    from moesaic.runs.folder import discard

    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "data").is_dir():
        raise ConfigError(f"out={folder} holds files that are not a demo's; name another folder")
    discard(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_data(folder: Path, settings: DemoSettings) -> None:
    """One folder a task with train.jsonl and test.jsonl, as any data for `moesaic train` may be."""
    from moesaic.models.nano.tasks import make_split

    splits = make_split(settings.train_per_task, settings.test_per_task, settings.seed)
    for split, rows in zip(("train", "test"), splits, strict=True):
        by_task: dict[str, list[str]] = {}
        for row in rows:
            by_task.setdefault(row["task"], []).append(json.dumps(row) + "\n")
        for task, lines in by_task.items():
            (folder / task).mkdir(parents=True, exist_ok=True)
            (folder / task / f"{split}.jsonl").write_text("".join(lines))


def _recipes(folder: Path, settings: DemoSettings) -> dict[str, Any]:
    """HotMoE first: LoRA's rank is solved for the parameters of HotMoE, its routers counted."""
    from moesaic.runs.recipe import Recipe

    common: dict[str, Any] = {
        "model": "nano",
        "data": str(folder / "data"),
        "steps": settings.steps,
        "batch_size": 48,
        "lr": settings.lr,
        "warmup": min(20, settings.steps // 4),
        "max_length": 64,
        "seed": settings.seed,
        "save_every": settings.steps,
    }
    mixture = {
        "target_modules": TARGETS,
        "num_experts": EXPERTS,
        "r": RANK,
        # A weight is 1/E on average: E times LoRA's usual scale of 2 makes the two updates alike at the start.
        "lora_alpha": 2 * EXPERTS * RANK,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "expert_dim": 16,
        "attention_dim": 16,
        # Summed over 18 routers, as the authors do, the auxiliary losses outweigh so small a task.
        "aux_reduce": "mean",
    }
    plain = {"target_modules": TARGETS, "r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
    hotmoe = Recipe(method="hotmoe", adapter=mixture, out=str(folder / "hotmoe"), **common)
    lora = Recipe(method="lora", adapter=plain, match=str(folder / "hotmoe"), out=str(folder / "lora"), **common)
    return {"hotmoe": hotmoe, "lora": lora}


def _train(recipe: Any) -> dict[str, Any]:
    from moesaic.training.run import train

    results = train(recipe)
    return {k: results[k] for k in ("trainable_parameters", "train_seconds", "tokens_per_second", "final_loss")}


def _score(folder: Path) -> dict[str, Any]:
    """Exact match by task of base, LoRA and HotMoE; a few answers; the routing of HotMoE on the test lists."""
    from moesaic.data import examples as data
    from moesaic.evaluation.run import load_run, score

    examples = data.load(str(folder / "data"), "test")
    scores: dict[str, Any] = {}
    answers: dict[str, list[str]] = {}
    shown = list({e.task: e for e in examples}.values())
    for name in ("lora", "hotmoe"):
        prepared = load_run(folder / name)
        if not scores:
            with prepared.model.disable_adapter():
                scores["base"] = _by_task(score(prepared, examples, batch_size=150))
                answers["base"] = _answers(prepared, shown)
        scores[name] = _by_task(score(prepared, examples, batch_size=150))
        answers[name] = _answers(prepared, shown)
    return {
        "test_lists": len(examples),
        "scores": scores,
        "answers": [
            {"prompt": e.prompt, "right": e.completion.strip(), **{name: rows[i] for name, rows in answers.items()}}
            for i, e in enumerate(shown)
        ],
        "routing": _routing(prepared, examples),
    }


def _by_task(figures: dict[str, Any]) -> dict[str, float]:
    return {task: row["score"] for task, row in figures.items()}


def _answers(prepared: Prepared, examples: list[Example]) -> list[str]:
    from moesaic.evaluation.run import generate

    return [text.strip() for text in generate(prepared, examples, max_new_tokens=12)]


def _routing(prepared: Prepared, examples: list[Example]) -> dict[str, Any]:
    """The trace of one forward over prompts and right answers."""
    import torch

    from moesaic.data.causal import CausalCollator, tokenize
    from moesaic.host import trace as tracing

    rows = tokenize(examples, prepared.base.tokenizer, prepared.tasks, max_length=64)
    collate = CausalCollator(prepared.base.tokenizer.pad_token_id, task_ids=True)
    with torch.no_grad(), tracing(prepared.model) as trace:
        for start in range(0, len(rows), 150):
            prepared.model(**collate(rows[start : start + 150]))
    found = trace.to_dict()
    found["by_task"] = {prepared.tasks[int(task)]: row for task, row in found["by_task"].items()}
    return found


def _show(console: Console, results: dict[str, Any], folder: Path) -> None:
    from rich.table import Table

    scores, runs, routing = results["scores"], results["runs"], results["routing"]
    table = Table(title="answers right on held-out lists, percent")
    for column in ("task", *scores):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task in scores["base"]:
        table.add_row(task, *[f"{100 * row[task]:.1f}" for row in scores.values()])
    means = {name: _mean(row) for name, row in scores.items()}
    table.add_row("mean", *[f"{100 * mean:.1f}" for mean in means.values()], style="bold")
    console.print(table)

    table = Table(title="cost")
    for column in ("", "lora", "hotmoe"):
        table.add_column(column, justify="right" if column else "left")
    for label, key, form in (
        ("trainable parameters", "trainable_parameters", "{:,}"),
        ("training, tokens/s", "tokens_per_second", "{:,.0f}"),
        ("training, seconds", "train_seconds", "{:.0f}"),
    ):
        table.add_row(label, *[form.format(runs[name][key]) for name in ("lora", "hotmoe")])
    overhead = runs["hotmoe"]["train_seconds"] / runs["lora"]["train_seconds"] - 1
    table.add_row("overhead over plain LoRA (one run each)", "", f"{overhead:+.0%}")
    console.print(table)

    table = Table(title="what HotMoE's routers did on the test lists")
    table.add_column("share of weight")
    for expert in range(EXPERTS):
        table.add_column(f"expert {expert}", justify="right")
    for label, rows in (("layer", routing["by_layer"]), ("task", routing["by_task"])):
        for key, row in rows.items():
            table.add_row(f"{label} {key}", *[f"{100 * share:.0f} %" for share in row])
    console.print(table)
    console.print(
        f"entropy {routing['entropy']:.2f} of 1, dead experts {len(routing['dead_experts'])}, "
        f"task-expert mutual information {routing['mutual_information']:.3f} of 1"
    )

    table = Table(title="a few answers")
    for column in ("prompt", "right", *scores):
        table.add_column(column)
    for row in results["answers"]:
        table.add_row(*[row[key] for key in ("prompt", "right", *scores)])
    console.print(table)
    console.print(_verdict(means, results["test_lists"]))
    console.print(f"{results['seconds']:.0f} s in all; everything is in {folder}")


def _mean(row: dict[str, float]) -> float:
    return sum(row.values()) / len(row)


def _verdict(means: dict[str, float], lists: int) -> str:
    """What came out, in words; differences below two standard errors are called none."""
    difference = 100 * (means["hotmoe"] - means["lora"])
    error = 100 * math.sqrt(sum(means[name] * (1 - means[name]) / lists for name in ("lora", "hotmoe")))
    gain = f"Both learned the tasks: the base solves {100 * means['base']:.0f} %."
    if min(means["lora"], means["hotmoe"]) < means["base"] + 0.1:
        gain = "At least one of the two did not learn the tasks: train longer (steps=) or change lr=."
    if abs(difference) < 2 * error:
        compare = f"HotMoE and plain LoRA are level ({difference:+.1f} points, standard error {error:.1f})."
    else:
        word = "above" if difference > 0 else "below"
        compare = f"HotMoE is {abs(difference):.1f} points {word} plain LoRA (standard error {error:.1f}, one seed)."
    return f"{gain} {compare} At this size a tuned LoRA is hard to beat; see docs/results.md for more seeds and tasks."
