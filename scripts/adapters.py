"""LoRA adapters trained apart, one a task, then routed by every method: `python scripts/adapters.py nano` (or minilm,
or smollm2).

For each seed: six plain LoRA adapters (PEFT's own); every method over all six on the tasks they were trained on; and
zero-shot, over five of them on the task of the sixth, those methods whose routers part into experts, and PEFT's merges.
Writes results/adapters-SETTING.json, and what is finished on the way into results/adapters-SETTING/, which is not run
again: it may be stopped and started, on another machine too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from moesaic.adapters.merges import MERGES


@dataclass(frozen=True)
class Setting:
    """What is trained and asked."""

    model: str
    data: str
    tasks: tuple[str, ...]
    zero_shot: tuple[str, ...]
    split: str
    instructions: dict[str, str]
    shared: list[str]
    adapter: list[str] = field(default_factory=list)
    routers: list[str] = field(default_factory=list)
    own: dict[str, list[str]] = field(default_factory=dict)
    """Settings of one task's adapter, or of one arm, by its name."""
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: dict[str, int] = field(default_factory=dict)
    """How many rows of a task are asked; all of them where it is not there."""


SETTINGS = {
    "minilm": Setting(
        "minilm",
        "../shared/data/tasks",
        ("arc_easy", "arc_challenge", "openbookqa", "boolq", "sst2", "cola"),
        ("arc_easy", "arc_challenge", "openbookqa"),
        "validation",
        {
            "arc_easy": "Answer an easy multiple-choice question from grade-school science exams.",
            "arc_challenge": "Answer a hard multiple-choice question from grade-school science that needs reasoning.",
            "openbookqa": "Complete a statement about elementary science facts and common sense with the right choice.",
            "boolq": "Read a passage of an encyclopedia and answer a yes-or-no question about it.",
            "sst2": "Tell whether the sentiment of a sentence from a film review is positive or negative.",
            "cola": "Judge whether an English sentence is grammatically acceptable.",
        },
        ["batch_size=16", "max_length=128", "warmup=40"],
        ["steps=400", "lr=3e-4", "adapter.r=16", "adapter.lora_alpha=32"],
        ["batch_size=16", "max_length=128"],
    ),
    "nano": Setting(
        "nano",
        "runs/nano-tasks",
        ("asc", "desc", "evens", "max", "reverse", "rotate"),
        ("desc", "evens", "rotate"),
        "test",
        {
            "asc": "4 1 8 2 up =",
            "desc": "4 1 8 2 down =",
            "evens": "4 1 8 2 even =",
            "max": "4 1 8 2 top =",
            "reverse": "4 1 8 2 back =",
            "rotate": "4 1 8 2 turn =",
        },
        ["batch_size=48", "max_length=64", "warmup=20"],
        [
            "steps=200",
            "lr=1e-2",
            "adapter.r=8",
            "adapter.lora_alpha=16",
            "adapter.target_modules=gate_proj,up_proj,down_proj",
        ],
        ["batch_size=48", "max_length=64"],
        {"lora-mixer": ["steps=200"]},
    ),
    "smollm2": Setting(
        "smollm2",
        "../shared/data/tasks",
        ("arc_easy", "boolq", "cola", "gsm8k", "openbookqa", "sst2"),
        ("openbookqa",),
        "validation",
        {
            "arc_easy": "Answer an easy question from grade-school science exams.",
            "boolq": "Answer a yes-or-no question about general knowledge with true or false.",
            "cola": "Judge whether an English sentence is grammatically acceptable.",
            "gsm8k": "Solve a grade-school math word problem step by step and give the final number.",
            "openbookqa": "Complete a statement about elementary science facts and common sense.",
            "sst2": "Tell whether the sentiment of a sentence from a film review is positive or negative.",
        },
        ["max_length=384", "warmup=10", "batch_size=16"],
        [
            "steps=100",
            "lr=2e-3",
            "adapter.r=16",
            "adapter.lora_alpha=32",
            "adapter.target_modules=q_proj,v_proj",
        ],
        ["max_length=384", "batch_size=8"],
        {
            "gsm8k": ["batch_size=4"],
            "phatgoose": ["steps=50"],
            "lora-mixer": ["steps=50", "warmup=5"],
            "smear": ["steps=50", "warmup=5"],
        },
        arms=(
            *("uniform", "oracle", "arrow", "retrieval", "phatgoose", "lora-mixer", "smear"),
            *("glider", "glider-instructions", "glider-written", "glider-top-1"),
            *MERGES,
        ),
        seeds=(0, 1),
        rows={
            **dict.fromkeys(("arc_easy", "boolq", "cola", "openbookqa", "sst2"), 120),
            "gsm8k": 48,
        },
    ),
}
UNTRAINED = ("uniform", "oracle", "arrow", "retrieval")
TRAINED = ("phatgoose", "lora-mixer", "smear", "cat", "lora-flow", "lorahub")
GLIDER = ("glider", "glider-alpha-100", "glider-instructions", "glider-written", "glider-top-1")
PART = ("uniform", "arrow", "retrieval", "phatgoose", *GLIDER, *MERGES)
"""Arms that can leave an expert out without new training."""
ARMS = [*UNTRAINED, *TRAINED, *GLIDER, *MERGES]


def arms_of(setting: str) -> list[str]:
    """All that a setting runs; instructions that the model writes itself need a model that follows instructions."""
    return list(SETTINGS[setting].arms) or [arm for arm in ARMS if arm != "glider-written"]


@dataclass(frozen=True)
class Job:
    """One arm of one seed; `left_out` is the task that it is asked zero-shot, its adapter left out."""

    setting: str
    arm: str
    seed: int
    left_out: str = ""

    @property
    def folder(self) -> Path:
        name = f"{self.arm}-without-{self.left_out}" if self.left_out else self.arm
        return Path("runs") / f"adapters-{self.setting}" / f"s{self.seed}" / name

    @property
    def result(self) -> Path:
        return Path("results") / f"adapters-{self.setting}" / f"s{self.seed}" / f"{self.folder.name}.json"


def train_adapter(setting: str, task: str, seed: int) -> None:
    from moesaic.runs.recipe import load_recipe
    from moesaic.training.run import train

    chosen, out = SETTINGS[setting], Job(setting, task, seed).folder
    if (out / "results.json").is_file():
        return
    given = [f"model={chosen.model}", f"data={chosen.data}", f"tasks={task}", f"seed={seed}", f"out={out}"]
    own = chosen.own.get(task, [])
    recipe = load_recipe("lora", [*given, "save_every=400", *chosen.shared, *chosen.adapter, *own])
    train(recipe, command=f"python scripts/adapters.py {setting}", progress=False)


def run(job: Job) -> None:
    """Make what an arm needs, ask it, write what it answered."""
    if job.result.is_file():
        return
    chosen = SETTINGS[job.setting]
    tasks = [job.left_out] if job.left_out else list(chosen.tasks)
    if job.arm in MERGES:
        found = _merged(job, chosen, tasks)
    else:
        _make(job, chosen)
        from moesaic.evaluation.run import evaluate_run
        from moesaic.evaluation.settings import EvalSettings

        found = {}
        for limit in dict.fromkeys(map(chosen.rows.get, tasks)):
            alike = [task for task in tasks if chosen.rows.get(task) == limit]
            ask = EvalSettings(chosen.split, chosen.data, alike, limit, base=job.arm == "uniform")
            found |= evaluate_run(job.folder, ask)["tasks"]
    scores = {task: {k: v for k, v in row.items() if k in ("score", "base_score", "n")} for task, row in found.items()}
    job.result.parent.mkdir(parents=True, exist_ok=True)
    part = job.result.with_suffix(".part")
    part.write_text(json.dumps(scores))
    part.replace(job.result)


def _make(job: Job, chosen: Setting) -> None:
    """The run folder of an arm: trained, composed, or made of one that is."""
    from moesaic.cli.compose import run_compose
    from moesaic.runs.recipe import load_recipe
    from moesaic.training.run import train

    if (job.folder / "recipe.yaml").is_file() and (job.folder / "adapter").is_dir():
        return
    stored = ",".join(f"{task}: {Job(job.setting, task, job.seed).folder}" for task in chosen.tasks)
    adapters, common = f"{{{stored}}}", [f"model={chosen.model}", f"data={chosen.data}"]
    if job.arm in TRAINED and not job.left_out:
        given = [f"tasks={','.join(chosen.tasks)}", f"seed={job.seed}", f"out={job.folder}", "save_every=1000"]
        recipe = load_recipe(
            job.arm, [*common, *given, *chosen.routers, *chosen.own.get(job.arm, []), f"adapter.adapters={adapters}"]
        )
        train(recipe, command=f"python scripts/adapters.py {job.setting}", progress=False)
        return
    asked = [f"out={job.folder}", "overwrite=true"]
    if job.arm in GLIDER:
        asked += ["method=glider", f"extend={Job(job.setting, 'phatgoose', job.seed).folder}"]
        if job.arm == "glider-alpha-100":
            asked.append("adapter.alpha=100")
        if job.arm == "glider-top-1":
            asked.append("adapter.top_k=1")
        told: dict[str, str] = {}
        if job.arm == "glider-instructions":
            told = chosen.instructions
        if job.arm == "glider-written":
            told = json.loads(written_by_model(job.setting).read_text())
        asked += [f"adapter.instructions.{t}={json.dumps(text)}" for t, text in told.items() if t != job.left_out]
    elif job.left_out:
        asked += [f"extend={Job(job.setting, job.arm, job.seed).folder}"]
    else:
        asked += [*common, f"method={job.arm}", f"adapters={adapters}"]
    if job.left_out:
        asked.append(f"drop={job.left_out}")
    with contextlib.redirect_stdout(io.StringIO()):
        run_compose(asked)


def written_by_model(setting: str) -> Path:
    """The model's own sentence on each task, in the words in which an endpoint would be asked for it."""
    from moesaic.adapters.instructions import EXAMPLES, question
    from moesaic.data import examples as data
    from moesaic.models.embedded import load_model

    chosen, file = SETTINGS[setting], Path("results") / f"adapters-{setting}" / "instructions.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        loaded, written = load_model(chosen.model), {}
        for task in chosen.tasks:
            texts = [row.prompt for row in data.load(chosen.data, "train", tasks=[task])[:EXAMPLES]]
            asked = [{"role": "user", "content": question(texts)}]
            how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
            given = loaded.tokenizer.apply_chat_template(asked, **how)
            said = loaded.model.generate(**given, max_new_tokens=64, do_sample=False)[0, given["input_ids"].shape[1] :]
            written[task] = " ".join(loaded.tokenizer.decode(said, skip_special_tokens=True).split())
        part = file.with_suffix(".part")
        part.write_text(json.dumps(written, indent=1))
        part.replace(file)
    return file


def _merged(job: Job, chosen: Setting, tasks: list[str]) -> dict[str, Any]:
    """Scores of one of PEFT's merges."""
    from moesaic.adapters.merges import merge, with_adapters
    from moesaic.data import examples as data
    from moesaic.evaluation.run import score
    from moesaic.models.embedded import load_model
    from moesaic.runs.recipe import adapter_config, load_recipe
    from moesaic.training.prepared import Prepared, load_examples
    from moesaic.training.wrapping import with_heads

    kept = [task for task in chosen.tasks if task != job.left_out]
    folders = {task: str(Job(job.setting, task, job.seed).folder) for task in kept}
    recipe = load_recipe("arrow", [f"model={chosen.model}", f"data={chosen.data}", *chosen.routers])
    recipe.adapter["adapters"] = folders
    loaded = load_model(recipe.model)
    base = with_heads(loaded, load_examples(recipe), recipe, adapter_config(recipe))
    model = with_adapters(base.model, {task: Path(folder) / "adapter" for task, folder in folders.items()})
    merge(model, job.arm, seed=job.seed)
    plain = load_recipe("lora", [f"model={chosen.model}", *chosen.routers])
    prepared = Prepared(model.eval(), loaded, base.tasks, base.layout, plain)
    rows = [r for t in tasks for r in data.load(chosen.data, chosen.split, tasks=[t])[: chosen.rows.get(t)]]
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    return score(prepared, rows)


def gather(setting: str, arms: list[str]) -> dict[str, Any]:
    """Scores of a setting: by arm, by seed."""
    chosen = SETTINGS[setting]
    found: dict[str, Any] = {}
    for arm in arms:
        rows = [json.loads(Job(setting, arm, seed).result.read_text()) for seed in chosen.seeds]
        means = [statistics.mean(row[task]["score"] for task in chosen.tasks) for row in rows]
        found[arm] = {"held_in": means, "tasks": {t: [row[t]["score"] for row in rows] for t in chosen.tasks}}
        if arm in PART:
            left = {
                t: [json.loads(Job(setting, arm, seed, t).result.read_text())[t] for seed in chosen.seeds]
                for t in chosen.zero_shot
            }
            found[arm]["zero_shot"] = {t: [r["score"] for r in rows] for t, rows in left.items()}
            if arm == "uniform":
                found["base"] = {"zero_shot": {t: [r["base_score"] for r in rows] for t, rows in left.items()}}
                base = [statistics.mean(row[t]["base_score"] for t in chosen.tasks) for row in rows]
                found["base"] |= {"held_in": base}
                found["base"]["tasks"] = {t: [row[t]["base_score"] for row in rows] for t in chosen.tasks}
    return {"setting": setting, "model": chosen.model, "split": chosen.split, "rows": chosen.rows,
            "seeds": chosen.seeds, "arms": found, "command": f"python scripts/adapters.py {setting}"}  # fmt: skip


def _worker(job: Job | tuple[str, str, int]) -> str:
    import torch

    torch.set_num_threads(1)
    train_adapter(*job) if isinstance(job, tuple) else run(job)
    return str(job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="run these again, and keep the others")
    given = parser.parse_args()
    chosen, every = SETTINGS[given.setting], arms_of(given.setting)
    arms, seeds = given.arms or every, chosen.seeds
    if "glider-written" in arms:
        written_by_model(given.setting)
    stages: list[list[Any]] = [
        [(given.setting, task, seed) for seed in seeds for task in chosen.tasks],
        [Job(given.setting, a, seed) for seed in seeds for a in (*UNTRAINED, *TRAINED, *MERGES) if a in arms],
        [Job(given.setting, arm, seed) for seed in seeds for arm in GLIDER if arm in arms],
        [Job(given.setting, a, s, task) for s in seeds for a in PART if a in arms for task in chosen.zero_shot],
    ]
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        for stage in stages:
            for done in as_completed([pool.submit(_worker, job) for job in stage]):
                print(done.result(), flush=True)
    out = Path("results") / f"adapters-{given.setting}.json"
    found = gather(given.setting, arms)
    if arms != every:
        found["arms"] = json.loads(out.read_text())["arms"] | found["arms"]
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
