"""128 LoRA adapters on one base, routed by Arrow: `python scripts/many_adapters.py [NUMBER]`.

Writes the adapters, composes them, and prints what that takes: seconds, megabytes, and milliseconds a token against the
base alone and against 8 adapters.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from moesaic.bench import measure
from moesaic.lora import METHODS
from moesaic.models.embedded import load_model

TOKENS = 256


def main(number: int) -> None:
    torch.set_num_threads(1)
    ids = torch.randint(5, 500, (1, TOKENS))
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for index in range(number):
            torch.manual_seed(index)
            config = LoraConfig(
                r=4 + index % 5, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
            )
            folders.append(Path(scratch) / f"expert{index}")
            get_peft_model(load_model("nano").model, config).save_pretrained(str(folders[-1]))
        print(
            f"{number} adapters, {sum(f.stat().st_size for p in folders for f in p.iterdir()) / 2**20:.0f} MiB on disk"
        )

        def composed(count: int) -> Any:
            return get_peft_model(
                load_model("nano").model, METHODS["arrow"](adapters=[str(f) for f in folders[:count]])
            )

        start = time.perf_counter()
        model = composed(number)
        print(f"composed in {time.perf_counter() - start:.1f} s")
        models = {"base": load_model("nano").model.eval(), "8": composed(8).eval(), str(number): model.eval()}

        def step(chosen: Any) -> Any:
            def run() -> None:
                with torch.no_grad():
                    chosen(input_ids=ids)

            return run

        steps = {name: step(chosen) for name, chosen in models.items()}
        seconds = measure.interleave(steps, 8, progress=lambda done, of: None)
        for name, values in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(values, seconds["base"], strict=True))
            print(f"{name:>6}: {1e3 * statistics.median(values) / TOKENS:.3f} ms a token, {ratio:.2f} of the base's")
        if measure.can_measure_memory():
            whole = TOKENS * number * model.config.intermediate_size * 4 / 2**20
            added = measure.in_fresh_process(_PEAK.format(folders=[str(f) for f in folders], ids=ids.tolist()))
            print(f"a forward adds {added:.0f} MiB; one tokens x experts x width tensor would be {whole:.0f}")


_PEAK = """
import torch
from peft import get_peft_model
from moesaic.bench import measure
from moesaic.models.embedded import load_model
from moesaic.lora import METHODS

model = get_peft_model(load_model("nano").model, METHODS["arrow"](adapters={folders})).eval()
ids = torch.tensor({ids})

def step():
    with torch.no_grad():
        model(input_ids=ids)

print(measure.peak_of(step))
"""


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 128)
