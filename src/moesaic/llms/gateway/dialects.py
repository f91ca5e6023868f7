"""Other APIs in a thin form: OpenAI's responses and Anthropic's messages, said as chat, and chat's answers said back.

Text, tools that are functions, and streams. What has no like in chat (files, searches, stored responses, thinking) is
refused by name rather than left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from moesaic.llms.gateway import messages, responses
from moesaic.llms.gateway.refusals import Refused
from moesaic.llms.gateway.relay import Form
from moesaic.llms.gateway.requests import CHAT, Asked, members, of_body

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
FIELDS: dict[str, tuple[Mapping[str, tuple[type, ...]], Mapping[str, tuple[Any, ...]]]] = {
    RESPONSES: (responses.FIELDS, responses.IDLE),
    MESSAGES: (messages.FIELDS, messages.IDLE),
}
FORMS: dict[str, tuple[Callable[[Mapping[str, Any]], dict[str, Any]], Callable[[str], Form]]] = {
    RESPONSES: (responses.chat_of, responses.Responses),
    MESSAGES: (messages.chat_of, messages.Messages),
}
"""By path: a body as a chat's, and the form that answers take for a model's name."""
_KINDS: Mapping[type, str] = {str: "a text", list: "a list", dict: "an object"}


def translated(path: str, raw: bytes) -> tuple[Asked, Form]:
    """A request as a chat, and the form of its answer. Raises Refused for what chat has no word for."""
    _, given = members(raw)
    body = {name: value for name, (value, _, _) in given.items()}
    for name, value in body.items():
        if value is not None:
            _check(path, name, value)
    chat_of, form = FORMS[path]
    try:
        chat = {"model": body["model"], **chat_of(body)}
        if body.get("stream") is not None:
            chat["stream"] = body["stream"]
        if body.get("stream") is True:
            chat["stream_options"] = {"include_usage": True}
        text = json.dumps(chat, allow_nan=False)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        raise Refused(400, f"the body is not what {path} takes") from None
    asked = written(chat, text)
    return asked, form(asked.model)


def written(chat: dict[str, Any], text: str) -> Asked:
    """A chat that was written here, its model first, and as JSON."""
    begin = len('{"model": ')
    return of_body(CHAT, text, chat, (begin, begin + len(json.dumps(chat["model"]))))


def _check(path: str, name: str, value: Any) -> None:
    """Raise Refused for a field that is not served, or holds what it cannot."""
    fields, idle = FIELDS[path]
    if any(type(value) is type(kept) and value == kept for kept in idle.get(name, ())):
        return
    if name in responses.STATE and path == RESPONSES:
        raise Refused(400, f"{name} is not served: send the whole conversation as input", param=name)
    if name not in fields:
        raise Refused(400, f"{name[:80]} is not served: leave it out", param=name[:80])
    if not isinstance(value, fields[name]):
        kinds = " or ".join(_KINDS[kind] for kind in fields[name])
        raise Refused(400, f"{name}: {kinds} is wanted", param=name)


def refusal(refused: Refused) -> bytes:
    """An error that both OpenAI's and Anthropic's clients read."""
    return json.dumps({"type": "error", **refused.content()}, ensure_ascii=False).encode()
