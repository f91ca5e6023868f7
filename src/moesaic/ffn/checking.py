"""Settings are of the kind that they are declared to be."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moesaic.errors import ConfigError

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def check(settings: Any) -> None:
    """Raise ConfigError for a field of a dataclass that is not of its declared kind; whole numbers pass as numbers."""
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, kind = getattr(settings, field.name), hints[field.name]
        if not _fits(value, kind):
            raise ConfigError(f"{field.name}={value!r} must be {_said(value, kind)}")


def _fits(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if origin is list:
        return isinstance(value, list) and all(_fits(part, get_args(kind)[0]) for part in value)
    if kind is type(None):
        return value is None
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _said(value: Any, kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is list:
        return f"a list, each {_KINDS[get_args(kind)[0]]}"
    return " or ".join(_KINDS[part] for part in get_args(kind) or (kind,) if part is not type(None))
