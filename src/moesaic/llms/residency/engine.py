"""Local models under a cap of memory, loaded when they are asked for and evicted as a policy says.

    disk --load--> memory --move--> device, where there is one

`async with engine.use("name") as model` has a model in for as long; many may use it at once. One load runs at a time,
in a thread; a model in use is never evicted. Requests whose model is in do not wait for the loads of others. A request
that waits for room keeps those behind it waiting, pinned models' apart, or it might wait for ever.
A model on the device keeps its room in memory, so that there is always a way back.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from moesaic.errors import AdapterError, ConfigError, MoesaicError, first_line, suggest
from moesaic.llms.residency.policy import Policy, Resident
from moesaic.llms.residency.sources import Source


@dataclass(eq=False)
class Level:
    """A memory: what it decides to hold, what is there, and what loading came to.

    Attributes:
        place: "memory", or the device's name.
        there: models whose loads have ended.
        seconds: spent loading. loaded: bytes. loads, ahead: how many, and of these before they were asked for.
    """

    place: str
    kept: Resident
    there: set[str] = field(default_factory=set)
    seconds: float = 0.0
    loaded: int = 0
    loads: int = 0
    ahead: int = 0
    evictions: int = 0

    def figures(self) -> dict[str, float]:
        cache = self.kept.cache
        return {
            "limit_bytes": cache.limit, "resident_bytes": cache.held, "hits": cache.hits, "misses": cache.misses,
            "evictions": self.evictions, "loads": self.loads, "loads_ahead": self.ahead,
            "loaded_bytes": self.loaded, "load_seconds": self.seconds,
        }  # fmt: skip


@dataclass(eq=False)
class _Request:
    name: str
    granted: asyncio.Future[None]
    missed: list[Level] = field(default_factory=list)
    """Where it was not in, which is counted already."""


class Engine:
    """Models by name, as they are asked for. All calls come from one event loop.

    Args:
        limit: bytes of memory. device: where models run, with `device_limit` bytes; "" for memory.
        pinned: models that stay; `start` loads them. shares: of requests, by model (see `policy`).

    Raises:
        ConfigError: a model larger than a limit, or an unknown name.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        limit: int,
        *,
        device: str = "",
        device_limit: int = 0,
        policy: Policy = "lru",
        pinned: Collection[str] = (),
        shares: Mapping[str, float] | None = None,
    ) -> None:
        sizes = {name: source.bytes for name, source in sources.items()}
        places = {"memory": limit, **({device: device_limit} if device else {})}
        self._sources = dict(sources)
        self._levels = [
            Level(place, Resident(sizes, most, policy=policy, pinned=pinned, shares=shares))
            for place, most in places.items()
        ]
        self._models: dict[str, Any] = {}
        self._waiting: list[_Request] = []
        self._busy: Counter[str] = Counter()
        self._loading: asyncio.Task[None] | None = None
        self._pinned = frozenset(pinned)
        self._broken: set[str] = set()
        """Models whose last load failed: they are not loaded ahead."""
        self._closed = False

    async def start(self) -> None:
        """Load the pinned models. Raises what loading them raises."""
        for name in sorted(self._pinned):
            async with self.use(name):
                pass

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Any]:
        """The model of a name, in for as long. To ask for another within may wait for ever: it may need the room.

        Raises:
            ConfigError: no such model, or one that takes more than its files say. AdapterError: it cannot be loaded.
        """
        if self._closed:
            raise ConfigError(f"{name}: the models were closed")
        if name not in self._sources:
            raise ConfigError(f"no model {name[:80]!r} here; {suggest(name[:80], self._sources)}")
        request = _Request(name, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._go_on()
        try:
            await request.granted
            yield self._models[name]
        finally:
            if request.granted.cancelled():
                self._go_on()
            elif request.granted.exception() is None:
                self._busy[name] -= 1
                self._go_on()

    def figures(self) -> dict[str, Any]:
        """By level its limit, hits, misses, evictions and loads; who is in, who is in use, how many wait."""
        return {
            **{level.place: level.figures() for level in self._levels},
            "resident": {level.place: sorted(level.there) for level in self._levels},
            "in_use": {name: uses for name, uses in self._busy.items() if uses},
            "waiting": len(self._waiting),
        }

    async def close(self) -> None:
        """Refuse who waits, and let go of all models once the load that runs has ended."""
        self._closed = True
        self._refuse(self._waiting, ConfigError("the models were closed"))
        if self._loading is not None:
            await asyncio.wait([self._loading])
        self._models.clear()
        for level in self._levels:
            level.there.clear()

    def _go_on(self) -> None:
        """Grant what can be granted, and begin the next load."""
        self._waiting = [request for request in self._waiting if not request.granted.done()]
        for level in self._levels:
            level.kept.waiting = [request.name for request in self._waiting]
        no_room = False
        for request in self._waiting:
            missing = next((level for level in self._levels if request.name not in level.there), None)
            if missing is None:
                if not no_room or request.name in self._pinned:
                    self._grant(request)
            elif self._loading is None and not no_room:
                no_room = not self._bring(request, missing)
        self._waiting = [request for request in self._waiting if not request.granted.done()]
        if self._loading is None and not no_room and not self._closed:
            self._bring_ahead()

    def _grant(self, request: _Request) -> None:
        for level in self._levels:
            if level not in request.missed:
                level.kept.use(request.name)
        self._busy[request.name] += 1
        request.granted.set_result(None)

    def _bring(self, request: _Request, level: Level) -> bool:
        """Begin to load a request's model; False where those in use leave no room."""
        try:
            left = level.kept.use(request.name, +self._busy)
        except ConfigError as error:
            if +self._busy:
                return False
            self._refuse([request], error)
            return True
        request.missed.append(level)
        self._begin(request.name, level, left)
        return True

    def _bring_ahead(self) -> None:
        below = [name for name in self._sources if name not in self._broken]
        for level in self._levels:
            if found := level.kept.ahead(below, +self._busy):
                level.ahead += 1
                self._begin(found[0], level, found[1])
                return
            below = [name for name in below if name in level.there]

    def _begin(self, name: str, level: Level, left: Sequence[str]) -> None:
        level.evictions += len(left)
        upper = self._levels[self._levels.index(level) :]
        leaving = [self._models.pop(other) if level is self._levels[0] else self._models[other] for other in left]
        for other in left:
            for each in upper:
                each.kept.drop(other)
                each.there.discard(other)
        self._loading = asyncio.create_task(self._load(name, level, leaving))

    async def _load(self, name: str, level: Level, leaving: list[Any]) -> None:
        begun = time.perf_counter()
        try:
            model = await asyncio.to_thread(self._loaded, name, level, leaving)
            taken = self._sources[name].measure(model)
            self._check(name, level, taken)
        except Exception as error:
            level.kept.drop(name)
            self._broken.add(name)
            said = AdapterError(f"{name} cannot be loaded: {first_line(error)}")
            told = error if isinstance(error, MoesaicError) else said
            self._refuse([request for request in self._waiting if request.name == name], told)
        else:
            self._models[name] = model
            self._broken.discard(name)
            level.there.add(name)
            level.loads += 1
            level.loaded += taken
            level.seconds += time.perf_counter() - begun
        self._loading = None
        self._go_on()

    def _loaded(self, name: str, level: Level, leaving: list[Any]) -> Any:
        """In a thread: a model from the level below, once what leaves is gone."""
        source = self._sources[name]
        if level is self._levels[0]:
            leaving.clear()
            return source.load()
        for other in leaving:
            source.move(other, "cpu")
        source.move(self._models[name], level.place)
        return self._models[name]

    def _check(self, name: str, level: Level, taken: int) -> None:
        """Hold what a model takes for its size from now on. Raises ConfigError where that is too much."""
        cache = level.kept.cache
        if cache.held - cache.sizes[name] + taken > cache.limit:
            raise ConfigError(
                f"{name} takes {taken:,} bytes, not {cache.sizes[name]:,} as its files say: raise the limit"
            )
        cache.sizes[name] = level.kept.sizes[name] = taken

    def _refuse(self, requests: Sequence[_Request], error: Exception) -> None:
        for request in requests:
            if not request.granted.done():
                request.granted.set_exception(error)
