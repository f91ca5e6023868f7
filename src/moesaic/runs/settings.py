"""Settings as people write them, YAML files and `key=value`, to dataclasses; what is unknown names the nearest."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from moesaic.errors import ConfigError, UnknownSetting, first_line, suggest

T = TypeVar("T")
DEEPEST = 100
"""How far a YAML file is nested at most."""
LARGEST = 1_000_000
"""Nodes of a YAML file at most, aliases written out; OmegaConf's own bound of ten times what stands there holds too."""


def read_yaml(file: Path) -> dict[str, Any]:
    """The `key: value` lines of a YAML file. Raises ConfigError where it has none or cannot be read."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError, YAMLError

    try:
        if file.exists() and not file.is_file() and not file.is_dir():  # a pipe would be waited for
            raise ConfigError(f"{file} is no file; name another")
        _check_depth(file)
        stored: Any = OmegaConf.to_container(OmegaConf.load(file, max_yaml_expanded_nodes=LARGEST))
    except ConfigError:
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigError(f"{where}: this is not YAML: {error.problem or error.context}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file}: {_refused(error)}") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or first_line(error)}") from None
    except (YAMLError, ValueError, RecursionError) as error:  # no UTF-8, or a name that none can have
        raise ConfigError(f"{file} is not a YAML file that can be read: {first_line(error)}") from None
    if not isinstance(stored, dict) or not stored:
        raise ConfigError(f"{file} must hold `key: value` lines")
    _check_keys_are_texts(str(file), stored)
    return stored


def _check_depth(file: Path) -> None:
    """Raise ConfigError for YAML that goes deeper than libyaml's reader has stack for."""
    import yaml
    from yaml.events import CollectionEndEvent, CollectionStartEvent

    depth, loader = 0, getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with file.open(encoding="utf-8") as text:
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > DEEPEST:
                raise ConfigError(f"{file} is nested more than {DEEPEST} deep")


def parse_overrides(
    overrides: Sequence[str],
    *,
    lists: Collection[str] = (),
    texts: Collection[str] = (),
    sections: Collection[str] = ("adapter", "arms"),
) -> dict[str, Any]:
    """`key=value` texts to a dict; those of `sections` nest, as `adapter.r=8`.

    Args:
        lists: keys that take one value for a list.
        texts: keys whose value is taken as it is written, whatever YAML would read in it.
    """
    given: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{text}' is not of the form key=value")
        if key in texts:
            given[key] = _text(value)
            continue
        parsed = _parsed(value)
        if isinstance(parsed, str) and not _is_quoted(value):
            parsed = _scalar(parsed)
        _check_keys_are_texts(key, parsed)
        section, dot, _ = key.partition(".")
        if dot and section in sections:
            _put(given, key.split("."), _numbers(parsed), text)
        else:
            given[key] = [parsed] if key in lists and isinstance(parsed, (str, int, float)) else parsed
    return given


def _put(given: dict[str, Any], path: Sequence[str], value: Any, text: str) -> None:
    for part in path[:-1]:
        given = given.setdefault(part, {})
        if not isinstance(given, dict):
            raise ConfigError(f"'{text}' sets a part of '{part}', which was given as a whole before")
    given[path[-1]] = value


def _parsed(text: str) -> Any:
    """What YAML reads in a text; the text itself where it is no YAML."""
    import yaml

    try:
        found = yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    if isinstance(found, dict):
        from omegaconf import OmegaConf

        try:
            OmegaConf.create(text)
        except yaml.constructor.ConstructorError as error:
            raise ConfigError(f"{text}: {error.problem}: each key may stand there once") from None
    return found


def _text(value: str) -> str | None:
    """A text as it is written, without quotes around it; None for null."""
    parsed, written = _parsed(value), value.strip()
    if isinstance(parsed, str) and _is_quoted(value):
        return parsed
    return None if parsed is None and not written.startswith("#") else written


def _is_quoted(value: str) -> bool:
    return value.lstrip().startswith(("'", '"'))


def _scalar(text: str) -> Any:
    """What YAML 1.1 leaves as text: `1e-3` and `inf` are numbers, `a,b` is a list."""
    if "," in text:
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return float(text)
    except ValueError:
        return text


def _numbers(value: Any) -> Any:
    """A list of texts that are all numbers as these, `8,8` as `[8,8]`; anything else as it is.

    For settings whose kind is not known yet.
    """
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        return value
    read = [_scalar(part) if isinstance(part, str) else part for part in map(_parsed, value)]
    return read if all(type(part) in (int, float) for part in read) else value


def _check_keys_are_texts(source: str, value: Any) -> None:
    """Raise ConfigError for a key such as 1 or true in mappings at any depth; `source` opens the message."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{source}: the key {str(key).lower()} is no name: if it is meant, quote it")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_keys_are_texts(source, part)


def check_keys(
    source: str,
    values: dict[str, Any],
    valid: Iterable[str],
    *,
    of_adapters: Callable[[], Collection[str]] = frozenset,
) -> None:
    """Raise ConfigError for a key that is not in `valid`; `source` (a file, or "settings") opens the message.

    `of_adapters` gives the keys that stand under `adapter.`; it is asked once something is wrong.
    """
    valid = list(valid)
    for key in values:
        if key not in valid:
            if key in of_adapters():
                raise ConfigError(f"{source}: {key} is a setting of the method: write adapter.{key}")
            hint = "settings of the method go under adapter.; " if "." in str(key) and "adapter" in valid else ""
            raise UnknownSetting(f"{source}: unknown key '{key}'; {hint}{suggest(str(key), valid)}", str(key))
    if not isinstance(values.get("adapter") or {}, dict):
        raise ConfigError(f"{source}: adapter must hold settings, such as adapter.r=8")


def names(cls: Any) -> list[str]:
    """The settings of a dataclass."""
    return [f.name for f in fields(cls)]


def lists(cls: Any) -> list[str]:
    """The settings of a dataclass that are lists, of which one value may be given without brackets."""
    return [f.name for f in fields(cls) if "list[" in str(f.type)]


def texts(cls: Any) -> list[str]:
    """The settings of a dataclass that are texts, which may look like a number or a switch."""
    return [f.name for f in fields(cls) if f.type in (str, "str") or str(f.type) == "str | None"]


def _mappings(cls: Any) -> list[str]:
    return [f.name for f in fields(cls) if str(f.type) in _KINDS and "dict[" in str(f.type)]


def build(cls: type[T], *layers: dict[str, Any]) -> T:
    """A dataclass from its defaults and layers of settings, the last on top. Raises ConfigError for a wrong kind."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = {key: value for layer in layers for key, value in layer.items()}
    for key in lists(cls):
        entries = given.get(key)
        if entries is not None and not (isinstance(entries, list) and not any(map(_is_nested, entries))):
            raise ConfigError(_wrong_kind(cls, key, entries))
    for f in fields(cls):  # type: ignore[arg-type]
        if f.type in (bool, "bool") and type(given.get(f.name)) in (int, float):
            raise ConfigError(_wrong_kind(cls, f.name, given[f.name]))
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), *layers))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        key = str(getattr(error, "full_key", None) or "")
        name = re.split(r"[.\[]", key)[0]
        if name in given and (key == name or name in (*lists(cls), *_mappings(cls))) and "$" not in str(given[name]):
            raise ConfigError(_wrong_kind(cls, name, given[name])) from None
        raise ConfigError(_refused(error)) from None
    assert isinstance(settings, cls)
    return settings


def check_within(settings: Any, bounds: Mapping[str, tuple[float, float]], prefix: str = "") -> None:
    """Raise ConfigError for a number that is outside its bounds, or none."""
    for key, (low, high) in bounds.items():
        if not low <= (value := getattr(settings, key)) <= high:
            raise ConfigError(f"{prefix}{key}={value} must be at least {low:g} and at most {high:g}")


def _is_nested(value: Any) -> bool:
    return isinstance(value, (list, dict))


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list[str]": "a list of texts, such as a,b",
    "list[int]": "a list of whole numbers, such as 0,1",
    "list[float]": "a list of numbers, such as 0.1,0.2",
    "dict[str, dict[str, bool]]": "true or false by two names, such as {A: {B: true}}",
}


def _wrong_kind(cls: Any, key: str, value: Any) -> str:
    annotation = next(f.type for f in fields(cls) if f.name == key)
    name = annotation.__name__ if annotation in (int, float, bool, str) else str(annotation).removesuffix(" | None")
    return f"{key}={_shown(value)} must be {_KINDS.get(name, 'settings of its own, such as ' + key + '.name=value')}"


def _refused(error: Exception) -> str:
    """What OmegaConf refuses, in our words."""
    from omegaconf.errors import GrammarParseError, InterpolationResolutionError, MissingMandatoryValue

    key = getattr(error, "full_key", None)
    if isinstance(error, (InterpolationResolutionError, GrammarParseError)):
        said = "the ${…} in it cannot be followed: write the value itself"
    elif isinstance(error, MissingMandatoryValue):
        said = "??? stands where a value must be"
    elif key:
        said = "it must be a number, a text, true, false, null, or a list or settings made of these"
    else:
        said = first_line(error)
    return f"{key}: {said}" if key else said


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """What differs, setting by setting: `adapter.r=8, now 4`; empty where nothing does."""
    found = list(_differences(before, now, prefix))
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more


_NAMED = 4


def _differences(before: Any, now: Any, name: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif before != now:
        yield f"{name}={_shown(before)}, now {_shown(now)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "[]"
    if isinstance(value, dict):
        return f"({len(value)} entries)"
    return "(not set)" if value is None else str(value)
