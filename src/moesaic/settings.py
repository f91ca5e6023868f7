"""Settings as people write them, YAML files and `key=value`, to dataclasses; what is unknown names the nearest."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from moesaic.errors import ConfigError, first_line, suggest

T = TypeVar("T")


def read_yaml(file: Path) -> dict[str, Any]:
    """The `key: value` lines of a YAML file. Raises ConfigError where it has none or cannot be read."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        stored: Any = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not a YAML file that can be read: {first_line(error)}") from None
    if not isinstance(stored, dict) or not stored:
        raise ConfigError(f"{file} must hold `key: value` lines")
    return {str(key): value for key, value in stored.items()}


def parse_overrides(overrides: Sequence[str], *, lists: Collection[str] = ("tasks",)) -> dict[str, Any]:
    """`key=value` texts to a dict; `adapter.*` and `arms.*` nest, and keys in `lists` take one value for a list."""
    import yaml

    given: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{text}' is not of the form key=value")
        try:
            parsed = yaml.safe_load(value) if value else ""
        except yaml.YAMLError:
            parsed = value
        if isinstance(parsed, str):
            parsed = _scalar(parsed)
        section, dot, _ = key.partition(".")
        if dot and section in ("adapter", "arms"):
            _put(given, key.split("."), parsed, text)
        else:
            given[key] = [parsed] if key in lists and isinstance(parsed, (str, int, float)) else parsed
    return given


def _put(given: dict[str, Any], path: Sequence[str], value: Any, text: str) -> None:
    for part in path[:-1]:
        given = given.setdefault(part, {})
        if not isinstance(given, dict):
            raise ConfigError(f"'{text}' sets a part of '{part}', which was given as a whole before")
    given[path[-1]] = value


def _scalar(text: str) -> Any:
    """What YAML 1.1 leaves as text: `1e-3` and `inf` are numbers, `a,b` is a list."""
    if "," in text:
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return float(text)
    except ValueError:
        return text


def check_keys(source: str, values: dict[str, Any], valid: Iterable[str]) -> None:
    """Raise ConfigError for a key that is not in `valid`; `source` (a file, or "settings") opens the message."""
    valid = list(valid)
    for key in values:
        if key not in valid:
            hint = "settings of the method go under adapter.; " if "." in str(key) else ""
            raise ConfigError(f"{source}: unknown key '{key}'; {hint}{suggest(str(key), valid)}")
    if not isinstance(values.get("adapter") or {}, dict):
        raise ConfigError(f"{source}: adapter must hold settings, such as adapter.r=8")


def names(cls: Any) -> list[str]:
    """The settings of a dataclass."""
    return [f.name for f in fields(cls)]


def build(cls: type[T], *layers: dict[str, Any]) -> T:
    """A dataclass from its defaults and layers of settings, the last on top. Raises ConfigError for a wrong kind."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), *layers))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key}: {first_line(error)}" if key else first_line(error)) from None
    assert isinstance(settings, cls)
    return settings
