"""When a long run says how far it is, where there is no terminal to show a bar on."""

from __future__ import annotations

import time

SOONEST, LATEST = 30.0, 600.0
"""Seconds between two lines: never fewer, and never many more."""


class Pace:
    """A line is due after half a minute or a tenth of the run, whichever is rarer; after ten minutes in any case.

    Args:
        total: steps in all; None where nobody knows, and then it is half a minute.
        done: steps that were made before this process began.
    """

    def __init__(self, total: int | None, done: int = 0) -> None:
        self.tenth, self._at = (total or 0) / 10, done
        self._told = time.monotonic()

    def due(self, done: int) -> bool:
        """Whether a line is due now that so many steps are done; once it says so, the next is counted from here."""
        waited = time.monotonic() - self._told
        if waited < SOONEST or (done - self._at < self.tenth and waited < LATEST):
            return False
        self._told, self._at = time.monotonic(), done
        return True


def in_words(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
