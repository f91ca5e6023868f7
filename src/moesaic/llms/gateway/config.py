"""A gateway's file: read and checked whole before any of it takes effect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, path_of, suggest
from moesaic.llms.catalog import OWN, Catalog
from moesaic.llms.gateway.keys import Key, Keys
from moesaic.llms.gateway.policy import Policy
from moesaic.llms.router_r1.folder import FILE, POLICY
from moesaic.runs.settings import build, check_keys, check_within, read_yaml
from moesaic.runs.states import VALUES

DISCONNECT = ("cancel", "drain", "partial")


@dataclass(frozen=True)
class Trace:
    """The log of what was decided: one JSON object a line.

    Attributes:
        file: empty for none. prompts: whether it holds what was asked; nothing else of a request does.
        bytes, files: it goes on in a new file after so many, and so many older ones are kept.
    """

    file: str = ""
    prompts: bool = False
    bytes: int = 50_000_000
    files: int = 5


@dataclass(frozen=True)
class Settings:
    """The settings of the file that are plain values.

    Attributes:
        host, port: where it listens; an address that others reach wants keys.
        ledger: the SQLite file of the books.
        on_disconnect: what becomes of a call whose client is gone. cancel: broken off, and nothing is billed; drain:
            read to its end and billed whole; partial: broken off, and what had come by then is billed.
        switching_penalty: how much better another expert must be before a chat goes over to it, 0 to 1.
        reserve_output: tokens of an answer that are reserved where the request names no most.
        request_budget: USD that a request may cost which names no budget; None for no end.
        fallbacks: models that are asked after one that failed, at most.
        largest_body: bytes of a request. body_seconds: until it has come. largest_answer: bytes of one that is no
            stream, and of one event of a stream. drain_seconds: that calls have to end in when the gateway stops.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    ledger: str = "ledger.sqlite"
    on_disconnect: str = "partial"
    switching_penalty: float = 0.1
    reserve_output: int = 1024
    request_budget: float | None = None
    most_fallbacks: int = 2
    largest_body: int = 4 * 2**20
    body_seconds: float = 30.0
    largest_answer: int = 64 * 2**20
    drain_seconds: float = 30.0


@dataclass(frozen=True)
class Config:
    """A file that holds together.

    Attributes:
        source: the file; its folder is where relative paths begin. routers: folders by name, without moesaic/.
        fallbacks: by model, the models that are asked after it.
        policies: of every model. tokenizers: tokenizer.json by model.
        beside: what it read, or will, beside the file itself: a catalog, and what routers are kept in.
    """

    source: Path
    settings: Settings
    catalog: Catalog
    keys: tuple[Key, ...] = ()
    routers: Mapping[str, Path] = field(default_factory=dict)
    fallbacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    policies: Mapping[str, Policy] = field(default_factory=dict)
    tokenizers: Mapping[str, Path] = field(default_factory=dict)
    trace: Trace = Trace()
    beside: tuple[Path, ...] = ()

    def path(self, text: str) -> Path:
        """A path as the file means it."""
        return self.source.parent / path_of(text)

    def after(self, model: str, *, routed: bool) -> tuple[str, ...]:
        """Who is asked after a model: whom the file names, and for a router's expert else the catalog's next."""
        named = self.fallbacks.get(model)
        if named is None and routed:
            order = [name for name in self.catalog if self.catalog[name].endpoint]
            at = order.index(model)
            named = tuple(order[at + 1 :] + order[:at])
        return (named or ())[: self.settings.most_fallbacks]


_KEPT = (VALUES, FILE, f"{POLICY}/{FILE}")
"""Files of routers that are looked at for changes: those of compositions, and of policies."""
_SECTIONS = ("models", "catalog", "keys", "routers", "fallbacks", "policy", "policies", "tokenizers", "trace")
_BOUNDS = {
    "port": (0, 65535), "switching_penalty": (0, 1), "reserve_output": (1, 1e7), "most_fallbacks": (0, 100),
    "largest_body": (1024, 2**30), "largest_answer": (1024, 2**32), "body_seconds": (0.01, 3600),
    "drain_seconds": (0, 3600),
}  # fmt: skip
_POLICY = {"retries": (0, 20), "longest_wait": (0, 600), "failures": (1, 10_000), "rest": (0, 86_400)}


def read_config(file: str | Path) -> Config:
    """A gateway's YAML file: `Settings`, and models (or catalog: FILE), routers, keys, fallbacks, policies, trace.

    Raises:
        ConfigError: anything in it that is unknown, impossible or missing.
    """
    path = path_of(file).absolute()
    stored = read_yaml(path)
    plain = [f.name for f in fields(Settings)]
    check_keys(str(path), stored, [*plain, *_SECTIONS])
    try:
        settings = build(Settings, {key: value for key, value in stored.items() if key in plain})
        config = _config(path, settings, stored)
        _check(config)
    except ConfigError as error:
        raise error if str(path) in str(error) else ConfigError(f"{path}: {error}") from None
    return config


def _config(path: Path, settings: Settings, stored: Mapping[str, Any]) -> Config:
    here = path.parent
    if ("models" in stored) == ("catalog" in stored):
        raise ConfigError("give models: [{name: …}, …] or catalog: FILE, one of them")
    if "catalog" in stored:
        catalog = Catalog.read(here / path_of(str(stored["catalog"])))
    else:
        catalog = Catalog.of(stored["models"], str(path))
    routers = {name: here / path_of(str(folder)) for name, folder in _mapping(stored, "routers").items()}
    catalogs = [here / path_of(str(stored["catalog"]))] if "catalog" in stored else []
    return Config(
        source=path,
        settings=settings,
        catalog=catalog,
        keys=tuple(_of(Key, entry, "keys") for entry in _list(stored, "keys")),
        routers=routers,
        fallbacks=_fallbacks(_mapping(stored, "fallbacks"), catalog),
        policies=_policies(stored, catalog),
        tokenizers={
            catalog.resolve(name).name: here / path_of(str(file))
            for name, file in _mapping(stored, "tokenizers").items()
        },
        trace=_of(Trace, _mapping(stored, "trace"), "trace"),
        beside=(
            *catalogs,
            *(folder / name for folder in routers.values() for name in (VALUES, FILE, f"{POLICY}/{FILE}")),
        ),
    )


def _of(cls: Any, entry: Any, section: str) -> Any:
    if not isinstance(entry, dict):
        raise ConfigError(f"{section}: settings are wanted, such as {fields(cls)[0].name}: …")
    check_keys(section, entry, [f.name for f in fields(cls)])
    return build(cls, entry)


def _mapping(stored: Mapping[str, Any], section: str, within: str = "") -> dict[str, Any]:
    found = stored.get(section) or {}
    if not isinstance(found, dict):
        raise ConfigError(f"{within}{section} must hold name: value lines")
    return found


def _list(stored: Mapping[str, Any], section: str) -> list[Any]:
    found = stored.get(section) or []
    if not isinstance(found, list):
        raise ConfigError(f"{section} must be a list")
    return found


def _fallbacks(given: Mapping[str, Any], catalog: Catalog) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, others in given.items():
        if not isinstance(others, list):
            raise ConfigError(f"fallbacks: {name}: a list of models, [] for none")
        model = catalog.resolve(name).name
        found[model] = tuple(catalog.resolve(str(other)).name for other in others)
        if model in found[model] or len(set(found[model])) < len(others):
            raise ConfigError(f"fallbacks: {name}: each other model once")
    return found


def _policies(stored: Mapping[str, Any], catalog: Catalog) -> dict[str, Policy]:
    common = _of(Policy, _mapping(stored, "policy"), "policy")
    given, found = _mapping(stored, "policies"), {}
    own = {catalog.resolve(name).name: _mapping(given, name, "policies: ") for name in given}
    for name in catalog:
        found[name] = _of(Policy, {**asdict(common), **own.get(name, {})}, f"policies: {name}")
        check_within(found[name], _POLICY, "policy: ")
    return found


def _check(config: Config) -> None:
    """Raise ConfigError for what cannot be served."""
    settings = config.settings
    for name in ("switching_penalty", "body_seconds", "drain_seconds"):
        if not math.isfinite(getattr(settings, name)):
            raise ConfigError(f"{name} must be a number")
    check_within(settings, _BOUNDS)
    if settings.request_budget is not None:
        check_within(settings, {"request_budget": (0, 1e6)})
    check_within(config.trace, {"bytes": (10_000, 1e12), "files": (0, 1000)}, "trace: ")
    if settings.on_disconnect not in DISCONNECT:
        raise ConfigError(f"on_disconnect={settings.on_disconnect}: {suggest(settings.on_disconnect, DISCONNECT)}")
    for name in config.routers:
        if OWN + name in config.catalog or not name or not name.isprintable() or len(name) > 100:
            raise ConfigError(f"routers: {name[:80]!r} is no name")
    for model, others in config.fallbacks.items():
        for other in (model, *others):
            if not config.catalog[other].endpoint:
                raise ConfigError(f"fallbacks: {other} has no endpoint, so it answers nothing")
    for entry in config.catalog.values():
        entry.key()
    Keys(config.keys)
    _check_written(config)
    if not config.keys and not is_loopback(settings.host):
        raise ConfigError(f"host={settings.host} lets others in: give keys that requests must bring")


def _check_written(config: Config) -> None:
    """Raise ConfigError for a ledger or a trace where neither can be, or where something else is."""
    taken = {place.resolve() for place in (config.source, *config.beside, *config.tokenizers.values())}
    ends = ("", "-wal", "-shm", "-journal", ".lock")
    for what, text, endings in (("ledger", config.settings.ledger, ends), ("trace.file", config.trace.file, ("",))):
        if not text:
            continue
        if "\0" in text:
            raise ConfigError(f"{what}={text[:80]!r} is no name of a file")
        place = config.path(text).resolve()
        places = {place.with_name(place.name + end) for end in endings}
        if taken & places:
            raise ConfigError(f"{what}={text} is a file that has another use here; name one of its own")
        if place.is_fifo():
            raise ConfigError(f"{what}={text} is a pipe; name a file")
        taken |= places


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
