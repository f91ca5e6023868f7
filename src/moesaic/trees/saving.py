"""A classifier in a folder: numbers in safetensors, the rest in JSON. Nothing in it is run when it is read.

state.safetensors  state.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.errors import AdapterError, ConfigError, first_line, path_of
from moesaic.runs.folder import atomic_folder, check_writable, write_json, writing
from moesaic.trees.graph import decode, encode

FORMAT = 1
ARRAYS, VALUES = "state.safetensors", "state.json"
FACE = "face."


def write(face: Any, core: Any, folder: str | Path, *, overwrite: bool) -> None:
    """Write what a classifier was made with and knows, whole or not at all.

    Args:
        face: what `graph.encode` takes.
        core: what has a `state`.
    Raises:
        ConfigError: the folder is there, and is not to be replaced; or it holds anything else.
        AdapterError: part of `face`, or an expert, is of a kind that cannot be written.
    """
    from safetensors.numpy import save_file

    place = path_of(folder)
    check_writable(place, f"folder={folder}")
    if place.exists() and (not place.is_dir() or {entry.name for entry in place.iterdir()} - {ARRAYS, VALUES}):
        raise ConfigError(f"{folder} holds files that are not a classifier's; name another folder")
    if place.exists() and not overwrite:
        raise ConfigError(f"{folder} is already there; overwrite=True replaces it")
    arrays, values = core.state()
    tables, more = encode(face, FACE)
    arrays = {name: np.array(held, order="C") for name, held in {**arrays, **more}.items()}
    try:
        with writing(place), atomic_folder(place) as staging:
            save_file(arrays, staging / ARRAYS)
            write_json(staging / VALUES, {"format": FORMAT, "face": tables, "core": values})
    except UnicodeEncodeError:
        raise AdapterError("a label or a feature's name holds half of a character: it cannot be written") from None


def read(folder: str | Path, make: Callable[[Any], tuple[Any, Any]]) -> Any:
    """What `write` wrote; it goes on exactly.

    Args:
        make: of the face, the classifier and its core, whose `restore` is called.
    Raises:
        AdapterError: there is none, it is damaged, or of another version.
    """
    from safetensors.numpy import load_file

    place = path_of(folder)
    try:
        values = json.loads((place / VALUES).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise AdapterError("it is of another version of moesaic")
        arrays = load_file(place / ARRAYS)
        made, core = make(decode(values["face"], arrays, FACE))
        core.restore({name: held.copy() for name, held in arrays.items() if not name.startswith(FACE)}, values["core"])
    except Exception as error:  # whatever safetensors, JSON and parts make of damage
        raise AdapterError(f"{folder} cannot be read: {first_line(error)}") from None
    return made
