"""Bounds on what uvicorn waits for without any: the head of a request, and whatever comes between two of them."""

from __future__ import annotations

import asyncio
from typing import Any

LARGEST_HEAD = 65_536
"""Bytes of a request's head, which is what h11 has for it too."""


def bounded(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, of connections that are closed where a head is not whole after so many seconds."""
    base: Any
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as base
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol as base

    class Bounded(base):
        _timer: asyncio.TimerHandle | None = None
        _in_head = False
        _size = 0

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(seconds, transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            self._in_head = True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_head, self._size = False, 0
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            more = self._in_head
            super().data_received(data)
            if self.transport.is_closing():
                return
            if self._in_head:
                self._size += len(data) if more else 0
                if self._size > LARGEST_HEAD:
                    self.transport.close()
                    return
            elif self.cycle is not None and not self.cycle.response_complete:
                self._disarm()
                return
            if self._timer is None:
                self._timer = self.loop.call_later(seconds, self.transport.close)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Bounded
