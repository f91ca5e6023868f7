"""A classifier in a folder: numbers in safetensors, the rest in JSON. Nothing in it is run when it is read.

state.safetensors  state.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.errors import AdapterError, ConfigError, first_line, path_of
from moesaic.runs.folder import atomic_folder, check_writable, write_json, writing
from moesaic.trees.graph import decode, encode

FORMAT = 1
ARRAYS, VALUES = "state.safetensors", "state.json"


def save(classifier: Any, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a `DriftMoEClassifier`, with all that it has learned, whole or not at all.

    Raises:
        ConfigError: the folder is there, and is not to be replaced; or it holds anything else.
        AdapterError: a label, a feature's name or an expert is of a kind that cannot be written.
    """
    from safetensors.numpy import save_file

    place = path_of(folder)
    check_writable(place, f"folder={folder}")
    if place.exists() and (not place.is_dir() or {entry.name for entry in place.iterdir()} - {ARRAYS, VALUES}):
        raise ConfigError(f"{folder} holds files that are not a classifier's; name another folder")
    if place.exists() and not overwrite:
        raise ConfigError(f"{folder} is already there; overwrite=True replaces it")
    arrays, values = classifier.core.state()
    given = {name: getattr(classifier, name) for name in classifier._get_params()}
    tables, more = encode([given, list(classifier.places), classifier.labels], "face.")
    arrays = {name: np.array(held, order="C") for name, held in {**arrays, **more}.items()}
    with writing(place), atomic_folder(place) as staging:
        save_file(arrays, staging / ARRAYS)
        write_json(staging / VALUES, {"format": FORMAT, "face": tables, "core": values})


def load(folder: str | Path) -> Any:
    """The `DriftMoEClassifier` that `save` wrote; it goes on exactly.

    Raises:
        AdapterError: there is none, it is damaged, or of another version.
    """
    from safetensors.numpy import load_file

    from moesaic.trees.classifier import DriftMoEClassifier

    place = path_of(folder)
    try:
        values = json.loads((place / VALUES).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise AdapterError("it is of another version of moesaic")
        arrays = load_file(place / ARRAYS)
        given, places, labels = decode(values["face"], arrays, "face.")
        made = DriftMoEClassifier(**given)
        made.core.restore({k: v.copy() for k, v in arrays.items() if not k.startswith("face.")}, values["core"])
        made.known(places, labels)
    except Exception as error:  # whatever safetensors, JSON and parts make of damage
        raise AdapterError(f"{folder} cannot be read: {first_line(error)}") from None
    return made
