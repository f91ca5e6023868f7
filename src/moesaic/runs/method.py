"""Methods by name, as recipes name them, and their configs from `adapter.*` settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from moesaic.errors import ConfigError, MoesaicError, first_line, suggest
from moesaic.runs.settings import names

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Plain:
    """One of PEFT's own kinds of LoRA, without a router; `settings` are what makes it that kind."""

    summary: str
    paper: str
    settings: dict[str, bool]


PLAIN = {
    "lora": Plain("one LoRA pair a layer, no router (PEFT's own)", "Hu et al., ICLR 2022", {}),
    "rslora": Plain(
        "LoRA scaled by alpha/sqrt(r) instead of alpha/r (PEFT's own)",
        "rsLoRA, Kalajdzievski 2023 (arXiv 2312.03732)",
        {"use_rslora": True},
    ),
    "dora": Plain(
        "LoRA turns the weights, their norms are trained beside it (PEFT's own)",
        "DoRA, Liu et al., ICML 2024 (arXiv 2402.09353)",
        {"use_dora": True},
    ),
}

_SET_BY_PEFT = {
    "task_type",
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}
"""Fields of a PEFT config that record what a run found; set by hand they would belie it."""


OF_ADAPTERS = ("r", "rank_pattern", "lora_alpha", "use_rslora", "num_experts", "experts")
"""Settings that adapters which become experts bring along."""


def check_follows(adapter: dict[str, Any]) -> None:
    """Raise ConfigError for settings that would be asked of experts that are trained already."""
    for key in OF_ADAPTERS:
        if key in adapter:
            raise ConfigError(f"adapter.{key} follows from the adapters, which are what they are: leave it out")


def methods() -> dict[str, type]:
    """Name -> PEFT config class: PEFT's own kinds of LoRA and every registered mixture."""
    from peft import LoraConfig

    from moesaic.lora import METHODS

    return {**dict.fromkeys(PLAIN, LoraConfig), **METHODS}


def is_routed(method: str) -> bool:
    """Whether a method has routers; PEFT's own kinds of LoRA have none."""
    return method not in PLAIN


def adapter_settings(method: str) -> list[str]:
    """What may be set under `adapter.` for a method that is known."""
    return [f.name for f in fields(methods()[method]) if f.init and f.name not in _SET_BY_PEFT]


def all_adapter_settings() -> set[str]:
    """What may be set under `adapter.` for any method."""
    return {key for method in methods() for key in adapter_settings(method)}


def config_of(method: str, adapter: dict[str, Any], **defaults: Any) -> PeftConfig:
    """Build a method's PEFT config from `adapter.*`; `defaults` are used where that is silent and the method knows
    them. Modules to save are those of both.

    Raises:
        ConfigError: an unknown method or key (naming the nearest), or a value the config refuses.
    """
    known = methods()
    if method not in known:
        raise ConfigError(f"no method '{method}'; {suggest(method, known)}")
    cls = known[method]
    valid = adapter_settings(method)
    _check_kind(method, adapter)
    for key in adapter:
        if key not in valid:
            raise ConfigError(f"method {method} has no setting adapter.{key}; {suggest(key, valid)}")
    settings = {k: v for k, v in defaults.items() if k in names(cls)} | adapter
    if method in PLAIN:
        settings |= PLAIN[method].settings
    for key in ("target_modules", "modules_to_save"):
        if isinstance(settings.get(key), str) and settings[key].isidentifier():
            settings[key] = [settings[key]]  # PEFT takes a bare text for a regular expression on whole paths
    for key in [f.name for f in fields(cls) if "list[str]" in str(f.type)]:
        if isinstance(settings.get(key), list):
            settings[key] = [str(v) if type(v) is int else v for v in settings[key]]  # names such as 0,1
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(key) or {}, dict):
            raise ConfigError(f"adapter.{key}={settings[key]} must hold numbers by module name, {key}.NAME=4")
    heads = defaults.get("modules_to_save") or ()
    if isinstance(settings.get("modules_to_save"), list) or (heads and settings["modules_to_save"] is None):
        settings["modules_to_save"] = sorted({*(settings["modules_to_save"] or ()), *heads})
    try:
        config: PeftConfig = cls(**settings)
    except MoesaicError:
        raise
    except (TypeError, ValueError, re.error) as error:
        raise ConfigError(f"adapter settings of {method}: {first_line(error)}") from None
    return config


def _check_kind(method: str, adapter: dict[str, Any]) -> None:
    """Raise ConfigError for settings that would make the method another kind than its name says."""
    if is_routed(method):
        if adapter.get("use_dora"):
            raise ConfigError(
                f"adapter.use_dora=true cannot go with method={method}: DoRA rescales by the norm of the whole "
                "updated weight, which a gate changes at each token"
            )
        return
    for other, plain in PLAIN.items() if method == "lora" else ():
        for key in plain.settings:
            if adapter.get(key):
                raise ConfigError(f"adapter.{key}=true makes method=lora another one: method={other} is LoRA with it")
    for key, value in PLAIN[method].settings.items():
        if adapter.get(key, value) != value:
            raise ConfigError(
                f"adapter.{key}={str(adapter[key]).lower()} cannot go with method={method}, which is "
                "LoRA with it: leave it out, or method=lora"
            )
