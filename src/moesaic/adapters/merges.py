"""What people do with several LoRA adapters today: PEFT merges them into one. An arm to compare routing with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

MERGES: dict[str, dict[str, Any]] = {
    "merge-linear": {"combination_type": "linear", "weights": "mean"},
    "merge-svd": {"combination_type": "svd", "weights": "mean"},
    "merge-sum": {"combination_type": "cat", "weights": "sum"},
    "merge-ties": {"combination_type": "ties", "weights": "sum", "density": 0.5},
    "merge-dare-ties": {"combination_type": "dare_ties", "weights": "sum", "density": 0.5},
}
"""Settings of PEFT's `add_weighted_adapter`: every adapter at weight 1/E ("mean") or 1 ("sum")."""


def with_adapters(model: nn.Module, folders: Mapping[str, Path]) -> Any:
    """`model` as a PEFT model that holds the LoRA adapters in these folders, by name; modules saved whole stay out."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    wrapped: Any = None
    for name, folder in folders.items():
        config: Any = LoraConfig.from_pretrained(str(folder))
        config.modules_to_save = None
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        stored = load_file(folder / "adapter_model.safetensors")
        set_peft_model_state_dict(wrapped, {k: v for k, v in stored.items() if ".lora_" in k}, adapter_name=name)
    return wrapped


def merge(model: Any, how: str, *, seed: int = 0) -> None:
    """Have a model of `with_adapters` answer by the merge of all its adapters that `MERGES` calls `how`.

    Args:
        seed: of what a merge drops at random.
    """
    if how in model.peft_config:
        model.delete_adapter(how)
    adapters = [name for name in model.peft_config if name not in MERGES]
    settings = dict(MERGES[how])
    weight = 1.0 / len(adapters) if settings.pop("weights") == "mean" else 1.0
    torch.manual_seed(seed)
    model.add_weighted_adapter(adapters, [weight] * len(adapters), how, **settings)
    model.set_adapter(how)
