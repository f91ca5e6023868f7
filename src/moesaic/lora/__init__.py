"""Experts are LoRA pairs beside a frozen linear, trained here: the machine. Its methods are in `methods/`."""

from __future__ import annotations

import importlib
from typing import Any

import peft  # noqa: F401  first: with it, the methods of every room are registered (moesaic/_registration.py)

from moesaic.lora.config import METHODS, MixtureConfig
from moesaic.lora.layer import MixtureLinear
from moesaic.lora.mix import mix

importlib.import_module(f"{__name__}.methods")

__all__ = ["METHODS", "MixtureConfig", "MixtureLinear", "mix"]


def __getattr__(name: str) -> Any:
    """Config classes by name: `from moesaic.lora import HotMoEConfig`."""
    for config in METHODS.values():
        if config.__name__ == name:
            return config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
