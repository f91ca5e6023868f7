"""A classifier in a folder. Nothing in it is run when it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesaic.errors import AdapterError, ConfigError, first_line, path_of
from moesaic.runs.folder import atomic_folder, check_writable, writing
from moesaic.runs.states import ARRAYS, VALUES, read_state, write_state
from moesaic.trees.graph import decode, encode

FORMAT = 2
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
    place = path_of(folder)
    check_writable(place, f"folder={folder}")
    if place.exists() and (not place.is_dir() or {entry.name for entry in place.iterdir()} - {ARRAYS, VALUES}):
        raise ConfigError(f"{folder} holds files that are not a classifier's; name another folder")
    if place.exists() and not overwrite:
        raise ConfigError(f"{folder} is already there; overwrite=True replaces it")
    arrays, values = core.state()
    tables, more = encode(face, FACE)
    try:
        with writing(place), atomic_folder(place) as staging:
            write_state(staging, {**arrays, **more}, {"face": tables, "core": values}, version=FORMAT)
    except UnicodeEncodeError:
        raise AdapterError("a label or a feature's name holds half of a character: it cannot be written") from None


def read(folder: str | Path, make: Callable[[Any], tuple[Any, Any]]) -> Any:
    """What `write` wrote; it goes on exactly.

    Args:
        make: of the face, the classifier and its core, whose `restore` is called.
    Raises:
        AdapterError: there is none, it is damaged, or of another version.
    """
    place = path_of(folder)
    try:
        arrays, values = read_state(place, version=FORMAT)
        made, core = make(decode(values["face"], arrays, FACE))
        core.restore({name: held.copy() for name, held in arrays.items() if not name.startswith(FACE)}, values["core"])
    except Exception as error:  # whatever safetensors, JSON and parts make of damage
        raise AdapterError(f"{folder} cannot be read: {first_line(error)}") from None
    return made
