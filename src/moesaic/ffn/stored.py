"""Converted models in folders: read back whole, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from moesaic.errors import AdapterError, ConfigError, first_line
from moesaic.ffn.model import PREFIX, routed_class
from moesaic.routing import Router

_UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError, StrictDataclassError
)  # fmt: skip


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A converted model from the folder that `save_pretrained` wrote; `kwargs` as `from_pretrained` takes them.

    Args:
        folder: of the model, or of a run that trained it.

    Raises:
        AdapterError: the folder holds none, or one that is damaged.
    """
    inner = Path(folder) / "model"
    place = inner if is_converted(inner) and not is_converted(folder) else Path(folder)
    return read(class_of(place), place, **kwargs)


def read(made: type[PreTrainedModel], folder: Path, **kwargs: Any) -> PreTrainedModel:
    """`from_pretrained`, in which nothing may be missing. Raises AdapterError."""
    try:
        loaded: Any = made.from_pretrained(folder, output_loading_info=True, **kwargs)
    except ConfigError as error:
        raise AdapterError(f"{folder} is damaged: {error}") from None
    except _UNREADABLE as error:
        raise AdapterError(f"{folder} cannot be read: {first_line(error)}") from None
    model, found = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[what]:
            first = min(map(str, found[what]))
            raise AdapterError(
                f"{folder} is damaged: {what.replace('_', ' ')} in its weights, {len(found[what])}, such as {first}"
            )
    _keep_routers(model)
    return cast(PreTrainedModel, model)


def _keep_routers(model: PreTrainedModel) -> None:
    """Bring routers whose weights Accelerate would bring and take away: they are small, and read past their modules."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for module in (inner for router in routers for inner in router.modules()):
        hook: Any = getattr(module, "_hf_hook", None)
        if getattr(hook, "offload", False):
            hook.pre_forward(module)
            hook.offload = False


def is_converted(folder: str | Path) -> bool:
    return str(described(folder).get("model_type", "")).startswith(PREFIX)


def class_of(folder: str | Path) -> type[PreTrainedModel]:
    """The class that a folder was written by, made again and told to Transformers' Auto classes.

    Raises:
        AdapterError: where the folder holds none of ours.
    """
    found = described(folder)
    architecture = found.get("architectures")
    if not is_converted(folder):
        raise AdapterError(f"{folder} holds no converted model: `moesaic convert` makes one")
    name = str(architecture[0] if isinstance(architecture, list) and architecture else "").removeprefix("Moesaic")
    base = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)) or not isinstance(found.get("moesaic"), dict):
        raise AdapterError(f"{folder}/config.json is damaged: restore it, or convert the model again")
    return routed_class(base)  # type: ignore[arg-type]


def described(folder: str | Path) -> dict[str, Any]:
    """What its config.json says; nothing where there is none that can be read."""
    try:
        found = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
