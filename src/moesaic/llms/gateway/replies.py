"""What a model gives when it is asked: an answer that has begun, or the reason why none has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol


class Failed(Exception):
    """A model gave no answer.

    Args:
        status: what a client is told, if nobody else answers either.
        again: whether the same model may be asked again. counts: whether its breaker is told.
        wait: seconds that it asked for.
    """

    def __init__(
        self, said: str, *, status: int = 502, again: bool = True, counts: bool = True, wait: float | None = None
    ) -> None:
        super().__init__(said)
        self.status, self.again, self.counts, self.wait = status, again, counts, wait


@dataclass
class Sending:
    """Whether a request has gone out to its model. A backend that can tell says so."""

    done: bool = True


SENDING: ContextVar[Sending] = ContextVar("SENDING")
"""That of the try which a task is making."""


@dataclass
class Reply:
    """An answer that has begun.

    Attributes:
        kind: its Content-Type. wait: seconds of its Retry-After.
        read: the bytes that have come, none at its end; raises Failed. close: ends it, whole or not.
    """

    status: int
    kind: str
    wait: float | None
    read: Callable[[], Awaitable[bytes]]
    close: Callable[[], None]


class Backend(Protocol):
    """Asks one model."""

    async def open(self, path: str, body: bytes) -> Reply:
        """Send a request to /v1/…. Raises Failed where no answer begins."""
        ...

    async def close(self) -> None: ...
