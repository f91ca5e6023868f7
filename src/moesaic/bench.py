"""`moesaic bench`: what a mixture costs beside plain LoRA of the same total rank, measured side by side.

All arms of a table run in turn, in a new order each round, in one process and one thread; a ratio is the median of
the ratios round by round, so a machine that slows down slows all arms alike. Peak memory is that of a fresh process
for each arm.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moesaic.lora import METHODS, MixtureConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS, RANK, TOP_K = 8, 8, 2

Step = Callable[[], None]


class OneLinear(nn.Module):
    """A single frozen linear inside a list of one block, as the tuner expects blocks."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"linear": nn.Linear(d, d)})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block = self.layers[0]
        assert isinstance(block, nn.ModuleDict)
        return cast(torch.Tensor, block["linear"](x))


def mixture(method: str, targets: list[str], **settings: Any) -> MixtureConfig:
    cls = METHODS[method]
    wanted = {"r": RANK, "num_experts": EXPERTS, "top_k": TOP_K, "lora_dropout": 0.0, **settings}
    known = {f.name for f in fields(cls)}
    return cls(target_modules=targets, **{k: v for k, v in wanted.items() if k in known})


def lora(targets: list[str]) -> LoraConfig:
    return LoraConfig(r=EXPERTS * RANK, target_modules=targets, lora_dropout=0.0)


def arms(targets: list[str], **settings: Any) -> dict[str, Any]:
    """Name -> config: LoRA of rank E*r, every method, HotMoE's two routers alone, and a loop over experts."""
    configs: dict[str, Any] = {"lora": lora(targets)}
    configs |= {name: mixture(name, targets, **settings) for name in METHODS}
    configs["hotmoe (expert-expert only)"] = mixture("hotmoe", targets, ee_fraction=1.0, **settings)
    configs["hotmoe (token-expert only)"] = mixture("hotmoe", targets, ee_fraction=0.0, **settings)
    configs["loop over experts"] = mixture("mola", targets, backend="reference", **settings)
    return configs


def linear_steps(tokens: int, d: int) -> dict[str, Step]:
    """Forward and backward of one wrapped linear, gradient to the input included."""
    x = torch.randn(1, tokens, d, requires_grad=True)
    grad = torch.randn(1, tokens, d)

    def step(model: nn.Module) -> Step:
        def run() -> None:
            model(x).backward(grad)
            x.grad = None
            for p in model.parameters():
                p.grad = None

        return run

    steps = {"frozen linear": step(OneLinear(d).requires_grad_(False))}
    configs = arms(["linear"], aux_weight=0.0)
    del configs["hotmoe"]  # its two routers are measured by themselves: one layer has one of them
    for name, config in configs.items():
        steps[name] = step(get_peft_model(OneLinear(d), config).train())
    return steps


def llama(d: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=d,
        intermediate_size=4 * d,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config)


def model_step(config: Any, *, d: int, layers: int, batch: int, tokens: int) -> Step:
    """A whole training step: forward, loss with auxiliary losses, backward, AdamW."""
    torch.manual_seed(0)
    model = llama(d, layers)
    model = get_peft_model(model, config) if config is not None else model
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, 1024, (batch, tokens))

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def interleave(steps: dict[str, Step], rounds: int, *, progress: Callable[[int, int], None]) -> dict[str, list[float]]:
    """Seconds of every step, `rounds` times in turn after two warm-up rounds, in a new order each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names, order = list(steps), random.Random(0)
    for index in range(rounds + 2):
        progress(index, rounds + 2)
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            steps[name]()
            if index >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Median milliseconds, and the ratio to `reference` round by round: median and quartiles."""
    rows = {}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[reference], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {"ms": statistics.median(values) * 1e3, "ratio": middle, "low": low, "high": high}
    return rows


def overhead_share(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Each arm's overhead over the frozen linear, as a share of the expert loop's: median over rounds."""
    base, loop = seconds["frozen linear"], seconds["loop over experts"]
    return {
        name: statistics.median((v - b) / (w - b) for v, b, w in zip(values, base, loop, strict=True))
        for name, values in seconds.items()
        if name not in ("frozen linear", "loop over experts")
    }


def keep_freed_memory() -> None:
    """Start this process again with an allocator that keeps what is freed, as CUDA's does; glibc only.

    By default glibc gives blocks of megabytes back to the system and gets them zeroed anew each step. That costs all
    arms alike, but its noise is larger than the differences to be measured.
    """
    settings = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_MAX_": "0"}
    if platform.libc_ver()[0] == "glibc" and not settings.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **settings})


def peak_memory(name: str, size: dict[str, int]) -> float:
    """MiB that training steps add to a fresh process, at their peak. Linux only: it reads /proc."""
    code = f"from moesaic import bench; print(bench.measure_peak({name!r}, {size!r}))"
    # Blocks above 64 KiB go back to the system when freed, so that what is resident is what is used.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_MAX_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **settings}
    )
    return float(done.stdout.strip().splitlines()[-1])


def measure_peak(name: str, size: dict[str, int]) -> float:
    """Runs in the fresh process: the highest resident memory of three steps, less that before the first."""
    torch.set_num_threads(1)
    step = model_step(arms(LINEARS)[name], **size)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """A figure of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def run(
    *,
    rounds: int = 20,
    tokens: int = 2048,
    d: int = 1024,
    methods: Iterable[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """All tables as one dictionary."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    wanted = {"frozen linear", "lora", "loop over experts", *(methods or arms(["linear"]))}

    def counted(what: str) -> Callable[[int, int], None]:
        return lambda index, total: progress(f"{what}: round {index + 1} of {total}")

    steps = {k: s for k, s in linear_steps(tokens, d).items() if k in wanted}
    linear = interleave(steps, 3 * rounds, progress=counted("one linear"))
    size = {"d": 512, "layers": 4, "batch": 4, "tokens": 256}
    configs = {k: c for k, c in arms(LINEARS).items() if k in wanted}
    whole = interleave({k: model_step(c, **size) for k, c in configs.items()}, rounds, progress=counted("model step"))
    peaks = {}
    for name in configs if Path("/proc/self/clear_refs").exists() else ():
        progress(f"peak memory: {name}")
        peaks[name] = peak_memory(name, size)
    return {
        "settings": {"experts": EXPERTS, "r": RANK, "top_k": TOP_K, "tokens": tokens, "d": d, "rounds": rounds},
        "machine": {"processor": platform.machine(), "threads": 1, "torch": torch.__version__},
        "linear": table(linear, "lora"),
        "linear_overhead_share_of_loop": overhead_share(linear),
        "model": {**size, "targets": "all seven linears"},
        "model_step": table(whole, "lora"),
        "peak_memory_mib": {name: {"mib": v, "ratio": v / peaks["lora"]} for name, v in peaks.items()},
    }


@dataclass
class BenchSettings:
    """Settings of `moesaic bench`."""

    rounds: int = 20
    out: str | None = None


def main(overrides: list[str], *, as_json: bool = False) -> None:
    """Run everything, print the tables, and write them to `out=` if given."""
    from rich.console import Console
    from rich.table import Table

    from moesaic.checkpoints import write_json
    from moesaic.errors import ConfigError
    from moesaic.recipe import parse_settings

    settings = parse_settings(BenchSettings, overrides)
    if settings.rounds < 2:
        raise ConfigError(f"rounds={settings.rounds} must be at least 2: quartiles need them")
    keep_freed_memory()
    console = Console()
    with Console(stderr=True).status("warming up") as status:
        result = run(rounds=settings.rounds, progress=status.update)
    if settings.out is not None:
        path = Path(settings.out).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    if as_json:
        console.print_json(json.dumps(result))
        return
    s = result["settings"]
    titles = {
        "linear": f"one linear, forward and backward: {s['tokens']} tokens, d={s['d']}, E={s['experts']}, r={s['r']}",
        "model_step": "training step: Llama, 4 layers, d=512, all seven linears, AdamW",
    }
    for key, title in titles.items():
        view = Table(title=title)
        columns = ["arm", "ms", "ratio to LoRA of rank 64", "quartiles"]
        columns += ["overhead, share of the loop's"] if key == "linear" else []
        for column in columns:
            view.add_column(column, justify="left" if column == "arm" else "right")
        for name, row in result[key].items():
            cells = [name, f"{row['ms']:.1f}", f"{row['ratio']:.3f}", f"{row['low']:.2f} to {row['high']:.2f}"]
            share = result["linear_overhead_share_of_loop"].get(name)
            view.add_row(*cells, *([f"{share:.0%}" if share is not None else ""] if key == "linear" else []))
        console.print(view)
    view = Table(title="peak memory added by a training step, fresh process each")
    for column in ("arm", "MiB", "ratio to LoRA of rank 64"):
        view.add_column(column, justify="left" if column == "arm" else "right")
    for name, row in result["peak_memory_mib"].items():
        view.add_row(name, f"{row['mib']:.0f}", f"{row['ratio']:.3f}")
    console.print(view)
