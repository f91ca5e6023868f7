"""How cost grows: with experts that are trained, adapters that are composed, length, depth and width."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from moesaic.bench import measure
from moesaic.bench.arms import LINEARS, USUAL, Size, Step, lora, mixture, model_of, model_step
from moesaic.bench.generating import Told, adapted, decoding, prefill
from moesaic.lora import METHODS

TOP_K = USUAL.top_k
RANK = 16
EXPERTS = (2, 8, 32, 128, 256)
ADAPTERS = (2, 8, 64, 512)
LENGTHS = (64, 256, 1024)
DEPTHS = (1, 4, 16)
WIDTHS = (64, 256, 1024)
REFERENCE = 8
"""Experts, or adapters, that the others are compared with."""

Table = dict[str, dict[str, float]]


def run(rounds: int, size: Size, told: Told, *, experts: Any = EXPERTS, adapters: Any = ADAPTERS) -> dict[str, Any]:
    """Tables by what grows; ratios are to `REFERENCE` experts or adapters, and to plain LoRA of the active rank."""
    found: dict[str, Any] = {
        "experts": _experts(rounds, size, told, experts),
        "length": _to_lora(rounds, told, {f"{n} tokens": {**size, "tokens": n, "batch": 1} for n in LENGTHS}, "length"),
        "width": _to_lora(rounds, told, {f"d={n}": {**size, "d": n, "batch": 1} for n in WIDTHS}, "width"),
        "depth": _to_lora(rounds, told, {f"{n} layers": {**size, "layers": n, "batch": 1} for n in DEPTHS}, "depth"),
    }
    for kind, table in _adapters(rounds, size, told, adapters).items():
        found[f"adapters, {kind}"] = table
    return found


def _experts(rounds: int, size: Size, told: Told, experts: Any) -> Table:
    steps = {"lora, rank k*r": model_step(lora(LINEARS, rank=TOP_K * RANK), size)}
    steps |= {str(n): model_step(mixture("mola", LINEARS, r=RANK, num_experts=n), size) for n in experts}
    return measure.table(measure.interleave(steps, rounds, progress=told("experts")), str(REFERENCE))


def _to_lora(rounds: int, told: Told, sizes: dict[str, Size], what: str) -> Table:
    """A step of MoLA beside LoRA's of the same total rank, in models of several sizes."""
    found: Table = {}
    for name, size in sizes.items():
        configs = {"lora": lora(LINEARS), name: mixture("mola", LINEARS)}
        steps = {key: model_step(config, size) for key, config in configs.items()}
        seconds = measure.interleave(steps, rounds, progress=told(f"{what}: {name}"))
        found[name] = measure.table(seconds, "lora")[name]
    return found


def _adapters(rounds: int, size: Size, told: Told, numbers: Any) -> dict[str, Table]:
    """Arrow over so many adapters, in decoding and reading a prompt; `megabytes` are theirs on disk."""
    with tempfile.TemporaryDirectory() as place:
        folders = _saved(size, Path(place), max(numbers))
        base = model_of(size)
        models = {str(n): adapted(base, _composed(folders[:n])) for n in numbers}
        each = sum(file.stat().st_size for file in Path(folders[0]).glob("*.safetensors"))
    given = {"prompt": 16, "new": 4, "tokens": size["tokens"]}
    kinds: dict[str, Callable[[Any], Step]] = {
        "decoding": lambda model: decoding(model, given, 1), "prefill": lambda model: prefill(model, given),
    }  # fmt: skip
    found: dict[str, Table] = {}
    for kind, step in kinds.items():
        steps = {name: step(model) for name, model in models.items()}
        seconds = measure.interleave(steps, rounds, progress=told(f"adapters, {kind}"))
        if kind == "decoding":
            seconds = measure.each_of(given["new"], seconds)
        table = measure.table(seconds, str(REFERENCE))
        found[kind] = {name: {**row, "megabytes": int(name) * each / 1e6} for name, row in table.items()}
    return found


def _composed(folders: list[str]) -> Callable[[Any], Any]:
    return lambda base: get_peft_model(base, METHODS["arrow"](adapters=folders, top_k=TOP_K))


def _saved(size: Size, place: Path, number: int) -> list[str]:
    """Folders of random adapters of one model."""
    torch.manual_seed(0)
    model = get_peft_model(model_of(size), LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"]))
    folders = [str(place / f"adapter{i}") for i in range(number)]
    for folder in folders:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.02)
        model.save_pretrained(folder)
    return folders
