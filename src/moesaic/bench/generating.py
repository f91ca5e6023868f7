"""What is measured of generation: reading a prompt, and steps of decoding with its KV cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from moesaic.bench import measure
from moesaic.bench.arms import (
    COUNTED,
    FROZEN,
    LINEARS,
    VOCABULARY,
    Mixtures,
    Size,
    Step,
    arms,
    model_of,
    wrapped,
)
from moesaic.bench.peers import GENERATES, sized
from moesaic.host import find_host
from moesaic.lora import MixtureConfig

ROWS = (1, 8, 32)

Told = Callable[[str], Callable[[int, int], None]]


def configs(names: Iterable[str], size: Size | None = None) -> dict[str, Any]:
    """Name -> config, or function of a base; None for the frozen base."""
    made = Mixtures.of(size or {})
    return {FROZEN: None, **arms(LINEARS, names, made), **sized(GENERATES, made)}


def adapted(base: nn.Module, config: Any) -> nn.Module:
    """A model of its own with the weights of `base` themselves, in evaluation."""
    model: Any = copy.deepcopy(base, {id(p): p for p in base.parameters()}).requires_grad_(False)
    if config is None:
        return model.eval()
    torch.manual_seed(0)
    model = wrapped(model, config)
    if isinstance(config, MixtureConfig):
        find_host(model).pinned_tasks = torch.tensor([1])
    return model.eval()


def decoding(model: nn.Module, size: Size, rows: int) -> Step:
    """Steps of decoding for `new` tokens of each row; the cache is cut back to the prompt behind them."""
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (rows, size["prompt"]))
    cache = DynamicCache()

    @torch.no_grad()
    def run() -> None:
        if not cache.get_seq_length():
            model(input_ids=ids, past_key_values=cache)
        for n in range(size["new"]):
            model(input_ids=ids[:, n : n + 1], past_key_values=cache)
        cache.crop(-size["new"])

    return run


def prefill(model: nn.Module, size: Size) -> Step:
    """A row of `tokens` into a new cache, with the logits of the last alone."""
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (1, size["tokens"]))

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, past_key_values=DynamicCache(), logits_to_keep=1)

    return run


def run_decoding(names: Iterable[str], rounds: int, size: Size, rows: Iterable[int], told: Told) -> dict[str, Any]:
    """Number of rows -> arm -> milliseconds a step, ratios to LoRA and to the frozen base."""
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    base = model_of(size)
    models = {name: adapted(base, config) for name, config in configs(names, size).items()}
    for number in rows:
        steps = {name: decoding(model, size, number) for name, model in models.items()}
        seconds = measure.interleave(steps, rounds, progress=told(f"decoding, {number} rows"))
        found[str(number)] = beside(seconds, steps_a_turn=size["new"])
    return found


def run_prefill(names: Iterable[str], rounds: int, size: Size, told: Told) -> dict[str, Any]:
    """Arm -> milliseconds, ratios to LoRA and to the frozen base."""
    torch.manual_seed(0)
    base = model_of(size)
    steps = {name: prefill(adapted(base, config), size) for name, config in configs(names, size).items()}
    return beside(measure.interleave(steps, rounds, progress=told("prefill")))


def beside(seconds: measure.Seconds, *, steps_a_turn: int = 1) -> dict[str, Any]:
    """Milliseconds a step, ratios to LoRA and to the frozen base."""
    to_base = measure.table(seconds, FROZEN)
    each = measure.table(measure.each_of(steps_a_turn, seconds), "lora")
    return {name: {**row, "to_base": to_base[name]["ratio"]} for name, row in each.items()}


def count(names: Iterable[str], size: Size, told: Callable[[str], None]) -> dict[str, dict[str, int]]:
    """Arm -> events, kernels and syncs of one step of one row."""
    found = {}
    with torch.device("cpu"):
        base = model_of(COUNTED)
        for name, config in configs(names, size).items():
            told(f"kernels of decoding: {name}")
            found[name] = measure.kernels(decoding(adapted(base, config), {"prompt": 4, "new": 1}, 1))
    return found
