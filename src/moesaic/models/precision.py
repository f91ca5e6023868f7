"""Which device, in which numbers: one decision for training and evaluation."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Numerics:
    """`autocast`: bf16 autocast around forwards. `weights`: type of the frozen weights. `attention`: implementation."""

    device: torch.device
    autocast: bool
    weights: torch.dtype
    attention: str | None

    def context(self) -> contextlib.AbstractContextManager[Any]:
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def numerics(precision: str) -> Numerics:
    """What `auto`, `bf16` or `fp32` means on this machine.

    Under bf16 autocast frozen weights are kept in bf16, or they would be cast anew in every product (on a CPU a
    forward of SmolLM2 took 1.3 times as long, a decoding step 1.8 times). On a CPU the backward of the fused attention
    kernel is four times slower in bf16 than plain matrix products (measured at 48 x 52 tokens, 12 heads), so those are
    used there.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = precision == "bf16" or (precision == "auto" and bf16_pays(device))
    weights = torch.bfloat16 if bf16 else torch.float32
    return Numerics(device, bf16, weights, "eager" if bf16 and device.type == "cpu" else None)


def bf16_pays(device: torch.device) -> bool:
    """Whether bf16 autocast is faster than fp32: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
