"""What a CUDA device shows, in under eight minutes: `make gpu`, or `python scripts/gpu.py [WIDTH ...]`.

Tests that are marked gpu, then `moesaic bench` at the widths of a 1B and an 8B base, with random weights of bf16:
training steps, decoding step by step and as one captured graph, and the crossover of backends, which is kept for this
device. Writes results/bench-cuda-WIDTH.json, prints a short table last. Without a CUDA device: the tests skip, and no
more is done.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
SECONDS = 450
WIDTHS = ("2048", "4096")
METHODS = "mola,dynmole,hotmoe,hydralora,lora-mixer,rmoe"
SUITES = ("train", "decode", "crossover", "compiled")
"""In the order of their worth: each is written when it ends."""
PYTHON = [sys.executable, "-m"]


def main(widths: list[str], *, device: str = "cuda", rounds: int = 10, folder: Path = ROOT / "results") -> int:
    end = time.monotonic() + SECONDS
    failed = subprocess.run([*PYTHON, "pytest", "-m", "gpu", "-q"], cwd=ROOT, timeout=SECONDS).returncode
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return failed
    files = {width: folder / f"bench-{device}-{width}.json" for width in widths}
    for suite in SUITES:
        for width, file in files.items():
            failed |= bench(suite, width, file, device, rounds, left=end - time.monotonic())
    for width, file in files.items():
        if file.exists():
            print(table(width, json.loads(file.read_text())))
    return failed


def bench(suite: str, width: str, file: Path, device: str, rounds: int, *, left: float) -> int:
    """One suite at one width, within the seconds that are left."""
    settings = [f"device={device}", "dtype=bfloat16", f"d={width}", "layers=2", f"methods={METHODS}"]
    command = [*PYTHON, "moesaic", "bench", *settings, f"suites={suite}", f"rounds={rounds}", f"out={file}"]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=max(left, 1), stdout=subprocess.DEVNULL).returncode
    except subprocess.TimeoutExpired:
        print(f"{suite} at d={width}: no time left")
        return 1


def table(width: str, found: dict[str, Any]) -> str:
    """Ratios to LoRA of the same total rank."""
    kinds = {"train": found.get("model_step"), "captured": found.get("compiled")}
    kinds |= {f"decode, {rows} rows": table for rows, table in found.get("decode", {}).items()}
    measured = {kind: rows for kind, rows in kinds.items() if rows}
    limit = f", rank space up to E*r = {found['crossover']['limit']}" if "crossover" in found else ""
    names = list(dict.fromkeys(name for rows in measured.values() for name in rows))
    lines = [f"{found['machine']['device']}, d={width}, bf16: time, LoRA of rank 64 is 1{limit}"]
    lines.append(f"{'':24}" + "".join(f"{kind:>17}" for kind in measured))
    for name in names:
        cells = (f"{rows[name]['ratio']:17.2f}" if name in rows else f"{'':17}" for rows in measured.values())
        lines.append(f"{name:24}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(WIDTHS)))
