"""OpenAI's responses as a chat, and a chat's answer as a response."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from moesaic.llms.gateway.forms import argument_text, dumped, text_of
from moesaic.llms.gateway.refusals import Refused
from moesaic.llms.gateway.requests import mapping, string
from moesaic.llms.gateway.stream import counts

_SAME = (
    "temperature", "top_p", "user", "prompt_cache_key", "parallel_tool_calls", "metadata", "top_logprobs",
    "service_tier", "safety_identifier", "prompt_cache_retention",
)  # fmt: skip
STATE = ("previous_response_id", "conversation", "background", "prompt")
FIELDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys((*_SAME, "model", "input", "max_output_tokens", "stream", "stream_options"), (object,)),
    "instructions": (str,), "reasoning": (dict,), "text": (dict,), "tools": (list,), "tool_choice": (str, dict),
}  # fmt: skip
"""What is served, and what a value may be where the rest of the gateway does not see to it."""
IDLE: Mapping[str, tuple[Any, ...]] = {
    "store": (False,),
    "include": ([],),
    "truncation": ("disabled",),
    "service_tier": ("auto",),
}
"""Values that change nothing, of fields that are not served, or need not be passed on."""
_TEXTS = ("input_text", "output_text", "text")


def chat_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a chat. Raises Refused for items that are neither messages nor functions, and for stored state."""
    said = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
    given = body["input"]
    said += [{"role": "user", "content": given}] if isinstance(given, str) else _messages(given)
    chat: dict[str, Any] = {"messages": said}
    chat |= {name: body[name] for name in _SAME if body.get(name) is not None and body[name] not in IDLE.get(name, ())}
    if "top_logprobs" in chat:
        chat["logprobs"] = True
    if body.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    chat |= _reasoning(body.get("reasoning") or {}) | _format(body.get("text") or {})
    if body.get("tools"):
        chat["tools"] = list(map(_tool, body["tools"]))
    if (choice := body.get("tool_choice")) is not None:
        named = isinstance(choice, dict)
        if named and choice["type"] != "function":
            raise Refused(400, f"tool_choice of type {str(choice['type'])[:40]} is not served", param="tool_choice")
        chat["tool_choice"] = {"type": "function", "function": {"name": string(choice["name"])}} if named else choice
    return chat


def _reasoning(given: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        if name != "effort" and value is not None:
            raise Refused(400, f"reasoning.{name[:40]} is not served: leave it out", param="reasoning")
    return {"reasoning_effort": string(given["effort"])} if given.get("effort") is not None else {}


def _format(text: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer is to look like, in a chat's words."""
    for name, value in text.items():
        if name not in ("format", "verbosity") and value is not None:
            raise Refused(400, f"text.{name[:40]} is not served: leave it out", param="text")
    chat = {"verbosity": text["verbosity"]} if text.get("verbosity") is not None else {}
    wanted = {"type": "text"} if text.get("format") is None else text["format"]
    kind = wanted["type"]
    if kind == "json_object":
        chat["response_format"] = {"type": kind}
    elif kind == "json_schema":
        schema = {k: wanted[k] for k in ("description", "strict") if wanted.get(k) is not None}
        schema |= {"name": string(wanted["name"]), "schema": mapping(wanted["schema"])}
        chat["response_format"] = {"type": kind, kind: schema}
    elif kind != "text":
        raise Refused(400, f"text.format of type {str(kind)[:40]} is not served", param="text")
    return chat


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool["type"] != "function":
        raise Refused(400, f"tools of type {str(tool['type'])[:40]} are not served", param="tools")
    kept = {k: tool[k] for k in ("description", "parameters", "strict") if k in tool}
    return {"type": "function", "function": {"name": string(tool["name"]), **kept}}


def _messages(items: Any) -> Iterator[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "function_call":
            function = {"name": string(item["name"]), "arguments": string(item["arguments"])}
            calls.append({"id": string(item["call_id"]), "type": "function", "function": function})
            continue
        if calls:
            yield {"role": "assistant", "content": None, "tool_calls": calls}
            calls = []
        if kind == "function_call_output":
            yield {"role": "tool", "tool_call_id": string(item["call_id"]), "content": _text(item["output"])}
        elif kind == "message":
            yield {"role": item["role"], "content": _text(item["content"])}
        elif kind != "reasoning":
            raise Refused(400, f"input: items of type {str(kind)[:40]} are not served", param="input")
    if calls:
        yield {"role": "assistant", "content": None, "tool_calls": calls}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError
    for part in content:
        if part["type"] not in _TEXTS:
            raise Refused(400, f"input: parts of type {str(part['type'])[:40]} are not served", param="input")
    return "".join(part["text"] for part in content)


class Responses:
    """The form of one answer."""

    keeps = True

    def __init__(self, model: str) -> None:
        self._id, self._model, self._created = f"resp_{uuid.uuid4().hex}", model, int(time.time())
        self._items: list[dict[str, Any]] = []
        self._sequence = -1
        self._open = ""
        self._parts: list[str] = []
        self._usage: dict[str, Any] | None = None
        self._cut = False

    def whole(self, content: Mapping[str, Any]) -> dict[str, Any]:
        choice = content["choices"][0]
        message = choice["message"]
        text = text_of(message.get("content"))
        items = [_message(text)] if text else []
        for call in message.get("tool_calls") or ():
            name, given = string(call["function"]["name"]), argument_text(call["function"].get("arguments"))
            items.append(_call(call["id"], name, given))
        self._items, self._usage = items, _usage(content)
        self._cut = choice.get("finish_reason") == "length"
        return self._response()

    def event(self, content: Mapping[str, Any]) -> bytes:
        out = []
        if self._sequence < 0:
            begun = self._response("in_progress")
            out += [self._event("created", response=begun), self._event("in_progress", response=begun)]
        self._usage = _usage(content) or self._usage
        for choice in (content.get("choices") or ())[:1]:
            delta = choice.get("delta") or {}
            if text := text_of(delta.get("content")):
                out += self._into("text", _message(""))
                self._parts.append(text)
                out.append(self._part("output_text.delta", delta=text, logprobs=[]))
            for call in delta.get("tool_calls") or ():
                function = call.get("function") or {}
                out += self._into(
                    f"call {call.get('index', 0)}", _call(call.get("id") or "", function.get("name") or "", "")
                )
                if part := argument_text(function.get("arguments")):
                    self._parts.append(part)
                    out.append(self._part("function_call_arguments.delta", delta=part))
            self._cut = self._cut or choice.get("finish_reason") == "length"
        return b"".join(out)

    def end(self) -> bytes:
        done = [*self._into("", {})]
        return b"".join([*done, self._event("incomplete" if self._cut else "completed", response=self._response())])

    def error(self, refused: Refused) -> bytes:
        self._join()
        told = {**self._response("failed"), "error": {"code": "server_error", "message": str(refused)}}
        return self._event("failed", response=told)

    def _response(self, status: str = "") -> dict[str, Any]:
        status = status or ("incomplete" if self._cut else "completed")
        return {
            "id": self._id, "object": "response", "created_at": self._created, "model": self._model, "status": status,
            "output": self._items, "usage": self._usage, "error": None, "instructions": None, "metadata": {},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "parallel_tool_calls": True, "temperature": None, "top_p": None, "tool_choice": "auto", "tools": [],
        }  # fmt: skip

    def _into(self, name: str, item: dict[str, Any]) -> Iterator[bytes]:
        """Go over to an item; nothing where it is open already, "" closes the last."""
        if self._open == name:
            return
        self._join()
        if self._open == "text":
            part = self._items[-1]["content"][0]
            yield self._part("output_text.done", text=part["text"], logprobs=[])
            yield self._part("content_part.done", part=part)
        elif self._open:
            last = self._items[-1]
            yield self._part("function_call_arguments.done", name=last["name"], arguments=last["arguments"])
        if self._open:
            yield self._event("output_item.done", output_index=len(self._items) - 1, item=self._items[-1])
        self._open = name
        if name:
            self._items.append(item)
            yield self._event("output_item.added", output_index=len(self._items) - 1, item=item)
        if name == "text":
            yield self._part("content_part.added", part=item["content"][0])

    def _join(self) -> None:
        """Put the parts of the item that is open into it."""
        text, self._parts = "".join(self._parts), []
        if text and self._open == "text":
            self._items[-1]["content"][0]["text"] += text
        elif text:
            self._items[-1]["arguments"] += text

    def _part(self, kind: str, **content: Any) -> bytes:
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        if self._open == "text":
            place["content_index"] = 0
        return self._event(kind, **place, **content)

    def _event(self, kind: str, **content: Any) -> bytes:
        self._sequence += 1
        kind = f"response.{kind}"
        told = {"type": kind, "sequence_number": self._sequence, **content}
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), dumped(told))


def _message(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }


def _call(call: str, name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call, "name": name, "arguments": arguments,
        "status": "completed",
    }  # fmt: skip


def _usage(content: Mapping[str, Any]) -> dict[str, Any] | None:
    given, written = counts(content)
    if given is None and written is None:
        return None
    given, written = given or 0, written or 0
    return {
        "input_tokens": given, "output_tokens": written, "total_tokens": given + written,
        "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0},
    }  # fmt: skip
