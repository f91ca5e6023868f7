"""The gateway as an ASGI application: what comes in, who is asked, what goes out, and what is booked."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from moesaic.errors import first_line
from moesaic.llms.catalog import OWN, Model
from moesaic.llms.gateway import dialects, openapi, trace
from moesaic.llms.gateway.backends import Backends
from moesaic.llms.gateway.calls import Call, price
from moesaic.llms.gateway.config import Config
from moesaic.llms.gateway.keys import Guesses, Key
from moesaic.llms.gateway.ledger import Ledger
from moesaic.llms.gateway.metrics import CONTENT, Metrics
from moesaic.llms.gateway.policy import Breaker
from moesaic.llms.gateway.refusals import SERVER, Refused, seconds
from moesaic.llms.gateway.relay import Form, Send, Sink
from moesaic.llms.gateway.requests import CHAT, COMPLETIONS, EMBEDDINGS, Asked, ClientGone, Receive, parse, read_body
from moesaic.llms.gateway.routers import Router
from moesaic.llms.gateway.sessions import Sessions, chat_of
from moesaic.llms.gateway.state import FIXED, State, make_state
from moesaic.llms.gateway.writer import Writer

logger = logging.getLogger(__name__)

JSON = (b"content-type", b"application/json")
MODELS = "/v1/models"
SETTLING = 5.0
"""Seconds that broken-off calls have for it."""
SESSION, DRY = b"x-moesaic-session", b"x-moesaic-dry-run"


class Gateway:
    """One endpoint in front of a file's models. Start it before the first request, and close it after the last.

    Args:
        routers: in place of those that the file names, by the names that requests use.
    """

    def __init__(self, config: Config, routers: Mapping[str, Router] | None = None) -> None:
        self._first, self._given = config, routers
        self._state: State | None = None
        self._backends, self._guesses = Backends(), Guesses()
        self._sessions, self.metrics = Sessions(), Metrics()
        self._deciding = ThreadPoolExecutor(1, "router")
        self._ids = itertools.count(time.time_ns())
        self._retiring: set[asyncio.Task[None]] = set()
        self._writer: Writer | None = None
        self._paths: dict[str, Callable[..., Any]] = {
            CHAT: self._answer, COMPLETIONS: self._answer, EMBEDDINGS: self._answer,
            **dict.fromkeys(dialects.FORMS, self._answer),
        }  # fmt: skip

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
        self._writer = Writer(ledger, trace.TraceLog(config.path(log.file) if log.file else None, log.bytes, log.files))
        if ledger.abandoned:
            logger.warning("%d calls that a dead gateway left are booked as they were reserved", ledger.abandoned)
        try:
            await self._take(config)
        except BaseException:
            await self.close()
            raise

    async def reload(self, config: Config) -> None:
        """Go by another configuration from the next request on. Raises MoesaicError, and then goes by the old one."""
        now = self.state.config
        for name in FIXED:
            if getattr(config.settings, name) != getattr(now.settings, name):
                raise_fixed(name)
        if config.trace != now.trace:
            raise_fixed("trace")
        await self._take(config)

    async def close(self) -> None:
        """Write what is left, and let go of everything. Calls that were broken off get a moment to be settled."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLING):
                while self.metrics.running:
                    await asyncio.sleep(0.01)
        for task in self._retiring:
            task.cancel()
        await self._backends.close()
        if self._writer is not None:
            await self._writer.close()
        self._deciding.shutdown()

    async def _take(self, config: Config) -> None:
        found = await self._backends.opened(config.catalog)
        before: Mapping[str, Breaker] = self._state.relay.breakers if self._state is not None else {}
        routes = {name: backend for name, (_, backend) in found.items()}
        state = await asyncio.to_thread(make_state, config, routes, before, self._guesses, self._given)
        self._state = state
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
            logger.error("%s", first_line(error))
            await send({"type": "lifespan.startup.failed", "message": first_line(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        sink, path = Sink(send), scope["path"]
        try:
            headers: dict[bytes, bytes] = dict(scope["headers"])
            state = self.state
            state.gate.check_host(headers)
            if handler := self._paths.get(path):
                _check_method(scope, "POST")
                key = state.gate.admit(scope, headers)
                settings = state.config.settings
                raw = await read_body(scope, receive, settings.largest_body, settings.body_seconds)
                await handler(state, key, path, headers, raw, receive, sink)
            else:
                status, kind, body = self._told(state, scope, headers)
                await _whole(sink, status, body, kind)
        except ClientGone:
            return
        except Refused as refused:
            self.metrics.refused(refused.status, refused.code)
            await _refuse(sink, refused, path)
        except Exception as error:
            logger.exception("a request to %s failed: %s", path[:80], type(error).__name__)
            if sink.begun:
                raise
            await _refuse(sink, Refused(500, "the gateway failed; its log says how", SERVER), path)

    def _told(
        self, state: State, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]
    ) -> tuple[int, bytes, bytes | dict[str, Any]]:
        """What is answered without asking a model."""
        path = scope["path"]
        if path not in ("/health", "/metrics", "/openapi.json", MODELS) and not path.startswith(MODELS + "/"):
            raise Refused(404, "there is nothing at this path: /openapi.json lists what there is", code="not_found")
        _check_method(scope, "GET")
        if path == "/openapi.json":
            return 200, JSON[1], openapi.document()
        if path == "/health":
            return 200, JSON[1], {"status": "ok", "in_flight": self.metrics.running}
        state.gate.admit(scope, headers)
        if path == "/metrics":
            return 200, CONTENT, self.metrics.text(state.relay.breakers).encode()
        names = state.names()
        cards = [_card(name) for name in names]
        if path == MODELS:
            return 200, JSON[1], {"object": "list", "data": cards}
        name = path.removeprefix(MODELS + "/")
        if name not in names:
            state.model(name)
        return 200, JSON[1], _card(name)

    async def _answer(
        self, state: State, key: Key, path: str, headers: Mapping[bytes, bytes], raw: bytes, receive: Receive, sink: Sink
    ) -> None:
        form: Form | None = None
        if path in dialects.FORMS:
            asked, form = dialects.translated(path, raw)
        else:
            asked = parse(path, raw)
        call = Call(next(self._ids), key.id, path, asked.model, stream=asked.stream)
        given = headers.get(SESSION, b"").decode("latin-1") or asked.session()
        chat, models = None, []
        if asked.model.startswith(OWN):
            router = state.router(asked.model)
            chat = chat_of(key.id, router.name, given)
            models = await self._routed(state, router, call, asked, given, chat)
        else:
            models = state.candidates(state.model(asked.model), routed=False)
        dry = headers.get(DRY, b"0").strip().lower() not in (b"", b"0", b"false")
        self.metrics.running += 1
        try:
            await self._reserve(state, key, call, asked, models, free=dry)
            if dry:
                await self._dry(call, models, sink)
                return
            try:
                await self._made(state, call, asked, models, receive, sink, form)
            finally:
                self._settle(call)
        finally:
            self.metrics.running -= 1
        if call.served is not None and call.ended != "refused":
            self._sessions.keep(chat, call.served.name)

    async def _routed(
        self, state: State, router: Router, call: Call, asked: Asked, session: str, chat: bytes | None
    ) -> list[Model]:
        """Ask a router, in its thread, and keep a chat's expert unless another is better by the penalty."""
        if asked.path == EMBEDDINGS:
            raise Refused(400, f"{router.name} chooses who writes an answer: embeddings name their model", param="model")
        prompt = asked.prompt()
        try:
            decision = await asyncio.get_running_loop().run_in_executor(
                self._deciding, lambda: router.decide(prompt, session=session)
            )
            expert = self._sessions.choose(chat, decision, state.config.settings.switching_penalty)
            models = state.candidates(state.model(expert), routed=True)
        except Exception as error:
            said = first_line(error)[:200]
            logger.error("router %s failed: %s", router.name, said if state.config.trace.prompts else type(error).__name__)
            raise Refused(500, f"router {router.name} did not decide", SERVER, code="router_failed") from None
        call.router, call.category, call.expert = router.name, decision.category, expert
        call.confidence, call.uncertain = decision.confidence, decision.uncertain
        call.kept = expert != decision.expert
        if state.config.trace.prompts:
            call.prompt = prompt
        return models

    async def _reserve(
        self, state: State, key: Key, call: Call, asked: Asked, models: Sequence[Model], *, free: bool
    ) -> None:
        """Put down the most that the call may cost, whoever of the models answers. Raises Refused."""
        call.own_input = state.count(models[0], asked)
        output = max(state.reserved_output(asked, model) for model in models)
        if not free:
            call.reserved = max(
                price(model, call.own_input, state.reserved_output(asked, model)) for model in models
            )
        refusal = await self.writer.reserve(call, key, 0 if free else call.own_input + output)
        if refusal is None:
            return
        if refusal.wait is None:
            told = [(b"x-should-retry", b"false")]
            raise Refused(429, refusal.message, "insufficient_quota", code="insufficient_quota", headers=told)
        status, kind = (503, SERVER) if refusal.message.startswith("the ledger") else (429, "rate_limit_error")
        raise Refused(status, refusal.message, kind, code="rate_limit_exceeded", headers=[seconds(refusal.wait)])

    async def _made(
        self, state: State, call: Call, asked: Asked, models: Sequence[Model], receive: Receive, sink: Sink,
        form: Form | None,
    ) -> None:  # fmt: skip
        """Make a call while watching whether its client stays."""
        work = asyncio.ensure_future(state.relay.answer(call, asked, models, sink, form))
        watch = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                return
            sink.gone = True
            policy = state.config.settings.on_disconnect
            call.status = 499
            if policy == "drain":
                call.ended = "drained"
                await work
            else:
                await _cancelled(work)
                call.ended = "cancelled" if policy == "cancel" else "partial"
        except Refused as refused:
            call.status, call.ended = refused.status, "failed"
            raise
        except asyncio.CancelledError:  # the gateway stops, and has waited long enough
            await _cancelled(work)
            call.ended = "cancelled" if state.config.settings.on_disconnect == "cancel" else "partial"
            raise
        finally:
            watch.cancel()

    def _settle(self, call: Call) -> None:
        call.end()
        self.metrics.ended(call)
        self.writer.settle(call)

    async def _dry(self, call: Call, models: Sequence[Model], sink: Sink) -> None:
        call.status, call.ended = 200, "dry"
        told = {
            "object": "moesaic.decision", "model": call.asked, "router": call.router or None,
            "category": call.category or None, "confidence": call.confidence, "uncertain": call.uncertain,
            "expert": models[0].name, "kept": call.kept, "fallbacks": [model.name for model in models[1:]],
            "input_tokens": call.own_input,
            "price": {"input": models[0].input_price, "output": models[0].output_price},
        }  # fmt: skip
        self._settle(call)
        await _whole(sink, 200, told, JSON[1], trace.headers(call))


async def _cancelled(work: asyncio.Future[None]) -> None:
    work.cancel()
    with suppress(asyncio.CancelledError, Refused):
        await work


def raise_fixed(name: str) -> None:
    from moesaic.errors import ConfigError

    raise ConfigError(f"{name} cannot change while the gateway runs: set it back, or start anew")


def _check_method(scope: Mapping[str, Any], wanted: str) -> None:
    if scope["method"] != wanted:
        allow = [(b"allow", wanted.encode())]
        raise Refused(405, f"this path takes {wanted}", code="method_not_allowed", headers=allow)


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "moesaic" if name.startswith(OWN) else "catalog"}


async def _refuse(sink: Sink, refused: Refused, path: str) -> None:
    if not sink.begun:
        body = dialects.error(refused) if path == dialects.MESSAGES else refused.body()
        await _whole(sink, refused.status, body, JSON[1], refused.headers)


async def _whole(
    sink: Sink,
    status: int,
    body: bytes | dict[str, Any],
    kind: bytes,
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    await sink.start(status, kind.decode(), [(b"content-length", b"%d" % len(content)), *headers])
    await sink.body(content, more=False)


def build(config: Config, routers: Mapping[str, Router] | None = None) -> Gateway:
    """The ASGI application of a configuration; its lifespan opens and closes it."""
    return Gateway(config, routers)
