"""What every call goes through, whoever makes it: put down, made while its client is watched, and settled."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from moesaic.llms.catalog import Model
from moesaic.llms.gateway.calls import LARGEST, PICO, Call, price
from moesaic.llms.gateway.keys import Key
from moesaic.llms.gateway.metrics import Metrics
from moesaic.llms.gateway.refusals import SERVER, Headers, Refused, seconds
from moesaic.llms.gateway.relay import Sink
from moesaic.llms.gateway.requests import Asked, Receive
from moesaic.llms.gateway.state import State
from moesaic.llms.gateway.writer import Writer

logger = logging.getLogger(__name__)

SESSION, DRY, BUDGET = b"x-moesaic-session", b"x-moesaic-dry-run", b"x-moesaic-budget"
DOLLARS = r"^[0-9]{1,6}(\.[0-9]{1,12})?$"


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

    def is_dry(self) -> bool:
        given = self.headers.get(DRY, b"0")
        if given not in (b"0", b"1"):
            raise Refused(400, f"{DRY.decode()} is 0 or 1")
        return given == b"1"

    def budget(self) -> int | None:
        """Picodollars that it may cost, by its header or else by the file; None for no end. Raises Refused."""
        if BUDGET not in self.headers:
            most = self.state.config.settings.request_budget
            return None if most is None else round(most * PICO)
        given = self.headers[BUDGET].decode("latin-1")
        if not re.fullmatch(DOLLARS, given):
            raise Refused(400, f"{BUDGET.decode()} is a decimal number of USD, such as 0.05", param=BUDGET.decode())
        return int(Decimal(given) * PICO)


class Booking:
    """What calls share: numbers, books and counts."""

    def __init__(self, writer: Writer, metrics: Metrics) -> None:
        self._writer, self._metrics = writer, metrics
        self._ids = itertools.count(time.time_ns())

    def call(self, key: Key, path: str, asked: str, *, stream: bool = False) -> Call:
        return Call(next(self._ids), key.id, path, asked, stream=stream)

    @asynccontextmanager
    async def open(self, key: Key, call: Call, tokens: int) -> AsyncIterator[None]:
        """Reserve what was put down for a call, and settle it in the end. Raises Refused where it is not admitted."""
        self._metrics.running += 1
        try:
            if (refusal := await self._writer.reserve(call, key, tokens)) is not None:
                if refusal.ours:
                    wait = [seconds(refusal.wait or 1)]
                    raise Refused(503, refusal.message, SERVER, code="unavailable", headers=wait)
                if refusal.wait is None:
                    told = [(b"x-should-retry", b"false")]
                    raise Refused(429, refusal.message, "insufficient_quota", code="insufficient_quota", headers=told)
                kind, code = "rate_limit_error", "rate_limit_exceeded"
                raise Refused(429, refusal.message, kind, code=code, headers=[seconds(refusal.wait)])
            try:
                yield
            finally:
                call.end()
                if call.is_lied_to():
                    logger.warning("call %x: %s counts more tokens than there can be", call.id, call.served_id[:80])
                self._metrics.ended(call)
                self._writer.settle(call)
        finally:
            self._metrics.running -= 1


def put_down(state: State, call: Call, asked: Asked, models: Sequence[Model], left: int | None) -> int:
    """Set the most that a call may cost, whoever of the models answers. Returns its tokens.

    Args:
        left: picodollars of its request's budget; None for no end.

    Raises:
        Refused: it could go beyond them, or is more than the books can hold.
    """
    outputs = {model.name: state.reserved_output(asked, model) for model in models}
    call.reserved_output = outputs
    call.reserved = max(price(model, call.own_input, outputs[model.name]) for model in models)
    if call.reserved > LARGEST:
        raise Refused(400, "this request may cost more than the books can hold: ask for fewer tokens")
    if left is not None and call.reserved > left:
        told = f"this may cost {call.reserved / PICO:.9f} USD, and {max(left, 0) / PICO:.9f} of its budget are left"
        raise Refused(400, told, code="budget_exceeded", param=BUDGET.decode())
    return call.own_input + max(outputs.values())


@contextmanager
def noted(call: Call, sink: Sink, on_disconnect: str) -> Iterator[None]:
    """Take down how a call ends that does not end well."""
    try:
        yield
    except Refused as refused:
        call.status, call.ended = refused.status, "failed"
        raise
    except Exception:
        if not sink.begun:
            call.status, call.ended = 500, "failed"
        raise
    except asyncio.CancelledError:  # the client is gone, or the gateway stops and has waited long enough
        call.status, call.ended = 499, "cancelled" if on_disconnect == "cancel" else "partial"
        raise


async def watched(
    request: Request,
    call: Call,
    answer: Awaitable[None],
    *,
    longest: float | None,
    drain: Callable[[], None] = lambda: None,
) -> None:
    """Make a call while watching whether its client stays; one that takes nothing for too long counts as gone.

    Args:
        longest: seconds that it takes at most; None for an answer that sees to that itself.
        drain: is told that the client is gone from a call that goes on to its end.
    """
    sink, policy = request.sink, request.state.config.settings.on_disconnect
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
            drain()

    watch = asyncio.ensure_future(request.receive())
    watch.add_done_callback(lambda _: None if watch.cancelled() or sink.ended else left())
    timer = None if longest is None else loop.call_later(longest, stop)
    try:
        with noted(call, sink, policy):
            await answer
    except asyncio.CancelledError:
        if not broken_off or making.uncancel():
            raise
    finally:
        sink.ended = True
        if timer is not None:
            timer.cancel()
        watch.cancel()


async def whole(
    sink: Sink, status: int, body: bytes | dict[str, Any], kind: str = "application/json", headers: Headers = ()
) -> None:
    """An answer of ours."""
    content = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    await sink.start(status, kind, [(b"content-length", b"%d" % len(content)), *headers])
    await sink.body(content, more=False)
