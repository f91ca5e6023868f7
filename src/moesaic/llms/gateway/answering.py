"""One request through the gateway: parsed, routed, reserved, made, watched and settled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from moesaic.errors import first_line
from moesaic.llms.catalog import OWN, Model
from moesaic.llms.gateway import dialects, rounds, trace
from moesaic.llms.gateway.asker import Asker
from moesaic.llms.gateway.calls import Call, valid
from moesaic.llms.gateway.making import SESSION, Booking, Request, put_down, watched, whole
from moesaic.llms.gateway.metrics import Metrics
from moesaic.llms.gateway.refusals import SERVER, Refused
from moesaic.llms.gateway.relay import Form, Sink
from moesaic.llms.gateway.requests import EMBEDDINGS, Asked, parse
from moesaic.llms.gateway.routers import Router
from moesaic.llms.gateway.sessions import Sessions, chat_of
from moesaic.llms.gateway.state import State
from moesaic.llms.gateway.writer import Writer

logger = logging.getLogger(__name__)


class Answering:
    """What requests share: books, chats and counts."""

    def __init__(self, writer: Writer, metrics: Metrics) -> None:
        self._booking = Booking(writer, metrics)
        self._sessions = Sessions()
        self._deciding = ThreadPoolExecutor(1, "router")

    def close(self) -> None:
        self._deciding.shutdown()

    async def answer(self, request: Request) -> None:
        """Answer a request, or raise Refused before anything of an answer was sent."""
        asked, form = _read(request)
        call = self._booking.call(request.key, request.path, asked.model, stream=asked.stream)
        chat = None
        if asked.model.startswith(OWN):
            router = request.state.router(asked.model)
            if isinstance(router, Asker):
                await rounds.answer(request, call, asked, form, router, self._booking)
                return
            session = request.headers.get(SESSION, b"").decode("latin-1") or asked.session()
            chat = chat_of(request.key.id, router.name, session)
            models = await self._routed(request.state, router, call, asked, session, chat)
        else:
            models = request.state.candidates(request.state.model(asked.model), routed=False)
        dry, budget, tokens = request.is_dry(), request.budget(), 0
        call.own_input = request.state.count(models[0], asked)
        if not dry:
            tokens = put_down(request.state, call, asked, models, budget)
        async with self._booking.open(request.key, call, tokens):
            if dry:
                await _decided(call, models, request.sink)
            else:
                relay = request.state.relay
                answer = relay.answer(call, asked, models, request.sink, form)
                await watched(request, call, answer, longest=relay.longest(models))
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


def _read(request: Request) -> tuple[Asked, Form | None]:
    if request.path in dialects.FORMS:
        return dialects.translated(request.path, request.body)
    return parse(request.path, request.body), None


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
