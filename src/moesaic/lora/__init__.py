"""Experts are LoRA pairs beside a frozen linear, trained here: the machine. Its methods are in `methods/`."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {"METHODS": "config", "MixtureConfig": "config", "MixtureLinear": "layer"}


def __getattr__(name: str) -> Any:
    """The machine's classes and the methods' config classes by name, loaded when first used."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name.endswith("Config"):
        for config in importlib.import_module(f"{__name__}.config").METHODS.values():
            if config.__name__ == name:
                return config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
