"""Which expert a chat has: it keeps its own unless another is better by more than a penalty."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b

from moesaic.llms.gateway.routers import Decision

MOST, LONGEST = 10_000, 3600.0
"""Chats that are remembered, and seconds since their last turn."""


class Sessions:
    """Experts of chats. A chat's name is kept as a digest only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    def choose(self, chat: bytes | None, decision: Decision, penalty: float) -> str:
        """The expert of this turn.

        The gain of a switch is the difference of the two experts' `scores` where the router gives both, and its
        confidence otherwise.
        """
        held = self._expert(chat) if chat else None
        if held is None or held == decision.expert:
            return decision.expert
        scores = decision.scores
        known = decision.expert in scores and held in scores
        gain = scores[decision.expert] - scores[held] if known else decision.confidence
        return decision.expert if gain > penalty else held

    def keep(self, chat: bytes | None, expert: str) -> None:
        """Remember who answered."""
        if chat:
            self._held[chat] = (expert, self._clock())
            self._held.move_to_end(chat)
            if len(self._held) > MOST:
                self._held.popitem(last=False)

    def _expert(self, chat: bytes) -> str | None:
        expert, last = self._held.get(chat, ("", 0.0))
        return expert if expert and self._clock() - last <= LONGEST else None


def chat_of(key: str, router: str, session: str) -> bytes | None:
    """A chat of one key and one router; None where the request names none."""
    if not session:
        return None
    return blake2b("\0".join((key, router, session)).encode("utf-8", "replace"), digest_size=16).digest()
