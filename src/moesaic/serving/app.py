"""An OpenAI-compatible server of one mixture: chat, completions, models, health. Starlette's; errors as OpenAI's."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.data.examples import Example
from moesaic.errors import ConfigError, DataError, MoesaicError
from moesaic.evaluation.routed import check_routed
from moesaic.serving.answer import Answer, Part
from moesaic.serving.asking import Asked, asked, of_messages
from moesaic.serving.engine import STOPS, Engine
from moesaic.serving.schema import ChatRequest, CompletionRequest

logger = logging.getLogger(__name__)

LARGEST = 4 * 2**20
"""Bytes of a request."""
_PORT = re.compile(r":\d+$")


def build(
    engine: Engine, name: str, *, temperature: float = 0.0, key: str = "", hosts: Collection[str] = ()
) -> FastAPI:
    """The server.

    Args:
        name: what the mixture is called, as a request's `model`.
        temperature: where a request names none.
        key: what requests must bring as their bearer token; empty for none.
        hosts: the names by which requests may call it; empty for any.
    """
    app = FastAPI(title="moesaic", openapi_url=None)
    service = _Service(engine, name, temperature)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(MoesaicError, _failed)
    app.add_middleware(Gate, key=key, hosts=hosts)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await service.chat(body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.complete(body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        service.check_name(model)
        return service.card

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "running": engine.running()}

    return app


class Gate:
    """Lets in requests that call the server by one of its names, are JSON of a size that fits, and bring the key.

    Names are checked as a page in a browser could have its own lead here.
    """

    def __init__(self, app: ASGIApp, key: str = "", hosts: Collection[str] = ()) -> None:
        self._app, self._key, self._hosts = app, key.encode(), frozenset(map(str.lower, hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await (self._refused(Request(scope)) or self._app)(scope, receive, sending)
        except asyncio.CancelledError:  # the time that a server has to end is over
            if not begun:
                await error(503, STOPS, "server_error")(scope, receive, send)

    def _refused(self, request: Request) -> Response | None:
        name = _PORT.sub("", request.headers.get("host", "")).lower()
        if self._hosts and name not in self._hosts:
            return error(400, f"this server is not called {name!r}", "invalid_request_error")
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("utf-8", "replace")
        if self._key and request.url.path != "/health" and not hmac.compare_digest(given, self._key):
            return error(401, "the API key is missing or another", "authentication_error", code="invalid_api_key")
        if request.method != "POST":
            return None
        size = request.headers.get("content-length")
        if size is None:
            return error(411, "a request says how long it is, by Content-Length", "invalid_request_error")
        if not (size.isdecimal() and int(size) <= LARGEST):
            return error(413, f"a request has {LARGEST:,} bytes at most", "invalid_request_error")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return error(415, "a request is JSON: its Content-Type is application/json", "invalid_request_error")
        return None


class _Service:
    def __init__(self, engine: Engine, name: str, temperature: float) -> None:
        self.engine, self.name, self.temperature = engine, name, temperature
        self.card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "moesaic"}

    def check_name(self, name: str) -> None:
        if name and name != self.name:
            raise HTTPException(404, f"no model {name!r}: this server's is {self.name!r}")

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        messages = [("system" if m.role == "developer" else m.role, m.text()) for m in body.messages]
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ConfigError("max_tokens and max_completion_tokens name the same thing: give one of them")
        question = self._asked(body, of_messages(messages), body.max_completion_tokens or body.max_tokens)
        return await self._answered(body, [question], request, _Chat(self.name))

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        prompts: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        if not 0 < len(prompts) <= 64:
            raise DataError(f"prompt holds {len(prompts)} prompts: 1 to 64 are answered at once")
        if body.stream and len(prompts) > 1:
            raise ConfigError("stream=true answers one prompt: send several without it, or a request each")
        questions = [self._asked(body, prompt, body.max_tokens) for prompt in prompts]
        return await self._answered(body, questions, request, _Completion(self.name))

    def _asked(self, body: Any, what: Example | str | list[int], max_tokens: int | None) -> Asked:
        """A question of a chat, a text or tokens."""
        self.check_name(body.model)
        if body.stream_options is not None and not body.stream:
            raise ConfigError("stream_options: only a streamed answer has any")
        temperature = self.temperature if body.temperature is None else body.temperature
        if body.seed is not None and temperature > 0:
            raise ConfigError("seed: requests draw from one generator, so none is kept; temperature=0 repeats itself")
        if body.routing:
            check_routed(self.engine.prepared)
        return asked(
            self.engine.prepared,
            Example("", what) if isinstance(what, str) else what,
            max_tokens=max_tokens,
            room=self.engine.room,
            temperature=float(temperature),
            top_p=float(body.top_p or 1.0),
            stops=tuple(body.stop or ()),
            task=body.task,
        )

    async def _answered(self, body: Any, questions: Sequence[Asked], request: Request, form: _Form) -> Response:
        how = {"routing": body.routing, "bare": isinstance(form, _Chat)}
        answers = [Answer(self.engine, question, **how) for question in questions]
        if body.stream:
            first = await anext(parts := answers[0].parts())
            usage = bool((body.stream_options or {}).get("include_usage"))
            return StreamingResponse(_events(form, answers[0], first, parts, usage), media_type="text/event-stream")
        writing = [asyncio.create_task(answer.whole()) for answer in answers]
        leaving = asyncio.create_task(_left(request))
        both = asyncio.gather(*writing)
        either: list[asyncio.Future[Any]] = [both, leaving]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not both.done():
                return Response(status_code=499)
            return JSONResponse(form.whole(await both, answers))
        finally:
            for task in (*writing, leaving):
                task.cancel()
            await asyncio.gather(*writing, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    """Until the client is gone."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


async def _events(
    form: _Form, answer: Answer, first: Part, parts: AsyncGenerator[Part], usage: bool
) -> AsyncIterator[str]:
    """An answer as server-sent events."""
    async with aclosing(parts):
        try:
            part: Part | None = first
            while part is not None:
                yield _event(form.chunk(part))
                part = await anext(parts, None)
        except MoesaicError as failed:
            yield _event(_error(str(failed), "server_error"))
            return
    if usage:
        yield _event(form.chunk(None, usage=answer.usage()))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class _Form(ABC):
    """How an answer is written: names of kinds, and what a choice and a part hold."""

    kind = chunk_kind = ""
    prefix = ""

    def __init__(self, model: str) -> None:
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, texts: Sequence[str], answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [
            self._choice(i, text, answer) | answer.extra()
            for i, (text, answer) in enumerate(zip(texts, answers, strict=True))
        ]
        counts = [answer.usage() for answer in answers]
        usage = {key: sum(count[key] for count in counts) for key in counts[0]}
        return {**self.head, "object": self.kind, "choices": choices, "usage": usage}

    def chunk(self, part: Part | None, *, usage: dict[str, int] | None = None) -> dict[str, Any]:
        choices = [] if part is None else [{"index": 0, **self._part(part), "finish_reason": part.finish, **part.extra}]
        counted = {} if usage is None else {"usage": usage}
        return {**self.head, "object": self.chunk_kind, "choices": choices, **counted}

    @abstractmethod
    def _choice(self, index: int, text: str, answer: Answer) -> dict[str, Any]: ...

    @abstractmethod
    def _part(self, part: Part) -> dict[str, Any]: ...


class _Chat(_Form):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _choice(self, index: int, text: str, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": answer.finish}

    def _part(self, part: Part) -> dict[str, Any]:
        role = {"role": "assistant"} if part.first else {}
        return {"delta": role | ({} if part.finish and not part.text else {"content": part.text})}


class _Completion(_Form):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def _choice(self, index: int, text: str, answer: Answer) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": answer.finish}

    def _part(self, part: Part) -> dict[str, Any]:
        return {"text": part.text, "logprobs": None}


def _error(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    message = " ".join(message.encode("utf-8", "replace").decode().split())[:500]
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error(status: int, message: str, kind: str, **more: str | None) -> JSONResponse:
    return JSONResponse(_error(message, kind, **more), status_code=status)


_NOT_SERVED = ("n", "best_of", "echo", "logprobs", "suffix", "presence_penalty", "frequency_penalty", "logit_bias")
_VARIANT = re.compile(r"(str|int|bool|none|list|literal)(\[.*)?$")
"""What pydantic adds to a field's place where it may be of several types."""


async def _invalid(request: Request, raised: Exception) -> Response:
    """What is wrong with a request's body, in one line: of several things the innermost, which says most."""
    assert isinstance(raised, RequestValidationError)
    first = max(raised.errors(), key=lambda found: len(found["loc"]))
    place = [str(part) for part in first["loc"][1:] if not _VARIANT.match(str(part))]
    if first["type"] == "json_invalid":
        said, place = f"the body is no JSON: {first.get('ctx', {}).get('error', '')}", []
    elif first["type"] == "extra_forbidden" or (place and place[0] in _NOT_SERVED):
        said = "is not served: leave it out"
    else:
        said = str(first["msg"])[:1].lower() + str(first["msg"])[1:]
    where = ".".join(place)[:80]
    return error(400, f"{where}: {said}" if where else said, "invalid_request_error", param=where or None)


async def _refused(request: Request, raised: Exception) -> Response:
    assert isinstance(raised, HTTPException)
    code = "model_not_found" if raised.status_code == 404 and "no model" in str(raised.detail) else None
    return error(raised.status_code, str(raised.detail), "invalid_request_error", code=code)


async def _failed(request: Request, raised: Exception) -> Response:
    mendable = isinstance(raised, ConfigError | DataError)
    message = " ".join(str(raised).split())
    return error(400, message, "invalid_request_error") if mendable else error(500, message, "server_error")
