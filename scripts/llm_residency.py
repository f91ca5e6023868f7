"""Models in and out of memory: `scripts/llm_residency.py FOLDER`, FOLDER of a seed from `scripts/llm_pool.py`.

Measured: the engine holds the pool's nano runs and SmolLM2 under a cap that all exceed together, and answers a
drawn trace of requests one by one, under each policy in turn; loads are real, from a warm page cache. Simulated: 150
experts of 7 B parameters in bf16 (14 GB each) on hosts that are not here, on Poisson arrivals whose models follow
Zipf's law. Nothing of SambaNova's own software is in these figures. Writes results/llm-residency.json.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from moesaic.llms.pool import MEMBERS
from moesaic.llms.residency.engine import Engine
from moesaic.llms.residency.simulator import GPU, SN40L, Plan, Request, Weights, compare, table
from moesaic.llms.residency.sources import Source, of_base, of_run
from moesaic.runs.folder import write_json
from moesaic.runs.results import command_line, versions

ROOT = Path(__file__).parents[1]
REQUESTS = 60
SHARES = {"nano-order": 0.35, "nano-move": 0.3, "nano-pick": 0.15, "nano-lists": 0.1, "smollm2": 0.1}
EXPERTS, ARRIVALS, RATES, TOKENS = 150, 2000, (4.0, 10.0), 128
"""Experts, requests, requests a second, and tokens that each writes, simulated."""
POLICIES: dict[str, dict[str, Any]] = {
    "lru": {},
    "pinned": {"pinned": ["nano-order", "nano-move"]},
    "prefetch": {"policy": "prefetch", "shares": SHARES},
}


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * 4096


async def measured(sources: Mapping[str, Source], limit: int, trace: Sequence[str], how: Mapping[str, Any]) -> Any:
    """Requests one by one; each holds its model for a moment in which a load ahead may begin."""
    engine = Engine(sources, limit, **how)
    await engine.start()
    begun, most, waited = time.perf_counter(), 0, 0.0
    for name in trace:
        asked = time.perf_counter()
        async with engine.use(name):
            waited += time.perf_counter() - asked
            await asyncio.sleep(0.05)
        most = max(most, resident())
    seconds = time.perf_counter() - begun
    await engine.close()
    return engine.figures()["memory"] | {"seconds": seconds, "waited": waited, "process_bytes": most}


def on_this_machine(folder: Path) -> dict[str, Any]:
    sources = {member.name: of_run(folder / member.name) for member in MEMBERS} | {"smollm2": of_base("smollm2")}
    limit = sources["smollm2"].bytes + sources["nano-lists"].bytes + sources["nano-order"].bytes
    trace = random.Random(0).choices([*SHARES], [*SHARES.values()], k=REQUESTS)
    found: dict[str, Any] = {"bytes": {name: source.bytes for name, source in sources.items()}, "limit": limit}
    for name, how in POLICIES.items():
        gc.collect()
        found[name] = asyncio.run(measured(sources, limit, trace, how))
    return found | {"requests": REQUESTS}


def simulated() -> dict[str, Any]:
    models = {f"expert-{i}": Weights(14 * 10**9) for i in range(EXPERTS)}
    weights = [1 / (1 + i) for i in range(EXPERTS)]
    shares = {name: weight / sum(weights) for name, weight in zip(models, weights, strict=True)}
    pinned = tuple(models)[:8]
    plans = [
        Plan(), Plan(order="expert"), Plan(pinned=pinned), Plan("prefetch", shares=shares),
        Plan("prefetch", "expert", shares=shares),
    ]  # fmt: skip
    found: dict[str, Any] = {}
    for rate in RATES:
        draw = random.Random(0)
        at, trace = 0.0, []
        for name in draw.choices([*models], weights, k=ARRIVALS):
            at += draw.expovariate(rate)
            trace.append(Request(name, at, TOKENS))
        rows = compare(trace, models, [SN40L.times(8), GPU.times(8)], plans)
        Console(width=160).print(table(rows))
        found[f"{rate:g} a second"] = [asdict(row) for row in rows]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    found = {"command": command_line(), "versions": versions(), "simulated": simulated()}
    found["measured"] = on_this_machine(given.folder)
    Console().print_json(data=found["measured"])
    write_json(ROOT / "results" / "llm-residency.json", found)


if __name__ == "__main__":
    main()
