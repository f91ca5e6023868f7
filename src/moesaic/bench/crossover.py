"""From which E*r on products over routed pairs alone are faster than rank space, with top-2 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.bench import measure
from moesaic.bench.arms import USUAL, Size, Step, dtype_of
from moesaic.bench.generating import Told
from moesaic.lora.mix import Backend, mix

TOP_K = USUAL.top_k
RANK = 8
EXPERTS = (4, 8, 12, 16, 24, 32, 64, 128)


def run(rounds: int, size: Size, told: Told) -> dict[str, Any]:
    """`table`: E*r -> milliseconds of a forward and backward in rank space, and what pairs alone take of that.

    `limit`: the largest E*r up to which pairs alone are not clearly faster, by their upper quartile; 0 if they always
    are.
    """
    table: dict[str, dict[str, float]] = {}
    for experts in EXPERTS:
        steps = {way: _step(experts, size, way) for way in ("rank", "grouped")}
        seconds = measure.interleave(steps, rounds, progress=told(f"crossover, E*r = {experts * RANK}"))
        rows = measure.table(seconds, "rank")
        table[str(experts * RANK)] = {**rows["grouped"], "ms": rows["rank"]["ms"]}
    slower = [row["high"] >= 1 for row in table.values()]
    first = slower.index(False) if False in slower else len(slower)
    return {"table": table, "limit": [0, *map(int, table)][first]}


def _step(experts: int, size: Size, backend: Backend) -> Step:
    """Forward and backward of a mixture alone: to x, A, B and the weights of all experts, of which two are not zero."""
    torch.manual_seed(0)
    dtype, tokens = dtype_of(size), size["tokens"]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    x, A, B = drawn(tokens, size["d"]), drawn(experts * RANK, size["d"]), drawn(experts * RANK, size["d"])
    chosen = torch.rand(tokens, experts).topk(TOP_K, dim=-1).indices
    weights = torch.zeros(tokens, experts, dtype=dtype).scatter_(-1, chosen, 0.5).requires_grad_()
    grad = torch.randn(tokens, size["d"], dtype=dtype)

    def run() -> None:
        mix(x, A, B, weights, backend=backend).backward(grad)
        for leaf in (x, A, B, weights):
            leaf.grad = None

    return run
