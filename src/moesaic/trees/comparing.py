"""Several learners on several streams, with several seeds each, and what it comes to."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, MissingDependency, MoesaicError, first_line, path_of, suggest
from moesaic.runs.folder import check_writable, locked, read_json, write_json, write_text, writing
from moesaic.runs.results import command_line, versions
from moesaic.runs.settings import build, check_keys, differences, lists, names, parse_overrides, texts
from moesaic.trees import needed
from moesaic.trees.running import PACKAGES, check_ours

MOST_WORKERS = 1000
METRICS = ("accuracy", "kappa_m", "kappa_t")
CELLS, SETTINGS, SUMMARY, REPORT = "cells", "settings.json", "comparison.json", "report.html"


@dataclass
class StreamComparison:
    """What is compared. `out`, `workers` and `engine` say where and how; the rest says what, and is kept with it."""

    streams: list[str] = field(default_factory=list, metadata={"help": "names or files, comma-separated"})
    learners: list[str] = field(
        default_factory=lambda: ["driftmoe", "nochange", "river-ht", "river-arf"],
        metadata={"help": "names, comma-separated, as `moesaic stream run` takes them"},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of generators and learners"})
    length: int | None = field(default=None, metadata={"help": "rows at most; generators make 100,000"})
    source: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "settings of the streams: source.noise=0.2 …"}
    )
    model: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "settings by learner: model.driftmoe.n_experts=10 …"}
    )
    window: int = field(default=1000, metadata={"help": "rows of a window"})
    delay: int = field(default=0, metadata={"help": "rows by which labels come late"})
    workers: int = field(default=1, metadata={"help": "cells at a time; 1 where times matter"})
    engine: str = field(default="local", metadata={"help": "local (processes) or ray (actors of a cluster)"})
    out: str = field(default="runs/streams", metadata={"help": "folder to write; finished cells are kept"})

    def describes(self) -> dict[str, Any]:
        how = ("out", "workers", "engine", "streams", "learners", "seeds")
        return {k: v for k, v in asdict(self).items() if k not in how}


@dataclass(frozen=True)
class Cell:
    """One learner on one stream with one seed."""

    stream: str
    learner: str
    seed: int

    def file(self, folder: Path) -> Path:
        plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in f"{Path(self.stream).name}--{self.learner}")
        mark = zlib.crc32(f"{self.stream} {self.learner}".encode())  # another folder's file may have the same name
        return folder / CELLS / f"{plain}-s{self.seed}-{mark:08x}.json"


def load_comparison(arguments: Sequence[str]) -> StreamComparison:
    """`key=value` settings to a comparison. Raises ConfigError as `load_run` does."""
    kind = StreamComparison
    given = parse_overrides(arguments, lists=lists(kind), texts=texts(kind), sections=("source", "model"))
    check_keys("settings", given, names(kind))
    made = build(kind, {}, given)
    if not made.streams or not made.learners or not made.seeds:
        raise ConfigError("streams, learners and seeds each need one entry at least: streams=led_a,sea_a")
    for name in ("streams", "learners", "seeds"):
        given = getattr(made, name)
        if doubled := [entry for entry in given if given.count(entry) > 1]:
            raise ConfigError(f"{name} has {doubled[0]} twice")
    if min(made.seeds) < 0:
        raise ConfigError(f"seeds={min(made.seeds)} must be at least 0")
    if made.engine not in ("local", "ray"):
        raise ConfigError(f"engine={made.engine}; known: local, ray")
    if made.workers < 1 or made.window < 1 or made.delay < 0:
        raise ConfigError("workers and window must be at least 1, and delay at least 0")
    if made.workers > MOST_WORKERS:
        raise ConfigError(f"workers={made.workers} is more than {MOST_WORKERS:,}")
    if unknown := made.model.keys() - {*made.learners}:
        first = made.learners[0]
        raise ConfigError(
            f"model.{min(unknown)}: no such learner is compared; settings are written model.{first}.{min(unknown)}=…"
        )
    if not all(isinstance(given, dict) for given in made.model.values()):
        raise ConfigError(f"settings of a learner are given by name: model.{made.learners[0]}.seed=1")
    return made


def compare(wanted: StreamComparison, *, command: str | None = None) -> dict[str, Any]:
    """Run all cells that are not there yet; returns what is written to comparison.json.

    Raises:
        ConfigError: the folder holds anything else, or a comparison with other settings, or a name is unknown.
    """
    needed()
    from moesaic.report.streams_compared import comparison_page

    folder = path_of(wanted.out)
    check_writable(folder, f"out={wanted.out}")
    cells = [Cell(s, l, seed) for seed in wanted.seeds for s in wanted.streams for l in wanted.learners]
    check_ours(folder, "comparison", (CELLS, SETTINGS, SUMMARY, REPORT), {"source", "model", "window"})
    _check(wanted)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        file = folder / SETTINGS
        changed = differences(read_json(file), wanted.describes()) if file.is_file() else ""
        if changed and any("failed" not in _read(kept) for kept in (folder / CELLS).glob("*.json")):
            raise ConfigError(f"{folder} holds a comparison with {changed}: set it back, or another out=")
        write_json(file, wanted.describes())
        with writing(folder / CELLS):
            (folder / CELLS).mkdir(exist_ok=True)
        left = [cell for cell in cells if not _is_whole(cell, _read(cell.file(folder)), wanted)]
        try:
            for number, (cell, found) in enumerate(_all(left, wanted), 1):
                write_json(cell.file(folder), {**found, **asdict(cell)})
                speed = f"{found.get('rows_per_second') or 0:,.0f} rows/s"
                said = found.get("failed") or f"{_percent(found['accuracy'])}, {speed}"
                told = f"{number} of {len(left)}: {cell.stream}, {cell.learner}, seed {cell.seed}: {said}"
                print(told, file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            done = sum(cell.file(folder).is_file() for cell in cells)
            raise KeyboardInterrupt(
                f"stopped with {done} of {len(cells)} cells done, which are kept; the same command goes on"
            ) from None
        results = [_read(cell.file(folder)) for cell in cells]
        summary = summarised(results, wanted, command=command or command_line())
        first = [r for r in results if r.get("seed") == wanted.seeds[0] and "failed" not in r]
        write_text(folder / REPORT, comparison_page(summary, first))
        write_json(folder / SUMMARY, summary)
    return summary


def _read(file: Path) -> dict[str, Any]:
    """A cell; `failed` where there is none."""
    try:
        return read_json(file)
    except ConfigError:
        return {"failed": "not run yet"}


def _is_whole(cell: Cell, found: dict[str, Any], wanted: StreamComparison) -> bool:
    """Whether a cell is done, and all that a page shows of it is there."""
    from moesaic.report.streams_compared import comparison_page

    if "failed" in found:
        return False
    alone = replace(wanted, streams=[cell.stream], learners=[cell.learner], seeds=[cell.seed])
    try:
        comparison_page(summarised([found], alone, command=""), [found])
        numbers = [of["accuracy"] for of in (found, *found["windows"])]
    except Exception:  # whatever a page makes of damage
        return False
    return all(v is None or type(v) in (int, float) for v in numbers) and all(
        found[name] == value for name, value in asdict(cell).items()
    )


def _all(cells: Sequence[Cell], wanted: StreamComparison) -> Iterable[tuple[Cell, dict[str, Any]]]:
    if wanted.engine == "ray":
        yield from _by_ray(cells, wanted)
    elif wanted.workers == 1:
        for cell in cells:
            yield cell, measure(cell, wanted)
    else:
        with ProcessPoolExecutor(wanted.workers, get_context("spawn"), initializer=_quiet) as pool:
            running = {pool.submit(measure, cell, wanted): cell for cell in cells}
            try:
                for done in as_completed(running):
                    try:
                        yield running[done], done.result()
                    except BrokenProcessPool:
                        yield running[done], {"failed": "its process ended"}
            except BaseException:
                for process in [*(pool._processes or {}).values()]:  # else they would run their cells to the end
                    process.terminate()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _quiet() -> None:
    """Ctrl-C in the terminal is the first process's, which ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _by_ray(cells: Sequence[Cell], wanted: StreamComparison) -> Iterable[tuple[Cell, dict[str, Any]]]:
    """A task of one CPU for each cell, on whatever cluster there is; its machines share the folders of files."""
    try:
        import ray
    except ImportError:
        raise MissingDependency("ray", "ray") from None
    here = os.getcwd()

    def measure_here(cell: Cell) -> dict[str, Any]:
        os.chdir(here)  # files may be given relative to it
        return measure(cell, wanted)

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    remote = ray.remote(num_cpus=1)(measure_here)
    running = {remote.remote(cell): cell for cell in cells}
    try:
        while running:
            (done,), _ = ray.wait([*running])
            try:
                found = ray.get(done)
            except ray.exceptions.RayError as error:
                found = {"failed": f"its task ended: {first_line(error)}"}
            yield running.pop(done), found
    finally:
        for task in running:
            ray.cancel(task)


def measure(cell: Cell, wanted: StreamComparison) -> dict[str, Any]:
    """A cell's result, without its name; `failed` says why there is none."""
    from moesaic.trees.learners import learner
    from moesaic.trees.prequential import prequential
    from moesaic.trees.streams import open_stream

    try:
        stream = open_stream(cell.stream, wanted.length, cell.seed, **_source(cell.stream, wanted))
        given = wanted.model.get(cell.learner) or {}
        made = learner(cell.learner, stream, seed=cell.seed, delay=wanted.delay, given=given)
        try:
            found = prequential(stream, made, window=wanted.window, delay=wanted.delay, progress=False)
        finally:
            made.close()
    except MoesaicError as error:
        return {"failed": str(error)}
    except Exception as error:  # the other cells go on
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}
    return {**found.as_json(), "versions": versions(PACKAGES)}


def _source(stream: str, wanted: StreamComparison) -> dict[str, Any]:
    """Those of the settings of streams that this one has."""
    from moesaic.trees.streams import settings_of

    return {name: value for name, value in wanted.source.items() if name in settings_of(stream)}


def _check(wanted: StreamComparison) -> None:
    """Raise ConfigError for a stream, a learner or a setting that is not known, before anything is run."""
    from moesaic.trees.learners import known as known_learners
    from moesaic.trees.learners import learner
    from moesaic.trees.streams import open_stream, settings_of

    known = {name for stream in wanted.streams for name in settings_of(stream)}
    if unknown := wanted.source.keys() - known:
        raise ConfigError(f"none of the streams has a setting source.{min(unknown)}; {suggest(min(unknown), known)}")
    opened = [open_stream(s, wanted.length, 0, **_source(s, wanted)) for s in wanted.streams]
    for name in wanted.learners:
        if not (name.startswith("capymoa-") and name in known_learners()):  # those start a JVM each
            learner(name, opened[0], delay=wanted.delay, given=wanted.model.get(name)).close()


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def summarised(results: Sequence[dict[str, Any]], wanted: StreamComparison, *, command: str) -> dict[str, Any]:
    """By stream and learner, mean and standard deviation over seeds; mean ranks over the streams that all have."""
    table: dict[str, dict[str, Any]] = {}
    for stream in wanted.streams:
        for name in wanted.learners:
            own = [r for r in results if (r.get("stream"), r.get("learner")) == (stream, name)]
            of, failed = [r for r in own if "failed" not in r], [r["failed"] for r in own if "failed" in r]
            table.setdefault(stream, {})[name] = _cell(of) | ({"failed": failed[0]} if failed else {})
    return {
        "streams": wanted.streams, "learners": wanted.learners, "seeds": wanted.seeds,
        "settings": wanted.describes(), "table": table, "ranks": ranks(table, wanted.learners),
        "curves": _curves(results, wanted), "drifts": _drifts(results),
        "recovery": _recovery(results), "command": command,
        "versions": versions(PACKAGES),
    }  # fmt: skip


def _cell(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not results:
        return {}
    found: dict[str, Any] = {"seeds": [r["seed"] for r in results], "rows": results[0]["rows"]}
    for metric in (*METRICS, "cpu_seconds", "rows_per_second"):
        values = [r[metric] for r in results if r.get(metric) is not None]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            found[metric] = {"mean": statistics.fmean(values), "sd": spread}
    return found


def ranks(table: dict[str, dict[str, Any]], learners: Sequence[str]) -> dict[str, float]:
    """Mean rank of each learner by accuracy, 1 the best, over the streams that all were run on; equals share ranks."""
    whole = [of for of in table.values() if all("accuracy" in of.get(name, {}) for name in learners)]
    found: dict[str, list[float]] = {name: [] for name in learners}
    for of in whole:
        scores = {name: of[name]["accuracy"]["mean"] for name in learners}
        for name in learners:
            above = sum(score > scores[name] for score in scores.values())
            equal = sum(score == scores[name] for score in scores.values())
            found[name].append(above + (equal + 1) / 2)
    return {name: statistics.fmean(values) for name, values in found.items() if values}


def _curves(results: Sequence[dict[str, Any]], wanted: StreamComparison) -> dict[str, dict[str, list[list[float]]]]:
    """By stream and learner, accuracy over windows with the first seed."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for r in results:
        if "failed" not in r and r["seed"] == wanted.seeds[0]:
            points = [[w["start"] + w["rows"], w["accuracy"]] for w in r["windows"] if w["accuracy"] is not None]
            found.setdefault(r["stream"], {})[r["learner"]] = points
    return found


def _drifts(results: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    return {r["stream"]: [d["position"] for d in r["drifts"]] for r in results if "failed" not in r}


def _recovery(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By stream and learner, what each drift did: means over `seeds`, of rows over those that came `back`."""
    found: dict[str, dict[str, list[Any]]] = {}
    for r in results:
        if "failed" not in r:
            found.setdefault(r["stream"], {}).setdefault(r["learner"], []).append(r["drifts"])
    return {
        stream: {name: [_recovered(same) for same in zip(*seeds, strict=True)] for name, seeds in of.items()}
        for stream, of in found.items()
    }


def _recovered(drifts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    means = {}
    for figure in ("before", "lowest", "rows"):
        values = [drift[figure] for drift in drifts if drift[figure] is not None]
        means[figure] = statistics.fmean(values) if values else None
    back = sum(drift["rows"] is not None for drift in drifts)
    return {"position": drifts[0]["position"], **means, "back": back, "seeds": len(drifts)}
