"""A layer of experts on each of Transformers' backends beside the loop over experts: `python scripts/bench_experts.py`.

Forward and backward, every backend in turn in each round: on one thread of a CPU into results/bench-experts.json, and
with `--device cuda` on a GPU, which is waited for after each step, into results/bench-experts-cuda.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.bench import measure
from moesaic.runs.results import device_name, versions

SIZES = {
    "a wide layer, prefill": {"d": 512, "width": 512, "experts": 8, "k": 2, "tokens": 2048},
    "many narrow experts": {"d": 256, "width": 64, "experts": 32, "k": 4, "tokens": 2048},
    "SMoE-Dropout, k = 8 of 16": {"d": 128, "width": 32, "experts": 16, "k": 8, "tokens": 2048},
    "SMoE-Dropout, k = 16 of 16": {"d": 128, "width": 32, "experts": 16, "k": 16, "tokens": 2048},
    "Read-ME on SmolLM2, top-1": {"d": 576, "width": 768, "experts": 7, "k": 1, "tokens": 512},
    "decoding, 8 rows": {"d": 512, "width": 512, "experts": 8, "k": 2, "tokens": 8},
}
ON_A_GPU = {"Mixtral's layer, prefill": {"d": 4096, "width": 14336, "experts": 8, "k": 2, "tokens": 2048}}
BACKENDS = ("eager", "grouped_mm", "batched_mm")


def layer(size: dict[str, int], backend: str) -> Any:
    """A bank of experts of a model whose backend is this."""
    from transformers import LlamaConfig

    from moesaic.ffn.layer import GatedExperts

    config = LlamaConfig(hidden_size=size["d"])
    config._experts_implementation = backend
    bank = GatedExperts(config, size["experts"], size["d"], size["width"], torch.nn.functional.silu)
    for values in bank.parameters():
        torch.nn.init.normal_(values, std=0.02)
    return bank


def step(size: dict[str, int], backend: str, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    bank = layer(size, backend).to(device, dtype)
    x = torch.randn(size["tokens"], size["d"], dtype=dtype, device=device, requires_grad=True)
    logits = torch.randn(size["tokens"], size["experts"], device=device)
    weights, index = logits.softmax(-1).topk(size["k"], dim=-1)
    back = torch.randn_like(x)

    def run() -> Tensor:
        x.grad = None
        bank.zero_grad(set_to_none=True)
        out = bank(x, index, weights.to(dtype))
        out.backward(back)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    asked = parser.parse_args()
    rounds, device = asked.rounds, asked.device
    if device == "cpu":
        torch.set_num_threads(1)
        measure.keep_freed_memory()
    sizes = SIZES if device == "cpu" else {**SIZES, **ON_A_GPU}
    found: dict[str, Any] = {}
    for name, size in sizes.items():
        for dtype in (torch.float32, torch.bfloat16):
            wide = size["tokens"] * size["k"] * size["width"] * size["d"] * 12 > 2**33  # a copy of weights for each use
            arms = {b: step(size, b, dtype, device) for b in BACKENDS if not (wide and b == "batched_mm")}
            seconds = measure.interleave(arms, rounds, progress=lambda index, total: None)
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            found[key] = measure.table(seconds, "eager")
            print(key, {arm: f"{row['ratio']:.2f}" for arm, row in found[key].items()}, flush=True)
    written = {
        "command": "python scripts/bench_experts.py" + (" --device cuda" if device == "cuda" else ""),
        "rounds": rounds, "sizes": sizes, "found": found,
        "device": device_name(torch.device(device)), "versions": versions(),
    }  # fmt: skip
    file = "bench-experts.json" if device == "cpu" else "bench-experts-cuda.json"
    (Path(__file__).parents[1] / "results" / file).write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
