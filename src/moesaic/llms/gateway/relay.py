"""Asks the models that may answer, one after the other, and hands on what the first says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moesaic.llms.catalog import Model
from moesaic.llms.gateway import trace
from moesaic.llms.gateway.calls import Call
from moesaic.llms.gateway.forms import dumped
from moesaic.llms.gateway.policy import LONGEST, Breaker, wait
from moesaic.llms.gateway.refusals import SERVER, Refused, seconds
from moesaic.llms.gateway.replies import SENDING, Backend, Failed, Reply, Sending
from moesaic.llms.gateway.requests import EMBEDDINGS, Asked
from moesaic.llms.gateway.stream import Events, Seen
from moesaic.llms.gateway.tokens import Counter

Send = Callable[[dict[str, Any]], Awaitable[None]]

AGAIN = frozenset([408, 409, 425, 429])
"""Statuses below 500 after which the same model may be asked again."""
AMISS = frozenset([401, 403, 404, 405, 407, 501])
"""Statuses that say that the catalog's entry is wrong, or does not serve this path: nobody asks again."""
UNWELL = frozenset([401, 407, 408])
"""Statuses below 500 that breakers are told. What a client can bring about by what it asks is none of them: a path that
the model does not serve (404, 405, 501, a redirection), words that it will not hear (403)."""


_NO_CHAT = (LookupError, TypeError, AttributeError, ValueError, RecursionError)


class Form(Protocol):
    """Another API's way of saying one answer (`dialects.py`). `keeps`: it holds all of a stream until its end."""

    keeps: bool

    def whole(self, content: Mapping[str, Any]) -> dict[str, Any]: ...

    def event(self, content: Mapping[str, Any]) -> bytes: ...

    def end(self) -> bytes: ...

    def error(self, refused: Refused) -> bytes: ...


class Sink:
    """Where an answer goes; nowhere, once its client is gone. `ended`: its last byte has been sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.ended = self.gone = False

    async def start(self, status: int, kind: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.begun = True
        if not self.gone:
            given = [(b"content-type", kind.encode("latin-1", "replace")), *headers]
            await self._send({"type": "http.response.start", "status": status, "headers": given})

    async def body(self, content: bytes, *, more: bool) -> None:
        self.ended = self.ended or not more
        if not self.gone:
            await self._send({"type": "http.response.body", "body": content, "more_body": more})


@dataclass
class Opened:
    """An answer that is good as far as it has been read: all of it, or the first events of a stream."""

    reply: Reply
    seen: Seen
    first: bytes
    parsed: list[dict[str, Any]]
    rest: Events | None


@dataclass(frozen=True)
class Relay:
    """Models' backends and breakers as one state of the gateway has them."""

    backends: Mapping[str, Backend]
    breakers: Mapping[str, Breaker]
    counter: Counter
    largest: int

    async def answer(self, call: Call, asked: Asked, models: Sequence[Model], sink: Sink, form: Form | None) -> None:
        """Hand on an answer. Raises Refused where nobody gives one, as long as nothing has been sent."""
        opened = await self._opened(call, asked, models)
        try:
            if opened.rest is None:
                await self._whole(call, asked, opened, sink, form)
            else:
                await self._streamed(call, opened, opened.rest, sink, form)
        finally:
            self._count(call, asked, opened.seen)
            opened.reply.close()

    def longest(self, models: Sequence[Model]) -> float:
        """Seconds that a call of these models takes at most, waits between tries included."""
        policies = [(model, self.breakers[model.name].policy) for model in models]
        return sum((p.retries + 1) * (model.total + max(LONGEST, p.longest_wait)) for model, p in policies)

    async def _opened(self, call: Call, asked: Asked, models: Sequence[Model]) -> Opened:
        last, rest = None, []
        for model in models:
            breaker = self.breakers[model.name]
            tries = 0
            while True:
                if not breaker.allows():
                    rest.append(breaker.remaining())
                    call.attempts.append({"model": model.name, "ms": None, "said": "left alone for a while"})
                    break
                tries += 1
                call.served = model
                begun, sending = call.elapsed(), Sending()
                SENDING.set(sending)
                try:
                    opened = await self._tried(asked, model, call.stream)
                except Failed as failed:
                    last, call.served = failed, None
                    breaker.failed() if failed.counts else breaker.left()
                    self._note(call, model, begun, str(failed))
                    delay = max(wait(tries), failed.wait or 0.0)
                    policy = breaker.policy
                    if not failed.again or tries > policy.retries or (failed.wait or 0.0) > policy.longest_wait:
                        break
                    await asyncio.sleep(delay)
                except BaseException:
                    breaker.left()
                    if not sending.done:
                        call.served = None
                    self._note(call, model, begun, "left")
                    raise
                else:
                    breaker.succeeded()
                    self._note(call, model, begun, "ok" if opened.reply.status < 400 else str(opened.reply.status))
                    return opened
        raise _nobody(models, last, rest)

    def _note(self, call: Call, model: Model, begun: float, said: str) -> None:
        call.attempts.append({"model": model.name, "ms": round((call.elapsed() - begun) * 1e3, 2), "said": said})

    async def _tried(self, asked: Asked, model: Model, stream: bool) -> Opened:
        """One try. Raises Failed as long as nothing good has come."""
        reply = await self.backends[model.name].open(asked.path, asked.named(model.served_as or model.name))
        seen, good = Seen(self.counter.tally(model.name)), False
        try:
            _check_status(reply)
            if reply.status >= 300 or not stream:
                body = await self._read(reply)
                parsed = [] if reply.status >= 300 else [seen.read(body)]
                if seen.failed and reply.status < 300:
                    raise Failed("its answer is an error")
                good = True
                return Opened(reply, seen, body, parsed, None)
            if not reply.kind.startswith("text/event-stream"):
                raise Failed("it was asked for a stream, and sent none")
            events = Events(reply.read, self.largest)
            first = await events.next()
            parsed = seen.feed(first)
            if not first or (seen.failed and not seen.begun):
                raise Failed("its stream ended before it began" if not first else "its stream begins with an error")
            good = True
            return Opened(reply, seen, first, parsed, events)
        finally:
            if not good:
                reply.close()

    async def _read(self, reply: Reply) -> bytes:
        parts, size = [], 0
        while chunk := await reply.read():
            parts.append(chunk)
            size += len(chunk)
            if size > self.largest:
                raise Failed(f"its answer has more than {self.largest:,} bytes", again=False, counts=False)
        return b"".join(parts)

    async def _whole(self, call: Call, asked: Asked, opened: Opened, sink: Sink, form: Form | None) -> None:
        reply, body = opened.reply, opened.first
        self._count(call, asked, opened.seen)
        if form is not None and reply.status < 300:
            body = _whole_form(form, opened.parsed[0], call.tokens())
        call.status = reply.status
        if reply.status >= 300:
            call.ended = "refused"
        elif call.ended == "failed":
            call.ended = "whole"
        call.end()
        length = (b"content-length", b"%d" % len(body))
        again = [seconds(reply.wait)] if reply.wait is not None else []
        await sink.start(reply.status, reply.kind or "application/json", [length, *trace.headers(call), *again])
        await sink.body(body, more=False)

    async def _streamed(self, call: Call, opened: Opened, rest: Events, sink: Sink, form: Form | None) -> None:
        seen, part, size = opened.seen, opened.first, len(opened.first)
        try:
            shown = part if form is None else _formed(form, opened.parsed, seen)
        except Failed as failed:
            raise self._broke_off(call, failed) from None
        call.status = 200
        headers = [(b"cache-control", b"no-cache"), *trace.headers(call)]
        await sink.start(200, opened.reply.kind, headers)
        try:
            while part:
                await sink.body(shown, more=True)
                part = await rest.next()
                parsed, size = seen.feed(part), size + len(part)
                if part and form is not None and form.keeps and size > self.largest:
                    raise Failed(f"its answer has more than {self.largest:,} bytes", counts=False)
                shown = part if form is None else _formed(form, parsed, seen)
            if not (seen.done or seen.finished or seen.failed):
                raise Failed("its stream broke off")
        except Failed as failed:
            call.ended = "broken"
            refused = self._broke_off(call, failed)
            wrong = b"data: " + refused.body() + b"\n\n" if form is None else form.error(refused)
            await sink.body(wrong, more=False)
            return
        if call.ended == "failed":
            call.ended = "broken" if seen.failed else "whole"
        await sink.body(b"" if form is None else form.end(), more=False)

    def _broke_off(self, call: Call, failed: Failed) -> Refused:
        """Take down that a stream failed; what the client is told."""
        assert call.served is not None
        call.attempts[-1]["said"] = str(failed)
        if failed.counts:
            self.breakers[call.served.name].failed()
        return Refused(502, f"model {call.served.name}: {failed}", SERVER, code="upstream_error")

    def _count(self, call: Call, asked: Asked, seen: Seen) -> None:
        """Take over what an answer said of itself, and count its tokens."""
        call.served_id = seen.model
        call.backend_input, call.backend_output = seen.usage
        if call.served is not None:
            call.possible = asked.possible(call.served)
        if asked.path != EMBEDDINGS:
            call.own_output = seen.tally.total()
        elif call.backend_input is not None:
            call.backend_output = 0


def _formed(form: Form, parsed: Sequence[Mapping[str, Any]], seen: Seen) -> bytes:
    """Events in another API's form. Raises Failed for one that is an error, or that is none of a chat's."""
    if seen.failed:
        raise Failed("its stream holds an error")
    try:
        return b"".join(map(form.event, parsed))
    except _NO_CHAT:
        raise Failed("its stream is no chat's") from None


def _whole_form(form: Form, content: Mapping[str, Any], tokens: tuple[int, int]) -> bytes:
    usage = dict(zip(("prompt_tokens", "completion_tokens"), tokens, strict=True))
    try:
        return dumped(form.whole({**content, "usage": usage}))
    except _NO_CHAT:
        raise Refused(502, "the answer of the model is no chat's", SERVER, code="upstream_error") from None


def _check_status(reply: Reply) -> None:
    """Raise Failed for a status after which somebody else may answer."""
    status = reply.status
    if status == 429:
        raise Failed("it is busy (429)", status=429, counts=False, wait=reply.wait)
    if status in AMISS or 300 <= status < 400:
        told = f"it answered {status}: its endpoint, name or key in the catalog is wrong, or it does not serve this"
        raise Failed(told, again=False, counts=status in UNWELL)
    if status >= 500 or status in AGAIN:
        raise Failed(f"it answered {status}", counts=status >= 500 or status in UNWELL, wait=reply.wait)


def _nobody(models: Sequence[Model], last: Failed | None, rest: Sequence[float]) -> Refused:
    names = ", ".join(model.name for model in models)
    if last is None:
        return Refused(
            503, f"{names}: left alone after failures", SERVER, code="unavailable", headers=[seconds(min(rest))]
        )
    headers = [seconds(last.wait)] if last.wait is not None else []
    kind = "rate_limit_error" if last.status == 429 else SERVER
    return Refused(last.status, f"no answer of {names}: {last}", kind, code="upstream_error", headers=headers)
