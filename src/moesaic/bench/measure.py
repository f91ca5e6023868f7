"""How it is measured: arms in turn, ratios round by round, memory in fresh processes, kernels by the profiler."""

from __future__ import annotations

import gc
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.overrides import _pop_mode_temporarily
from torch.profiler import ProfilerActivity, profile

from moesaic.bench.arms import Size, Step

Seconds = dict[str, list[float]]


def interleave(steps: dict[str, Step], rounds: int, *, progress: Callable[[int, int], None]) -> Seconds:
    """Seconds of every step, `rounds` times in turn after two warm-up rounds, in a new order each round."""
    seconds: Seconds = {name: [] for name in steps}
    names, order, on_gpu = list(steps), random.Random(0), torch.get_default_device().type == "cuda"
    with as_users():
        for index in range(rounds + 2):
            progress(index, rounds + 2)
            order.shuffle(names)
            for name in names:
                start = time.perf_counter()
                steps[name]()
                if on_gpu:
                    torch.cuda.synchronize()
                if index >= 2:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def as_users() -> AbstractContextManager[Any]:
    """Without `with torch.device(...)`, by which models are made: it calls Python for each call of torch.

    In decoding that is a tenth of LoRA's step, and more of a mixture's.
    """
    return _pop_mode_temporarily() if torch._C._len_torch_function_stack() else nullcontext()


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles of a ratio."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"ratio": middle, "low": low, "high": high}


def table(seconds: Seconds, reference: str) -> dict[str, dict[str, float]]:
    """Median milliseconds, and the ratio to `reference` round by round."""
    return {
        name: {
            "ms": statistics.median(values) * 1e3,
            **spread([a / b for a, b in zip(values, seconds[reference], strict=True)]),
        }
        for name, values in seconds.items()
    }


def each_of(number: int, seconds: Seconds) -> Seconds:
    """Seconds of one of so many that were timed together."""
    return {name: [value / number for value in values] for name, values in seconds.items()}


def overhead_share(seconds: Seconds, *, base: str, loop: str) -> dict[str, float]:
    """Each arm's overhead over `base`, as a share of `loop`'s: median over rounds."""
    return {
        name: statistics.median((v - b) / (w - b) for v, b, w in zip(values, seconds[base], seconds[loop], strict=True))
        for name, values in seconds.items()
        if name not in (base, loop)
    }


def ceiling(dtype: torch.dtype, *, n: int = 2048, megabytes: int = 256) -> dict[str, float]:
    """What the device does at its best: a product of (n, n) matrices, and a copy of what no cache holds; of 8 each."""
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    source = torch.zeros(megabytes * 2**18)
    target = torch.zeros_like(source)
    steps: dict[str, Step] = {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}  # type: ignore[dict-item]
    seconds = {name: min(own) for name, own in interleave(steps, 8, progress=lambda index, total: None).items()}
    moved = 2 * source.numel() * source.element_size()
    return {"gflops": 2 * n**3 / seconds["product"] / 1e9, "gigabytes_per_second": moved / seconds["copy"] / 1e9}


# -- kernels ----------------------------------------------------------------------------------------------------------

_NO_KERNEL = {
    "aten::_local_scalar_dense",
    "aten::_reshape_alias",
    "aten::_unsafe_view",
    "aten::alias",
    "aten::as_strided",
    "aten::broadcast_tensors",
    "aten::chunk",
    "aten::contiguous",
    "aten::detach",
    "aten::detach_",
    "aten::diagonal",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::expand",
    "aten::expand_as",
    "aten::flatten",
    "aten::is_nonzero",
    "aten::item",
    "aten::lift_fresh",
    "aten::movedim",
    "aten::narrow",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::numpy_T",
    "aten::permute",
    "aten::reshape",
    "aten::reshape_as",
    "aten::resize_",
    "aten::resolve_conj",
    "aten::resolve_neg",
    "aten::result_type",
    "aten::select",
    "aten::slice",
    "aten::split",
    "aten::split_with_sizes",
    "aten::squeeze",
    "aten::t",
    "aten::to",
    "aten::transpose",
    "aten::unbind",
    "aten::unflatten",
    "aten::unsqueeze",
    "aten::view",
    "aten::view_as",
}
"""Operators that make views, metadata or memory, where nothing below them computes."""

_ONE_KERNEL = frozenset({"aten::_grouped_mm"})
"""Operators that are one kernel on a GPU, whatever the CPU does for them."""


def kernels(step: Step) -> dict[str, int]:
    """What the profiler sees of one step on the CPU.

    `events` are all of torch's operators, those that others call included; `kernels`, operators below which no other
    computes, views and memory left out; `syncs`, reads of a value by Python, which on a GPU wait for it.
    """
    step()
    with _quiet(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events: Any = profiled.events()
    found = [_computing(event) for event in events if event.cpu_parent is None]
    operators = sum(event.name.startswith("aten::") for event in events)
    return {"events": operators, "kernels": sum(k for k, _ in found), "syncs": sum(s for _, s in found)}


@contextmanager
def _quiet() -> Iterator[None]:
    """No standard error, on which some builds of the profiler tell of every start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _computing(event: Any) -> tuple[int, int]:
    """Kernels and syncs of an operator and all below it."""
    if event.name in _ONE_KERNEL:
        return 1, 0
    below = [_computing(child) for child in event.cpu_children]
    kernels, syncs = sum(k for k, _ in below), sum(s for _, s in below)
    if event.name == "aten::_local_scalar_dense":
        syncs += 1
    return kernels or int(event.name.startswith("aten::") and event.name not in _NO_KERNEL), syncs


# -- memory -----------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Start this process again with an allocator that keeps what is freed, as CUDA's does; glibc only.

    By default glibc gives blocks of megabytes back to the system and gets them zeroed anew each step. That costs all
    arms alike, but its noise is larger than the differences to be measured.
    """
    settings = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_MAX_": "0"}
    if platform.libc_ver()[0] == "glibc" and not settings.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **settings})


def can_measure_memory() -> bool:
    """Linux only: the figures are read from /proc."""
    return Path("/proc/self/clear_refs").exists()


def peak_memory(name: str, size: Size) -> float:
    """MiB that training steps of an arm add to a fresh process, at their peak."""
    return in_fresh_process(f"from moesaic.bench import suite; print(suite.measure_peak({name!r}, {size!r}))")


def in_fresh_process(code: str) -> float:
    """The number that `code` prints last, in a process whose memory is resident while it is used and no longer."""
    # Blocks above 64 KiB go back to the system when freed, so that what is resident is what is used.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_MAX_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **settings}
    )
    return float(done.stdout.strip().splitlines()[-1])


def peak_of(step: Step) -> float:
    """The highest resident memory of three steps, less that before the first, in MiB; on a GPU what is allocated."""
    torch.set_num_threads(1)
    gc.collect()
    if torch.get_default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """A figure of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
