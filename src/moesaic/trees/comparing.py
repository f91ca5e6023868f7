"""Several learners on several streams, with several seeds each, and what it comes to."""

from __future__ import annotations

import signal
import sys
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, MoesaicError, first_line, path_of, suggest
from moesaic.runs.cluster import on_ray
from moesaic.runs.folder import check_writable, locked, read_json, write_json, write_text, writing
from moesaic.runs.places import SETTINGS, check_ours
from moesaic.runs.results import command_line, versions
from moesaic.runs.settings import differences
from moesaic.trees import needed
from moesaic.trees.comparison import StreamComparison
from moesaic.trees.running import PACKAGES
from moesaic.trees.summary import summarised

CELLS, SUMMARY, REPORT = "cells", "comparison.json", "report.html"


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
    check_ours(folder, "a stream comparison", {"source", "model", "window"}, (CELLS, SETTINGS, SUMMARY, REPORT))
    _check(wanted)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        file = folder / SETTINGS
        there = [*(folder / CELLS).glob("*.json")]
        new = wanted.overwrite or not file.is_file()
        changed = "" if new else differences(read_json(file), wanted.describes())
        if changed and any("failed" not in _read(kept) for kept in there):
            raise ConfigError(
                f"{folder} holds a comparison with {changed}: set it back, or overwrite=true, or another out="
            )
        for kept in there if wanted.overwrite else ():
            kept.unlink()
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
            line = f"the same command{' without overwrite' if wanted.overwrite else ''} goes on"
            raise KeyboardInterrupt(f"stopped with {done} of {len(cells)} cells done, which are kept; {line}") from None
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
        with on_ray(partial(measure, wanted=wanted), cells) as ended:
            for cell, found in ended:
                yield cell, {"failed": found} if isinstance(found, str) else found
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
