"""Learners on nine streams, test then train: results/streams.jsonl, a line a cell.

    python scripts/streams.py ten | hundred | ablations [workers=N] [seeds=0,1,2]

Cells that are there are not run again. The three real streams are files of ../shared/data/streams (or MOESAIC_DATA).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lines

ROOT = Path(__file__).parents[1]
FILE = ROOT / "results" / "streams.jsonl"
DATA = Path(os.environ.get("MOESAIC_DATA") or ROOT.parent / "shared" / "data") / "streams"
LENGTH = 100_000
GENERATED = ("led_a", "led_g", "sea_a", "sea_g", "rbf_m", "rbf_f")
FILES = {
    "electricity": "electricity_6attr.arff.gz",
    "weather": "weather.csv.gz",
    "sea_stream": "sea_stream.csv.gz",
}
STREAMS = (*GENERATED, *FILES)
MOA = {"backend": "capymoa"}

TEN: dict[str, tuple[str, dict[str, Any]]] = {
    "best": ("driftmoe", {}),
    "best, trees only": ("driftmoe-trees", {}),
    "best, task": ("driftmoe-task", {}),
    "paper": ("driftmoe-paper", MOA),
    "code": ("driftmoe-code", MOA),
    "paper, task": ("driftmoe-task-paper", MOA),
    "code, task: MLP only": ("driftmoe-task-code", {}),
    "NoChange": ("nochange", {}),
    "majority": ("majority", {}),
    "Hoeffding tree": ("capymoa-ht", {}),
    "ARF-10": ("capymoa-arf", {}),
    "LevBag-10": ("capymoa-levbag", {}),
    "SRP-10": ("capymoa-srp", {}),
    "SGBT-10": ("capymoa-sgbt", {}),
    "DEMS-10": ("capymoa-dems", {}),
}
HUNDRED: dict[str, tuple[str, dict[str, Any]]] = {
    "best": ("driftmoe", {}),
    "best, 100 experts": ("driftmoe", {"n_experts": 100}),
    **{
        f"{name}-100": (f"capymoa-{name.lower()}", {"members": 100})
        for name in ("ARF", "LevBag", "SRP", "SGBT", "DEMS")
    },
}
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "best": ("driftmoe", {}),
    "without the router": ("driftmoe-trees", {}),
    "without recent accuracy": ("driftmoe", {"recency": 0}),
    "without the last labels": ("driftmoe", {"history": 0}),
    "without ADWIN": ("driftmoe", {"detect": False}),
    "without input scaling": ("driftmoe", {"scale": False}),
    "each row learned once": ("driftmoe", {"poisson": 0}),
    "all features in each leaf": ("driftmoe", {"share": 1.0}),
    "10 experts": ("driftmoe", {"n_experts": 10}),
    "one expert answers": ("driftmoe", {"combine": "top1"}),
    "the router's three learn": ("driftmoe", {"train": "topk"}),
    "paper": ("driftmoe-paper", {"backend": "arrays"}),
    "paper, with exploration": ("driftmoe-paper", {"backend": "arrays", "explore": 0.1}),
    "paper, with balance": ("driftmoe-paper", {"backend": "arrays", "balance": 0.01}),
    "paper, with resets": ("driftmoe-paper", {"backend": "arrays", "reset_after": 2000}),
    "paper, with a warm-up": ("driftmoe-paper", {"backend": "arrays", "warmup": 2000}),
    "paper, with input scaling": ("driftmoe-paper", {"backend": "arrays", "scale": True}),
    "paper, three answer": ("driftmoe-paper", {"backend": "arrays", "combine": "topk"}),
    "paper, five of twelve asked": ("driftmoe-paper", {"backend": "arrays", "lazy": 2}),
}
SLOW = ("SGBT-10", "SGBT-100")
"""Run last."""
TABLES = {
    "ten": (TEN, STREAMS),
    "hundred": (HUNDRED, ("led_a", "electricity")),
    "ablations": (ABLATIONS, ("led_a", "rbf_f", "electricity", "weather")),
}


def measure(table: str, stream: str, arm: str, seed: int) -> dict[str, Any]:
    """One cell: figures over all rows, drifts, and what it took."""
    from moesaic.errors import MoesaicError
    from moesaic.runs.results import versions
    from moesaic.trees.learners import learner
    from moesaic.trees.prequential import prequential
    from moesaic.trees.running import PACKAGES
    from moesaic.trees.streams import open_stream

    name, given = TABLES[table][0][arm]
    source = open_stream(DATA / FILES[stream]) if stream in FILES else open_stream(stream, LENGTH, seed)
    cell = {"table": table, "stream": stream, "arm": arm, "seed": seed}
    try:
        made = learner(name, source, seed=seed, given=given)
        try:
            found = prequential(source, made, progress=False).as_json()
        finally:
            made.close()
    except MoesaicError as error:
        return {**cell, "failed": str(error)}
    kept = ("rows", "accuracy", "kappa", "kappa_m", "kappa_t", "drifts", "cpu_seconds", "peak_memory_mib")
    resets = sum(sum(window.get("reset", ())) for window in found["activity"])
    trained = [sum(window["trained"]) for window in found["activity"] if "trained" in window]
    return {**cell, **{key: found[key] for key in kept}, "resets": resets, "lessons": sum(trained),
            "windows": [round(w["accuracy"], 4) for w in found["windows"]] if seed == 0 and table == "ten" else None,
            "versions": versions(PACKAGES)}  # fmt: skip


def said(cell: dict[str, Any]) -> str:
    return f"{100 * cell['accuracy']:.2f} % in {cell['cpu_seconds']:.0f} s"


if __name__ == "__main__":
    cells = {name: [(stream, arm) for stream in streams for arm in arms] for name, (arms, streams) in TABLES.items()}
    lines.make(FILE, cells, ("stream", "arm"), measure, said, __doc__, last=SLOW)
