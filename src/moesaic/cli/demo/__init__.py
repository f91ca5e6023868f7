"""`moesaic demo`: what moesaic is for, in two acts on the embedded model, in minutes.

    act one   adapters: six small LoRAs, one a task, become one model; which of them answers is routed
    act two   mixture: one routed mixture trained from scratch, beside a plain LoRA of the same size

Six tasks ask for different answers to the same list of digits; only a cue word after the list tells them apart.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moesaic.cli.demo.settings import ACTS, DemoSettings
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError, path_of
from moesaic.runs.settings import differences

logger = logging.getLogger(__name__)

_SETTINGS, _MARK = "demo.json", "moesaic demo"


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

    from moesaic.models.nano.tasks import make_split
    from moesaic.runs.folder import locked, read_json, write_json
    from moesaic.runs.recipe import parse_settings
    from moesaic.runs.results import command_line, versions

    settings = parse_settings(DemoSettings, arguments)
    settings.check()
    from moesaic.cli.demo import adapters, mixture
    from moesaic.cli.demo.workers import workers

    acts: dict[str, Any] = {"adapters": adapters, "mixture": mixture}
    console = Console(stderr=as_json, highlight=False, markup=False)
    folder = path_of(settings.out)
    _check_place(folder, settings)
    splits = make_split(settings.train_per_task, settings.test_per_task, settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        found = _prepare(folder, settings, splits) | {"command": command_line(), "versions": versions()}
        with workers() as pool:
            for act in settings.acts:
                done, started = folder / act / "results.json", time.perf_counter()
                if not done.is_file():
                    result = acts[act].play(folder / act, folder / "data", settings, console, pool)
                    write_json(done, {**result, "seconds": round(time.perf_counter() - started, 1)})
                found[act] = read_json(done)
                acts[act].show(console, found[act])
        write_json(folder / "results.json", found)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        console.print(f"{sum(found[act]['seconds'] for act in settings.acts):.0f} s in all; everything is in {folder}")


def _check_place(folder: Path, settings: DemoSettings) -> None:
    """Raise ConfigError where `out` cannot be written, is not a demo's, or is one's with other settings."""
    from moesaic.runs.folder import check_writable, read_json

    check_writable(folder, f"out={folder}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder} is a file; name a folder")
    ours = (".lock", f".{_SETTINGS}.part")
    others = [entry.name for entry in folder.iterdir() if entry.name not in ours] if folder.is_dir() else []
    if not others:
        return
    kept = read_json(folder / _SETTINGS).get(_MARK) if (folder / _SETTINGS).is_file() else None
    if not isinstance(kept, dict):
        raise ConfigError(f"out={folder} holds files that are not a demo's; name another folder")
    changed = differences(kept, _describing(settings))
    if changed and not settings.overwrite:
        raise ConfigError(f"out={folder} holds a demo with {changed}: set it back, or overwrite=true, or another out=")


def _describing(settings: DemoSettings) -> dict[str, Any]:
    """What makes two demos the same."""
    return {key: value for key, value in asdict(settings).items() if key not in ("act", "out", "overwrite")}


def _prepare(folder: Path, settings: DemoSettings, splits: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The data, and what an interrupted demo with these settings left; the acts of it that are not asked for.

    A demo that ended is done anew.
    """
    from moesaic.runs.folder import discard, read_json, write_json

    file, before = folder / "results.json", dict[str, Any]()
    same = (folder / _SETTINGS).is_file() and read_json(folder / _SETTINGS).get(_MARK) == _describing(settings)
    if same and file.is_file():
        before = {act: result for act, result in read_json(file).items() if act in ACTS}
    again = [act for act in settings.acts if act in before]
    for name in (*again,) if same else (*ACTS, "data"):
        discard(folder / name)
    if not same or again:
        file.unlink(missing_ok=True)
    if same and not again and any((folder / act).is_dir() for act in settings.acts):
        logger.warning("%s: going on from what is there", folder)
    write_json(folder / _SETTINGS, {_MARK: _describing(settings)})
    if not (folder / "data").is_dir():
        _write_data(folder / "data", splits)
    kept = {act: result for act, result in before.items() if act not in settings.acts}
    return {"settings": asdict(settings), **kept}


def _write_data(folder: Path, splits: Sequence[Sequence[dict[str, Any]]]) -> None:
    """One folder a task with train.jsonl and test.jsonl, as any data for `moesaic train` may be."""
    from moesaic.runs.folder import atomic_folder

    with atomic_folder(folder) as staging:
        for split, rows in zip(("train", "test"), splits, strict=True):
            by_task: dict[str, list[str]] = {}
            for row in rows:
                by_task.setdefault(row["task"], []).append(json.dumps(row) + "\n")
            for task, lines in by_task.items():
                (staging / task).mkdir(parents=True, exist_ok=True)
                (staging / task / f"{split}.jsonl").write_text("".join(lines))
