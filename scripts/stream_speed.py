"""What rows of a stream cost: results/stream-speed.json. `python scripts/stream_speed.py [rounds=3]`, idle machine.

Arms take turns within a round, each in a process of its own; CPU seconds, a JVM's start left out. Then DriftMoE's share
of router time, its cost by number of experts, and time and memory by length of the stream.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "stream-speed.json"
ROWS = 40_000
STREAMS = ("led_a", "sea_a", "rbf_m")
LEAN = {"lazy": 2}
ARMS: dict[str, tuple[str, dict[str, Any], int]] = {
    "best": ("driftmoe", {}, ROWS),
    "best without router": ("driftmoe-trees", {}, ROWS),
    "CapyMOA ARF-10": ("capymoa-arf", {}, ROWS),
    "paper, MOA's trees": ("driftmoe-paper", {"backend": "capymoa"}, ROWS),
    "CapyMOA LevBag-10": ("capymoa-levbag", {}, ROWS),
    "CapyMOA SRP-10": ("capymoa-srp", {}, ROWS),
    "CapyMOA DEMS-10": ("capymoa-dems", {}, ROWS),
    "CapyMOA SGBT-10": ("capymoa-sgbt", {}, ROWS // 8),
    "river ARF-10": ("river-arf", {"n_models": 10}, ROWS // 8),
    "paper, river's trees": ("driftmoe-paper", {}, ROWS // 8),
    "paper, river's trees, lazy": ("driftmoe-paper", LEAN, ROWS // 8),
}
EXPERTS = (10, 20, 40, 80)
LENGTHS = (10_000, 100_000, 500_000)


def measure(stream: str, name: str, given: dict[str, Any], rows: int, seed: int) -> dict[str, float]:
    """Accuracy, microseconds of CPU a row, and MiB at the peak."""
    from moesaic.trees.learners import learner
    from moesaic.trees.prequential import prequential
    from moesaic.trees.streams import synthetic

    source = synthetic(stream, length=max(rows, 100_000), seed=seed).head(rows)
    warm = learner(name, source, seed=seed, given=given)  # compiled code is loaded before anything counts
    prequential(source.head(300), warm, progress=False)
    warm.close()
    made = learner(name, source, seed=seed, given=given)
    found = prequential(source, made, progress=False)
    made.close()
    return {
        "accuracy": float(found.accuracy or 0),
        "us": 1e6 * found.cpu_seconds / found.rows,
        "mib": found.peak_memory_mib,
    }


def alone(*cell: Any) -> dict[str, float]:
    """In a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *cell).result()


def summed(found: list[dict[str, float]]) -> dict[str, Any]:
    keys = found[0]
    return {k: {"mean": statistics.mean(v), "all": v} for k in keys if (v := [round(f[k], 4) for f in found])}


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    given = dict(text.split("=", 1) for text in sys.argv[1:])
    if given.keys() - {"rounds"}:
        sys.exit(__doc__)
    rounds = int(given.get("rounds", 3))
    arms: dict[str, dict[str, list[dict[str, float]]]] = {s: {arm: [] for arm in ARMS} for s in STREAMS}
    for number in range(rounds):
        for stream in STREAMS:
            for arm, (name, settings, rows) in ARMS.items():
                found = alone(stream, name, settings, rows, number)
                arms[stream][arm].append(found)
                print(f"round {number + 1}, {stream}, {arm}: {found['us']:.0f} us a row", flush=True)
    by_experts = {k: alone("led_a", "driftmoe", {"n_experts": k}, ROWS, 0) for k in EXPERTS}
    by_length = {n: alone("led_a", "driftmoe", {}, n, 0) for n in LENGTHS}
    from moesaic.runs.results import command_line, versions
    from moesaic.trees.running import PACKAGES

    OUT.write_text(json.dumps({
        "rows": {arm: rows for arm, (_, _, rows) in ARMS.items()}, "rounds": rounds,
        "arms": {stream: {arm: summed(f) for arm, f in of.items()} for stream, of in arms.items()},
        "by_experts": by_experts, "by_length": by_length, "command": command_line(), "versions": versions(PACKAGES),
    }, indent=2) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
