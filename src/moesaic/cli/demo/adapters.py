"""Act one: six LoRA adapters, each trained on one task and apart from the others, become one model.

Each test row is asked of the untrained base, of PEFT's merges of the six into one, of a uniform average, of two routers
over them, and of the one adapter that was trained on its task, which is the most that can be had.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli.demo.shared import TARGETS, answers_of, level, mean, percent, recipe_of, trained

if TYPE_CHECKING:
    from rich.console import Console

    from moesaic.cli.demo.settings import DemoSettings
    from moesaic.cli.demo.workers import Workers
    from moesaic.data.examples import Example
    from moesaic.training.prepared import Prepared

ROUTED = ("retrieval", "glider")
GATE_STEPS = 100


def play(folder: Path, data: Path, settings: DemoSettings, console: Console, pool: Workers) -> dict[str, Any]:
    """Train, compose, ask, show; returns the scores by arm and task, and an answer of each task."""
    from moesaic.adapters.merges import MERGES
    from moesaic.data import examples

    rows = examples.load(str(data), "test")
    shown = {row.task: row for row in reversed(rows)}
    tasks = sorted(shown)
    console.rule("act one: adapters that are trained already become one model")
    console.print(f"training {len(tasks)} LoRA adapters, {settings.adapter_steps} steps each, one for each task alone")
    recipes = [
        recipe_of(
            "lora",
            folder / task,
            data,
            settings,
            steps=settings.adapter_steps,
            batch_size=24,
            tasks=[task],
            adapter={"target_modules": TARGETS, "r": 8, "lora_alpha": 16},
        )
        for task in tasks
    ]
    for number, (recipe, found) in enumerate(pool.each(trained, recipes), 1):
        size = found["trainable_parameters"]
        console.print(f"  {number} of {len(tasks)}: {recipe.run_folder().name}, {size:,} parameters")
    console.print("making one model of them: averaged, by retrieval, and by GLIDER over gates that are trained")
    composed = pool.each(_compose, [["uniform", "retrieval"], ["gates", "glider"]], folder, data, tasks, settings)
    list(composed)
    console.print(f"asking {len(rows)} held-out lists of each, and of {len(MERGES)} merges by PEFT")
    scores: dict[str, dict[str, float]] = {arm: {} for arm in ("base", *MERGES, "uniform", *ROUTED, "own")}
    said: dict[str, dict[str, str]] = {task: {} for task in tasks}
    for arm, answers in pool.each(_ask, scores, folder, data, tasks, settings.seed):
        for task, (score, text) in answers.items():
            scores[arm][task] = score
            said[task][arm] = text
    best = max(MERGES, key=lambda arm: mean(scores[arm]))
    answered = _who_answered(folder / "glider", list(shown.values()))
    return {
        "trainable_parameters": size,
        "test_lists": len(rows),
        "scores": scores,
        "best_merge": best,
        "answers": [
            {"prompt": shown[task].prompt, "right": shown[task].completion.strip(), **said[task], **answered[task]}
            for task in tasks
        ],
    }


def _compose(methods: Sequence[str], folder: Path, data: Path, tasks: Sequence[str], settings: DemoSettings) -> None:
    """The adapters as one model, by each method in turn: folder/METHOD. GLIDER's gates are those of folder/gates."""
    from moesaic.cli.compose import run_compose

    adapters = {task: str(folder / task) for task in tasks}
    listed = f"adapters={json.dumps(adapters)}"
    for method in methods:
        if method == "gates":
            adapter = {"adapters": adapters}
            trained(recipe_of("phatgoose", folder / method, data, settings, steps=GATE_STEPS, adapter=adapter))
            continue
        of = [f"extend={folder / 'gates'}"] if method == "glider" else [listed, "model=nano", f"data={data}"]
        with contextlib.redirect_stdout(io.StringIO()):
            run_compose([*of, f"method={method}", f"out={folder / method}", "overwrite=true"])


def _ask(arm: str, folder: Path, data: Path, tasks: Sequence[str], seed: int) -> dict[str, tuple[float, str]]:
    """By task: the share of rows that an arm answers right, and what it says to the first."""
    from moesaic.data import examples
    from moesaic.evaluation.opening import load_run

    rows = examples.load(str(data), "test")
    if arm == "base":
        prepared = load_run(folder / "uniform")
        with prepared.model.disable_adapter():
            return answers_of(prepared, rows)
    if arm.startswith("merge-"):
        return answers_of(_merged(arm, folder, tasks, seed), rows)
    if arm != "own":
        return answers_of(load_run(folder / arm), rows)
    own = (answers_of(load_run(folder / task), [row for row in rows if row.task == task]) for task in tasks)
    return {task: found for answers in own for task, found in answers.items()}


def _merged(how: str, folder: Path, tasks: Sequence[str], seed: int) -> Prepared:
    """The adapters merged into one by PEFT."""
    from moesaic.adapters.merges import merge, with_adapters
    from moesaic.models.embedded import load_model
    from moesaic.runs.recipe import Recipe
    from moesaic.training.prepared import Prepared

    loaded = load_model("nano")
    model = with_adapters(loaded.model, {task: folder / task / "adapter" for task in tasks})
    merge(model, how, seed=seed)
    return Prepared(model, loaded, tuple(tasks), None, Recipe(model="nano", max_length=64))


def _who_answered(folder: Path, rows: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """By task: the adapter with most weight on its prompt, and how much that is."""
    from moesaic.evaluation.opening import load_run
    from moesaic.evaluation.routed import explain

    prepared, found = load_run(folder), {}
    for row in rows:
        routed = explain(prepared, row.prompt)
        share, adapter = max(zip(routed["weights"], routed["experts"], strict=True))
        found[row.task] = {"adapter": adapter, "share": round(share, 3)}
    return found


def show(console: Console, result: dict[str, Any]) -> None:
    from rich.table import Table

    scores, best = result["scores"], result["best_merge"]
    arms = {"base": "base", best: f"PEFT's {best}", "uniform": "average", "retrieval": "retrieval", "glider": "GLIDER"}
    arms["own"] = "own adapter"
    table = Table(title="answers right on held-out lists, percent")
    for column in ("task", *arms.values()):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task in scores["base"]:
        table.add_row(task, *[percent(scores[arm][task]) for arm in arms])
    table.add_row("mean", *[percent(mean(scores[arm])) for arm in arms], style="bold")
    console.print(table)
    merges = [arm for arm in scores if arm.startswith("merge-")]
    console.print(f"{best} is the best of PEFT's {len(merges)} merges on these very lists; the others: ", end="")
    console.print(
        ", ".join(f"{arm.removeprefix('merge-')} {percent(mean(scores[arm]))}" for arm in merges if arm != best)
    )
    table = Table(title="the same prompts")
    for column in ("prompt", "right", "merged", "GLIDER", "answered by"):
        table.add_column(column)
    for row in result["answers"]:
        who = f"{row['adapter']} ({row['share']:.0%})"
        table.add_row(row["prompt"].strip(), row["right"], row[best], row["glider"], who)
    console.print(table)
    console.print(_verdict(result))


def _verdict(result: dict[str, Any]) -> str:
    """What came out, in words; differences below two standard errors are called none."""
    scores, lists = result["scores"], result["test_lists"]
    merged, own = mean(scores[result["best_merge"]]), mean(scores["own"])
    routed = {arm: mean(scores[arm]) for arm in ROUTED}
    best = max(routed, key=lambda arm: routed[arm])
    name = {"glider": "GLIDER", "retrieval": "retrieval"}[best]
    said = f"Merged into one, the six answer {percent(merged)} % right; routed by {name}, {percent(routed[best])} %"
    said += f"; each asked its own task alone, {percent(own)} %."
    if level(merged, routed[best], lists):
        return f"{said} Routing and merging are level here."
    return f"{said} {'Routing keeps what merging loses.' if routed[best] > merged else 'Merging was better here.'}"
