"""The gateway's models as a policy's pool: each search is a call like any other, under the key of who asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, wait
from typing import Any

from moesaic.llms.catalog import Model
from moesaic.llms.gateway import dialects
from moesaic.llms.gateway.asker import Asker, Stopped
from moesaic.llms.gateway.calls import SEARCH, Call, valid
from moesaic.llms.gateway.forms import text_of
from moesaic.llms.gateway.making import Booking, Request, noted, put_down
from moesaic.llms.gateway.refusals import Refused
from moesaic.llms.gateway.relay import Sink
from moesaic.llms.gateway.requests import Asked
from moesaic.llms.router_r1.engine import Reply
from moesaic.llms.router_r1.prompt import helper

SLICE = 1.0
"""Seconds between two looks of a rollout whether the reply that it waits for can still come."""


class Searches:
    """The searches of one request, whose `call` lists them; one at a time runs.

    Args:
        check: raises Stopped where the rollout is to end.
    """

    def __init__(self, request: Request, call: Call, asker: Asker, booking: Booking, check: Callable[[], None]) -> None:
        self._request, self._call, self._asker, self._booking, self._check = request, call, asker, booking, check
        self._made: list[Call] = []
        call.searches = self._made
        self._loop = asyncio.get_running_loop()
        self._running: tuple[asyncio.Task[Any], Call] | None = None

    def ask(self, calls: Sequence[tuple[Model, str]]) -> list[Reply]:
        """As a pool: in the rollout's thread, while the calls are made in the event loop."""
        return [self._reply(*call) for call in calls]

    def _reply(self, model: Model, query: str) -> Reply:
        self._check()
        coming = asyncio.run_coroutine_threadsafe(self._search(model, query), self._loop)
        while not wait([coming], SLICE).done:
            self._check()
        try:
            return coming.result()
        except CancelledError:
            raise Stopped from None

    def unknown(self) -> None:
        """Take down a search for a model that there is not."""
        _refuse(self._new(""), "there is no such model")

    def drain(self) -> None:
        """Let the call that runs go on, for a client that has gone."""
        if self._running is not None:
            self._running[1].ended = "drained"

    async def end(self, *, drain: bool) -> None:
        """Wait until the call that runs is settled, if any does; to `drain` it is not broken off."""
        if self._running is not None:
            task, _ = self._running
            if not drain:
                task.cancel()
            await asyncio.wait([task])

    async def _search(self, model: Model, query: str) -> Reply:
        """Ask a model, or one of its fallbacks."""
        task = asyncio.current_task()
        assert task is not None
        try:
            self._check()
        except Stopped:
            raise asyncio.CancelledError from None
        state, call, taken = self._request.state, self._new(model.name), _Taken()
        self._running = task, call
        try:
            asked = self._asked(model, query)
            models = state.candidates(model, routed=False)
            call.own_input = state.count(models[0], asked)
            if state.config.trace.prompts:
                call.prompt = query
            budget = self._call.budget
            left = None if budget is None else budget - self._call.spent()
            tokens = put_down(state, call, asked, models, left)
            async with self._booking.open(self._request.key, call, tokens):
                sink = Sink(taken)
                with noted(call, sink, state.config.settings.on_disconnect):
                    await state.relay.answer(call, asked, models, sink, None)
        except Refused as refused:
            if not call.attempts:
                _refuse(call, str(refused))
            return Reply("", seconds=call.latency, failure=str(refused))
        finally:
            self._running = None
        return taken.reply(call)

    def _new(self, model: str) -> Call:
        call = self._booking.call(self._request.key, SEARCH, model)
        call.router, call.expert, call.within = self._asker.name, model, self._call.id
        self._made.append(call)
        return call

    def _asked(self, model: Model, query: str) -> Asked:
        """A search as its model is asked."""
        asking = self._asker.asking
        content = valid(query if asking.bare else helper(query))
        chat = {
            "model": model.name, "messages": [{"role": "user", "content": content}],
            "max_tokens": asking.max_tokens, "temperature": 0.0, "top_p": 1,
        }  # fmt: skip
        return dialects.written(chat, json.dumps(chat))


def _refuse(call: Call, said: str) -> None:
    call.attempts.append({"model": call.expert, "ms": None, "said": said})


class _Taken:
    """Takes in what would be sent to a client."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    async def __call__(self, message: dict[str, Any]) -> None:
        self._parts.append(message.get("body", b""))

    def reply(self, call: Call) -> Reply:
        if call.ended == "refused":
            return Reply("", seconds=call.latency, failure=f"it answered {call.status}")
        try:
            message = json.loads(b"".join(self._parts))["choices"][0]["message"]
            return Reply(text_of(message.get("content")), call.tokens()[1], call.latency)
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
            return Reply("", seconds=call.latency, failure="its answer is no chat's")
