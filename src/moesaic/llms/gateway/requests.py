"""A request's body: read within its bounds, checked as far as the gateway needs it, and otherwise left as it is."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, NoReturn

from moesaic.errors import first_line
from moesaic.llms.catalog import Model
from moesaic.llms.gateway.refusals import Refused
from moesaic.llms.gateway.texts import PART, beside, said
from moesaic.llms.gateway.tokens import MESSAGE

Receive = Callable[[], Any]

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MOST_TOKENS, MOST_CHOICES = 10_000_000, 128
PROMPT = 16_384
"""Characters of a prompt that a router is shown."""

_OPENING = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*(\}?)[ \t\n\r]*")
_COLON = re.compile(r"[ \t\n\r]*(:)[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*([,}])[ \t\n\r]*")


class ClientGone(Exception):
    """The client left before its request was whole."""


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, largest: int, seconds: float) -> bytes:
    """A request's body. Raises Refused for one that is too long, too slow or no JSON by its header; ClientGone."""
    if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
        raise Refused(415, "a request is JSON: its Content-Type is application/json")
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise Refused(415, "a request is sent as it is: no Content-Encoding")
    size = headers.get(b"content-length", b"0")
    if not (size.isdigit() and len(size) < 16 and int(size) <= largest):
        raise _too_long(largest)
    try:
        async with asyncio.timeout(seconds):
            return await _body(receive, largest)
    except TimeoutError:
        raise Refused(408, f"the request did not come whole within {seconds:g} seconds") from None


def _too_long(largest: int) -> Refused:
    return Refused(413, f"a request has {largest:,} bytes at most", headers=[(b"connection", b"close")])


async def _body(receive: Receive, largest: int) -> bytes:
    parts, length = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > largest:
            raise _too_long(largest)
        if not message.get("more_body", False):
            return b"".join(parts)


@dataclass(slots=True)
class Asked:
    """A request's body, and what the gateway reads in it.

    Attributes:
        text: as it came. at: where the value of `model` stands in it.
        body: parsed. texts: what a model is given to read, of which tokens are counted; overhead: tokens beside them.
        prompts: how many are answered, each by itself. most: tokens of a choice at most; None where the request does
            not say. choices: how many each prompt wants.
    """

    path: str
    text: str
    at: tuple[int, int]
    body: dict[str, Any]
    model: str
    stream: bool
    texts: list[str]
    overhead: int
    prompts: int
    most: int | None
    choices: int

    def named(self, model: str) -> bytes:
        """The body as it came, but for the model's name."""
        if model == self.model:
            return self.text.encode()
        return (self.text[: self.at[0]] + json.dumps(model) + self.text[self.at[1] :]).encode()

    def answers(self, most: int) -> int:
        """Tokens of all answers where each has so many at most."""
        return 0 if self.path == EMBEDDINGS else self.prompts * self.choices * most

    def possible(self, model: Model) -> tuple[int, int]:
        """Tokens of prompts and of answers beyond which a count cannot be true."""
        context = model.context or MOST_TOKENS
        return self.prompts * context, self.answers(min(context, self.most or context))

    def session(self) -> str:
        """What the body says of the chat that it belongs to; empty where it says nothing."""
        for field in ("prompt_cache_key", "user"):
            if isinstance(found := self.body.get(field), str) and found:
                return found
        return ""

    def prompt(self) -> str:
        """What a router decides by: the user's last message, or the completion's prompt."""
        if self.path == CHAT:
            users = (m for m in reversed(self.body["messages"]) if m["role"] == "user")
            found = " ".join(_texts(next(users, self.body["messages"][-1])))
        else:
            given = self.body["prompt"]
            found = next((part for part in ([given] if isinstance(given, str) else given) if isinstance(part, str)), "")
        if not found.strip():
            raise _invalid("a router decides by text, and there is none in the prompt", "messages")
        return found[:PROMPT].encode("utf-8", "replace").decode()


def parse(path: str, raw: bytes) -> Asked:
    """A request's body of one of our paths. Raises Refused for what is malformed, in one line."""
    text, given = members(raw)
    return of_body(path, text, {name: value for name, (value, _, _) in given.items()}, given["model"][1:])


def members(raw: bytes) -> tuple[str, dict[str, tuple[Any, int, int]]]:
    """A body's text, and (value, begin, end) of the members of the object that it is, `model` among them.

    Raises Refused for what is no such body.
    """
    try:
        text = raw.decode("utf-8")
        found = _members(text)
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is no text in UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise Refused(400, "the body is nested too deep") from None
    except ValueError as error:
        raise Refused(400, f"the body is no JSON object: {first_line(error)}") from None
    if "model" not in found:
        raise _invalid("model: the name of a model is wanted", "model")
    return text, found


def of_body(path: str, text: str, body: dict[str, Any], at: tuple[int, int]) -> Asked:
    """A body that is parsed already."""
    model, stream = body["model"], body.get("stream")
    if not isinstance(model, str) or not 0 < len(model) <= 200:
        raise _invalid("model: the name of a model is wanted", "model")
    if stream is not None and not isinstance(stream, bool):
        raise _invalid("stream: true or false", "stream")
    try:
        read = _READ[path](body)
    except RecursionError:
        raise Refused(400, "the body is nested too deep") from None
    return Asked(path, text, at, body, model, bool(stream), *read, *_most(body))


def _members(text: str) -> dict[str, tuple[Any, int, int]]:
    """(value, begin, end) of the members of the JSON object that a text is. Raises ValueError, RecursionError.

    A name that comes twice is refused: the gateway would bill one model and the backend might run another.
    """
    found: dict[str, tuple[Any, int, int]] = {}
    at, more = _after(_OPENING, text, 0, "{")
    while more != "}":
        if text[at : at + 1] != '"':
            raise ValueError(f"a name in quotes is wanted at character {at}")
        name, at = scanstring(text, at + 1, True)
        if name in found:
            raise ValueError(f"{name[:40]!r} stands there twice")
        begin, _ = _after(_COLON, text, at, ":")
        try:
            value, end = _SCAN(text, begin)
        except StopIteration as stopped:
            raise ValueError(f"a value is wanted at character {stopped.value}") from None
        found[name] = value, begin, end
        at, more = _after(_NEXT, text, end, ", or }")
        if more == "," and text[at : at + 1] == "}":
            raise ValueError(f"a name in quotes is wanted at character {at}")
    if at != len(text):
        raise ValueError(f"there is more after it, at character {at}")
    return found


def string(value: Any) -> str:
    """A text that is one. Raises TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError
    return value


def mapping(value: Any) -> dict[str, Any]:
    """An object that is one. Raises TypeError for anything else."""
    if not isinstance(value, dict):
        raise TypeError
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


_SCAN: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(parse_constant=_no_number).scan_once  # type: ignore[attr-defined]


def _after(wanted: re.Pattern[str], text: str, at: int, said: str) -> tuple[int, str]:
    """Where a mark and the blanks around it end, and what it is."""
    found = wanted.match(text, at)
    if found is None:
        raise ValueError(f"{said} is wanted at character {at}")
    return found.end(), found[1]


def _invalid(message: str, param: str) -> Refused:
    return Refused(400, message, param=param)


def _most(body: Mapping[str, Any]) -> tuple[int | None, int]:
    """Tokens of a choice, and choices."""
    limits = ("max_completion_tokens", "max_tokens")
    most = [_whole(body[name], name, MOST_TOKENS) for name in limits if body.get(name) is not None]
    choices = [_whole(body[name], name, MOST_CHOICES) for name in ("n", "best_of") if body.get(name) is not None]
    return max(most, default=None), max(choices, default=1)


def _whole(value: Any, name: str, most: int) -> int:
    if not _is_integer(value) or not 1 <= value <= most:
        raise _invalid(f"{name}: a whole number from 1 to {most:,}", name)
    return int(value)


def _is_integer(value: Any) -> bool:
    """As JSON Schema has it: 2.0 is one, true is not."""
    return type(value) is int or (type(value) is float and value.is_integer())


def _chat(body: Mapping[str, Any]) -> tuple[list[str], int, int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _invalid("messages: a list of messages, one at least", "messages")
    texts, media = list(beside(body, "messages")), 0
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _invalid(f"messages.{i}: a message is an object with a role", f"messages.{i}")
        content = message.get("content")
        if not (content is None or isinstance(content, str) or _is_parts(content)):
            raise _invalid(f"messages.{i}.content: a text, or a list of parts that have a type", f"messages.{i}")
        found, parts = said(message)
        texts += found
        media += parts
    return texts, MESSAGE * len(messages) + PART * media, 1


def _is_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("type"), str) for part in content
    )


def _texts(message: Mapping[str, Any]) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    for part in content if isinstance(content, list) else ():
        if isinstance(text := part.get("text"), str):
            yield text
    if message.get("tool_calls"):
        yield json.dumps(message["tool_calls"], ensure_ascii=False)


def _completion(body: Mapping[str, Any]) -> tuple[list[str], int, int]:
    return _inputs(body, "prompt")


def _embedding(body: Mapping[str, Any]) -> tuple[list[str], int, int]:
    if body.get("stream"):
        raise _invalid("stream: embeddings come whole", "stream")
    return _inputs(body, "input")


def _inputs(body: Mapping[str, Any], name: str) -> tuple[list[str], int, int]:
    """Texts, tokens beside them and how many inputs, of what is a text, tokens, or a list of texts or of tokens."""
    given, more = body.get(name), list(beside(body, name))
    if isinstance(given, str):
        return [given, *more], 0, 1
    if isinstance(given, list) and given:
        if all(isinstance(part, str) for part in given):
            return [*given, *more], 0, len(given)
        if all(map(_is_token, given)):
            return more, len(given), 1
        if all(isinstance(part, list) and part and all(map(_is_token, part)) for part in given):
            return more, sum(map(len, given)), len(given)
    raise _invalid(f"{name}: a text, tokens, or a list of texts or of tokens", name)


def _is_token(value: Any) -> bool:
    return _is_integer(value) and value >= 0


_READ = {CHAT: _chat, COMPLETIONS: _completion, EMBEDDINGS: _embedding}
