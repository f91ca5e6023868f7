"""From which E*r on products over routed pairs alone are faster than rank space: measured on a device, kept for it.

`moesaic bench suites=crossover` measures it, for one dtype on one device, and keeps it in crossover.json beside the
models (see `models/gguf.py` for where). What was never measured goes by a constant.
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional as F

DTYPES = ("float32", "bfloat16", "float16")
LIMITS = {"cpu": 64, "cuda": 256}
"""Largest E*r at which rank space is taken although weights are sparse: measured on a CPU, arithmetic on a GPU."""

_kept: dict[tuple[str, torch.dtype], int] = {}
_asked: set[str] = set()
"""Kinds of devices whose file has been read."""


def limit(kind: str, dtype: torch.dtype) -> int:
    """Of the device that `kind` names, in a dtype."""
    if kind not in _asked and not torch.compiler.is_compiling():
        _asked.add(kind)
        _kept.update({(kind, getattr(torch, name)): value for name, value in read(kind).items()})
    return _kept.get((kind, dtype), LIMITS.get(kind, 256))


def keep(kind: str, dtype: str, limit: int) -> None:
    """Keep what was measured on this device beside what was before; other processes read it when they start."""
    try:
        found = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = {}
    found = found if isinstance(found, dict) else {}
    own = {**read(kind), dtype: limit}
    file().parent.mkdir(parents=True, exist_ok=True)
    part = file().with_suffix(f".{os.getpid()}")
    try:
        part.write_text(json.dumps({**found, device_name(kind): own}, indent=2) + "\n", encoding="utf-8")
        part.replace(file())
    finally:
        part.unlink(missing_ok=True)


def file() -> Path:
    from moesaic.models.gguf import cache_folder

    return cache_folder() / "crossover.json"


def device_name(kind: str) -> str:
    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"{kind} {platform.processor() or platform.machine()}"


def read(kind: str) -> dict[str, int]:
    """Name of a dtype -> limit, as measured on this device; empty where nothing is kept that can be read."""
    try:
        found = json.loads(file().read_text(encoding="utf-8"))[device_name(kind)]
        return {name: limit for name, limit in found.items() if name in DTYPES and type(limit) is int and limit >= 0}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


@cache
def runs_grouped(kind: str, dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` runs on a kind of device in a dtype, backwards too; where not, that is said once."""
    try:
        with torch.enable_grad(), torch.autocast(kind, enabled=False):
            rows = torch.zeros(8, 16, device=kind, dtype=dtype, requires_grad=True)
            matrices = torch.zeros(2, 16, 16, device=kind, dtype=dtype, requires_grad=True)
            ends = torch.tensor([4, 8], device=kind, dtype=torch.int32)
            F.grouped_mm(rows, matrices, offs=ends).backward(torch.ones_like(rows))
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"grouped products do not run on {kind} in {str(dtype).removeprefix('torch.')} ({reason}): every expert "
            "is computed for every token instead; set backend='rank' to choose that",
            stacklevel=2,
        )
        return False
    return True
