"""Act two: a routed mixture trained from scratch, HotMoE, beside a plain LoRA with as many trainable parameters.

Scores of both and of the untrained base on lists that neither has seen, and what the router did.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli.demo.shared import TARGETS, answers_of, level, mean, percent, recipe_of, standard_error, trained

if TYPE_CHECKING:
    from rich.console import Console

    from moesaic.cli.demo.settings import DemoSettings
    from moesaic.cli.demo.workers import Workers
    from moesaic.data.examples import Example
    from moesaic.training.prepared import Prepared

EXPERTS, RANK = 4, 2


def play(folder: Path, data: Path, settings: DemoSettings, console: Console, pool: Workers) -> dict[str, Any]:
    """Train both, ask, show; returns scores by arm and task, parameters, answers, and the routing."""
    console.rule("act two: a mixture trained from scratch, beside plain LoRA")
    recipes = _recipes(folder, data, settings)
    console.print(f"training {' and '.join(recipes)}, {settings.steps} steps each")
    runs = {}
    for recipe, found in pool.each(trained, recipes.values()):
        runs[recipe.method] = {key: found[key] for key in ("trainable_parameters", "final_loss")}
        console.print(f"  {recipe.method}: {found['trainable_parameters']:,} parameters")
    console.print("asking base, LoRA and HotMoE")
    return {"runs": runs, **_ask(folder, data)}


def _recipes(folder: Path, data: Path, settings: DemoSettings) -> dict[str, Any]:
    """LoRA's rank is solved for the parameters of HotMoE, its routers counted."""
    from moesaic.runs.folder import write_text
    from moesaic.runs.recipe import dump

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
    hotmoe = recipe_of("hotmoe", folder / "hotmoe", data, settings, steps=settings.steps, adapter=mixture)
    file = folder / "hotmoe.yaml"
    folder.mkdir(exist_ok=True)
    write_text(file, dump(hotmoe))
    lora = recipe_of("lora", folder / "lora", data, settings, steps=settings.steps, adapter=plain, match=str(file))
    return {"hotmoe": hotmoe, "lora": lora}


def _ask(folder: Path, data: Path) -> dict[str, Any]:
    """Exact match by task of base, LoRA and HotMoE; a few answers; the routing of HotMoE on the test lists."""
    from moesaic.data import examples
    from moesaic.evaluation.opening import load_run

    rows = examples.load(str(data), "test")
    shown = {row.task: row for row in reversed(rows)}
    scores: dict[str, dict[str, float]] = {}
    said: dict[str, dict[str, str]] = {task: {} for task in sorted(shown)}

    def ask(arm: str, prepared: Prepared) -> None:
        for task, (score, text) in answers_of(prepared, rows).items():
            scores.setdefault(arm, {})[task] = score
            said[task][arm] = text

    for name in ("lora", "hotmoe"):
        prepared = load_run(folder / name)
        if not scores:
            with prepared.model.disable_adapter():
                ask("base", prepared)
        ask(name, prepared)
    return {
        "test_lists": len(rows),
        "scores": scores,
        "answers": [
            {"prompt": shown[task].prompt, "right": shown[task].completion.strip(), **texts}
            for task, texts in said.items()
        ],
        "routing": _routing(prepared, rows),
    }


def _routing(prepared: Prepared, rows: list[Example]) -> dict[str, Any]:
    """The trace of one forward over prompts and right answers."""
    import torch

    from moesaic.data.causal import CausalCollator, tokenize
    from moesaic.host import trace as tracing

    tokens = tokenize(rows, prepared.base.tokenizer, prepared.tasks, max_length=64)
    collate = CausalCollator(prepared.base.tokenizer.pad_token_id, task_ids=True)
    with torch.no_grad(), tracing(prepared.model) as trace:
        for start in range(0, len(tokens), 150):
            prepared.model(**collate(tokens[start : start + 150]))
    found = trace.to_dict()
    found["by_task"] = {prepared.tasks[int(task)]: row for task, row in found["by_task"].items()}
    return found


def show(console: Console, result: dict[str, Any]) -> None:
    from rich.table import Table

    scores, routing = result["scores"], result["routing"]
    table = Table(title="answers right on held-out lists, percent")
    for column in ("task", *scores):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task in scores["base"]:
        table.add_row(task, *[percent(row[task]) for row in scores.values()])
    table.add_row("mean", *[percent(mean(row)) for row in scores.values()], style="bold")
    parameters = [result["runs"].get(name, {}).get("trainable_parameters", 0) for name in scores]
    table.add_row("trained parameters", *[f"{number:,}" for number in parameters])
    console.print(table)
    table = Table(title="what HotMoE's routers did on the test lists (numbers of experts aligned)")
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
    for row in result["answers"]:
        table.add_row(row["prompt"].strip(), *[row[key] for key in ("right", *scores)])
    console.print(table)
    console.print(_verdict({name: mean(row) for name, row in scores.items()}, result["test_lists"]))


def _verdict(means: dict[str, float], lists: int) -> str:
    """What came out, in words; differences below two standard errors are called none."""
    difference = 100 * (means["hotmoe"] - means["lora"])
    error = 100 * standard_error(means["hotmoe"], means["lora"], lists)
    gain = f"Both learned the tasks: the base solves {100 * means['base']:.0f} %."
    if min(means["lora"], means["hotmoe"]) < means["base"] + 0.1:
        gain = "At least one of the two did not learn the tasks: train longer (steps=) or change lr=."
    if level(means["hotmoe"], means["lora"], lists):
        compare = f"HotMoE and plain LoRA are level ({difference:+.1f} points, standard error {error:.1f})."
    else:
        word = "above" if difference > 0 else "below"
        compare = f"HotMoE is {abs(difference):.1f} points {word} plain LoRA (standard error {error:.1f}, one seed)."
    return f"{gain} {compare} At this size a tuned LoRA is hard to beat; see docs/results.md for more seeds and tasks."
