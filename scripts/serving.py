"""Serving Read-ME's experts: `python scripts/serving.py FOLDER [rounds=3]`, FOLDER from `moesaic convert read-me`.

One request trace (prompts of the folder's own domains, Poisson arrivals at 0.8 and 1.5 of what decode-first batches can
take) through the engine by every order of batches and at several budgets, all in turn in each round, in this process on
one torch thread; and simulated: hit ratios of caches of k experts, experts a batch, and the engine's batches on a model
of 7 B parameters. Writes results/serving.json.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moesaic.ffn.serving.batching import Item, choose
from moesaic.ffn.serving.engine import Engine, Request
from moesaic.ffn.serving.simulator import Machine, simulate
from moesaic.routing.residency import replay

ROOT = Path(__file__).parents[1]
REQUESTS, NEW, BATCH = 32, 12, 16
PROMPT = (12, 48)
"""Shortest and longest prompt, in tokens."""
ENGINES: dict[str, dict[str, Any]] = {
    "experts": {"order": "experts"},
    "first come": {"order": "fcfs"},
    "decode first": {"order": "decode-first"},
    "prefill first": {"order": "prefill-first"},
    "experts, on demand": {"order": "experts", "prefetch": False},
    "experts, LRU": {"order": "experts", "policy": "lru"},
    "routers by layer": {"order": "decode-first", "prefetch": False, "policy": "lru"},
}
"""The last has what a mixture with a router in each layer has: nothing is known before the layer runs. Its routes are
those of the others."""
LOADS = (0.8, 1.5)
"""Arrivals, of what decode-first batches take."""
POLICIES = ("random", "fifo", "lru", "belady")


# -- the simulator -------------------------------------------------------------------------------------------------


def sticky(requests: int, tokens: int, experts: int, stay: float, seed: int) -> list[list[int]]:
    """Routes of requests whose tokens keep the expert of the token before with probability `stay`."""
    draw = random.Random(seed)
    made = []
    for _ in range(requests):
        route = [draw.randrange(experts)]
        for _ in range(tokens - 1):
            route.append(route[-1] if draw.random() < stay else draw.randrange(experts))
        made.append(route)
    return made


def interleaved(routes: Sequence[Sequence[int]]) -> list[int]:
    """One token of each request in turn."""
    longest = max(map(len, routes))
    return [route[i] for i in range(longest) for route in routes if i < len(route)]


def hits(routes: Sequence[Sequence[int]], seed: int) -> dict[str, list[float]]:
    """Percent of uses that find their expert in a cache of 2, 3, 4, 5; by policy, and for Belady 16 tokens ahead."""
    trace = interleaved(routes)
    made = {
        policy: [100 * replay(trace, k, policy, seed=seed).hits / len(trace) for k in (2, 3, 4, 5)]  # type: ignore[arg-type]
        for policy in POLICIES
    }
    made["belady, 16 ahead"] = [100 * replay(trace, k, "belady", horizon=16).hits / len(trace) for k in (2, 3, 4, 5)]
    return made


def experts_a_batch(routes: Sequence[Sequence[int]], budget: int) -> dict[str, float]:
    """Mean distinct experts of batches that empty one pool of waiting tokens, one of each request at a time."""
    made = {}
    for order in ("fcfs", "experts"):
        ahead, sizes, now = [list(route) for route in routes], [], 0
        since = [0] * len(routes)
        while any(ahead):
            items = [Item(i, (route[0],), since[i]) for i, route in enumerate(ahead) if route]
            items.sort(key=lambda item: item.since)
            taken = choose(items, budget, order, now=now)  # type: ignore[arg-type]
            now += 1
            for item in taken:
                ahead[item.request].pop(0)  # type: ignore[call-overload]
                since[item.request] = now  # type: ignore[call-overload]
            if len(taken) == budget:
                sizes.append(len({item.experts[0] for item in taken}))
        made[order] = statistics.mean(sizes)
    return made


# -- the engine ----------------------------------------------------------------------------------------------------


def prompts_of(folder: Path, seed: int) -> list[list[int]]:
    """Beginnings of held-out text, the folder's domains in turn."""
    from transformers import AutoTokenizer

    from moesaic.training.domains import domains_of

    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = json.loads((folder / "conversion.json").read_text())["domains"]
    domains = [*domains_of(wanted, tokenizer, length=PROMPT[1], train=1, held=REQUESTS).values()]
    draw = random.Random(seed)
    made = []
    for i in range(REQUESTS):
        rows = domains[i % len(domains)].held
        made.append(rows[draw.randrange(len(rows))][: draw.randint(*PROMPT)].tolist())
    draw.shuffle(made)
    return made


def served(folder: Path, prompts: list[list[int]], arrivals: list[float], **settings: Any) -> dict[str, Any]:
    """Serve the trace once; latencies in seconds from arrival to the last token."""
    engine = Engine(folder, batch_tokens=BATCH, **settings)
    engine.ends = set()  # every request writes NEW tokens, whichever they are
    waiting = [*zip(arrivals, prompts, strict=True)]
    done: list[Request] = []
    begun = engine.now
    while waiting or engine.open:
        while waiting and waiting[0][0] <= engine.now - begun:
            engine.add(waiting.pop(0)[1], max_new_tokens=NEW)
        if engine.open:
            done += engine.step()
        else:
            time.sleep(max(0.0, waiting[0][0] - (engine.now - begun)))
    seconds = engine.now - begun
    latencies = sorted(r.times[-1] - r.arrived for r in done)
    first = [r.times[0] - r.arrived for r in done]
    residency, loads = engine.residency, engine.store.loads
    full = [batch for batch in engine.batches if batch.tokens >= BATCH]
    made = {
        "mean": statistics.mean(latencies),
        "p95": latencies[int(0.95 * len(latencies))],
        "first_token": statistics.mean(first),
        "seconds": seconds,
        "tokens_per_second": sum(batch.tokens for batch in engine.batches) / seconds,
        "experts_a_batch": statistics.mean(len(batch.experts) for batch in full or engine.batches),
        "tokens_a_batch": statistics.mean(batch.tokens for batch in engine.batches),
        "hit_ratio": residency.hits / max(1, residency.hits + residency.misses),
        "moved_mib": residency.moved / 2**20,
        "loading": loads.loading,
        "waiting": loads.waiting,
        "hidden": 1 - loads.waiting / loads.loading if loads.loading else 1.0,
        "trace": [batch.experts for batch in engine.batches],
        "written": [r.written for r in sorted(done, key=lambda r: int(str(r.name)))],
    }
    engine.close()
    return made


LARGE = {"layers": 32, "expert_bytes": 3 * 4096 * 5504 * 2, "bandwidth": 25e9, "layer_seconds": 1e-3}
"""Llama-2-7B with experts of half its width in bf16, read from a host's memory; a layer's time is assumed."""


def enlarged(trace: Sequence[Sequence[int]], experts: int) -> dict[int, dict[str, dict[str, float]]]:
    """A trace of batches on the large model, by experts kept and by what knows the future."""
    ways: dict[str, dict[str, Any]] = {
        "belady, prefetch": {},
        "belady, on demand": {"prefetch": False},
        "lru, on demand": {"prefetch": False, "policy": "lru"},
    }
    made: dict[int, dict[str, dict[str, float]]] = {}
    for kept in range(2, experts - 1):
        budget = LARGE["layers"] * kept * LARGE["expert_bytes"]
        machine = Machine(**LARGE, budget=int(budget))  # type: ignore[arg-type]
        made[kept] = {name: vars(simulate(trace, machine, **how)) for name, how in ways.items()}
    return made


def checked(trace: Sequence[Sequence[int]], made: dict[str, Any], layers: int, size: int, budget: int) -> list[float]:
    """Seconds of waiting that the simulator says of a run on demand, and those of the run."""
    rate = made["moved_mib"] * 2**20 / made["loading"]
    pace = (made["seconds"] - made["waiting"]) / len(trace) / layers
    found = simulate(trace, Machine(layers, size, budget, rate, pace), prefetch=False)
    return [found.waiting, made["waiting"]]


PEAK = """
import json, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {scripts!r})
import serving
from pathlib import Path
from moesaic.runs.results import peak_memory
folder, budget = Path(sys.argv[1]), int(sys.argv[2])
prompts = serving.prompts_of(folder, 0)[:12]
before = peak_memory(torch.device("cpu"))["peak_memory_mib"]
from moesaic.ffn.serving.engine import Engine
engine = Engine(folder, budget=budget, batch_tokens=serving.BATCH)
resident = sum(p.numel() * p.element_size() for p in engine.model.parameters())
for prompt in prompts:
    engine.add(prompt, max_new_tokens=serving.NEW)
list(engine.run())
print(json.dumps({{"before_mib": before, "resident_mib": resident / 2**20, "budget_mib": budget / 2**20,
                  "peak_mib": peak_memory(torch.device("cpu"))["peak_memory_mib"]}}))
"""


def peak(folder: Path, budget: int) -> dict[str, float]:
    """Memory of a process of its own that serves some of the prompts."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(scripts=str(ROOT / "scripts")), str(folder), str(budget)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    folder, *rest = [Path(sys.argv[1]), *sys.argv[2:]] if len(sys.argv) > 1 else [Path()]
    if not (folder / "conversion.json").is_file():
        sys.exit(__doc__)
    rounds = int(rest[0].partition("=")[2]) if rest else 3
    torch.set_num_threads(1)
    probe = Engine(folder)
    whole, experts, layers = probe.residency.limit, probe.num_experts, probe.num_layers
    prompts = prompts_of(folder, 0)
    with torch.no_grad():
        routes = [probe.router(torch.tensor([prompt]))[0][0].argmax(-1).tolist() for prompt in prompts]
    probe.close()
    k = max(1, experts // 2)
    budget = whole * k // experts
    burst = served(folder, prompts, [0.0] * REQUESTS, order="decode-first", budget=budget)
    rates = {load: load * REQUESTS / burst["seconds"] for load in LOADS}
    cells: dict[float, dict[str, list[dict[str, Any]]]] = {load: {name: [] for name in ENGINES} for load in LOADS}
    answers = burst.pop("written")
    equal, traces = 0, {}
    for number, load in itertools.product(range(rounds), LOADS):
        draw = random.Random(number)
        arrivals = [*itertools.accumulate(draw.expovariate(rates[load]) for _ in prompts)]
        for name in random.Random(number).sample([*ENGINES], len(ENGINES)):
            made = served(folder, prompts, arrivals, budget=budget, **ENGINES[name])
            equal += made.pop("written") == answers
            traces[load, name] = made.pop("trace")
            cells[load][name].append(made)
            print(number, load, name, {key: round(value, 3) for key, value in made.items()}, flush=True)
    budgets = {}
    for kept in range(2, experts):
        of = {}
        for prefetch in (True, False):
            made = served(folder, prompts, [0.0] * REQUESTS, budget=whole * kept // experts, prefetch=prefetch)
            equal += made.pop("written") == answers
            traces[kept, prefetch] = made.pop("trace")
            of["prefetch" if prefetch else "on demand"] = made
        budgets[kept] = of
        print(kept, {how: round(made["hidden"], 2) for how, made in of.items()}, flush=True)
    memory = [peak(folder, whole * kept // experts) for kept in (2, k, experts)]
    from moesaic.runs.results import device_name, versions

    written = {
        "command": "python scripts/serving.py FOLDER" + (f" rounds={rounds}" if rest else ""),
        "conversion": json.loads((folder / "conversion.json").read_text())["command"],
        "requests": REQUESTS, "new_tokens": NEW, "batch_tokens": BATCH, "prompt_tokens": PROMPT, "rounds": rounds,
        "experts": experts, "kept": k, "budget_mib": budget / 2**20, "arrivals_a_second": rates,
        "engines": cells, "budgets": budgets, "memory": memory,
        "answers_equal": [equal, rounds * len(LOADS) * len(ENGINES) + 2 * len(budgets)],
        "simulated": {
            "sticky": [hits(sticky(64, 64, 7, 0.95, seed), seed) for seed in range(5)],
            "sticky_experts": [experts_a_batch(sticky(64, 64, 7, 0.95, seed), 16) for seed in range(5)],
            "prompts": hits(routes, 0),
            "prompts_experts": experts_a_batch(routes, 16),
        },
        "enlarged": {"machine": LARGE} | {
            name: enlarged(traces[max(LOADS), name], experts) for name in ("experts", "decode first")
        },
        "simulator": {
            kept: checked(traces[kept, False], of["on demand"], layers, whole // layers // experts,
                          whole * kept // experts)
            for kept, of in budgets.items()
        },
        "device": device_name(torch.device("cpu")), "versions": versions(),
    }  # fmt: skip
    (ROOT / "results" / "serving.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
