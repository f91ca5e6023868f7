"""Providers that LiteLLM speaks to, asked with what OpenAI's API has a meaning for and nothing else.

LiteLLM takes where a request goes, which key it brings and much more from the same arguments as what is asked, and
fetches what messages point to. A client is to have a say in none of that, so what is not known here is refused.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

from moesaic.errors import ConfigError, MissingDependency
from moesaic.llms.catalog import Model
from moesaic.llms.gateway.local import before
from moesaic.llms.gateway.refusals import Refused
from moesaic.llms.gateway.replies import Failed, Reply
from moesaic.llms.gateway.requests import CHAT, COMPLETIONS, EMBEDDINGS

_WRITING = frozenset([
    "model", "temperature", "top_p", "n", "stream", "stream_options", "stop", "max_tokens", "presence_penalty",
    "frequency_penalty", "logit_bias", "logprobs", "seed", "user",
])  # fmt: skip
_FIELDS = {
    CHAT: _WRITING | {
        "messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice",
        "parallel_tool_calls", "functions", "function_call", "reasoning_effort", "verbosity", "modalities", "audio",
        "prediction", "service_tier", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    },
    COMPLETIONS: _WRITING | {"prompt", "suffix", "echo", "best_of"},
    EMBEDDINGS: frozenset(["model", "input", "encoding_format", "dimensions", "user"]),
}  # fmt: skip
_MESSAGE = frozenset([
    "role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal", "audio", "annotations",
    "reasoning_content",
])  # fmt: skip
_PARTS = {
    "text": frozenset[str](), "refusal": frozenset[str](), "input_audio": frozenset(["data", "format"]),
    "image_url": frozenset(["url", "detail"]), "file": frozenset(["filename", "file_data"]),
}  # fmt: skip
_INLINE = {"image_url": "url", "file": "file_data"}


class Litellm:
    """A provider by LiteLLM's name for it, PROVIDER/MODEL."""

    def __init__(self, model: Model, name: str, litellm: Any) -> None:
        self._model, self._name, self._litellm = model, name, litellm
        self._key = model.key() or None

    async def open(self, path: str, body: bytes) -> Reply:
        ask = {CHAT: "acompletion", COMPLETIONS: "atext_completion", EMBEDDINGS: "aembedding"}[path]
        asked = {name: value for name, value in json.loads(body).items() if value is not None}
        check(path, asked)
        given = {**asked, "model": self._name}
        try:
            found = await getattr(self._litellm, ask)(
                **given, api_key=self._key, timeout=self._model.idle, num_retries=0, drop_params=False
            )
        except Exception as error:
            raise _failed(error) from None
        if given.get("stream"):
            end = asyncio.get_running_loop().time() + self._model.total
            return Reply(200, "text/event-stream", None, partial(self._next, aiter(found), end), lambda: None)
        parts: list[bytes] = [b"", found.model_dump_json().encode()]

        async def read() -> bytes:
            return parts.pop()

        return Reply(200, "application/json", None, read, lambda: None)

    async def close(self) -> None:
        pass

    async def _next(self, parts: AsyncIterator[Any], end: float) -> bytes:
        try:
            part = await before(end, self._model, anext(parts, None))
        except Failed:
            raise
        except Exception as error:
            raise _failed(error) from None
        told: str = "[DONE]" if part is None else part.model_dump_json()
        return f"data: {told}\n\n".encode()


def check(path: str, body: Mapping[str, Any]) -> None:
    """Raise Refused for what LiteLLM might do more with than ask its model, by name."""
    for name in body:
        if name not in _FIELDS[path]:
            raise _unknown(name)
    tools = body.get("tools", [])
    if not isinstance(tools, list) or any(not isinstance(t, dict) or t.get("type") != "function" for t in tools):
        raise Refused(400, "tools: this model takes a list of functions", param="tools")
    for i, message in enumerate(body.get("messages") or ()):
        for name, value in message.items():
            if name not in _MESSAGE and value is not None:
                raise _unknown(f"messages.{i}.{name}")
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            _check_part(f"messages.{i}.content", part)


def _check_part(where: str, part: Mapping[str, Any]) -> None:
    """Raise Refused for a part of a message that does not hold what it shows, or is of a kind unknown."""
    kind = part["type"]
    if kind not in _PARTS:
        raise Refused(400, f"{where}: this model takes no parts of type {kind[:40]}", param=where)
    held = part.get(kind)
    if kind == "image_url" and isinstance(held, str):
        held = {"url": held}
    own, known = held if isinstance(held, dict) else {}, _PARTS[kind]
    for name in (*(part.keys() - {"type", kind}), *(own.keys() - known)):
        raise _unknown(f"{where}.{name}")
    if bool(known) != isinstance(held, dict):
        raise Refused(400, f"{where}: that is no {kind}", param=where)
    if kind in _INLINE and not str(own.get(_INLINE[kind])).startswith("data:"):
        raise Refused(400, f"{where}: send it as a data: URL, nothing is fetched", param=where)


def _unknown(name: str) -> Refused:
    return Refused(400, f"{name[:80]} is not passed on to this model's provider: leave it out", param=name[:80])


def _failed(error: Exception) -> Failed:
    """What LiteLLM raised, by its status and without its words, which may quote a key."""
    status = getattr(error, "status_code", None)
    said = f"LiteLLM: {type(error).__name__}"
    if status == 429:
        return Failed(said, status=429, counts=False)
    if isinstance(status, int) and 400 <= status < 500 and status not in (401, 403, 404, 408):
        return Failed(said, status=status, again=False, counts=False)
    code = 504 if isinstance(error, TimeoutError) else 502
    return Failed(said, status=code, again=status not in (401, 403, 404), counts=status not in (403, 404))


def open_litellm(model: Model, name: str) -> Litellm:
    """Raises MissingDependency where LiteLLM is not installed, ConfigError for a name without a provider."""
    if "/" not in name:
        raise ConfigError(f"model {model.name}: litellm:PROVIDER/MODEL is wanted, not litellm:{name}")
    try:
        import litellm
    except ImportError:
        raise MissingDependency("litellm", "litellm") from None
    return Litellm(model, name, litellm)
