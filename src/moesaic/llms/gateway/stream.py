"""Server-sent events: whole ones out of chunks, and what is read in them for the books."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from moesaic.llms.gateway.calls import valid
from moesaic.llms.gateway.replies import Failed

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINE = re.compile(rb"\r\n|\n|\r")


class Events:
    """A stream's bytes, cut after whole events; a last one that is not ended is dropped.

    Args:
        largest: bytes of an event.
    """

    def __init__(self, read: Callable[[], Awaitable[bytes]], largest: int) -> None:
        self._read, self._largest, self._rest = read, largest, b""

    async def next(self) -> bytes:
        """One whole event or more; nothing at the end. Raises Failed."""
        while chunk := await self._read():
            rest = self._rest + chunk if self._rest else chunk
            end = rest.rfind(b"\n\n") + 2
            if b"\r" in rest:
                end = max(end, rest.rfind(b"\r\n\r\n") + 4)
            if end >= 4 or rest[:2] == b"\n\n":
                self._rest = rest[end:]
                return rest[:end]
            if len(rest) > self._largest:
                raise Failed(f"an event of its stream has more than {self._largest:,} bytes", counts=False)
            self._rest = rest
        return b""


class Seen:
    """What a stream or a whole answer has told so far.

    Attributes:
        texts: of the answer, pieces as they came. model: what the backend calls itself. usage: its counts.
        finished: a choice ended, or [DONE] came. failed: an event was an error.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.model = ""
        self.usage: tuple[int, int] | None = None
        self.finished = self.done = self.failed = False

    def feed(self, whole: bytes) -> list[dict[str, Any]]:
        """Read whole events; what their data hold. Raises Failed for data that are no JSON object."""
        found = []
        for event in _END.split(whole) if b"\r" in whole else whole.split(b"\n\n"):
            if event.startswith(b"data: {") and b"\n" not in event:
                found.append(self.read(event[6:]))
                continue
            data = b"\n".join(line[5:].strip() for line in _LINE.split(event) if line.startswith(b"data:"))
            if data == b"[DONE]":
                self.done = True
            elif data:
                found.append(self.read(data))
        return found

    def read(self, data: bytes) -> dict[str, Any]:
        """Read one JSON object of the backend's. Raises Failed where it is none."""
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise Failed("it sent what is no JSON object")
        self._take(content)
        return content

    def _take(self, content: Mapping[str, Any]) -> None:
        self.failed = self.failed or bool(content.get("error"))
        if not self.model and isinstance(name := content.get("model"), str):
            self.model = valid(name[:200])
        self.usage = _usage(content.get("usage")) or self.usage
        choices = content.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self.finished = self.finished or choice.get("finish_reason") is not None
                self.texts.extend(_said(choice))


def _said(choice: Mapping[str, Any]) -> list[str]:
    """Texts of a choice or a part of one, arguments of tool calls among them."""
    found = [choice.get("text")]
    said = choice.get("delta") or choice.get("message")
    if isinstance(said, dict):
        found += [said.get("content"), said.get("reasoning_content"), said.get("refusal")]
        calls = said.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict):
                found += [function.get("name"), function.get("arguments")]
    return [text for text in found if isinstance(text, str) and text]


def _usage(given: Any) -> tuple[int, int] | None:
    """(prompt, completion) tokens that a backend counted; None where it says nothing that can be true."""
    if not isinstance(given, dict):
        return None
    counts = given.get("prompt_tokens"), given.get("completion_tokens", 0)
    if all(type(count) is int and 0 <= count < 10**9 for count in counts):
        return counts  # type: ignore[return-value]
    return None
