"""Loading a mixture onto a base model, with everything checked before the model is touched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moesaic.errors import AdapterError, MissingRouterWeights, MoesaicError, first_line
from moesaic.lora.config import METHODS, MixtureConfig
from moesaic.lora.factors import named_now
from moesaic.lora.stored import DTYPES
from moesaic.routing import Site


def from_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    ignore_base: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """Put the mixture in `folder` on `model`: `PeftModel.from_pretrained`, strict.

    Args:
        folder: an adapter folder, or a hub id (checked by PEFT only).
        adapter_name: name under which the mixture lives in the model.
        is_trainable: train on instead of using it.
        ignore_base: load although the adapter names another base model. Shapes are checked all the same.
        kwargs: passed on to `PeftModel.from_pretrained`.

    Raises:
        AdapterError: the folder is missing, damaged, of another method or for another base.
        MissingRouterWeights: it holds experts without their routers.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise AdapterError(f"folder={folder!r} must be the path of an adapter folder, or a hub id")
    path = Path(folder)
    kwargs = {**kwargs, "adapter_name": adapter_name, "is_trainable": is_trainable}
    if path.exists():
        check_folder(path, model=None if ignore_base else model)
        try:
            return PeftModel.from_pretrained(model, str(folder), **kwargs)
        except (KeyError, RuntimeError) as error:
            raise AdapterError(f"{folder} is damaged or does not fit this model: {first_line(error)}") from None
    try:
        return PeftModel.from_pretrained(model, str(folder), **kwargs)
    except (OSError, ValueError) as error:
        if isinstance(error, MoesaicError):
            raise
        raise AdapterError(f"{folder} is no folder, and no adapter of the hub either: {first_line(error)}") from None


def check_folder(path: Path, *, model: nn.Module | None = None, method: str | None = None) -> MixtureConfig:
    """Read the config and the tensors of an adapter folder, without a model.

    Args:
        model: also check that the adapter was made for this base model.
        method: also check that the adapter is of this method.

    Raises:
        AdapterError: see `from_pretrained`.
    """
    config = read_config(path)
    if method is not None and config.method != method:
        raise AdapterError(f"{path} holds a mixture of method {config.method!r}, not {method!r}")
    if model is not None:
        _check_base(path, config, model)
    keys, weights = check_tensors(path), path / "adapter_model.safetensors"
    experts, routers = ([k for k in keys if f".moe_lora_{part}" in k] for part in ("A", "router"))
    if not experts:
        raise AdapterError(f"{weights} holds no experts of a mixture")
    if not routers and config.router(Site("", d_in=1, d_out=1)).state_dict():
        raise MissingRouterWeights(f"{weights} holds experts but no routers: the mixture cannot be restored from it")
    return config


def check_tensors(path: Path) -> list[str]:
    """The names of an adapter folder's tensors.

    Raises:
        AdapterError: it has none, they cannot be read, or one holds numbers that are not finite.
    """
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        hint = "; it has adapter_model.bin, which is not read: convert it" if _has_pickle(path) else ""
        raise AdapterError(f"{path} has no adapter_model.safetensors{hint}")
    try:
        with safe_open(weights, framework="pt") as tensors:
            keys = list(tensors.keys())
            factors = [key for key in keys if any(name in key for name in ("lora_A", "lora_B", "lora_embedding_"))]
            strange = next((key for key in factors if tensors.get_slice(key).get_dtype() not in DTYPES), None)
            broken = next((key for key in keys if not bool(tensors.get_tensor(key).isfinite().all())), None)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{weights} is damaged or truncated ({error}): restore it from a copy") from None
    if strange is not None:
        raise AdapterError(f"{weights} is damaged: {strange} is none of {', '.join(DTYPES)}; restore it from a copy")
    if broken is not None:
        raise AdapterError(f"{weights} is damaged: {broken} holds numbers that are not finite; train it again")
    return keys


def saved_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, by the names that they are saved under now.

    Raises:
        SafetensorError, OSError: they cannot be read.
    """
    from safetensors.torch import load_file

    return {named_now(key): value for key, value in load_file(path / "adapter_model.safetensors").items()}


def read_config(path: Path) -> MixtureConfig:
    """The config of an adapter folder.

    Raises:
        AdapterError: when there is none, it cannot be read, or it is not a mixture's.
    """
    file = path / "adapter_config.json"
    if not file.is_file():
        inner = f"; that of this run is {path / 'adapter'}" if (path / "adapter" / file.name).is_file() else ""
        raise AdapterError(f"{path} is no adapter folder: it has no adapter_config.json{inner}")
    try:
        values = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from None
    known = sorted(str(cls.type.value) for cls in METHODS.values())
    if not isinstance(values, dict) or values.get("peft_type") not in known:
        found = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
        raise AdapterError(f"{path} holds an adapter of type {found!r}, which is no mixture of moesaic")
    try:
        config = PeftConfig.from_pretrained(str(path))
    except MoesaicError as error:
        raise AdapterError(f"{file}: {error}") from None
    except Exception as error:
        raise AdapterError(f"{file} is damaged: {first_line(error)}") from None
    assert isinstance(config, MixtureConfig)
    return config


def _check_base(path: Path, config: MixtureConfig, model: nn.Module) -> None:
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or getattr(model, "name_or_path", "")
    wanted = str(config.base_model_name_or_path or "")
    if not wanted or not name or Path(wanted).name == Path(name).name:
        return
    raise AdapterError(f"{path} was trained on {wanted!r}, not on {name!r}: pass ignore_base=True if they are the same")


def _has_pickle(path: Path) -> bool:
    return (path / "adapter_model.bin").exists()
