"""What `peft.LoraConfig` says beside the settings of a mixture: taken as it stands where it says nothing.

So that a script changes one config's name and no more. A setting of LoRA's that is left at its default asks for
nothing, in this release of PEFT as in the next; one that is set and has no meaning here is refused by its name.
"""

from __future__ import annotations

from abc import ABCMeta
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Any

from peft import LoraConfig

from moesaic.errors import ConfigError

_WHY = {
    "use_dora": "experts have no magnitude of their own; method dora is the plain one, to compare with",
    "target_parameters": "a router reads the input of a module, and fused 3-D parameters have none: name linears",
    "init_lora_weights": "experts start as no change, A drawn at random",
    "layer_replication": "repeat the base model's layers before it is wrapped",
    "arrow_config": "method arrow routes among adapters, and method glider with instructions",
    "fan_in_fan_out": "it is read off each layer",
    "loftq_config": "experts start as no change: quantise the base as you load it",
}


class TakesLoras(ABCMeta):
    """Makes a config also from keywords of `LoraConfig` that ask for nothing."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        own = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        return super().__call__(*args, **{k: v for k, v in kwargs.items() if k in own or not _asks_nothing(k, v)})


def _asks_nothing(key: str, value: Any) -> bool:
    """Whether it is a setting of LoRA's, at its default. Raises ConfigError for one that is not."""
    if key not in _loras():
        return False
    field = _loras()[key]
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is None or value == default or key == "fan_in_fan_out":
        return True
    why = f": {_WHY[key]}" if key in _WHY else ""
    raise ConfigError(f"{key}={value!r} is a setting of LoRA that no mixture has{why}. Leave it out")


@cache
def _loras() -> dict[str, Field[Any]]:
    return {f.name: f for f in fields(LoraConfig) if f.init}
