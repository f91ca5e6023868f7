"""When an endpoint is asked again, and when it is left alone for a while."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

FIRST, LONGEST = 0.2, 5.0
"""Seconds: the spread of the first wait between two tries, and of any."""


@dataclass(frozen=True)
class Policy:
    """How one model's endpoint is treated.

    Attributes:
        retries: tries after the first, as long as no byte of an answer has been sent.
        longest_wait: seconds that a Retry-After is waited for; where it says more, the next model is asked.
        failures: one after the other that open the breaker. rest: seconds until it lets one request through again.
    """

    retries: int = 2
    longest_wait: float = 10.0
    failures: int = 5
    rest: float = 30.0


def wait(tries: int, draw: Callable[[], float] = random.random) -> float:
    """Seconds before the next try, after `tries` of them: even draws below a bound that doubles (full jitter)."""
    return draw() * min(LONGEST, FIRST * 2.0 ** (tries - 1))


def retry_after(text: str | None, clock: Callable[[], float] = time.time) -> float | None:
    """Seconds that a Retry-After header asks for, which holds a number or a date; None where it says nothing."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - clock()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds < 1e9 else None


class Breaker:
    """A circuit breaker: closed, open after too many failures in a row, half-open for one request after a rest.

    Ask `allows` once before each request, and tell its end by `succeeded`, `failed` or `left`.
    """

    def __init__(self, policy: Policy, clock: Callable[[], float] = time.monotonic) -> None:
        self.policy, self._clock = policy, clock
        self._failures = 0
        self._opened = 0.0
        self._probing = False

    @property
    def state(self) -> str:
        if self._failures < self.policy.failures:
            return "closed"
        return "half-open" if self._probing or self.remaining() <= 0 else "open"

    def remaining(self) -> float:
        """Seconds until a request may pass; 0 where one may."""
        if self._failures < self.policy.failures:
            return 0.0
        return max(0.0, self._opened + self.policy.rest - self._clock())

    def allows(self) -> bool:
        """Whether a request may pass; in the half-open state the first who asks may."""
        if self._failures < self.policy.failures:
            return True
        if self._probing or self.remaining() > 0:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        self._failures, self._probing = 0, False

    def failed(self) -> None:
        self._failures += 1
        self._probing = False
        if self._failures >= self.policy.failures:
            self._opened = self._clock()

    def left(self) -> None:
        """The request ended in a way that says nothing of the endpoint."""
        self._probing = False
