"""Quantised bases: a training step and a step of decoding, beside LoRA over the same base and the plain base."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from moesaic.bench import measure
from moesaic.bench.arms import LINEARS, Mixtures, Size, Step, lora, mixture, model_of, stepping, wrapped
from moesaic.bench.generating import Told, decoding
from moesaic.errors import ConfigError


def _bitsandbytes(**how: Any) -> Callable[[], Any]:
    return lambda: BitsAndBytesConfig(**how)


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


WAYS: dict[str, tuple[str, Callable[[], Any]]] = {
    "torchao, 8 bits": ("torchao", _torchao),
    "bitsandbytes, 8 bits": ("bitsandbytes", _bitsandbytes(load_in_8bit=True)),
    "bitsandbytes, 4 bits": ("bitsandbytes", _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
}
"""Name -> the package that it needs, and what makes Transformers' setting."""
METHODS = ("mola", "hotmoe")
"""Measured where no methods are named."""
PLAIN = "as it is"


def check() -> None:
    """Raise ConfigError where none of the packages is installed."""
    if not installed():
        raise ConfigError(
            "the suite quantised needs bitsandbytes or torchao: pip install bitsandbytes torchao, or name other suites"
        )


def installed() -> list[str]:
    return [name for name, (package, _) in WAYS.items() if find_spec(package)]


def run(names: Iterable[str], rounds: int, size: Size, told: Told) -> dict[str, Any]:
    """Kind -> base -> arm -> milliseconds and the ratio to LoRA over the same base; `to_plain`, to the same arm over
    the base as it is."""
    made = Mixtures.of(size)
    arms = {"lora": lora(LINEARS, rank=made.rank), **{name: mixture(name, LINEARS, made) for name in names}}
    steps: dict[str, dict[str, Step]] = {"training": {}, "decoding": {}}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model_of(size).save_pretrained(folder)
        bases = [PLAIN, *installed()]
        for base in bases:
            for name, config in arms.items():
                arm = f"{base}: {name}"
                steps["decoding"][arm] = decoding(wrapped(_loaded(folder, base), config).eval(), size, 1)
                steps["training"][arm] = stepping(wrapped(_loaded(folder, base), config).train(), config, size)
    found: dict[str, Any] = {}
    for kind, each in steps.items():
        seconds = measure.interleave(each, rounds, progress=told(f"quantised bases, {kind}"))
        if kind == "decoding":
            seconds = measure.each_of(size["new"], seconds)
        found[kind] = {base: _beside(seconds, base, list(arms)) for base in bases}
    return found


def _loaded(folder: str, base: str) -> Any:
    if base == PLAIN:
        return AutoModelForCausalLM.from_pretrained(folder)
    config = WAYS[base][1]()
    device = torch.get_default_device()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=device)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _beside(seconds: measure.Seconds, base: str, arms: list[str]) -> dict[str, Any]:
    own = measure.table({name: seconds[f"{base}: {name}"] for name in arms}, "lora")
    for name in arms:
        pair = {"own": seconds[f"{base}: {name}"], "plain": seconds[f"{PLAIN}: {name}"]}
        own[name]["to_plain"] = measure.table(pair, "plain")["own"]["ratio"]
    return own
