"""Decoding under `torch.compile`: what a step costs, and what compiling does."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.utils import fresh_cache
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from moesaic.bench import measure
from moesaic.bench.arms import FROZEN, LINEARS, VOCABULARY, Mixtures, Size, Step, arms, model_of
from moesaic.bench.generating import Told, adapted, beside
from moesaic.errors import ConfigError
from moesaic.host import find_host
from moesaic.lora import MixtureConfig

_NUMBER = itertools.count()


def check() -> None:
    """Raise ConfigError where there is no C++ compiler for this CPU's code."""
    if torch.get_default_device().type != "cpu":
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigError("the suite compiled needs a C++ compiler: install g++, or name other suites") from None


@inductor.patch(freezing=True)
def run(names: Iterable[str], rounds: int, size: Size, told: Told, progress: Callable[[str], None]) -> dict[str, Any]:
    """Arm -> milliseconds a step of one row, ratios to LoRA and to the frozen base, and seconds of compiling.

    One graph for the whole step, weights as constants (`freezing`); on a GPU it is captured as one, too. Each arm holds
    a copy of the base's weights, so it is timed in turn with LoRA and the frozen base, and let go. Two that run the
    same kernels may still differ by some percent, by where their copies lie. Methods that route by the prompt are left
    out: they do not decode under `torch.compile`.
    """
    torch.manual_seed(0)
    base = model_of(size)
    beside_it: dict[str, Step] = {}
    found: dict[str, Any] = {}
    progress("warming up the compiler")
    compiling(decoding(adapted(base, None), size))
    for name, config in {FROZEN: None, **arms(LINEARS, names, Mixtures.of(size))}.items():
        model = adapted(base, config)
        if isinstance(config, MixtureConfig) and find_host(model).asks("by_prompt"):
            continue
        progress(f"compiling {name}")
        step = decoding(model, size)
        found[name] = {"compiling": compiling(step)}
        if name in (FROZEN, "lora"):
            beside_it[name] = step
        if "lora" in beside_it:
            turns = measure.interleave({**beside_it, name: step}, rounds, progress=told(f"compiled {name}"))
            table = beside(turns, steps_a_turn=size["new"])
            found[name].update(table[name])
            found[FROZEN] = {**table[FROZEN], **found[FROZEN]}
    for row in found.values():
        row["compiling_ratio"] = row["compiling"] / found["lora"]["compiling"]
    return found


def compiling(step: Step) -> float:
    """Seconds of a first step, nothing of which was compiled before."""
    start = time.perf_counter()
    with measure.as_users(), fresh_cache():
        step()
    return time.perf_counter() - start


def decoding(model: nn.Module, size: Size) -> Step:
    """`new` steps of one row, compiled, on a static cache that is taken back to the prompt behind them."""
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (1, size["prompt"]))
    config: Any = model.config
    cache = StaticCache(config=config, max_cache_len=size["prompt"] + size["new"])
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)

    def logits(token: Tensor) -> Tensor:
        return cast(Tensor, model(input_ids=token, past_key_values=cache).logits)

    # Graphs, and which numbers have changed from one to the next, are kept by code and name: this arm's are its own.
    logits.__code__ = logits.__code__.replace(co_name=f"logits_{next(_NUMBER)}")
    on_gpu = ids.device.type == "cuda"
    step = torch.compile(logits, fullgraph=True, mode="reduce-overhead" if on_gpu else None)

    @torch.no_grad()
    def run() -> None:
        for n in range(size["new"]):
            step(ids[:, n : n + 1])
        for layer in cast(list[StaticLayer], cache.layers):
            layer.cumulative_length.sub_(size["new"])

    return run
