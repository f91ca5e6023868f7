"""The models that there are: exact names, where they answer, what they cost and how large they are. A YAML file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moesaic.errors import ConfigError, path_of, suggest
from moesaic.runs.settings import build, read_yaml

OWN = "moesaic/"
"""What begins the names that a gateway answers by itself; no model of a catalog may take one."""


@dataclass(frozen=True)
class Model:
    """One language model.

    Attributes:
        name: as requests call it, exactly. aliases: other names for it.
        endpoint: base URL of an OpenAI-compatible API (http://127.0.0.1:8000/v1); run:FOLDER for a mixture that is
            loaded into the gateway's own process; litellm:PROVIDER/MODEL; empty for one that is known by figures alone.
        served_as: what its endpoint calls it; its name where empty.
        key_env: the environment variable that holds its API key. Keys themselves are never written here.
        input_price, output_price: USD a million tokens.
        parameters: billions, of all that must be resident. active: billions a token passes; `parameters` where None.
        bytes: on disk and in memory, where parameters do not tell.
        context: tokens of prompt and answer.
        latency: seconds to the first token, as known beforehand.
        description: prose, for people and for policies that choose by it. examples: measured scores, by name, 0 to 1.
        connect, idle, total: seconds until its endpoint must have taken the connection, sent anything more, and ended.
    """

    name: str = ""
    aliases: list[str] = field(default_factory=list)
    endpoint: str = ""
    served_as: str = ""
    key_env: str = ""
    input_price: float | None = None
    output_price: float | None = None
    parameters: float | None = None
    active: float | None = None
    bytes: int | None = None
    context: int | None = None
    latency: float | None = None
    description: str = ""
    examples: dict[str, float] = field(default_factory=dict)
    connect: float = 5.0
    idle: float = 60.0
    total: float = 600.0

    def cost(self, input_tokens: float, output_tokens: float) -> float:
        """USD of so many tokens."""
        assert self.input_price is not None
        assert self.output_price is not None
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6

    @property
    def size(self) -> float:
        """Billions of parameters that must be resident."""
        assert self.parameters is not None
        return self.parameters

    @property
    def active_size(self) -> float:
        """Billions of parameters that a token passes."""
        return self.size if self.active is None else self.active

    def key(self) -> str:
        """Its API key, out of the environment; empty where it needs none. Raises ConfigError where it is not set."""
        if not self.key_env:
            return ""
        found = os.environ.get(self.key_env, "")
        if not found:
            raise ConfigError(f"model {self.name}: {self.key_env} is not set, and holds its key")
        return found


class Catalog(Mapping[str, Model]):
    """Models by exact name, in the order of the file; `resolve` takes aliases too. `source` is the file.

    Raises:
        ConfigError: no model, a name that two could mean, a price or a size that is missing or no number, an endpoint
            that is no address.
    """

    def __init__(self, models: list[Model], source: str = "the catalog") -> None:
        self.source, self._models = source, {model.name: model for model in models}
        self._by_any = dict(self._models)
        if not models:
            raise ConfigError(f"{source} names no model: models: [{{name: …, input_price: …}}, …]")
        taken: dict[str, str] = {}
        for model in models:
            _check(model, source)
            for name in (model.name, *model.aliases):
                if name in taken:
                    raise ConfigError(f"{source}: {name} could mean {taken[name]} or {model.name}: one of them has it")
                taken[name] = model.name
                self._by_any[name] = model

    @classmethod
    def read(cls, file: str | Path) -> Catalog:
        """A YAML file with `models:`, a list of what `Model` holds."""
        path = path_of(file)
        stored = read_yaml(path)
        return cls.of(stored.get("models"), str(path))

    @classmethod
    def of(cls, entries: Any, source: str = "the catalog") -> Catalog:
        """Out of a list of mappings, as they stand in the file."""
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ConfigError(f"{source}: models must be a list, each with name, input_price, output_price, parameters")
        known = {f.name for f in fields(Model)}
        models = []
        for entry in entries:
            if unknown := entry.keys() - known:
                raise ConfigError(f"{source}: a model's {min(map(str, unknown))}: {suggest(str(min(unknown)), known)}")
            try:
                models.append(build(Model, entry))
            except ConfigError as error:
                raise ConfigError(f"{source}: model {entry.get('name', '?')}: {error}") from None
        return cls(models, source)

    def resolve(self, name: str) -> Model:
        """The model of a name or an alias. Raises ConfigError for any other, a part of a name too."""
        if name not in self._by_any:
            raise ConfigError(f"no model {name[:80]!r}; {suggest(name[:80], self._by_any)}")
        return self._by_any[name]

    def scored(self, names: Iterable[str], by: str) -> list[Model]:
        """The models that a table has scores of. Raises ConfigError, which names `by`, its file, for one it lacks."""
        names = list(names)
        if lacking := [name for name in names if name not in self._by_any]:
            shown = f"no model {lacking[0][:80]!r}, of which {by or 'the table'} has scores: add it"
            raise ConfigError(f"{self.source} has {shown}; {suggest(lacking[0][:80], self._by_any)}")
        return [self._by_any[name] for name in names]

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)


def _check(model: Model, source: str) -> None:
    """Raise ConfigError for what no model can be."""
    said = f"{source}: model {' '.join(model.name[:80].split()) or '?'}"
    for name in (model.name, *model.aliases):
        if not name or name != name.strip() or not name.isprintable() or len(name) > 200:
            raise ConfigError(f"{said}: a name is a line of 1 to 200 characters, not {name[:80]!r}")
        if name.startswith(OWN):
            raise ConfigError(f"{said}: names that begin with {OWN} are the gateway's own")
    for what in ("input_price", "output_price", "parameters"):
        if getattr(model, what) is None:
            unit = "billions" if what == "parameters" else "USD a million tokens"
            raise ConfigError(f"{said}: {what} is missing ({unit})")
    zero = ("input_price", "output_price", "latency")
    for what in (*zero, "parameters", "active", "bytes", "context", "connect", "idle", "total"):
        value = getattr(model, what)
        least = 0 if what in zero else math.ulp(0)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"{said}: {what}={value} must be {'at least' if what in zero else 'above'} 0")
    if not all(0 <= score <= 1 for score in model.examples.values()):
        raise ConfigError(f"{said}: examples are scores between 0 and 1")
    if model.endpoint and not _is_address(model.endpoint):
        raise ConfigError(
            f"{said}: endpoint={model.endpoint[:80]!r} must be http://HOST:PORT/v1, https://…, run:FOLDER or "
            "litellm:PROVIDER/MODEL"
        )


def _is_address(text: str) -> bool:
    kind, _, rest = text.partition(":")
    if kind in ("run", "litellm"):
        return bool(rest.strip())
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username and parts.port != 0
    except ValueError:
        return False
