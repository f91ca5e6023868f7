"""One request through the gateway: parsed, routed, reserved, made, watched and settled."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from moesaic.errors import first_line
from moesaic.llms.catalog import OWN, Model
from moesaic.llms.gateway import dialects, trace
from moesaic.llms.gateway.calls import LARGEST, Call, price, valid
from moesaic.llms.gateway.keys import Key
from moesaic.llms.gateway.metrics import Metrics
from moesaic.llms.gateway.refusals import SERVER, Headers, Refused, seconds
from moesaic.llms.gateway.relay import Form, Sink
from moesaic.llms.gateway.requests import EMBEDDINGS, Asked, Receive, parse
from moesaic.llms.gateway.routers import Router
from moesaic.llms.gateway.sessions import Sessions, chat_of
from moesaic.llms.gateway.state import State
from moesaic.llms.gateway.writer import Writer

logger = logging.getLogger(__name__)

SESSION, DRY = b"x-moesaic-session", b"x-moesaic-dry-run"


@dataclass(frozen=True, slots=True)
class Request:
    """A request that was let in. `state` is what it goes by to its end, whatever is reloaded meanwhile."""

    state: State
    key: Key
    path: str
    headers: Mapping[bytes, bytes]
    body: bytes
    receive: Receive
    sink: Sink


class Answering:
    """What requests share: books, chats and counts."""

    def __init__(self, writer: Writer, metrics: Metrics) -> None:
        self._writer, self._metrics = writer, metrics
        self._sessions = Sessions()
        self._deciding = ThreadPoolExecutor(1, "router")
        self._ids = itertools.count(time.time_ns())

    def close(self) -> None:
        self._deciding.shutdown()

    async def answer(self, request: Request) -> None:
        """Answer a request, or raise Refused before anything of an answer was sent."""
        asked, form = _read(request)
        call = Call(next(self._ids), request.key.id, request.path, asked.model, stream=asked.stream)
        chat = None
        if asked.model.startswith(OWN):
            router = request.state.router(asked.model)
            session = request.headers.get(SESSION, b"").decode("latin-1") or asked.session()
            chat = chat_of(request.key.id, router.name, session)
            models = await self._routed(request.state, router, call, asked, session, chat)
        else:
            models = request.state.candidates(request.state.model(asked.model), routed=False)
        dry = _is_dry(request.headers)
        self._metrics.running += 1
        try:
            await self._reserve(request, call, asked, models, free=dry)
            try:
                if dry:
                    await _decided(call, models, request.sink)
                else:
                    await _made(request, call, asked, models, form)
            finally:
                call.end()
                if call.is_lied_to():
                    logger.warning("call %x: %s counts more tokens than there can be", call.id, call.served_id[:80])
                self._metrics.ended(call)
                self._writer.settle(call)
        finally:
            self._metrics.running -= 1
        if call.served is not None and call.ended != "refused":
            self._sessions.keep(chat, call.served.name)

    async def _routed(
        self, state: State, router: Router, call: Call, asked: Asked, session: str, chat: bytes | None
    ) -> list[Model]:
        """Ask a router, in its thread, and keep a chat's expert unless another is better by the penalty."""
        if asked.path == EMBEDDINGS:
            raise Refused(400, f"{router.name} chooses who writes answers: embeddings name their model", param="model")
        prompt = asked.prompt()
        config = state.config
        try:
            decision = await asyncio.get_running_loop().run_in_executor(
                self._deciding, lambda: router.decide(prompt, session=session)
            )
            expert = self._sessions.choose(chat, decision, config.settings.switching_penalty)
            if not state.answers(expert):
                expert = decision.expert
            models = state.candidates(state.model(expert), routed=True)
        except Exception as error:
            said = first_line(error)[:200] if config.trace.prompts else ""  # it may quote the prompt
            logger.error("router %s failed: %s %s", router.name, type(error).__name__, said)
            raise Refused(500, f"router {router.name} did not decide", SERVER, code="router_failed") from None
        call.router, call.category, call.expert = router.name, valid(decision.category), expert
        call.confidence, call.uncertain, call.scores = decision.confidence, decision.uncertain, decision.scores
        call.kept = expert != decision.expert
        if config.trace.prompts:
            call.prompt = prompt
        return models

    async def _reserve(
        self, request: Request, call: Call, asked: Asked, models: Sequence[Model], *, free: bool
    ) -> None:
        """Put down the most that the call may cost, whoever of the models answers. Raises Refused."""
        state, tokens = request.state, 0
        call.own_input = state.count(models[0], asked)
        if not free:
            outputs = {model.name: state.reserved_output(asked, model) for model in models}
            tokens, call.reserved_output = call.own_input + max(outputs.values()), outputs
            call.reserved = max(price(model, call.own_input, outputs[model.name]) for model in models)
            if call.reserved > LARGEST:
                raise Refused(400, "this request may cost more than the books can hold: ask for fewer tokens")
        refusal = await self._writer.reserve(call, request.key, tokens)
        if refusal is None:
            return
        if refusal.ours:
            raise Refused(503, refusal.message, SERVER, code="unavailable", headers=[seconds(refusal.wait or 1)])
        if refusal.wait is None:
            told = [(b"x-should-retry", b"false")]
            raise Refused(429, refusal.message, "insufficient_quota", code="insufficient_quota", headers=told)
        headers = [seconds(refusal.wait)]
        raise Refused(429, refusal.message, "rate_limit_error", code="rate_limit_exceeded", headers=headers)


def _is_dry(headers: Mapping[bytes, bytes]) -> bool:
    given = headers.get(DRY, b"0")
    if given not in (b"0", b"1"):
        raise Refused(400, f"{DRY.decode()} is 0 or 1")
    return given == b"1"


def _read(request: Request) -> tuple[Asked, Form | None]:
    if request.path in dialects.FORMS:
        return dialects.translated(request.path, request.body)
    return parse(request.path, request.body), None


async def _made(request: Request, call: Call, asked: Asked, models: Sequence[Model], form: Form | None) -> None:
    """Make a call while watching whether its client stays; one that takes nothing for too long counts as gone."""
    relay, sink, policy = request.state.relay, request.sink, request.state.config.settings.on_disconnect
    loop, making = asyncio.get_running_loop(), asyncio.current_task()
    assert making is not None
    broken_off = False

    def stop() -> None:
        nonlocal broken_off
        sink.gone = broken_off = True
        making.cancel()

    def left() -> None:
        if policy != "drain":
            stop()
        else:
            sink.gone, call.ended = True, "drained"

    watch = asyncio.ensure_future(request.receive())
    watch.add_done_callback(lambda _: None if watch.cancelled() or sink.ended else left())
    timer = loop.call_later(relay.longest(models), stop)
    try:
        await relay.answer(call, asked, models, sink, form)
    except Refused as refused:
        call.status, call.ended = refused.status, "failed"
        raise
    except Exception:
        if not sink.begun:
            call.status, call.ended = 500, "failed"
        raise
    except asyncio.CancelledError:  # the client is gone, or the gateway stops and has waited long enough
        call.status, call.ended = 499, "cancelled" if policy == "cancel" else "partial"
        if not broken_off or making.uncancel():
            raise
    finally:
        sink.ended = True
        timer.cancel()
        watch.cancel()


async def _decided(call: Call, models: Sequence[Model], sink: Sink) -> None:
    """Answer with the decision alone."""
    call.status, call.ended = 200, "dry"
    told = {
        "object": "moesaic.decision", "model": call.asked, "router": call.router or None,
        "category": call.category or None, "confidence": call.confidence, "uncertain": call.uncertain,
        "expert": models[0].name, "kept": call.kept, "scores": trace.scores(call),
        "fallbacks": [model.name for model in models[1:]],
        "input_tokens": call.own_input, "price": {"input": models[0].input_price, "output": models[0].output_price},
    }  # fmt: skip
    await whole(sink, 200, told, headers=trace.headers(call))


async def whole(
    sink: Sink, status: int, body: bytes | dict[str, Any], kind: str = "application/json", headers: Headers = ()
) -> None:
    """An answer of ours."""
    content = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    await sink.start(status, kind, [(b"content-length", b"%d" % len(content)), *headers])
    await sink.body(content, more=False)
