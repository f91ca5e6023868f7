"""An OpenAI-compatible server that answers from recorded outcomes: a backend whose every answer is *replayed*.

It knows the prompts of a table and no others: a chat is looked up by its last user message, as it stands there. The
text is the model's recorded response, or else a line that says what was recorded. Usage says as many tokens as the
recorded cost comes to at the catalog's prices; where no cost was recorded, a token for every four bytes (ours: an
estimate). Answers bear `x-moesaic-replayed: 1`, and `x-moesaic-cost` (USD) and `x-moesaic-score` as recorded.
"""

from __future__ import annotations

import csv
import hmac
import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.errors import ConfigError, DataError, MissingDependency, first_line
from moesaic.llms.catalog import Catalog
from moesaic.llms.tables import Table

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MARK = "x-moesaic-replayed"
LARGEST = 4 * 2**20
"""Bytes of a request."""
_RESPONSE = re.compile(r"(.+?)(\|model)?_response")
"""A model's column of responses: RouteLLM's, RouterBench's."""

Responses = Mapping[str, Mapping[str, str]]
"""Texts by model and prompt."""


@dataclass(frozen=True)
class Replayed:
    """An answer as it was recorded; `cost` in USD, at the catalog's prices where none was recorded."""

    text: str
    input_tokens: int
    output_tokens: int
    cost: float
    score: float


class Replay:
    """Recorded answers by model and prompt; of prompts that a table holds twice, the first.

    Raises:
        ConfigError: a model of the table that the catalog does not have.
    """

    def __init__(self, table: Table, catalog: Catalog, responses: Responses | None = None) -> None:
        self.table, self.catalog, self.responses = table, catalog, responses or {}
        self._columns = {catalog.resolve(name).name: column for column, name in enumerate(table.models)}
        self._rows: dict[str, int] = {}
        for row, prompt in enumerate(table.prompts):
            self._rows.setdefault(prompt, row)

    @property
    def models(self) -> list[str]:
        return list(self._columns)

    def answer(self, model: str, prompt: str) -> Replayed:
        """What a model, by its name or an alias, answered. Raises ConfigError, DataError where none is recorded."""
        found = self.catalog.resolve(model)
        if found.name not in self._columns:
            raise ConfigError(f"no model {model[:80]!r} in the table: nothing that it answered is recorded")
        if prompt not in self._rows:
            shown = " ".join(prompt[:60].split())
            raise DataError(f"no outcome is recorded for the prompt {shown!r}: only the table's can be replayed")
        row, column = self._rows[prompt], self._columns[found.name]
        score = float(self.table.scores[row, column])
        named = self.table.models[column]
        recorded = self.responses.get(named, {}).get(prompt)
        text = f"replayed: {found.name} scored {score:g}; its text was not recorded" if recorded is None else recorded
        asked, said = estimated_tokens(prompt), estimated_tokens(text)
        cost = None if self.table.costs is None else float(self.table.costs[row, column])
        if cost is not None and recorded is None and found.output_price:
            rest = cost * 1e6 - asked * float(found.input_price or 0)
            said = max(1, round(rest / found.output_price))
        return Replayed(text, asked, said, found.cost(asked, said) if cost is None else cost, score)


def estimated_tokens(text: str) -> int:
    """One for every four bytes, and one at least."""
    return max(1, -(-len(text.encode("utf-8", "replace")) // 4))


def read_responses(file: str | Path) -> dict[str, dict[str, str]]:
    """Texts by model and prompt, out of a CSV file with MODEL_response or MODEL|model_response columns.

    Raises:
        DataError: the file cannot be read, or has no prompt or no such column.
    """
    csv.field_size_limit(2**24)
    try:
        with Path(file).open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {first_line(error)}") from None
    names = [name for name in (rows[0] if rows else {}) if name]
    columns = {match[1]: name for name in names if (match := _RESPONSE.fullmatch(name))}
    if not columns or "prompt" not in rows[0]:
        raise DataError(f"{file} holds no responses: a column prompt, and MODEL_response for each model")
    found: dict[str, dict[str, str]] = {model: {} for model in columns}
    for row in rows:
        for model, column in columns.items():
            found[model].setdefault(row["prompt"], row[column] or "")
    return found


def build(replay: Replay, *, key: str = "") -> Starlette:
    """The server: /v1/chat/completions, streamed or not, /v1/models and /health.

    Args:
        key: what requests must bring as their bearer token; empty for none.
    """
    try:
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse
        from starlette.routing import Route
    except ImportError:
        raise MissingDependency("Starlette", "serve") from None

    async def chat(request: Request) -> Response:
        return _refused(request, key) or _chat(replay, await request.body())

    async def models(request: Request) -> Response:
        cards = [{"id": name, "object": "model", "created": 0, "owned_by": "replayed"} for name in replay.models]
        return _refused(request, key) or JSONResponse({"object": "list", "data": cards})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "replayed": len(replay.table)})

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    return Starlette(routes=routes)


def _refused(request: Request, key: str) -> Response | None:
    size, given = request.headers.get("content-length", "0"), request.headers.get("authorization", "")
    if key and not hmac.compare_digest(given.encode("utf-8", "replace"), f"Bearer {key}".encode()):
        return _error(401, "the API key is missing or another", "invalid_api_key")
    if not size.isdecimal() or int(size) > LARGEST:
        return _error(413, f"a request has {LARGEST:,} bytes at most", "too_large")
    return None


def _error(status: int, message: str, code: str) -> Response:
    from starlette.responses import JSONResponse

    told = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": told}, status_code=status)


def _chat(replay: Replay, body: bytes) -> Response:
    from starlette.responses import JSONResponse, StreamingResponse

    try:
        asked = json.loads(body)
        model, prompt = str(asked["model"]), _prompt(asked["messages"])
        usage_too = bool((asked.get("stream_options") or {}).get("include_usage"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, StopIteration):
        return _error(400, "a chat is JSON with a model, and messages with a user's among them", "no_chat")
    try:
        found, name = replay.answer(model, prompt), replay.catalog.resolve(model).name
    except (ConfigError, DataError) as missing:
        return _error(404, str(missing), "model_not_found" if isinstance(missing, ConfigError) else "not_recorded")
    headers = {MARK: "1", "x-moesaic-cost": f"{found.cost:.9g}", "x-moesaic-score": f"{found.score:g}"}
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    if asked.get("stream"):
        events = _events(head, found, usage_too)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    message = {"role": "assistant", "content": found.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    whole = {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(found)}
    return JSONResponse(whole, headers=headers)


def _prompt(messages: Any) -> str:
    """The last user message's text."""
    content = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _usage(found: Replayed) -> dict[str, int]:
    both = found.input_tokens + found.output_tokens
    return {"prompt_tokens": found.input_tokens, "completion_tokens": found.output_tokens, "total_tokens": both}


def _events(head: Mapping[str, Any], found: Replayed, usage_too: bool) -> Iterator[str]:
    """The answer as server-sent events, a line of its text each."""
    deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": line} for line in found.text.splitlines(keepends=True)]
    for delta in deltas:
        yield _event(head, [{"index": 0, "delta": delta, "finish_reason": None}])
    yield _event(head, [{"index": 0, "delta": {}, "finish_reason": "stop"}])
    if usage_too:
        yield _event(head, [], usage=_usage(found))
    yield "data: [DONE]\n\n"


def _event(head: Mapping[str, Any], choices: list[Any], **more: Any) -> str:
    chunk = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
