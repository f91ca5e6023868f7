"""What can go wrong, by kind. Every message is one line that says what to do; the CLI prints it and exits with 2."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class MoesaicError(ValueError):
    """Base class: something the user can mend."""


class ConfigError(MoesaicError):
    """A setting is unknown, impossible, or contradicts another one."""


class UnknownSetting(ConfigError):
    """There is no setting of that name; `key` is the name."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.key)


class UnknownKeyword(ConfigError, TypeError):
    """A config's constructor has no such setting. PEFT knows the error, and goes on without it when it reads a file."""


class DataError(MoesaicError):
    """A data file is missing, empty or has a line that cannot be read."""


class AdapterError(MoesaicError):
    """An adapter folder is damaged or does not fit the model or the method."""


class MissingRouterWeights(AdapterError):
    """A checkpoint holds experts but not the router that belongs to them."""


class TrainingError(MoesaicError):
    """Training cannot go on (a non-finite loss, a loop that cannot carry the auxiliary loss)."""


class MissingDependency(MoesaicError, ImportError):
    """A part of moesaic needs an extra that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs {package}: pip install 'moesaic[{extra}]'")
        self.lacking = package, extra

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), self.lacking


def suggest(name: str, options: Iterable[str]) -> str:
    """The end of an "unknown X" message: the nearest valid name, if any is near, and all of them."""
    known = sorted(options)
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}known: {', '.join(known) or 'none'}"


def first_line(error: BaseException) -> str:
    """A foreign exception in one line, for the end of ours: its first, and the second where that is a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def path_of(text: str | Path) -> Path:
    """A path with its `~` filled in. Raises ConfigError where that stands for no user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{Path(text).parts[0]}: no such user; write the whole path of {text}") from None
