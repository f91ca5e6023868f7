"""A state, in a folder: numbers in safetensors, the rest in JSON, with a checksum of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import AdapterError
from moesaic.runs.folder import write_json

ARRAYS, VALUES = "state.safetensors", "state.json"


def write_state(folder: Path, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any], *, version: int) -> None:
    """Write both files into a folder that is there; `values` is what JSON can hold."""
    from safetensors.numpy import save_file

    save_file({name: np.array(held, order="C") for name, held in arrays.items()}, folder / ARRAYS)
    whole = {"format": version, **values}
    write_json(folder / VALUES, {**whole, "checksum": _checksum(folder, whole)})


def read_state(folder: Path, *, version: int) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """What `write_state` wrote.

    Raises:
        AdapterError: it is of another version, or not as it was written.
        Exception: whatever safetensors and JSON make of damage.
    """
    from safetensors.numpy import load_file

    values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
    if values["format"] != version:
        raise AdapterError("it is of another version of moesaic")
    if values.pop("checksum", None) != _checksum(folder, values):
        raise AdapterError("its files are not as they were written")
    return load_file(folder / ARRAYS), values


def _checksum(folder: Path, values: Mapping[str, Any]) -> str:
    found = hashlib.sha256((folder / ARRAYS).read_bytes())
    found.update(json.dumps(values, sort_keys=True).encode())
    return found.hexdigest()
