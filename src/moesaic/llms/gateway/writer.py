"""The thread that writes books and traces, so that the event loop never waits for a disk.

Calls of one moment are written together: one transaction for all who wait, then for those who came meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

from moesaic.errors import first_line
from moesaic.llms.gateway.calls import Call
from moesaic.llms.gateway.keys import Key
from moesaic.llms.gateway.ledger import UNBOOKABLE, Ledger, Refusal
from moesaic.llms.gateway.trace import TraceLog

logger = logging.getLogger(__name__)

LAZY = 0.02
"""Seconds that settlements wait for more of them; they go at once where a reservation goes."""
UNWRITTEN = Refusal("the ledger cannot be written, so nothing can be charged", 5.0, ours=True)
UNBOOKED = Refusal("this request cannot be booked", 1.0, ours=True)


@dataclass
class _Reservation:
    call: Call
    key: Key
    tokens: int
    done: asyncio.Future[Refusal | None]
    refusal: Refusal | None = None


@dataclass
class _Batch:
    reservations: list[_Reservation]
    settled: list[Call]


class Writer:
    """Books and traces of one event loop."""

    def __init__(self, ledger: Ledger, log: TraceLog) -> None:
        self.ledger, self.log = ledger, log
        self._loop = asyncio.get_running_loop()
        self._next = self._sent = _Batch([], [])
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._queue: SimpleQueue[_Batch | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    async def reserve(self, call: Call, key: Key, tokens: int) -> Refusal | None:
        """Whether a call is admitted. Returns once that is on record."""
        wanted = _Reservation(call, key, tokens, self._loop.create_future())
        self._next.reservations.append(wanted)
        if len(self._next.reservations) == 1 and not self._busy:
            self._loop.call_soon(self._send)
        try:
            return await asyncio.shield(wanted.done)
        except asyncio.CancelledError:
            wanted.done.add_done_callback(lambda done: None if done.result() else self.settle(call))
            raise

    def settle(self, call: Call) -> None:
        """Book a call that has ended, and trace it. Returns at once."""
        call.end()
        self._next.settled.append(call)
        self._idle.clear()
        if not self._busy and self._timer is None:
            self._timer = self._loop.call_later(LAZY, self._send)

    async def written(self) -> None:
        """Return once all that has ended is on record."""
        while not self._idle.is_set() or self._busy:
            if not self._busy:
                self._send()
            await self._idle.wait()
            await asyncio.sleep(0)  # callbacks of reservations whose caller has gone settle them

    async def close(self, seconds: float | None = None) -> int:
        """Write what is left, if that takes no longer, and close the books. Returns how many calls are not in them."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.written()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join, seconds)
        left = len(self._next.settled) + (len(self._sent.settled) if self._busy else 0)
        if not self._thread.is_alive():
            self.ledger.close()
            self.log.close()
        return left

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._busy or not (self._next.reservations or self._next.settled):
            return
        self._busy, batch = True, self._next
        self._sent = batch
        self._next = _Batch([], [])
        self._idle.clear()
        self._queue.put(batch)

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            self._write(batch)
            with suppress(RuntimeError):  # `close` has not waited for it, and the loop is over
                self._loop.call_soon_threadsafe(self._written, batch)

    def _write(self, batch: _Batch) -> None:
        try:
            self.ledger.begin()
            for call in batch.settled:
                self._settle(call)
            for wanted in batch.reservations:
                wanted.refusal = self._reserve(wanted)
            self.ledger.commit()
        except Exception as error:  # a full disk, a damaged file: nothing is admitted until it is mended
            logger.error("the ledger was not written: %s", first_line(error))
            self.ledger.undo()
            for wanted in batch.reservations:
                wanted.refusal = UNWRITTEN
            return
        settled, batch.settled = batch.settled, []
        try:
            self.log.write(settled)
        except Exception as error:  # the books are what counts
            logger.error("%d calls are missing in the trace: %s", len(settled), first_line(error))

    def _settle(self, call: Call) -> None:
        try:
            self.ledger.settle(call)
        except UNBOOKABLE as error:
            logger.error("call %x is booked as it was reserved: %s", call.id, first_line(error))
            self.ledger.abandon(call)

    def _reserve(self, wanted: _Reservation) -> Refusal | None:
        try:
            return self.ledger.reserve(wanted.call, wanted.key, wanted.tokens)
        except UNBOOKABLE as error:
            logger.error("call %x cannot be booked: %s", wanted.call.id, first_line(error))
            return UNBOOKED

    def _written(self, batch: _Batch) -> None:
        self._busy = False
        self._next.settled[:0] = batch.settled  # those that could not be written are tried again
        for wanted in batch.reservations:
            if not wanted.done.done():
                wanted.done.set_result(wanted.refusal)
        if self._next.reservations:
            self._send()
        elif self._next.settled and self._timer is None:
            self._timer = self._loop.call_later(1.0 if batch.settled else LAZY, self._send)
        elif not self._next.settled:
            self._idle.set()
