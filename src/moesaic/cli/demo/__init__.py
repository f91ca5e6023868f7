"""`moesaic demo`: what moesaic is for, in two acts on the embedded model, in minutes.

    act one   adapters: six small LoRAs, one a task, become one model; which of them answers is routed
    act two   mixture: one routed mixture trained from scratch, beside a plain LoRA of the same size

Six tasks ask for different answers to the same list of digits; only a cue word after the list tells them apart.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moesaic.cli.demo.settings import ACTS, DemoSettings
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError, path_of

logger = logging.getLogger(__name__)

_SETTINGS = "settings.json"


@verb(
    "demo",
    "your adapters as one model, and a mixture beside plain LoRA: two acts, in minutes",
    group="mixtures",
    place=10,
    settings=[Section(DemoSettings)],
)
def run(arguments: list[str], *, as_json: bool = False) -> None:
    """Play the acts, show what came out, and write it to `<out>/results.json`.

    Raises:
        ConfigError: an unknown setting, or `out` is a folder that holds something else.
        KeyboardInterrupt: when interrupted; what is trained is kept, and the same command goes on from there.
    """
    from rich.console import Console

    from moesaic.runs.folder import locked, write_json
    from moesaic.runs.recipe import parse_settings
    from moesaic.runs.results import command_line, versions

    settings = parse_settings(DemoSettings, arguments)
    settings.check()
    from moesaic.cli.demo import adapters, mixture
    from moesaic.cli.demo.workers import workers

    console = Console(stderr=as_json, highlight=False)
    folder = path_of(settings.out)
    _check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _prepare(folder, settings)
        found: dict[str, Any] = {"settings": asdict(settings), "command": command_line(), "versions": versions()}
        with workers() as pool:
            for act in settings.acts:
                started = time.perf_counter()
                play = {"adapters": adapters.play, "mixture": mixture.play}[act]
                result = play(folder / act, folder / "data", settings, console, pool)
                found[act] = {**result, "seconds": round(time.perf_counter() - started, 1)}
                write_json(folder / act / "results.json", found[act])
        write_json(folder / "results.json", found)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        console.print(f"{sum(found[act]['seconds'] for act in settings.acts):.0f} s in all; everything is in {folder}")


def _check_place(folder: Path) -> None:
    from moesaic.runs.folder import check_writable

    check_writable(folder, f"out={folder}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder} is a file; name a folder")
    ours = (".lock", f".{_SETTINGS}.part")
    others = [entry.name for entry in folder.iterdir() if entry.name not in ours] if folder.is_dir() else []
    if others and not (folder / _SETTINGS).is_file():
        raise ConfigError(f"out={folder} holds files that are not a demo's; name another folder")


def _prepare(folder: Path, settings: DemoSettings) -> None:
    """The data, and what an interrupted demo with these settings left; of any other demo, nothing."""
    from moesaic.runs.folder import discard, read_json, write_json

    asked = {key: value for key, value in asdict(settings).items() if key not in ("act", "out")}
    same = (folder / _SETTINGS).is_file() and read_json(folder / _SETTINGS) == asked
    for name in (*ACTS, "data"):
        finished = (folder / name / "results.json").is_file()
        if not same or (name in settings.acts and finished):
            discard(folder / name)
        elif name in settings.acts and (folder / name).is_dir():
            logger.warning("%s: going on from what is there", folder / name)
    write_json(folder / _SETTINGS, asked)
    if not (folder / "data").is_dir():
        _write_data(folder / "data", settings)


def _write_data(folder: Path, settings: DemoSettings) -> None:
    """One folder a task with train.jsonl and test.jsonl, as any data for `moesaic train` may be."""
    from moesaic.models.nano.tasks import make_split
    from moesaic.runs.folder import atomic_folder

    splits = make_split(settings.train_per_task, settings.test_per_task, settings.seed)
    with atomic_folder(folder) as staging:
        for split, rows in zip(("train", "test"), splits, strict=True):
            by_task: dict[str, list[str]] = {}
            for row in rows:
                by_task.setdefault(row["task"], []).append(json.dumps(row) + "\n")
            for task, lines in by_task.items():
                (staging / task).mkdir(parents=True, exist_ok=True)
                (staging / task / f"{split}.jsonl").write_text("".join(lines))
