"""moesaic: turn what you have into a routed mixture of experts, and see what the router did.

Importing it makes PEFT know the methods: `PeftModel.from_pretrained` and `get_peft_model` work with their configs.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from moesaic.lora.registration import register_with_peft
from moesaic.models import nano

__version__ = "0.1.0"

_HOMES = {
    "trace": "moesaic.host",
    "routing_tasks": "moesaic.host",
    "routing_scores": "moesaic.host",
    "routing_prompt_length": "moesaic.host",
    "routing_prompts": "moesaic.adapters.prompts",
    "set_training_progress": "moesaic.host",
    "router_aux_loss": "moesaic.host",
    "RoutedTrainerMixin": "moesaic.host",
    "RoutingCallback": "moesaic.host.callback",
    "RoutingTrace": "moesaic.routing",
    "mix": "moesaic.lora.mix",
    "from_pretrained": "moesaic.lora.loading",
    "matched": "moesaic.training.budget",
}

sys.modules[f"{__name__}.nano"] = nano
register_with_peft("moesaic.lora.methods", "moesaic.adapters")


def __getattr__(name: str) -> Any:
    """Public names, loaded when first used: importing moesaic alone must not import torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name.endswith("Config"):
        return getattr(importlib.import_module("moesaic.lora"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """All of them, the methods' configs too: whoever asks waits for torch."""
    methods = importlib.import_module("moesaic.lora").METHODS
    return sorted({*globals(), *_HOMES, *(config.__name__ for config in methods.values())})
