"""Anthropic's messages as a chat, and a chat's answer as a message."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moesaic.llms.gateway.forms import argument_text, arguments, dumped, text_of
from moesaic.llms.gateway.refusals import Refused
from moesaic.llms.gateway.requests import mapping, string
from moesaic.llms.gateway.stream import counts

_STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_SAME = ("temperature", "top_p", "max_tokens")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_TOOL = ("type", "name", "description", "input_schema", "strict", "cache_control")
FIELDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys((*_SAME, "model", "messages", "stop_sequences", "stream"), (object,)),
    "system": (str, list), "metadata": (dict,), "tools": (list,), "tool_choice": (dict,),
}  # fmt: skip
"""What is served, and what a value may be where the rest of the gateway does not see to it."""
IDLE: Mapping[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "standard_only"),
    "thinking": ({"type": "disabled"},),
    "mcp_servers": ([],),
}
"""Values that change nothing, of fields that are not served."""


def chat_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a chat. Raises Refused for blocks that are neither text nor tools."""
    said = [{"role": "system", "content": _text(body["system"])}] if body.get("system") else []
    for message in body["messages"]:
        said += _messages(message["role"], message["content"])
    chat: dict[str, Any] = {"messages": said}
    chat |= {name: body[name] for name in _SAME if body.get(name) is not None}
    if body.get("stop_sequences"):
        chat["stop"] = body["stop_sequences"]
    if isinstance(user := (body.get("metadata") or {}).get("user_id"), str):
        chat["user"] = user
    if body.get("tools"):
        chat["tools"] = list(map(_tool, body["tools"]))
    if (choice := body.get("tool_choice")) is not None:
        chat["tool_choice"] = _choice(choice)
        if choice.get("disable_parallel_tool_use") is not None:
            chat["parallel_tool_calls"] = not choice["disable_parallel_tool_use"]
    return chat


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if (kind := tool.get("type")) not in (None, "custom"):
        raise Refused(400, f"tools of type {str(kind)[:40]} are not served", param="tools")
    for name, value in tool.items():
        if name not in _TOOL and value is not None:
            raise Refused(400, f"tools: {name[:40]} is not served", param="tools")
    name, schema = string(tool["name"]), mapping(tool["input_schema"])
    function = {"name": name, "description": tool.get("description", ""), "parameters": schema}
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


def _choice(choice: Mapping[str, Any]) -> Any:
    if (kind := choice["type"]) == "tool":
        return {"type": "function", "function": {"name": string(choice["name"])}}
    if kind not in _CHOICES:
        raise Refused(400, f"tool_choice of type {str(kind)[:40]} is not served", param="tool_choice")
    return _CHOICES[kind]


def _messages(role: str, content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list):
        raise TypeError
    texts, calls = [], []
    for block in content:
        if block["type"] == "text":
            texts.append(block["text"])
        elif block["type"] == "tool_use":
            function = {"name": string(block["name"]), "arguments": json.dumps(mapping(block["input"]))}
            calls.append({"id": string(block["id"]), "type": "function", "function": function})
        elif block["type"] == "tool_result":
            said = _text(block.get("content", ""))
            said = f"error: {said}" if block.get("is_error") else said
            yield {"role": "tool", "tool_call_id": string(block["tool_use_id"]), "content": said}
        else:
            raise _not_served(block)
    if calls:
        yield {"role": role, "content": "".join(texts) or None, "tool_calls": calls}
    elif texts:
        yield {"role": role, "content": "".join(texts)}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError
    for block in content:
        if block["type"] != "text":
            raise _not_served(block)
    return "".join(block["text"] for block in content)


def _not_served(block: Mapping[str, Any]) -> Refused:
    return Refused(400, f"messages: blocks of type {str(block['type'])[:40]} are not served", param="messages")


class Messages:
    """The form of one answer."""

    keeps = False

    def __init__(self, model: str) -> None:
        self._head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self._open = ""
        self._count = -1
        self._stop = "end_turn"
        self._usage = {"input_tokens": 0, "output_tokens": 0}

    def whole(self, content: Mapping[str, Any]) -> dict[str, Any]:
        choice = content["choices"][0]
        message = choice["message"]
        text = text_of(message.get("content"))
        blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
        for call in message.get("tool_calls") or ():
            name, given = string(call["function"]["name"]), arguments(call["function"].get("arguments"))
            blocks.append({"type": "tool_use", "id": call["id"], "name": name, "input": given})
        stop = _STOPS.get(choice.get("finish_reason"), "end_turn")
        self._count_usage(content)
        return {**self._head, "content": blocks, "stop_reason": stop, "stop_sequence": None, "usage": self._usage}

    def event(self, content: Mapping[str, Any]) -> bytes:
        out = []
        if self._count < 0:
            self._count = 0
            message: dict[str, Any] = {
                **self._head,
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": self._usage,
            }
            out.append(_event("message_start", message=message))
        self._count_usage(content)
        for choice in (content.get("choices") or ())[:1]:
            delta = choice.get("delta") or {}
            if text := text_of(delta.get("content")):
                out += self._into("text", {"type": "text", "text": ""})
                out.append(self._delta(type="text_delta", text=text))
            for call in delta.get("tool_calls") or ():
                out += self._call(call)
            self._stop = _STOPS.get(choice.get("finish_reason"), self._stop)
        return b"".join(out)

    def end(self) -> bytes:
        delta = {"stop_reason": self._stop, "stop_sequence": None}
        last = _event("message_delta", delta=delta, usage=self._usage)
        return b"".join([*self._into("", {}), last, _event("message_stop")])

    def error(self, refused: Refused) -> bytes:
        return _event("error", **refused.content())

    def _call(self, call: Mapping[str, Any]) -> Sequence[bytes]:
        function = call.get("function") or {}
        block: dict[str, Any] = {"type": "tool_use", "id": call.get("id"), "name": function.get("name"), "input": {}}
        out = [*self._into(f"call {call.get('index', 0)}", block)]
        if part := argument_text(function.get("arguments")):
            out.append(self._delta(type="input_json_delta", partial_json=part))
        return out

    def _count_usage(self, content: Mapping[str, Any]) -> None:
        given, written = counts(content)
        self._usage = {
            "input_tokens": self._usage["input_tokens"] if given is None else given,
            "output_tokens": self._usage["output_tokens"] if written is None else written,
        }

    def _into(self, name: str, block: Mapping[str, Any]) -> Iterator[bytes]:
        """Go over to a block; nothing where it is open already, "" closes the last."""
        if self._open == name:
            return
        if self._open:
            yield _event("content_block_stop", index=self._count)
            self._count += 1
        self._open = name
        if name:
            yield _event("content_block_start", index=self._count, content_block=block)

    def _delta(self, **delta: Any) -> bytes:
        return _event("content_block_delta", index=self._count, delta=delta)


def _event(kind: str, **content: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), dumped({"type": kind, **content}))
