"""Cells of a table, each a file that is not made again, several at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

Measure = Callable[[str, str, int], dict[str, Any]]


def asked(known: Iterable[str], usage: str | None) -> tuple[str, int]:
    """A table's name and how many workers there are, from the command line: NAME [workers=N]."""
    name, *rest = sys.argv[1:] or [""]
    if name not in known or any(not text.startswith("workers=") for text in rest):
        sys.exit(usage)
    return name, int(rest[0].partition("=")[2]) if rest else 1


def make(measure: Measure, table: str, arms: Iterable[str], seeds: Iterable[int], folder: Path, workers: int) -> None:
    """`measure(table, arm, seed)` into folder/ARM-sSEED.json, where there is none yet; says what is there."""
    cells = [(arm, seed) for seed in seeds for arm in arms]
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        for file in pool.map(partial(_kept, measure, table, folder), *zip(*cells, strict=True)):
            print(file, flush=True)


def _kept(measure: Measure, table: str, folder: Path, arm: str, seed: int) -> str:
    from moesaic.runs.folder import write_json

    file = folder / f"{arm}-s{seed}.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, measure(table, arm, seed))
    return file.name
