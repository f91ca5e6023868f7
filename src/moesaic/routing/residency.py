"""Which experts are in memory, matrices or whole models: a cache limited in bytes, and who leaves it.

| policy | who leaves | source |
| --- | --- | --- |
| `lru` | whoever was used longest ago | |
| `fifo` | whoever came first | |
| `random` | anybody | |
| `belady` | whoever is used again last, or not as far as is known | Belady 1966; over pre-gated tokens: Read-ME |

Of those that Belady's policy knows no use of, the one used longest ago leaves.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from moesaic.errors import ConfigError

Policy = Literal["lru", "fifo", "random", "belady"]
NextUse = Callable[[Any], float]
"""When a key is used next, in any unit; infinity where no use is known."""


def never(key: Any) -> float:
    return math.inf


@dataclass
class Residency:
    """Keys of known sizes within `limit` bytes. It decides and counts; whoever asks holds the data.

    Attributes:
        limit: bytes.
        policy: who leaves.
        next_use: for belady.
        seed: for random.
    """

    limit: int
    policy: Policy = "belady"
    next_use: NextUse = never
    seed: int = 0
    sizes: dict[Hashable, int] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0
    moved: int = 0
    """Bytes that came in."""

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise ConfigError(f"unknown policy {self.policy!r}: choose one of {', '.join(get_args(Policy))}")
        self._clock = 0
        self._used: dict[Hashable, int] = {}
        self._came: dict[Hashable, int] = {}
        self._ahead: set[Hashable] = set()
        self._random = random.Random(self.seed)

    @property
    def held(self) -> int:
        return sum(self.sizes.values())

    def use(self, key: Hashable, size: int, *, pinned: Collection[Hashable] = (), count: bool = True) -> list[Hashable]:
        """Have `key` in; returns who left for it.

        Args:
            pinned: those that must stay.
            count: whether this is a use, and not a load ahead of one; the use that follows such a load is a miss.
        Raises:
            ConfigError: where it does not fit beside those that must stay.
        """
        self._clock += 1
        if key in self.sizes:
            if count:
                self.hits += key not in self._ahead
                self.misses += key in self._ahead
                self._ahead.discard(key)
                self._used[key] = self._clock
            return []
        left: list[Hashable] = []
        free = self.limit - self.held
        while free < size:
            leaving = self._victim([k for k in self.sizes if k not in pinned and k not in left])
            if leaving is None:
                raise ConfigError(
                    f"{size:,} bytes of {key} do not fit into the {self.limit:,} of the cache beside what is in use: "
                    "raise the limit, or have less in use at once"
                )
            left.append(leaving)
            free += self.sizes[leaving]
        for leaving in left:
            self.drop(leaving)
        if not count:
            self._ahead.add(key)
        self.sizes[key] = size
        self._used[key] = self._came[key] = self._clock
        self.moved += size
        self.misses += count
        return left

    def drop(self, key: Hashable) -> None:
        """Forget that a key is in."""
        self.sizes.pop(key, None)
        self._ahead.discard(key)

    def _victim(self, candidates: Sequence[Hashable]) -> Hashable | None:
        if not candidates:
            return None
        if self.policy == "random":
            return self._random.choice(list(candidates))
        if self.policy == "fifo":
            return min(candidates, key=self._came.__getitem__)
        if self.policy == "lru":
            return min(candidates, key=self._used.__getitem__)
        return max(candidates, key=lambda key: (self.next_use(key), -self._used[key]))


class Future:
    """When each key of a trace is used next, at most `horizon` uses ahead."""

    def __init__(self, trace: Sequence[Hashable], horizon: int | None = None) -> None:
        self.now, self.horizon = 0, horizon
        self.places: dict[Hashable, list[int]] = {}
        for place, key in enumerate(trace):
            self.places.setdefault(key, []).append(place)

    def __call__(self, key: Hashable) -> float:
        places = self.places.get(key, [])
        following = bisect.bisect_right(places, self.now)
        if following == len(places):
            return math.inf
        ahead = places[following]
        return math.inf if self.horizon is not None and ahead > self.now + self.horizon else ahead


def replay(
    trace: Sequence[Hashable], slots: int, policy: Policy, *, horizon: int | None = None, seed: int = 0
) -> Residency:
    """A trace of uses through a cache of `slots` equal places; its counts say what happened."""
    future = Future(trace, horizon)
    cache = Residency(slots, policy, future, seed)
    for place, key in enumerate(trace):
        future.now = place
        cache.use(key, 1)
    return cache


def best(trace: Sequence[Hashable], slots: int) -> int:
    """The most hits that any policy can have, by trying all: for short traces."""
    reached: Mapping[frozenset[Hashable], int] = {frozenset(): 0}
    for key in trace:
        now: dict[frozenset[Hashable], int] = {}
        for held, hits in reached.items():
            for kept, scored in _choices(held, key, slots, hits):
                now[kept] = max(now.get(kept, -1), scored)
        reached = now
    return max(reached.values())


def _choices(
    held: frozenset[Hashable], key: Hashable, slots: int, hits: int
) -> Iterable[tuple[frozenset[Hashable], int]]:
    if key in held:
        yield held, hits + 1
    elif len(held) < slots:
        yield held | {key}, hits
    else:
        for leaving in held:
            yield held - {leaving} | {key}, hits
