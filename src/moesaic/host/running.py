"""What belongs to a thread: the forward that runs in it, and what its user opened around it.

Several threads may run one model at a time (a server does, and `nn.DataParallel`, which HF Trainer takes by itself with
two GPUs): none may see another's masks, task ids or losses. A compiled forward cannot ask which thread it is in, and
runs as the one that made the model: one thread at a time.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from moesaic.host.frames import Frame
from moesaic.host.prompts import Prompt
from moesaic.routing import RoutingTrace


class Running:
    """One thread's."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.recomputing = False
        self.aux: Tensor | None = None
        self.loss_values: dict[str, Tensor] = {}
        self.traces: list[RoutingTrace] = []
        self.pinned_tasks: Tensor | None = None
        self.pinned_scores: Tensor | None = None
        self.told: Prompt | None = None

    def copied(self) -> Running:
        """What a copy of the model takes along: what was pinned, not what runs."""
        new = Running()
        new.pinned_tasks, new.pinned_scores = self.pinned_tasks, self.pinned_scores
        return new


class _Local(threading.local):
    def __init__(self) -> None:
        self.running = Running()


class Threads:
    """Every thread's `Running`."""

    def __init__(self, own: Running | None = None) -> None:
        self._home, self._own, self._others = threading.get_ident(), own or Running(), _Local()

    def current(self) -> Running:
        if torch.compiler.is_compiling() or threading.get_ident() == self._home:
            return self._own
        return self._others.running

    def __reduce__(self) -> tuple[type, tuple[Running]]:
        return Threads, (self.current().copied(),)


def of_thread(name: str) -> property:
    """An attribute of a host that is its thread's."""
    return property(
        lambda host: getattr(host.threads.current(), name),
        lambda host, value: setattr(host.threads.current(), name, value),
    )
