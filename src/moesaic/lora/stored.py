"""One LoRA adapter that somebody already trained, read as an expert: never changed, never copied whole into memory.

An adapter is a folder as PEFT writes it, `adapter_config.json` and `adapter_model.safetensors`. Its module m has
A (r, d_in), B (d_out, r) and a scaling s = alpha/r, or alpha/sqrt(r) with rsLoRA; `rank_pattern` and `alpha_pattern`
may say otherwise for single modules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic.errors import AdapterError, first_line, path_of
from moesaic.models.embedded import fetched_only

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_PREFIX = "base_model.model."
_HEADS = f"{_PREFIX}task_heads."
"""Of encoders: the only thing beside LoRA that an expert may bring along."""
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_REFUSED = {
    "use_dora": "DoRA rescales by the norm of the whole updated weight, so it is no sum of experts",
    "lora_bias": "a bias on B is not routed",
    "use_qalora": "QALoRA pools its input",
    "alora_invocation_tokens": "an activated LoRA is off for a part of the tokens",
    "layer_replication": "it adapts another model than the base: layers are replicated",
    "target_parameters": "it adapts parameters, not linear layers",
    "trainable_token_indices": "it trains token embeddings, which are not routed",
    "use_bdlora": "its factors are block-diagonal",
    "velora_config": "VeLoRA's factors are not those of LoRA",
    "monteclora_config": "its factors are drawn, not fixed",
    "kasa_config": "it has a factor more than LoRA",
    "arrow_config": "it is a router over other adapters: name those",
}
"""Settings of a LoRA adapter that make it something else than s B A x, and why they cannot be had."""
DTYPES = ("F32", "BF16", "F16", "F64")
LARGEST = 1e6
"""Of factors that scale what is added: beyond it float32 has no digits left for the rest."""


@dataclass(frozen=True)
class Factor:
    """What an expert has at one module."""

    rank: int
    d_in: int
    d_out: int
    scaling: float
    keys: tuple[str, str]
    """Names of A and B in the file."""


@dataclass(frozen=True)
class StoredExpert:
    """One adapter: what its config and its file's header say. `extras` are the names of tensors that are not LoRA's."""

    name: str
    folder: Path
    base: str
    config: dict[str, Any] = field(repr=False)
    factors: dict[str, Factor] = field(repr=False)
    extras: tuple[str, ...] = field(repr=False)

    @property
    def file(self) -> Path:
        return self.folder / WEIGHTS

    def read(self, module: str) -> tuple[Tensor, Tensor]:
        """A (r, d_in) and B (d_out, r) at a module that it has.

        Raises:
            AdapterError: the file was changed since, or holds numbers that are not finite.
        """
        found = self.tensors(self.factors[module].keys)
        return found[0], found[1]

    def tensors(self, keys: Sequence[str]) -> list[Tensor]:
        """Some of the file's tensors. Raises AdapterError where they cannot be read or are not finite."""
        try:
            with safe_open(self.file, framework="pt") as opened:
                found = [opened.get_tensor(key) for key in keys]
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{self.file} is damaged or truncated ({first_line(error)}): restore it") from None
        for key, tensor in zip(keys, found, strict=True):
            if not bool(tensor.isfinite().all()):
                raise AdapterError(f"{self.file} is damaged: {key} holds numbers that are not finite")
        return found


def read_expert(folder: str | Path, name: str | None = None) -> StoredExpert:
    """Read an adapter's config and its file's header; no weights.

    Args:
        folder: a folder as PEFT writes it, a run folder that holds one in `adapter/`, a Trainer's output folder, or a
            hub id.
        name: of the expert; the folder's own where None.
    Raises:
        AdapterError: there is none, it is damaged, or it is of a kind that is no sum of experts.
    """
    path = _place(folder)
    called = name_of(folder) if name is None else name
    path = adapter_in(path) or path
    config = _config(path)
    for key, why in _REFUSED.items():
        if config.get(key):
            raise AdapterError(f"{path} cannot be an expert: {key}={config[key]!r}, and {why}")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise AdapterError(
            f"{path} cannot be an expert: init_lora_weights={start!r} changed the base model's own weights; convert it "
            "to plain LoRA (path_initial_model_for_weight_conversion of PEFT)"
        )
    if (config.get("bias") or "none") != "none":
        raise AdapterError(f"{path} cannot be an expert: bias={config['bias']!r}, and a trained bias is not routed")
    shapes = tensor_shapes(path, expert=True)
    sides: dict[str, dict[str, str]] = {}
    extras = []
    for key in shapes:
        found = _FACTOR.fullmatch(key)
        if found:
            sides.setdefault(found["module"].removeprefix(_PREFIX), {})[found["side"]] = key
        elif ".lora_" in key:
            raise AdapterError(f"{path} cannot be an expert: {key} is no factor of a linear layer")
        else:
            extras.append(key)
    if not sides:
        raise AdapterError(f"{path} holds no LoRA of a linear layer")
    whole = next((key for key in extras if not key.startswith(_HEADS)), None)
    if whole is not None:
        raise AdapterError(f"{path} cannot be an expert: it also trained {whole} as a whole, which is not routed")
    factors = {module: _factor(path, config, module, keys, shapes) for module, keys in sorted(sides.items())}
    base = str(config.get("base_model_name_or_path") or "")
    return StoredExpert(called, path, base, config, factors, tuple(extras))


def adapter_in(folder: Path) -> Path | None:
    """The adapter that a folder is, or holds in `adapter/`; else, as a Trainer leaves them, its newest checkpoint's."""
    steps = {int(p.name.split("-")[1]): p for p in folder.glob("checkpoint-*") if p.name.split("-")[1].isdecimal()}
    places = (folder, folder / "adapter", *(steps[number] for number in sorted(steps, reverse=True)))
    return next((place for place in places if (place / CONFIG).is_file()), None)


def name_of(folder: str | Path) -> str:
    """What an adapter is called where nobody names it: as its folder, or as the run whose `adapter/` it is."""
    path = Path(folder).expanduser()
    return path.parent.name if path.name == "adapter" else path.name


def _place(folder: str | Path) -> Path:
    """A local folder, or the folder that a hub id was fetched to."""
    if not isinstance(folder, (str, Path)) or not str(folder):
        raise AdapterError(f"{folder!r} must be the path of an adapter's folder, or a hub id")
    path = path_of(folder)
    if path.is_dir():
        return path
    if path.exists():
        raise AdapterError(f"{path} is a file: name the adapter's folder")
    if path.is_absolute() or str(folder).count("/") != 1 or str(folder).startswith((".", "~")) or path.parent.is_dir():
        raise AdapterError(f"there is no adapter folder {path}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(str(folder), allow_patterns=[CONFIG, WEIGHTS], local_files_only=fetched_only(str(folder)))
        )
    except (OSError, ValueError, HFValidationError) as error:
        raise AdapterError(f"{folder} is no folder, and no adapter of the hub either: {first_line(error)}") from None


def _config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise AdapterError(f"{path} is no adapter folder: it has no {CONFIG}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file} cannot be read: {first_line(error)}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != "LORA":
        raise AdapterError(f"{path} holds an adapter of type {kind!r}; experts are LoRA adapters")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(_is_number(value) for value in pattern.values()):
            raise AdapterError(f"{file} is damaged: {key} must hold numbers by module")
    if not all(_is_number(config.get(key, 8)) and config.get(key, 8) > 0 for key in ("r", "lora_alpha")):
        raise AdapterError(f"{file} is damaged: r and lora_alpha must be numbers above 0")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def tensor_shapes(path: Path, *, expert: bool = False) -> dict[str, tuple[int, ...]]:
    """Shape by name of an adapter folder's tensors, from its file's header.

    Raises:
        AdapterError: it has none; or, of an `expert`, one that is no factor's.
    """
    file = path / WEIGHTS
    if not file.is_file():
        hint = f"; its {PICKLE} is not read, since it may run code: convert it to safetensors"
        raise AdapterError(f"{path} has no {WEIGHTS}{hint if (path / PICKLE).is_file() else ''}")
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            strange = next((key for key, found in slices.items() if found.get_dtype() not in DTYPES), None)
            if expert and strange is not None:
                raise AdapterError(
                    f"{file} cannot be an expert: {strange} is of {slices[strange].get_dtype()}, and factors are of "
                    f"{', '.join(DTYPES)}"
                )
            return {key: tuple(found.get_shape()) for key, found in slices.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged or truncated ({first_line(error)}): restore it from a copy") from None


def _factor(
    path: Path, config: dict[str, Any], module: str, keys: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> Factor:
    if len(keys) < 2:
        raise AdapterError(f"{path} is damaged: {module} has lora_{next(iter(keys))} without the other factor")
    a, b = shapes[keys["A"]], shapes[keys["B"]]
    if len(a) != 2 or len(b) != 2:
        raise AdapterError(f"{path} cannot be an expert: {module} is a convolution, not a linear layer")
    if not a[0]:
        raise AdapterError(f"{path} is damaged: {module} has rank 0")
    rank, alpha = (
        _by_pattern(path, config, module, *names) for names in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    if a[0] != b[1] or a[0] != rank:
        raise AdapterError(f"{path} is damaged: {module} has rank {rank:g} by its config, and A {a}, B {b}")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if abs(scaling) > LARGEST:
        raise AdapterError(f"{path} is damaged: {module} is scaled by {scaling:g}, above {LARGEST:g}")
    return Factor(a[0], a[1], b[0], scaling, (keys["A"], keys["B"]))


def _by_pattern(path: Path, config: dict[str, Any], module: str, pattern: str, plain: str) -> float:
    """What PEFT takes for a module: its pattern's first fitting entry, else the plain setting."""
    from peft.utils.other import get_pattern_key

    entries: dict[str, float] = config.get(pattern) or {}
    try:
        return float(entries.get(get_pattern_key(list(entries), module), config.get(plain, 8)))
    except re.error as error:
        raise AdapterError(f"{path} is damaged: {pattern} is no regular expression: {first_line(error)}") from None
