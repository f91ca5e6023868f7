"""Cells of tables, a line each of one file; those that are there are not run again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def make(
    file: Path, tables: Mapping[str, Sequence[tuple[str, str]]], names: tuple[str, str],
    measure: Callable[..., Cell], said: Callable[[Cell], str], usage: str | None, *, last: Sequence[str] = (),
) -> None:  # fmt: skip
    """NAME [workers=N] [seeds=0,1,2] of the command line: `measure(table, *cell, seed)` where `file` has no such cell.

    `names` are the two by which a table's cells differ; those whose second is in `last` come last. A cell that has
    `failed`, or raised, is told and not written.
    """
    name, *rest = sys.argv[1:] or [""]
    given = dict(text.split("=", 1) for text in rest if "=" in text)
    if name not in tables or given.keys() - {"workers", "seeds"} or len(given) < len(rest):
        sys.exit(usage)
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    there = {tuple(cell[key] for key in ("table", *names, "seed")) for cell in done}
    seeds = [int(text) for text in given.get("seeds", "0,1,2").split(",")]
    cells = [(name, *cell, seed) for seed in seeds for cell in tables[name]]
    left = sorted((cell for cell in cells if cell not in there), key=lambda cell: cell[2] in last)
    with ProcessPoolExecutor(
        int(given.get("workers", 1)), mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        running = {pool.submit(measure, *cell): cell for cell in left}
        for number, future in enumerate(as_completed(running), 1):
            try:
                found = future.result()
            except Exception as error:  # the others are not lost for it
                found = {"failed": f"failed: {type(error).__name__}: {error}"}
            told = found.get("failed") or said(found)
            print(f"{number} of {len(left)}: {', '.join(map(str, running[future]))}: {told}", flush=True)
            if "failed" not in found:
                with file.open("a") as out:
                    out.write(json.dumps(found) + "\n")
