"""Experts that are not in the model: fetched from disk when they are needed, or before, by threads that read."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future as Pending
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.errors import AdapterError, ConfigError
from moesaic.ffn.layer import Activation
from moesaic.ffn.serving.files import ExpertFiles
from moesaic.routing.residency import Residency

READERS = 2
"""Threads that read: one leaves half of a disk's rate unused."""
Key = tuple[int, int]
"""Layer and expert."""


class StreamedBank(nn.Module):
    """Stands where a bank of experts would: x (T, d), index (T, 1) and weights (T, 1) to (T, d), without parameters.

    Before it has a store it adds nothing.
    """

    store: Store | None = None
    layer: int

    def __init__(self, config: Any, num_experts: int, d_model: int, width: int, activation: Activation) -> None:
        super().__init__()
        self.num_experts, self.width, self.act_fn = num_experts, width, activation

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        if self.store is None:
            return out
        chosen = index[:, 0]
        for expert, held in self.store.take(self.layer, chosen.unique().tolist()):
            token = torch.where(chosen == expert)[0]
            out.index_copy_(0, token, self._one(held, x[token]) * weights[token])
            del held  # it may leave memory before the next is there
        return out

    def _one(self, held: dict[str, Tensor], x: Tensor) -> Tensor:
        if "gate_up_proj" in held:
            gate, up = F.linear(x, held["gate_up_proj"].to(x.dtype)).chunk(2, dim=-1)
            hidden = self.act_fn(gate) * up
        else:
            hidden = self.act_fn(F.linear(x, held["up_proj"].to(x.dtype), held["up_proj_bias"].to(x.dtype)))
        return F.linear(hidden, held["down_proj"].to(x.dtype))


@dataclass
class Loads:
    """What loading cost so far, in seconds and bytes."""

    loading: float = 0.0
    """Spent reading, on whichever thread."""
    waiting: float = 0.0
    """Of these, what the forward stood still for."""
    ahead: int = 0
    """Loads that were begun before they were needed."""


class Store:
    """Experts in memory within a budget of bytes, read ahead where it is told what comes.

    Args:
        files: where they lie.
        residency: what is kept; its `next_use` becomes the store's.
        prefetch: read the next layer's experts while this one computes.
    """

    def __init__(self, files: ExpertFiles, residency: Residency, *, prefetch: bool = True) -> None:
        self.files, self.residency, self.prefetch = files, residency, prefetch
        residency.next_use = self.next_use
        self.loads = Loads()
        self.plan: Sequence[Sequence[int]] = ()
        """The running batch's experts, by layer."""
        self.coming: Mapping[int, int] = {}
        """In how many batches an expert is needed next, as far as that is known."""
        self._held: dict[Key, Pending[dict[str, Tensor]]] = {}
        self._reader = ThreadPoolExecutor(READERS, thread_name_prefix="experts")
        self._lock = threading.Lock()
        self.now = 0
        """The layer that runs."""
        self.broken: list[Key] = []
        """Experts that could not be read."""

    def begin(self, plan: Sequence[Sequence[int]]) -> None:
        """A batch is about to run, with these experts in each layer; reads that failed unnoticed are begun anew."""
        for key in [key for key, read in self._held.items() if read.done() and read.exception() is not None]:
            self.drop(key)
        self.plan, self.now = plan, 0
        self._ahead((), [(0, expert) for expert in plan[0]])

    def take(self, layer: int, wanted: Sequence[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """A layer's experts, one after the other, those in memory first; what comes next is read meanwhile."""
        self.now = layer
        left = sorted(wanted, key=lambda expert: (layer, expert) not in self.residency.sizes)
        following = self.plan[layer + 1] if layer + 1 < len(self.plan) else ()
        while left:
            key = layer, left.pop(0)
            rest = [(layer, expert) for expert in left]
            self._need(key, rest)
            self._ahead((key,), [*rest, *((layer + 1, expert) for expert in following)])
            yield key[1], self._get(key)

    def next_use(self, key: Key) -> float:
        """When an expert is needed next, in layers from now."""
        layer, expert = key
        ahead = layer - self.now
        if ahead > 0 and expert in self.plan[layer]:
            return ahead
        return self.coming.get(expert, math.inf) * len(self.plan) + ahead

    def _need(self, key: Key, rest: Sequence[Key]) -> None:
        try:
            self._admit(key, rest, count=True)
        except ConfigError:  # this layer's experts do not fit in together: they take turns
            self._admit(key, (), count=True)

    def _ahead(self, running: Sequence[Key], coming: Sequence[Key]) -> None:
        """Begin to read what comes next, as far as it fits in beside what this batch still needs.

        No further than the next layer: reads that are begun earlier only delay those that are waited for. What is on
        its way in takes a place beside what runs, so that a cache of few experts has less room for those that stay:
        reading on demand may move fewer bytes.
        """
        missing = [key for key in coming if key not in self.residency.sizes] if self.prefetch else []
        if not missing:
            return
        needed = [(layer, e) for layer in range(self.now + 1, len(self.plan)) for e in self.plan[layer]]
        for key in missing:
            try:
                self._admit(key, [*running, *coming, *needed], count=False)
            except ConfigError:
                return
            self.loads.ahead += 1

    def _admit(self, key: Key, pinned: Sequence[Key], *, count: bool) -> None:
        missing = key not in self.residency.sizes
        for leaving in self.residency.use(key, self.files.size(*key), pinned=set(pinned), count=count):
            del self._held[leaving]  # type: ignore[arg-type]
        if missing:
            self._fetch(key)

    def _fetch(self, key: Key) -> None:
        self._held[key] = self._reader.submit(self._load, key)

    def _load(self, key: Key) -> dict[str, Tensor]:
        begun = time.perf_counter()
        found = self.files.read(*key)
        with self._lock:
            self.loads.loading += time.perf_counter() - begun
        return found

    def _get(self, key: Key) -> dict[str, Tensor]:
        """An expert's tensors; waits for them."""
        begun = time.perf_counter()
        try:
            return self._held[key].result()
        except AdapterError:
            self.broken.append(key)
            self.drop(key)
            raise
        finally:
            self.loads.waiting += time.perf_counter() - begun

    def drop(self, key: Key) -> None:
        """Forget an expert, so that it is read again when it is asked for."""
        self._held.pop(key, None)
        self.residency.drop(key)

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
