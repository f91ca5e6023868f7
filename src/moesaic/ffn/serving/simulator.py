"""A trace of batches on a machine that is not there: what its disk, its memory and its pace make of it.

The engine's own store decides what is read, kept and read ahead, on a clock that is counted: an expert's read takes its
bytes over the disk's rate, one read after the other, and a layer computes while the disk reads. What is hit, missed and
moved by LRU and FIFO is exactly the engine's on the same batches. Belady's policy knows the trace's next batches, the
engine's only the tokens that wait. What is waited for is an estimate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from moesaic.errors import ConfigError
from moesaic.ffn.checking import check
from moesaic.ffn.serving.engine import HORIZON
from moesaic.ffn.serving.streamed import Key, Store
from moesaic.routing.residency import Policy, Residency


@dataclass(frozen=True)
class Machine:
    """A model on a machine.

    Attributes:
        layers: of the model.
        expert_bytes: of one expert of one layer.
        budget: bytes of experts in memory.
        bandwidth: bytes a second that are read.
        layer_seconds: what a layer computes for a batch.
    """

    layers: int
    expert_bytes: int
    budget: int
    bandwidth: float
    layer_seconds: float

    def __post_init__(self) -> None:
        check(self)
        if min(vars(self).values()) <= 0:
            raise ConfigError(f"{self}: all must be above 0")
        if self.budget < self.expert_bytes:
            raise ConfigError(f"budget={self.budget:,} bytes hold no expert of {self.expert_bytes:,}")


@dataclass(frozen=True)
class Simulated:
    """What a trace came to: experts found in memory and not, bytes moved, and seconds."""

    hits: int
    misses: int
    moved: int
    loading: float
    waiting: float
    """Of the seconds, what was stood still for."""
    seconds: float


def simulate(
    batches: Iterable[Collection[int]], machine: Machine, *, policy: Policy = "belady", prefetch: bool = True
) -> Simulated:
    """Run batches (the experts of each, such as `[batch.experts for batch in engine.batches]`) on a machine.

    Raises:
        ConfigError: a batch of no expert, or a machine that holds none.
    """
    plans = [_plan(batch) for batch in batches]
    store = _Counted(machine, policy, prefetch=prefetch)
    for number, plan in enumerate(plans):
        store.coming = coming(plans[number + 1 : number + 1 + HORIZON])
        store.begin([plan] * machine.layers)
        for layer in range(machine.layers):
            for _ in store.take(layer, plan):
                store.clock += machine.layer_seconds / len(plan)
    kept = store.residency
    return Simulated(kept.hits, kept.misses, kept.moved, store.loads.loading, store.loads.waiting, store.clock)


def _plan(batch: Any) -> list[int]:
    """A batch's experts, each once. Raises ConfigError for what is no list of them."""
    if not isinstance(batch, Collection) or not batch or any(type(expert) is not int for expert in batch):
        raise ConfigError(f"a batch is a list of whole numbers, the experts that it takes, one at least: not {batch!r}")
    return sorted({*batch})


class _Counted(Store):
    """A store that reads nothing, and counts the time that it would take."""

    def __init__(self, machine: Machine, policy: Policy, *, prefetch: bool) -> None:
        sizes: Any = self
        super().__init__(sizes, Residency(machine.budget, policy), prefetch=prefetch)
        self.machine, self.clock, self._free = machine, 0.0, 0.0
        self._ready: dict[Key, float] = {}

    def size(self, layer: int, expert: int) -> int:
        return self.machine.expert_bytes

    def _fetch(self, key: Key) -> None:
        seconds = self.machine.expert_bytes / self.machine.bandwidth
        self._free = self._ready[key] = max(self._free, self.clock) + seconds
        self._held[key] = Future()
        self.loads.loading += seconds

    def _get(self, key: Key) -> dict[str, Any]:
        wait = max(0.0, self._ready[key] - self.clock)
        self.loads.waiting += wait
        self.clock += wait
        return {}


def coming(following: Sequence[Sequence[int]]) -> dict[int, int]:
    """In how many batches each expert is needed next, of those that follow."""
    found: dict[int, int] = {}
    for ahead, batch in enumerate(following, 1):
        for expert in batch:
            found.setdefault(expert, ahead)
    return found
