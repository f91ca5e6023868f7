"""Three small adapters of nano, and what is composed of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from moesaic.models.embedded import load_model

TASKS = ("up", "down", "max")


def make(place: Path) -> Path:
    """Three adapters of nano, of differing ranks and targets, and rows of their tasks."""
    for number, task in enumerate(TASKS):
        torch.manual_seed(number)
        targets = ["q_proj", "down_proj"] if number else ["q_proj"]
        config = LoraConfig(r=2 + number, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(load_model("nano").model, config)
        model.peft_config["default"].base_model_name_or_path = "nano"
        model.save_pretrained(str(place / task))
    for split in ("train", "validation"):
        rows = [{"task": t, "prompt": f"{i} 4 {t} =", "completion": f" {i}"} for t in TASKS for i in range(6)]
        (place / "data").mkdir(exist_ok=True)
        (place / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def asked(place: Path, out: Path, *settings: str) -> list[str]:
    adapters = ",".join(str(place / task) for task in TASKS)
    return ["compose", f"adapters={adapters}", "model=nano", f"out={out}", "adapter.ignore_base=true", *settings]


def tree(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")
