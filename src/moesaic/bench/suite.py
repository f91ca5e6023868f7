"""All tables of the benchmark, as one dictionary."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import peft
import torch
import transformers

from moesaic.bench import compiled, crossover, generating, measure, quantised, scale
from moesaic.bench.arms import (
    ATTENTION,
    COUNTED,
    FROZEN,
    LINEARS,
    LOOP,
    USUAL,
    Mixtures,
    Size,
    arms,
    dtype_of,
    frozen_steps,
    linear_steps,
    lora,
    methods,
    model_step,
)
from moesaic.bench.peers import TRAINED, XLORA, sized
from moesaic.lora.crossover import device_name, limit

SIZES: dict[str, Size] = {
    "linear": {"d": 1024, "tokens": 1024},
    "model": {"d": 1024, "layers": 2, "batch": 2, "tokens": 256},
    "generating": {"d": 1024, "layers": 4, "prompt": 64, "new": 4, "tokens": 256},
    "scale": {"d": 512, "layers": 2, "batch": 4, "tokens": 256},
    "crossover": {"d": 1024, "tokens": 512},
    "quantised": {"d": 1024, "layers": 1, "batch": 1, "tokens": 256, "prompt": 64, "new": 4},
}
"""What the suites measure: a linear; the model that is trained; that which generates (`new` tokens behind a `prompt`,
again and again, or a prompt of `tokens`); those that cost is followed in; a mixture by itself; quantised models."""
KEYS = {
    "mix": "linear", "train": "model_step", "decode": "decode", "compiled": "compiled", "prefill": "prefill",
    "scale": "scale", "crossover": "crossover", "quantised": "quantised",
}  # fmt: skip
"""Suite -> what it leaves in the figures."""
SUITES = tuple(KEYS)
"""One linear; a training step; steps of decoding with a KV cache, and compiled; reading a prompt into one; how cost
grows; from where on products over routed pairs alone are faster; quantised bases."""

FFNS, MATCHED = "frozen FFNs", "lora, rank r on attention"
"""Two more arms, from which the arithmetic of methods with FFNs as experts is reckoned."""


def run(
    *,
    suites: Collection[str] = SUITES,
    rounds: int = 20,
    sizes: Mapping[str, Size] = SIZES,
    shape: Size | None = None,
    device: str = "cpu",
    only: Collection[str] | None = None,
    memory: bool = True,
    progress: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Measure everything.

    Args:
        suites: these of SUITES.
        rounds: of each suite; the single linear, which is quick and noisy, runs three times as often.
        shape: what every size has instead of its own: d, layers, tokens, dtype, and fields of `Mixtures`.
        device: as torch names it.
        only: these methods instead of all.
        memory: also the peak memory of training, on a CPU in a fresh process for each arm.
        keep: is handed what was found so far whenever a suite ends.
    """
    sizes = {name: {**size, **(shape or {})} for name, size in sizes.items()}
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found: dict[str, Any] = described(rounds, shape or {}, device, only)
    with torch.device(device):
        if "compiled" in suites:
            compiled.check()
        if "quantised" in suites:
            quantised.check()
        found["ceiling"] = measure.ceiling(dtype_of(sizes["linear"]))
        found["rank_space_up_to"] = limit(torch.get_default_device().type, dtype_of(sizes["linear"]))
        for _ in _measure(found, suites, rounds, sizes, only, memory, progress):
            keep(found)
    return found


def described(rounds: int, shape: Size, device: str, only: Collection[str] | None = None) -> dict[str, Any]:
    """What figures hold for: settings, versions and the device."""
    own: dict[str, Any] = {} if only is None else {"methods": sorted(only)}
    versions = {package.__name__: package.__version__ for package in (torch, transformers, peft)}
    with torch.device(device):
        machine = {"device": device_name(torch.get_default_device().type), "threads": 1, **versions}
    return {
        "settings": {
            **{key: value for key, value in asdict(USUAL).items() if key != "dropout"},
            "rounds": rounds,
            "dtype": "float32",
            **shape,
            **own,
        },
        "machine": machine,
    }


def _measure(
    found: dict[str, Any],
    suites: Collection[str],
    rounds: int,
    sizes: Mapping[str, Size],
    only: Collection[str] | None,
    memory: bool,
    progress: Callable[[str], None],
) -> Iterator[None]:
    """Yields whenever a suite is in `found`."""
    by_linear, by_block = ([n for n in methods(level) if only is None or n in only] for level in ("linear", "block"))
    names = [*by_linear, *by_block]

    def counted(what: str) -> Callable[[int, int], None]:
        return lambda index, total: progress(f"{what}: round {index + 1} of {total}")

    if "mix" in suites:
        size = found["linear_size"] = sizes["linear"]
        linear = measure.interleave(linear_steps(by_linear, size), 3 * rounds, progress=counted("one linear"))
        found["linear"] = measure.table(linear, "lora")
        found["linear_overhead_share_of_loop"] = measure.overhead_share(linear, base="frozen linear", loop=LOOP)
        yield
    if "train" in suites:
        found |= _training(by_linear, by_block, rounds, sizes["model"], memory, progress, counted)
        yield
    size = sizes["generating"]
    if {"decode", "compiled", "prefill"} & set(suites):
        found["generating"] = {**size, "targets": "all seven linears"}
    if "decode" in suites:
        counts = generating.count(names, size, progress)
        found["decode_kernels"] = {name: _beside(own, counts["lora"]) for name, own in counts.items()}
        found["decode"] = generating.run_decoding(names, rounds, size, generating.ROWS, counted)
        yield
    if "compiled" in suites:
        found["compiled"] = compiled.run(names, rounds, size, counted, progress)
        yield
    if "prefill" in suites:
        found["prefill"] = generating.run_prefill(names, rounds, size, counted)
        yield
    if "scale" in suites:
        found["scale"] = scale.run(rounds, sizes["scale"], counted)
        yield
    if "crossover" in suites:
        found["crossover"] = {**crossover.run(rounds, sizes["crossover"], counted), **sizes["crossover"]}
        yield
    if "quantised" in suites:
        size = sizes["quantised"]
        own = [name for name in by_linear if only is not None or name in quantised.METHODS]
        found["quantised"] = {"size": size, **quantised.run(own, rounds, size, counted)}
        yield


def _training(
    by_linear: list[str],
    by_block: list[str],
    rounds: int,
    size: Size,
    memory: bool,
    progress: Callable[[str], None],
    counted: generating.Told,
) -> dict[str, Any]:
    made = Mixtures.of(size)
    peers = {} if made.dropout else sized(TRAINED, made)
    configs = arms(LINEARS, [*by_linear, *by_block], made) | peers
    frozen, ffns = frozen_steps(size)
    steps = {FROZEN: frozen} | {name: model_step(config, size) for name, config in configs.items()}
    if by_block:
        steps |= {FFNS: ffns, MATCHED: model_step(matched_lora(made), size)}
    whole = measure.interleave(steps, rounds, progress=counted("model step"))
    extra = {name: whole.pop(name) for name in (FFNS, MATCHED) if name in whole}
    launches: dict[str, dict[str, int]] = {}
    peaks: dict[str, float] = {}
    for name, config in configs.items():
        progress(f"kernels: {name}")
        with torch.device("cpu"):
            launches[name] = measure.kernels(model_step(config, {**COUNTED, "experts": made.experts}, optimizer=False))
    del steps
    for name, config in configs.items() if memory and measure.can_measure_memory() else ():
        progress(f"peak memory: {name}")
        on_cpu = torch.get_default_device().type == "cpu"
        peaks[name] = measure.peak_memory(name, size) if on_cpu else measure.peak_of(model_step(config, size))
    shares = measure.overhead_share(whole, base=FROZEN, loop=XLORA) if XLORA in whole else {}
    return {
        "model": {**size, "targets": "all seven linears"},
        "model_step": measure.table(whole, "lora"),
        "model_overhead_share_of_loop": measure.overhead_share(whole, base=FROZEN, loop=LOOP),
        "model_overhead_share_of_xlora": shares,
        "arithmetic": {name: arithmetic(whole[name], extra, made.top_k) for name in by_block},
        "kernels": {name: _beside(counts, launches["lora"]) for name, counts in launches.items()},
        "peak_memory_mib": {name: {"mib": v, "ratio": v / peaks["lora"]} for name, v in peaks.items()},
    }


def _beside(counts: dict[str, int], reference: dict[str, int]) -> dict[str, float]:
    return {**counts, **{f"{key}_ratio": counts[key] / reference[key] for key in ("events", "kernels")}}


def matched_lora(made: Mixtures = USUAL) -> Any:
    """LoRA with the total rank that a method with FFNs as experts has: E*r on the FFNs, r on attention."""
    own = dict.fromkeys(ATTENTION, made.r)
    return lora(LINEARS, rank=made.rank, dropout=made.dropout, rank_pattern=own, alpha_pattern=own)


def arithmetic(seconds: list[float], extra: measure.Seconds, top_k: int) -> dict[str, float]:
    """A training step beside what k separate FFNs a token would cost at the speed of the frozen products.

    They are (2 + k) / 3 of the frozen FFN's work: the first linears' products are shared, the last one's come after a
    nonlinearity that differs by expert. So (k - 1) / 3 of the FFNs' forward and backward is added to a step of plain
    LoRA of the same total rank. Below 1: faster than that, since the last products too can be shared.
    """
    more = (top_k - 1) / 3
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
    made = Mixtures.of(size)
    configs = arms(LINEARS, [method] if method in known else [], made) | sized(TRAINED, made)
    return measure.peak_of(model_step(configs[name], size))
