"""Small models of one's own behind HTTP, so that routing is tried on models that really answer.

Four LoRA adapters of nano on the list tasks (`models.nano.tasks`): three know a domain of two tasks each, the fourth
knows all six with an adapter of six times the rank. `moesaic train` makes them, `moesaic serve` serves each in a
process of its own on a free port of this machine. SmolLM2-135M-Instruct may stand beside them, as it is and with two
adapters. Nobody charges for any of them: prices are 0, and sizes are what is counted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.errors import TrainingError
from moesaic.llms.catalog import Catalog
from moesaic.runs.folder import atomic_folder, read_json, write_text

DOMAINS = {"order": ("asc", "desc"), "move": ("reverse", "rotate"), "pick": ("evens", "max")}
"""Tasks that a specialist is trained on."""
TASKS = tuple(task for tasks in DOMAINS.values() for task in tasks)
VALIDATION = 100
"""Rows a task by which members are chosen, apart from those that they are scored on."""
STARTING, STOPPING = 600.0, 20.0
"""Seconds that a server is given to answer, and to end."""
_URL = re.compile(r"(http://\S+)/v1 ")


@dataclass(frozen=True)
class Member:
    """A model of the pool: its base, the tasks that it is trained on (none: as it is), and how."""

    name: str
    model: str = "nano"
    tasks: tuple[str, ...] = TASKS
    steps: int = 300
    batch_size: int = 32
    lr: float = 1e-2
    rank: int = 8

    def command(self, data: Path, out: Path, seed: int) -> list[str]:
        """Its `moesaic train`."""
        settings = {
            "model": self.model, "data": data, "out": out, "tasks": ",".join(self.tasks), "steps": self.steps,
            "batch_size": self.batch_size, "lr": self.lr, "warmup": min(20, self.steps // 4), "max_length": 64,
            "seed": seed, "save_every": 100, "adapter.target_modules": "gate_proj,up_proj,down_proj",
            "adapter.r": self.rank, "adapter.lora_alpha": 2 * self.rank,
        }  # fmt: skip
        given = [f"{key}={value}" for key, value in settings.items()]
        return [sys.executable, "-m", "moesaic", "train", "lora", *given]


MEMBERS = (
    *(Member(f"nano-{domain}", tasks=tasks) for domain, tasks in DOMAINS.items()),
    Member("nano-lists", steps=400, batch_size=48, lr=5e-3, rank=48),
)
LARGER = (
    Member("smollm2", "smollm2", tasks=()),
    Member("smollm2-move", "smollm2", DOMAINS["move"], steps=100, batch_size=16, lr=1e-3),
    Member("smollm2-lists", "smollm2", steps=150, batch_size=16, lr=1e-3),
)


def mixed(
    seed: int, *, train: int = 2000, validation: int = VALIDATION, test: int = 150
) -> dict[str, list[dict[str, str]]]:
    """Rows by split, so many a task, the tasks taking turns; no list of training is in the others."""
    from moesaic.models.nano.tasks import make_split

    learned, held_out = make_split(train, validation + test, seed)
    cut = validation * len(TASKS)
    return {"train": learned, "validation": held_out[:cut], "test": held_out[cut:]}


def write_rows(folder: Path, rows: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
    """A folder a task with a file a split, as `moesaic train` and `moesaic eval` take them."""
    with atomic_folder(folder) as staging:
        for split, given in rows.items():
            for task in TASKS:
                own = [json.dumps(row) + "\n" for row in given if row["task"] == task]
                (staging / task).mkdir(exist_ok=True)
                (staging / task / f"{split}.jsonl").write_text("".join(own), encoding="utf-8")


def train(members: Sequence[Member], data: Path, folder: Path, seed: int) -> dict[str, Path]:
    """Train members that are not trained yet; their run folders by name, `folder`/NAME.

    Raises:
        TrainingError: a training ended before its time; its log says more, and the same call goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {member.name: folder / member.name for member in members}
    for member in members:
        place, log = found[member.name], folder / f"{member.name}.log"
        if not member.tasks:
            _as_it_is(member.model, place)
        elif not (place / "results.json").is_file():
            with log.open("w", encoding="utf-8") as told:
                ended = subprocess.run(member.command(data, place, seed), stdout=told, stderr=told, check=False)
            if ended.returncode:
                raise TrainingError(f"training {member.name} ended with {ended.returncode}: {_last_line(log)}")
    return found


def _as_it_is(model: str, place: Path) -> None:
    """An adapter that adds nothing, as `moesaic serve` takes adapters alone: B is 0."""
    if (place / "adapter_config.json").is_file():
        return
    from peft import LoraConfig, get_peft_model

    from moesaic.models.embedded import load_model

    wrapped = get_peft_model(load_model(model).model, LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrapped.peft_config["default"].base_model_name_or_path = model
    with atomic_folder(place) as staging:
        wrapped.save_pretrained(str(staging))


def billions(member: Member, run: Path) -> float:
    """Parameters of a member, base and adapter: all are passed by every token."""
    from moesaic.models.embedded import load_outline

    base = sum(part.numel() for part in load_outline(member.model).model.parameters())
    adapter = read_json(run / "results.json")["trainable_parameters"] if member.tasks else 0
    return float(base + adapter) / 1e9


def entries(members: Sequence[Member], runs: Mapping[str, Path], urls: Mapping[str, str]) -> list[dict[str, Any]]:
    """Members as a catalog's `models:` holds them; `urls` may lack some, or all."""
    return [
        {
            "name": member.name,
            "endpoint": urls.get(member.name, ""),
            "input_price": 0.0,
            "output_price": 0.0,
            "parameters": billions(member, runs[member.name]),
            "context": 512 if member.model == "nano" else 2048,
            "description": f"{member.model} on {', '.join(member.tasks)}"
            if member.tasks
            else f"{member.model} as it is",
        }
        for member in members
    ]


@contextmanager
def serving(members: Sequence[Member], runs: Mapping[str, Path], folder: Path) -> Iterator[Catalog]:
    """Members behind HTTP for as long; `folder`/catalog.yaml names their addresses, and is yielded as read.

    Raises:
        TrainingError: a server does not come up; its log, `folder`/NAME.serve.log, says more. No process is left.
    """
    import yaml

    with ExitStack() as stack:
        begun = {m.name: stack.enter_context(_process(m.name, runs[m.name], folder)) for m in members}
        urls = {name: _wait(name, process, log) for name, (process, log) in begun.items()}
        stored = {"models": entries(members, runs, {name: f"{url}/v1" for name, url in urls.items()})}
        write_text(folder / "catalog.yaml", yaml.safe_dump(stored, sort_keys=False))
        yield Catalog.read(folder / "catalog.yaml")


@contextmanager
def _process(name: str, run: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A `moesaic serve`; when this ends, so has the process."""
    log = folder / f"{name}.serve.log"
    given = [f"name={name}", "port=0"]
    with log.open("wb") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "moesaic", "serve", str(run), *given],
            stdin=subprocess.DEVNULL, stdout=told, stderr=told, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            yield process, log
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOPPING)
            process.kill()
            process.wait()


def _wait(name: str, process: subprocess.Popen[bytes], log: Path) -> str:
    """The address of a server, once it says that it is healthy."""
    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        found = _URL.search(log.read_text(encoding="utf-8", errors="replace"))
        if found and _is_healthy(found[1]):
            return found[1]
        if process.poll() is not None:
            raise TrainingError(f"serving {name} ended with {process.returncode}: {_last_line(log)}")
        time.sleep(0.1)
    raise TrainingError(f"serving {name}: no answer in {STARTING:.0f} s; {log} says more")


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(json.load(answer)["status"] == "ok")
    except (OSError, ValueError, LookupError):
        return False


def correct(members: Sequence[Member], runs: Mapping[str, Path], data: Path, split: str) -> dict[str, dict[str, Any]]:
    """By member and task, whether it answers each row of a split exactly, asked in this process."""
    from moesaic.data import examples
    from moesaic.evaluation.answers import answer
    from moesaic.evaluation.opening import load, open_adapter

    rows = examples.load(data, split, tasks=TASKS)
    found: dict[str, dict[str, Any]] = {}
    for member in members:
        prepared = load(open_adapter(runs[member.name]), TASKS)
        answers = answer(prepared, rows, batch_size=150)
        found[member.name] = {task: [one.correct for one in said] for task, said in answers.items()}
    return found


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
