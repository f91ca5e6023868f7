"""A long run as people see it: how far it is, and Ctrl-C that waits until nothing is half done."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from types import FrameType
from typing import Any

from moesaic.runs.pace import Pace
from moesaic.trees.prequential.metrics import Figures

logger = logging.getLogger(__name__)


class Interrupts:
    """A context in which the first Ctrl-C or SIGTERM is only noted, in `asked`; the second interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt("stopped at once")
        self.asked = True
        logger.warning("stopping after these rows; once more to stop at once")


class Progress:
    """A bar over rows with the accuracy so far, or, where it is not `shown`, a line every so often."""

    def __init__(self, name: str, total: int | None, done: int, *, shown: bool) -> None:
        self.name, self.total, self.done, self.shown = name, total, done, shown
        self._pace = Pace(total, done)

    def __enter__(self) -> Progress:
        from tqdm import tqdm

        self._bar = tqdm(
            desc=self.name,
            total=self.total,
            initial=self.done,
            unit="row",
            unit_scale=True,
            file=sys.stderr,
            leave=False,
            disable=not self.shown,
        )
        return self

    def advance(self, done: int, overall: Figures) -> None:
        """Tell that so many rows are done."""
        said = "-" if overall.accuracy is None else f"{overall.accuracy:.1%}"
        self._bar.set_postfix(accuracy=said, refresh=False)
        self._bar.update(done - self.done)
        self.done = done
        if not self.shown and self._pace.due(done):
            print(f"{self.name}: row {told(done, self.total)}, accuracy {said}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def told(done: int, total: int | None) -> str:
    """How far it is, in words."""
    return f"{done:,}" if total is None else f"{done:,} of {total:,}"
