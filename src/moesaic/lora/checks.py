"""Whether the values of a config are of the kinds that its annotations ask for, and its names names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moesaic.errors import ConfigError, first_line

_KINDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    list[int]: "a list of whole numbers",
    list[float]: "a list of finite numbers",
    dict[str, list[int]]: "lists of whole numbers by module name",
    type(None): "null",
}


def check_kinds(config: Any, *, but: Collection[str] = ()) -> None:
    """Raise ConfigError for a setting that is not the number, switch, list or choice its annotation asks for."""
    hints = get_type_hints(type(config))
    for f in (own for own in fields(config) if own.name not in but):
        hint, value = hints[f.name], getattr(config, f.name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ConfigError(f"{f.name}={value!r} must be one of {', '.join(get_args(hint))}")
        kinds = (hint,) if hint in _KINDS else get_args(hint)
        if kinds and all(kind in _KINDS for kind in kinds) and not any(_is(value, kind) for kind in kinds):
            raise ConfigError(f"{f.name}={value!r} must be {' or '.join(_KINDS[kind] for kind in kinds)}")


def are_folders(given: Any, *, named: bool) -> bool:
    if isinstance(given, dict):
        return named and all(isinstance(part, str) for pair in given.items() for part in pair)
    return isinstance(given, (list, tuple)) and all(isinstance(folder, str) for folder in given)


def is_ranks(pattern: Any) -> bool:
    if pattern is None:
        return True
    return isinstance(pattern, dict) and all(isinstance(k, str) and _is(v, int) for k, v in pattern.items())


def is_numbers(pattern: Any) -> bool:
    if pattern is None:
        return True
    return isinstance(pattern, dict) and all(isinstance(k, str) and _is(v, float) for k, v in pattern.items())


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind in `_KINDS`; a switch is no number."""
    if kind == dict[str, list[int]]:
        return isinstance(value, dict) and all(_is(k, str) and _is(v, list[int]) for k, v in value.items())
    if kind in (list[int], list[float]):
        return isinstance(value, (list, tuple)) and all(_is(v, get_args(kind)[0]) for v in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def check_names(config: Any) -> None:
    """Raise ConfigError for names of modules that are neither texts nor a pattern that can be read."""
    for key in ("target_modules", "lora_target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = getattr(config, key)
        if isinstance(value, str) and key != "modules_to_save":
            try:
                re.compile(value)
            except re.error as error:
                raise ConfigError(f"{key}={value!r} is not a regular expression: {first_line(error)}") from None
        elif value is not None and not (
            isinstance(value, (list, tuple, set)) and all(isinstance(v, str) for v in value)
        ):
            raise ConfigError(f"{key}={value!r} must be a list of names")
    if config.target_modules is not None and not config.target_modules and not config.lora_target_modules:
        raise ConfigError("target_modules is empty: leave it out to adapt every linear of the model's blocks")
