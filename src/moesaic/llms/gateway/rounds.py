"""One request that a policy answers, in rounds.

The rollout runs in a thread. What it writes and reads comes to the event loop piece by piece; whom it asks is asked
there. A search that is refused, or that nobody answers, reads None. Where the client leaves, nothing more is written or
asked, and the call that runs is ended as `on_disconnect` says.
"""

from __future__ import annotations

import asyncio
import logging
from threading import Event
from typing import Any

from moesaic.errors import first_line
from moesaic.llms.gateway.asker import Asker, Stopped, Turns
from moesaic.llms.gateway.calls import Call, valid
from moesaic.llms.gateway.making import DRY, Booking, Request, watched
from moesaic.llms.gateway.refusals import SERVER, Refused
from moesaic.llms.gateway.relay import Form
from moesaic.llms.gateway.requests import CHAT, PROMPT, Asked
from moesaic.llms.gateway.searching import Searches
from moesaic.llms.gateway.telling import Telling
from moesaic.llms.router_r1.engine import Question, roll
from moesaic.llms.router_r1.settings import DIALECTS
from moesaic.llms.router_r1.transcript import Piece, Search

logger = logging.getLogger(__name__)

SERVED = frozenset(
    ["model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "user",
     "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "metadata", "store", "service_tier",
     "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty"]
)  # fmt: skip
"""Fields of a chat that a policy answers. It draws nothing, so that those of drawing change nothing."""


async def answer(request: Request, call: Call, asked: Asked, form: Form | None, asker: Asker, booking: Booking) -> None:
    """Answer a chat by a policy, or raise Refused before anything of an answer was sent."""
    question = _question(asked, asker.name)
    if request.is_dry():
        raise Refused(400, f"{DRY.decode()}: {asker.name} decides by what it reads, so there is nothing to tell before")
    call.budget = request.budget()
    call.own_input = request.state.counter.count(asker.name, asked.texts) + asked.overhead
    if request.state.config.trace.prompts:
        call.prompt = question
    telling = Telling(call, request.sink, form, DIALECTS[asker.asking.dialect])
    rollout = Rollout(request, call, question, asked.most, telling, asker, booking)
    async with booking.open(request.key, call, 0):
        await watched(request, call, rollout.run(), longest=None, drain=rollout.drain)


class Rollout:
    """A question's way through the rounds.

    Args:
        most: tokens after which the policy begins no further generation.
    """

    def __init__(
        self,
        request: Request,
        call: Call,
        question: str,
        most: int | None,
        telling: Telling,
        asker: Asker,
        booking: Booking,
    ) -> None:
        self._request, self._call, self._most, self._telling, self._asker = request, call, most, telling, asker
        self._dialect = DIALECTS[asker.asking.dialect]
        self._question = Question(question, asker.answering(request.state.config.catalog))
        self._turns = Turns(asker, self._check)
        self._searches = Searches(request, call, asker, booking, self._check)
        self._loop, self._stop = asyncio.get_running_loop(), Event()
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._last = Piece("")
        self._drains = False
        self._fault: Exception | None = None

    async def run(self) -> None:
        """Raises Refused where the policy fails, as long as nothing has been sent."""
        call = self._call
        rolling = self._loop.run_in_executor(self._asker.rolling, self._roll)
        rolling.add_done_callback(lambda _: self._pieces.put_nowait(None))
        try:
            while (piece := await self._pieces.get()) is not None:
                await self._telling.tell(piece)
            if self._fault is not None:
                raise self._fault
        except Exception as error:
            quotes = self._request.state.config.trace.prompts  # it may quote the prompt
            said = first_line(error)[:200] if quotes else ""
            logger.error("policy %s failed: %s %s", self._asker.name, type(error).__name__, said)
            refused = Refused(500, f"{self._asker.name} failed", SERVER, code="router_failed")
            if not self._request.sink.begun:
                raise refused from None
            call.status, call.ended = 200, "broken"
            await self._telling.fail(refused)
            return
        finally:
            self._stop.set()
            rolling.cancel()
            await self._searches.end(drain=self._drains)
            call.own_output = self._turns.tokens
        call.status, call.ended = (499, "drained") if self._drains else (200, "whole")
        call.end()
        await self._telling.end()

    def drain(self) -> None:
        """Write and ask no more; the call that runs goes on to its end."""
        self._drains = True
        self._stop.set()
        self._searches.drain()

    def _roll(self) -> None:
        asking = self._asker.asking
        try:
            roll(
                self._turns, self._searches, [self._question], asking.limits(), dialect=self._dialect, say=asking.say,
                watch=self._watch,
            )  # fmt: skip
        except Stopped:
            pass
        except Exception as error:  # a future does not take every kind
            self._fault = error

    def _check(self) -> None:
        if self._stop.is_set() or (self._most is not None and self._turns.tokens >= self._most):
            raise Stopped

    def _watch(self, which: int, piece: Piece) -> None:
        before, self._last = self._last, piece
        done = self._dialect.action(before.text) if piece.reply else None
        if isinstance(done, Search) and self._dialect.resolve(done.name, self._question.catalog) is None:
            self._searches.unknown()  # the engine asks nobody for it
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


def _question(asked: Asked, name: str) -> str:
    """What is asked: a message's text; of several all, with the role before each. Raises Refused."""
    if asked.path != CHAT:
        raise Refused(400, f"{name} answers chats alone", param="model")
    for field, value in asked.body.items():
        if field not in SERVED and value:
            raise Refused(400, f"{field[:80]} is not served by {name}: leave it out", param=field[:80])
    if asked.choices > 1:
        raise Refused(400, f"{name} gives one answer", param="n")
    said = [(message["role"], _text(message, name)) for message in asked.body["messages"]]
    text = said[0][1] if len(said) == 1 else "\n\n".join(f"{role}: {text}" for role, text in said)
    if not text.strip() or len(text) > PROMPT:
        raise Refused(400, f"{name} takes a text of 1 to {PROMPT:,} characters", param="messages")
    return valid(text)


def _text(message: dict[str, Any], name: str) -> str:
    content = message.get("content") or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = [part["text"] for part in parts if part["type"] == "text" and isinstance(part.get("text"), str)]
    if message.get("tool_calls") or len(texts) < len(parts):
        raise Refused(400, f"{name} reads text alone", param="messages")
    return "".join(texts)
