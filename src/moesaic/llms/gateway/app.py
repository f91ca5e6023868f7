"""The gateway as an ASGI application: its paths, its life, and how it goes by a new configuration."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from moesaic.errors import ConfigError, first_line
from moesaic.llms.catalog import OWN
from moesaic.llms.gateway import dialects, openapi
from moesaic.llms.gateway.answering import Answering
from moesaic.llms.gateway.asker import Asker
from moesaic.llms.gateway.backends import Backends
from moesaic.llms.gateway.config import Config
from moesaic.llms.gateway.keys import Guesses
from moesaic.llms.gateway.ledger import Ledger
from moesaic.llms.gateway.making import Request, whole
from moesaic.llms.gateway.metrics import CONTENT, Metrics
from moesaic.llms.gateway.refusals import SERVER, Refused
from moesaic.llms.gateway.relay import Send, Sink
from moesaic.llms.gateway.requests import CHAT, COMPLETIONS, EMBEDDINGS, ClientGone, Receive, read_body
from moesaic.llms.gateway.routers import Router
from moesaic.llms.gateway.state import State, make_state
from moesaic.llms.gateway.trace import TraceLog
from moesaic.llms.gateway.writer import Writer

logger = logging.getLogger(__name__)

ASKED = frozenset([CHAT, COMPLETIONS, EMBEDDINGS, *dialects.FORMS])
MODELS = "/v1/models"
FIXED = ("host", "port", "ledger")
"""Settings that a running gateway cannot change; neither can it `trace`."""
SETTLING = 5.0
"""Seconds that calls which were broken off have to be settled, and as many that they have to be written."""


class Gateway:
    """One endpoint in front of a file's models. Its lifespan opens and closes it, or `start` and `close` do.

    Args:
        routers: in place of those that the file names, by the names that requests use.
    """

    def __init__(self, config: Config, routers: Mapping[str, Router | Asker] | None = None) -> None:
        self._first, self._given = config, routers
        self._backends, self._guesses, self.metrics = Backends(), Guesses(), Metrics()
        self._state: State | None = None
        self._writer: Writer | None = None
        self._answering: Answering | None = None
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def state(self) -> State:
        assert self._state is not None
        return self._state

    @property
    def writer(self) -> Writer:
        assert self._writer is not None
        return self._writer

    async def start(self) -> None:
        """Open the books and the backends. Raises ConfigError, MissingDependency."""
        config, log = self._first, self._first.trace
        ledger = Ledger(config.path(config.settings.ledger))
        self._writer = Writer(ledger, TraceLog(config.path(log.file) if log.file else None, log.bytes, log.files))
        self._answering = Answering(self._writer, self.metrics)
        if ledger.abandoned:
            logger.warning("%d calls that a dead gateway left are booked as they were reserved", ledger.abandoned)
        try:
            await self._take(config)
        except BaseException:
            await self.close()
            raise

    async def reload(self, config: Config) -> None:
        """Go by another configuration from the next request on. Raises MoesaicError, and goes by the old one then."""
        now = self.state.config
        for name in FIXED:
            if getattr(config.settings, name) != getattr(now.settings, name):
                raise ConfigError(f"{name} cannot change while the gateway runs: set it back, or start anew")
        if config.trace != now.trace:
            raise ConfigError("trace cannot change while the gateway runs: set it back, or start anew")
        await self._take(config)

    async def close(self) -> None:
        """Write what is left, and let go of everything."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLING):
                while self.metrics.running:
                    await asyncio.sleep(0.01)
        for task in self._retiring:
            task.cancel()
        await self._backends.close()
        if self._answering is not None:
            self._answering.close()
        if self._writer is not None and (left := await self._writer.close(SETTLING)):
            logger.error("%d calls that have ended are not in the ledger: its next start books them as reserved", left)

    async def _take(self, config: Config) -> None:
        found = await self._backends.opened(config.catalog, config.source.parent)
        backends = {name: backend for name, (_, backend) in found.items()}
        try:
            self._state = await asyncio.to_thread(make_state, config, backends, self._state, self._guesses, self._given)
        except BaseException:
            await self._backends.forget(found)
            raise
        for backend in self._backends.use(found):
            task = asyncio.create_task(backend.close())
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    # -- requests ------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            if self._state is None:
                await self.start()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": first_line(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        sink, path = Sink(send), scope["path"]
        try:
            await self._handled(scope, path, receive, sink)
        except ClientGone:
            return
        except asyncio.CancelledError:  # the gateway stops, and has waited long enough
            await _refuse(sink, Refused(503, "the gateway stops", SERVER, code="unavailable"), path)
        except Refused as refused:
            self.metrics.refused(refused.status, refused.code)
            await _refuse(sink, refused, path)
        except Exception as error:
            logger.error("a request to %s failed", path[:80], exc_info=error)
            if sink.begun:
                raise
            await _refuse(sink, Refused(500, "the gateway failed; its log says how", SERVER), path)

    async def _handled(self, scope: Mapping[str, Any], path: str, receive: Receive, sink: Sink) -> None:
        state, headers = self.state, dict(scope["headers"])
        if len(headers) < len(scope["headers"]) and [name for name, _ in scope["headers"]].count(b"host") > 1:
            raise Refused(400, "a request has one Host")
        state.gate.check_host(headers)
        if path in ASKED:
            _check_method(scope, "POST")
            key = state.gate.admit(scope, headers)
            settings = state.config.settings
            body = await read_body(headers, receive, settings.largest_body, settings.body_seconds)
            assert self._answering is not None
            await self._answering.answer(Request(state, key, path, headers, body, receive, sink))
        elif path == "/metrics":
            _check_method(scope, "GET")
            state.gate.admit(scope, headers)
            await whole(sink, 200, self.metrics.text(state.relay.breakers).encode(), CONTENT)
        else:
            await whole(sink, 200, self._told(state, scope, headers))

    def _told(self, state: State, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> dict[str, Any]:
        """What is answered without asking a model."""
        path = scope["path"]
        if path not in ("/health", "/openapi.json", MODELS) and not path.startswith(MODELS + "/"):
            raise Refused(404, "there is nothing at this path: /openapi.json lists what there is", code="not_found")
        _check_method(scope, "GET")
        if path == "/openapi.json":
            return openapi.document()
        if path == "/health":
            return {"status": "ok", "in_flight": self.metrics.running}
        state.gate.admit(scope, headers)
        names = state.names()
        if path == MODELS:
            return {"object": "list", "data": list(map(_card, names))}
        name = path.removeprefix(MODELS + "/")
        if name not in names:
            raise state.unknown(name)
        return _card(name)


def _check_method(scope: Mapping[str, Any], wanted: str) -> None:
    if scope["method"] != wanted:
        allow = [(b"allow", wanted.encode())]
        raise Refused(405, f"this path takes {wanted}", code="method_not_allowed", headers=allow)


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "moesaic" if name.startswith(OWN) else "catalog"}


async def _refuse(sink: Sink, refused: Refused, path: str) -> None:
    if not sink.begun:
        body = dialects.refusal(refused) if path == dialects.MESSAGES else refused.body()
        await whole(sink, refused.status, body, headers=refused.headers)


def build(config: Config, routers: Mapping[str, Router | Asker] | None = None) -> Gateway:
    """The ASGI application of a configuration."""
    return Gateway(config, routers)
