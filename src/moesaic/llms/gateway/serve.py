"""Serves a gateway's file until it is told to stop, and goes by the file anew when it changes."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from moesaic.errors import ConfigError, MissingDependency, MoesaicError, first_line
from moesaic.llms.gateway.app import Gateway, build
from moesaic.llms.gateway.asker import Asker
from moesaic.llms.gateway.config import Config, read_config
from moesaic.llms.gateway.connections import bounded
from moesaic.llms.gateway.routers import Router

logger = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds between two looks at the file."""


def serve(
    file: str | Path, *, say: Callable[[str], None] = logger.info, routers: Mapping[str, Router | Asker] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; running calls end first, within `drain_seconds`.

    Args:
        say: told the address once it listens. routers: in place of those that the file names.

    Raises:
        ConfigError, MissingDependency: it cannot be served.
    """
    config = read_config(file)
    try:
        import aiohttp  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise MissingDependency(str(error.name), "llms") from None
    with listening(config.settings.host, config.settings.port) as place:
        options = uvicorn.Config("", loop="auto", http="auto")
        with asyncio.Runner(loop_factory=options.get_loop_factory()) as runner:
            runner.run(_serve(build(config, routers), config, place, say))


async def _serve(gateway: Gateway, config: Config, place: socket.socket, say: Callable[[str], None]) -> None:
    import uvicorn

    await gateway.start()
    gc.collect()
    gc.freeze()  # what was imported lives as long as the process: it need not be looked through again
    options = uvicorn.Config(
        gateway, log_level="warning", access_log=False, lifespan="on", backlog=4096, server_header=False,
        proxy_headers=False, http=bounded(config.settings.body_seconds),
        timeout_graceful_shutdown=round(config.settings.drain_seconds),
    )  # fmt: skip
    watching = asyncio.create_task(watch(gateway, config.source, say))
    host, port = place.getsockname()[:2]
    say(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")
    try:
        await uvicorn.Server(options).serve(sockets=[place])
    finally:
        watching.cancel()


async def watch(gateway: Gateway, file: Path, say: Callable[[str], None] = logger.info) -> None:
    """Reload a file on SIGHUP and whenever it, its catalog or a router's folder has changed.

    One that is broken leaves the old one in force. `say` is told of one that is not.
    """
    asked = asyncio.Event()
    with suppress(NotImplementedError, RuntimeError, AttributeError):  # Windows, or not the main thread
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)

    def stamps() -> list[tuple[int, ...]]:
        return [_stamp(place) for place in (file, *gateway.state.config.beside)]

    seen = stamps()
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(asked.wait(), EVERY)
        now = stamps()
        if not asked.is_set() and now == seen:
            continue
        seen = now
        asked.clear()
        try:
            await gateway.reload(await asyncio.to_thread(read_config, file))
            seen = stamps()  # it may name others now
            say(f"{file} has changed, and is in force")
        except Exception as error:
            said = first_line(error) if isinstance(error, MoesaicError) else type(error).__name__
            logger.warning("%s; the configuration before it stays in force", said)


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError where the address cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(found[4][:2], family=found[0], backlog=4096)
    except UnicodeError:
        raise ConfigError(f"host={host[:40]} is no name of a host") from None
    except OSError as error:
        raise ConfigError(f"{host}:{port}: {error.strerror}; host and port in the file name another") from None
