"""`moesaic serve`: an OpenAI-compatible server of one mixture."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError, MissingDependency

KEY = "MOESAIC_API_KEY"
GRACE = 10
"""Seconds that requests have to end in, once the server is asked to stop."""


@dataclass
class ServeSettings:
    """Settings of `moesaic serve`."""

    host: str = field(default="127.0.0.1", metadata={"help": f"address; one that others reach wants {KEY} set"})
    port: int = field(default=8000, metadata={"help": "0 takes one that is free"})
    name: str = field(default="", metadata={"help": "what requests call the model; the folder's name where left out"})
    model: str = field(default="", metadata={"help": "the base model, where a folder names none or it has moved"})
    temperature: float = field(default=0.0, metadata={"help": "where a request names none; 0: the likeliest tokens"})
    cache_tokens: int = field(default=8192, metadata={"help": "of all requests together, which the KV cache holds"})
    at_once: bool = field(default=True, metadata={"help": "false: requests are answered one after the other"})


_ABOUT = f"""serves /v1/chat/completions and /v1/completions to any OpenAI client, streaming or not, many at once:

  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-")
  client.chat.completions.create(model="hotmoe-smollm2-s0", messages=[{{"role": "user", "content": "…"}}])

extra_body={{"routing": True}} asks for each expert's share with the answer ("tokens": of every token), and
extra_body={{"task": "…"}} tells methods that ask each row's task. {KEY} in the environment is the key that
clients must bring."""


@verb(
    "serve",
    "answer OpenAI clients with a run, a composition or an adapter",
    group="mixtures",
    place=48,
    settings=[Section(ServeSettings)],
    operands={"folder": "of a run, or of an adapter that PEFT, Trainer or SFTTrainer saved"},
    about=lambda: _ABOUT,
)
def run(folder: str, arguments: Sequence[str], *, as_json: bool = False) -> None:
    """Serve until interrupted. Raises MoesaicError of the kind that fits."""
    from moesaic.evaluation.opening import load, open_adapter
    from moesaic.runs.recipe import parse_settings
    from moesaic.serving.asking import check_answers

    settings = parse_settings(ServeSettings, arguments)
    key = os.environ.get(KEY, "")
    check(settings, key)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise MissingDependency("FastAPI and uvicorn", "serve") from None
    opened = open_adapter(folder, model=settings.model)
    with listening(settings.host, settings.port) as place:
        prepared = load(opened)
        check_answers(prepared)
        try:
            asyncio.run(_serve(prepared, settings, settings.name or opened.place.resolve().name, place, key))
        except KeyboardInterrupt:  # how a server ends
            print("stopped", file=sys.stderr)


def check(settings: ServeSettings, key: str) -> None:
    """Raise ConfigError for settings that cannot be served."""
    from moesaic.serving.asking import check_temperature

    if not 0 <= settings.port < 2**16:
        raise ConfigError(f"port={settings.port} must lie between 0 and 65535")
    check_temperature(settings.temperature)
    if not 64 <= settings.cache_tokens <= 2**24:
        raise ConfigError(f"cache_tokens={settings.cache_tokens} must lie between 64 and {2**24:,}")
    if not key.isascii() or not (key + "x").isprintable() or key != key.strip():
        raise ConfigError(f"{KEY} must be of printable ASCII characters, with no blanks about it")
    if not _is_loopback(settings.host) and not key:
        raise ConfigError(f"host={settings.host} lets others in: set {KEY} to a key that requests must bring")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens, before a model is loaded. Raises ConfigError where the address cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(found[4][:2], family=found[0])
    except UnicodeError:
        raise ConfigError(f"host={host[:40]} is no name of a host") from None
    except OSError as error:
        number = error.errno or 0  # getaddrinfo's are below 0
        why = os.strerror(number) if number > 0 else error.strerror
        raise ConfigError(f"{host}:{port}: {why}; host=… and port=… name another") from None


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _serve(prepared: object, settings: ServeSettings, name: str, place: socket.socket, key: str) -> None:
    import uvicorn

    from moesaic.serving.app import build
    from moesaic.serving.engine import opened

    engine = await opened(prepared, cache_tokens=settings.cache_tokens, at_once=settings.at_once)  # type: ignore[arg-type]
    hosts = ["localhost", "127.0.0.1", "[::1]", settings.host] if _is_loopback(settings.host) else []
    app = build(engine, name, temperature=settings.temperature, key=key, hosts=hosts)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=GRACE))

    async def end() -> None:
        while not server.should_exit:
            await asyncio.sleep(0.1)
        await asyncio.sleep(GRACE - 1)
        engine.stop()

    host, port = place.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    how = "requests at once" if engine.at_once else "requests in turn"
    print(f"{name}: {url} ({how}); Ctrl-C stops", file=sys.stderr, flush=True)
    ending = asyncio.create_task(end())
    try:
        await server.serve(sockets=[place])
    finally:
        ending.cancel()
        engine.close()
