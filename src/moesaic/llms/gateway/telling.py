"""What the client of a policy is told: thinking, searches and replies as reasoning, then the answer."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable
from typing import Any

from moesaic.llms.gateway import trace
from moesaic.llms.gateway.calls import Call
from moesaic.llms.gateway.forms import dumped
from moesaic.llms.gateway.making import whole
from moesaic.llms.gateway.refusals import Refused
from moesaic.llms.gateway.relay import Form, Sink
from moesaic.llms.router_r1.transcript import Dialect, Piece

TAKING = 60.0
"""Seconds in which a client must take a piece of an answer, or counts as gone."""


class Telling:
    """One answer, as a chat's completion or as its chunks.

    A chunk is sent for each piece of the transcript. Without an answer the content is empty, and `length` is why: the
    policy went as far as it may. That is no error: its calls were made, and asked again it would do the same.
    """

    def __init__(self, call: Call, sink: Sink, form: Form | None, dialect: Dialect) -> None:
        self._call, self._sink, self._form, self._dialect = call, sink, form, dialect
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": call.asked}
        self._thoughts: list[str] = []
        self._answer: str | None = None

    async def tell(self, piece: Piece) -> None:
        """The next piece."""
        said = self._dialect.shown(piece.text) if piece.reply else piece.text
        if not piece.reply and isinstance(done := self._dialect.action(said), str):
            self._answer = done
            said = (said.rpartition(done)[0] if done else said).partition("<answer>")[0]
        self._thoughts.append(said)
        if self._call.stream and said:
            await self._chunk({"reasoning_content": said})

    async def end(self) -> None:
        """The answer, and what it took: tokens of the question, and those that the policy wrote."""
        given, written = self._call.own_input, self._call.own_output
        usage = {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}
        finish = "length" if self._answer is None else "stop"
        if self._call.stream:
            if self._answer:
                await self._chunk({"content": self._answer})
            await self._chunk({}, finish, usage=usage)
            await self._send(b"data: [DONE]\n\n" if self._form is None else self._form.end(), more=False)
            return
        message = {"role": "assistant", "content": self._answer or "", "reasoning_content": "".join(self._thoughts)}
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        content = {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage}
        body = dumped(content if self._form is None else self._form.whole(content))
        await self._taken(whole(self._sink, 200, body, headers=trace.headers(self._call)))

    async def fail(self, refused: Refused) -> None:
        """End a stream that has begun."""
        wrong = b"data: " + refused.body() + b"\n\n" if self._form is None else self._form.error(refused)
        await self._send(wrong, more=False)

    async def _chunk(self, delta: dict[str, str], finish: str | None = None, **more: Any) -> None:
        if not self._sink.begun:
            delta = {"role": "assistant", **delta}
            headers = [(b"cache-control", b"no-cache"), *trace.headers(self._call)]
            await self._sink.start(200, "text/event-stream; charset=utf-8", headers)
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice], **more}
        await self._send(b"data: " + dumped(chunk) + b"\n\n" if self._form is None else self._form.event(chunk))

    async def _send(self, content: bytes, *, more: bool = True) -> None:
        await self._taken(self._sink.body(content, more=more))

    async def _taken(self, sending: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(TAKING):
                await sending
        except TimeoutError:  # as good as gone
            self._sink.gone = True
            raise asyncio.CancelledError from None
