"""All tables of the benchmark, as one dictionary."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Collection
from typing import Any

import torch

from moesaic.bench import compiled, generating, measure, scale
from moesaic.bench.arms import (
    ATTENTION,
    COUNTED,
    EXPERTS,
    FROZEN,
    LINEARS,
    LOOP,
    RANK,
    TOP_K,
    Size,
    arms,
    frozen_steps,
    linear_steps,
    lora,
    methods,
    model_step,
)
from moesaic.bench.peers import TRAINED, XLORA

MODEL = {"d": 512, "layers": 4, "batch": 4, "tokens": 256}
SUITES = ("mix", "train", "decode", "compiled", "prefill", "scale")
"""One linear; a training step; steps of decoding with a KV cache, and compiled; reading a prompt into one; how cost
grows."""

FFNS, MATCHED = "frozen FFNs", "lora, rank r on attention"
"""Two more arms, from which the arithmetic of methods with FFNs as experts is reckoned."""


def run(
    *,
    suites: Collection[str] = SUITES,
    rounds: int = 20,
    tokens: int = 1024,
    d: int = 1024,
    size: Size = MODEL,
    generating_size: Size = generating.GENERATING,
    scale_size: Size = scale.SIZE,
    only: Collection[str] | None = None,
    memory: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure everything.

    Args:
        suites: these of SUITES.
        rounds: of each suite; the single linear, which is quick and noisy, runs three times as often.
        tokens, d: of the single linear.
        size: of the model that is trained; `generating_size`: of the one that generates; `scale_size`: of
            those that cost is followed in.
        only: these methods instead of all.
        memory: also the peak memory of training, in a fresh process for each arm.
    """
    if "compiled" in suites:
        compiled.check()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    by_linear, by_block = ([n for n in methods(level) if only is None or n in only] for level in ("linear", "block"))
    names = [*by_linear, *by_block]

    def counted(what: str) -> Callable[[int, int], None]:
        return lambda index, total: progress(f"{what}: round {index + 1} of {total}")

    found: dict[str, Any] = {
        "settings": {"experts": EXPERTS, "r": RANK, "top_k": TOP_K, "tokens": tokens, "d": d, "rounds": rounds},
        "machine": {"processor": platform.machine(), "threads": 1, "torch": torch.__version__},
    }
    if "mix" in suites:
        linear = measure.interleave(linear_steps(by_linear, tokens, d), 3 * rounds, progress=counted("one linear"))
        found["linear"] = measure.table(linear, "lora")
        found["linear_overhead_share_of_loop"] = measure.overhead_share(linear, base="frozen linear", loop=LOOP)
    if "train" in suites:
        found |= _training(by_linear, by_block, rounds, size, memory, progress, counted)
    if {"decode", "compiled", "prefill"} & set(suites):
        found["generating"] = {**generating_size, "targets": "all seven linears"}
    if "decode" in suites:
        counts = generating.count(names, progress)
        found["decode_kernels"] = {name: _beside(own, counts["lora"]) for name, own in counts.items()}
        found["decode"] = generating.run_decoding(names, rounds, generating_size, generating.ROWS, counted)
    if "compiled" in suites:
        found["compiled"] = compiled.run(names, rounds, generating_size, counted, progress)
    if "prefill" in suites:
        found["prefill"] = generating.run_prefill(names, rounds, generating_size, counted)
    if "scale" in suites:
        found["scale"] = scale.run(rounds, scale_size, counted)
    return found


def _training(
    by_linear: list[str],
    by_block: list[str],
    rounds: int,
    size: Size,
    memory: bool,
    progress: Callable[[str], None],
    counted: generating.Told,
) -> dict[str, Any]:
    configs = arms(LINEARS, [*by_linear, *by_block]) | TRAINED
    frozen, ffns = frozen_steps(size)
    steps = {FROZEN: frozen} | {name: model_step(config, size) for name, config in configs.items()}
    if by_block:
        steps |= {FFNS: ffns, MATCHED: model_step(matched_lora(), size)}
    whole = measure.interleave(steps, rounds, progress=counted("model step"))
    extra = {name: whole.pop(name) for name in (FFNS, MATCHED) if name in whole}
    launches: dict[str, dict[str, int]] = {}
    peaks: dict[str, float] = {}
    for name, config in configs.items():
        progress(f"kernels: {name}")
        launches[name] = measure.kernels(model_step(config, COUNTED, optimizer=False))
    for name in configs if memory and measure.can_measure_memory() else ():
        progress(f"peak memory: {name}")
        peaks[name] = measure.peak_memory(name, size)
    return {
        "model": {**size, "targets": "all seven linears"},
        "model_step": measure.table(whole, "lora"),
        "model_overhead_share_of_loop": measure.overhead_share(whole, base=FROZEN, loop=LOOP),
        "model_overhead_share_of_xlora": measure.overhead_share(whole, base=FROZEN, loop=XLORA),
        "arithmetic": {name: arithmetic(whole[name], extra) for name in by_block},
        "kernels": {name: _beside(counts, launches["lora"]) for name, counts in launches.items()},
        "peak_memory_mib": {name: {"mib": v, "ratio": v / peaks["lora"]} for name, v in peaks.items()},
    }


def _beside(counts: dict[str, int], reference: dict[str, int]) -> dict[str, float]:
    return {**counts, **{f"{key}_ratio": counts[key] / reference[key] for key in ("events", "kernels")}}


def matched_lora() -> Any:
    """LoRA with the total rank that a method with FFNs as experts has: E*r on the FFNs, r on attention."""
    return lora(LINEARS, rank_pattern=dict.fromkeys(ATTENTION, RANK), alpha_pattern=dict.fromkeys(ATTENTION, RANK))


def arithmetic(seconds: list[float], extra: measure.Seconds) -> dict[str, float]:
    """A training step beside what k separate FFNs a token would cost at the speed of the frozen products.

    They are (2 + k) / 3 of the frozen FFN's work: the first linears' products are shared, the last one's come after a
    nonlinearity that differs by expert. So (k - 1) / 3 of the FFNs' forward and backward is added to a step of plain
    LoRA of the same total rank. Below 1: faster than that, since the last products too can be shared.
    """
    more = (TOP_K - 1) / 3
    expected = [base + more * ffn for base, ffn in zip(extra[MATCHED], extra[FFNS], strict=True)]
    return {
        "ms": statistics.median(seconds) * 1e3,
        "expected_ms": statistics.median(expected) * 1e3,
        "ffn_ms": statistics.median(extra[FFNS]) * 1e3,
        **measure.spread([v / e for v, e in zip(seconds, expected, strict=True)]),
    }


def measure_peak(name: str, size: Size) -> float:
    """Runs in the fresh process of `measure.peak_memory`."""
    method = name.partition(" (")[0]
    known = {*methods("linear"), *methods("block")}
    configs = arms(LINEARS, [method] if method in known else []) | TRAINED
    return measure.peak_of(model_step(configs[name], size))
