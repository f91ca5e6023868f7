"""What keeping the KV cache from round to round saves: results/r1-speed.json, `python scripts/r1_speed.py [rounds=5]`.

Conversations as Router-R1 has them, side by side: the whole prompt, five generations, a reply read after each of the
first four. Two ways in turn, so many times: the cache is kept, or every round computes all of its text anew. Tokens are
the likeliest ones, the same both ways, and counted.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moesaic.llms.catalog import Catalog
from moesaic.llms.router_r1.engine import Question, plainly
from moesaic.llms.router_r1.local import LocalPolicy
from moesaic.models.embedded import load_model
from moesaic.runs.folder import write_json
from moesaic.runs.results import command_line, versions

FILE = Path(__file__).parents[1] / "results" / "r1-speed.json"
GENERATIONS, WRITTEN, REPLY = 5, 24, "It was finished in 1908, and hangs in Vienna since; others say 1907. " * 6
CASES = {"nano": 8, "smollm2": 4}
"""Conversations side by side."""
MODELS = [
    {"name": name, "parameters": size, "input_price": 0.1, "output_price": price, "description": prose}
    for name, size, price, prose in (
        ("small-3b", 3, 0.1, "Quick and cheap; good at short facts and at following instructions."),
        ("code-14b", 14, 0.4, "Knows programs, mathematics and logic; answers at length."),
        ("large-70b", 70, 0.9, "Knows the most of the world, of people, places and history; slow."),
    )
]


def written(policy: LocalPolicy, prompts: Sequence[str]) -> int:
    """Tokens that were written; whether the cache is kept is the policy's affair."""
    rounds, everybody, tokens = policy.begin(prompts), range(len(prompts)), 0
    for generation in range(GENERATIONS):
        tokens += sum(of.tokens for of in rounds.write(list(everybody)))
        for i in everybody if generation < GENERATIONS - 1 else ():
            rounds.read(i, f"<information>{REPLY}</information>")
    return tokens


def case(name: str, many: int, rounds: int) -> dict[str, Any]:
    loaded = load_model(name)
    how: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": WRITTEN}
    ways = {
        "kept": LocalPolicy(loaded.model.eval(), loaded.tokenizer, **how),
        "anew each round": LocalPolicy(loaded.model, loaded.tokenizer, keep=False, **how),
    }
    for policy in ways.values():
        policy.stopped = lambda ids: False  # type: ignore[method-assign]
    catalog = Catalog.of(MODELS)
    prompts = [plainly(Question(f"Who painted picture number {n} of the museum?", catalog)) for n in range(many)]
    took: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, policy in ways.items():
            begun = time.perf_counter()
            tokens = written(policy, prompts)
            took[way].append(tokens / (time.perf_counter() - begun))
            print(name, way, f"{took[way][-1]:.1f} tokens/s", flush=True)
    faster = [a / b for a, b in zip(took["kept"], took["anew each round"], strict=True)]
    return {
        "conversations": many, "prompt_tokens": len(ways["kept"].encode(prompts[0])), "tokens": tokens,
        "tokens_per_second": {way: statistics.median(of) for way, of in took.items()},
        "faster": {"median": statistics.median(faster), "least": min(faster), "most": max(faster)},
    }  # fmt: skip


def main(rounds: int = 5) -> None:
    torch.set_num_threads(1)
    found = {name: case(name, many, rounds) for name, many in CASES.items()}
    write_json(FILE, {"rounds": rounds, "cases": found, "command": command_line(), "versions": versions()})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*(int(text.split("=")[-1]) for text in sys.argv[1:2]))
