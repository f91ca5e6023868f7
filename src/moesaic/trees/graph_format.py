"""What a file of river's objects may name, and the tokens that it is made of; `graph.py` tells how they are used."""

from __future__ import annotations

import collections
import functools
import importlib
import operator
import types
from typing import Any

import numpy as np

from moesaic.errors import AdapterError

PACKAGES = {
    "anomaly", "base", "cluster", "compose", "covariance", "drift", "dummy", "ensemble", "feature_extraction",
    "feature_selection", "forest", "imblearn", "linear_model", "metrics", "misc", "model_selection", "multiclass",
    "naive_bayes", "neighbors", "optim", "preprocessing", "proba", "rules", "sketch", "stats", "tree", "utils",
}  # fmt: skip
"""Parts of river whose classes may be met: none of them reads files or the net."""
NATIVE: dict[tuple[str, str], tuple[Any, ...]] = {
    ("river._river_rust.drift", "AdaptiveWindowing"): (),
    ("river._river_rust.stats", "RsEWMean"): (0.5,),
    ("river._river_rust.stats", "RsEWVar"): (0.5,),
    ("river._river_rust.stats", "RsIQR"): (0.25, 0.75),
    ("river._river_rust.stats", "RsKurtosis"): (False,),
    ("river._river_rust.stats", "RsPeakToPeak"): (),
    ("river._river_rust.stats", "RsQuantile"): (),
    ("river._river_rust.stats", "RsSkew"): (False,),
}
"""Compiled classes, and what to call them with before their state is set, which holds all of it again."""
VECTORS = ("river._river_rust.vectordict", "VectorDict")
GAUSSIAN = ("river.proba.gaussian", "Gaussian")
SCALERS = {("river.preprocessing.scale", f"{name}Scaler") for name in ("Standard", "MinMax", "MaxAbs")}
"""Their `__setstate__` is for pickles of older releases."""
BUILTIN: dict[tuple[str, str], type] = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (bool, int, float, str, list, tuple, dict, set, frozenset, collections.Counter, collections.defaultdict,
                collections.OrderedDict, collections.deque)
}  # fmt: skip
FUNCTIONS = {("copy", "deepcopy"), ("river.naive_bayes.gaussian", "GaussianNB._make_gaussian")}
"""What makes defaults and is no class: the only functions that may be named."""
SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}
MAPPINGS: dict[type, str] = {dict: "dict", collections.Counter: "counter", collections.OrderedDict: "ordered"}
FIXED = ("tuple", "frozenset", "partial")
"""Kinds that are made whole, when what they hold is there."""
DEEPEST = 100
"""Levels of those within each other."""

HEAP = 1 << 9
"""Python's flag of classes that a `class` statement made."""

NONE, FALSE, TRUE, REAL, WHOLE, BIG, TEXT, BYTES, AGAIN, CLASS, CHANCE = range(11)
SMALL, SHAPES = 16, 16 + 256
STREAMS: dict[str, Any] = {"tokens": np.uint16, "reals": np.float64, "wholes": np.int64, "bytes": np.uint8}


def name_of(named: Any) -> tuple[str, str]:
    """Of a class or a function, its module and its name there."""
    return str(named.__module__), str(named.__qualname__)


@functools.cache
def find(module: str, name: str) -> Any:
    """A class that may be named, or one of two functions. Raises AdapterError for all others."""
    if (module, name) in BUILTIN:
        return BUILTIN[module, name]
    if (module, name) in FUNCTIONS:
        return operator.attrgetter(name)(importlib.import_module(module))
    listed = (module, name) in NATIVE or (module, name) == VECTORS
    parts = module.split(".")
    proper = len(parts) > 1 and all(map(str.isidentifier, parts))
    if not listed and not (proper and parts[0] == "river" and parts[1] in PACKAGES):
        raise AdapterError(f"{module}.{name} cannot be saved or read: it is no class of river's estimators")
    try:
        found = vars(importlib.import_module(module)).get(name)
    except ImportError:
        found = None
    if not isinstance(found, type) or name_of(found) != (module, name):
        raise AdapterError(f"{module}.{name} cannot be saved or read: it is no class of river's estimators")
    return found


@functools.cache
def slots_of(cls: type) -> dict[str, Any]:
    """Of a class whose objects are all in their `__dict__` and slots, the slots. Raises AdapterError for others."""
    module, name = name_of(cls)
    own = (module, name) not in SCALERS and any(
        getattr(cls, method, None) is not getattr(object, method, None)
        for method in ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
    )
    heap = all(
        base is object or (base.__flags__ & HEAP and "_river_rust" not in base.__module__) for base in cls.__mro__
    )
    if not module.startswith("river.") or own or not heap or cls.__new__ is not object.__new__:
        raise AdapterError(f"{module}.{name} has a state of its own kind, which cannot be saved or read")
    held = [vars(base).items() for base in reversed(cls.__mro__)]
    return {n: slot for items in held for n, slot in items if isinstance(slot, types.MemberDescriptorType)}


def is_key(obj: Any) -> bool:
    """Whether an object may be a key, or in a set: it is plain, or like no other."""
    if isinstance(obj, tuple | frozenset):
        return all(map(is_key, obj))
    plain = obj is None or isinstance(obj, bool | int | float | str | bytes | np.generic | type)
    return plain or type(obj).__hash__ is object.__hash__
