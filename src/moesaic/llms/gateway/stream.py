"""Server-sent events: whole ones out of chunks, and what is read in them for the books."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from moesaic.llms.gateway.calls import valid
from moesaic.llms.gateway.replies import Failed
from moesaic.llms.gateway.texts import PART, written
from moesaic.llms.gateway.tokens import Tally

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
        tally: counts the answer. begun: it has a text. model: what the backend calls itself.
        usage: its counts of prompt and answer, None for one that it does not tell.
        finished: a choice ended, or [DONE] came. failed: an event was an error.
    """

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.model = ""
        self.usage: tuple[int | None, int | None] = None, None
        self.begun = self.finished = self.done = self.failed = False

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
        if content.get("usage") is not None:
            prompt, answer = counts(content)
            self.usage = self.usage[0] if prompt is None else prompt, self.usage[1] if answer is None else answer
        choices = content.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self.finished = self.finished or choice.get("finish_reason") is not None
                self._take_choice(choice)

    def _take_choice(self, choice: Mapping[str, Any]) -> None:
        texts, parts = written(choice)
        for text in texts:
            self.tally.add(text)
            self.begun = self.begun or bool(text)
        if parts:
            self.tally.add_tokens(parts * PART)


def counts(content: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Tokens of prompt and answer that a backend counted; None for what it does not say, or that cannot be true."""
    given = content.get("usage")
    if not isinstance(given, dict):
        return None, None
    return _count(given.get("prompt_tokens")), _count(given.get("completion_tokens"))


def _count(given: Any) -> int | None:
    return given if type(given) is int and 0 <= given < 10**9 else None
