"""A trace of requests on a host that is not there: what its memories and its policy make of it.

A host's memories stand in tiers, the fastest first; the last holds all models. A model runs from the fastest tier that
it fits into, and lies in all below it. Loads take bytes / bandwidth of the tier that they come from, hop by hop, one
load after the other, and go on while models run. A token reads the bytes that are active once, at the bandwidth of the
tier that the model runs from, for all requests of a batch together; a prompt is read as one token is. Arithmetic, links
between sockets and what a tier needs beside weights are counted as nothing, so that times are the least there can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from moesaic.errors import ConfigError, suggest
from moesaic.llms.residency.policy import Policy, Resident, check_fit

if TYPE_CHECKING:
    from rich.table import Table

Order = Literal["fcfs", "expert"]
"""Who runs next: those at the head of the queue that want the same model, or all in it that want the head's."""


@dataclass(frozen=True)
class Tier:
    """A memory: bytes, and bytes a second at which what lies in it is read."""

    name: str
    bytes: int
    bandwidth: float


@dataclass(frozen=True)
class Host:
    """Memories, the fastest first. Raises ConfigError for none, or one of no size or no bandwidth."""

    name: str
    tiers: tuple[Tier, ...]

    def __post_init__(self) -> None:
        if not self.tiers or any(not (tier.bytes > 0 and tier.bandwidth > 0) for tier in self.tiers):
            raise ConfigError(f"host {self.name}: one tier at least, each with bytes and a bandwidth above 0")

    def times(self, sockets: int) -> Host:
        """As many of it, each holding its part of every model."""
        tiers = (Tier(tier.name, tier.bytes * sockets, tier.bandwidth * sockets) for tier in self.tiers)
        return Host(f"{sockets} x {self.name}", tuple(tiers))


SN40L = Host(
    "SN40L socket",
    (Tier("SRAM", 520 * 2**20, math.inf), Tier("HBM", 64 * 2**30, 1.8e12), Tier("DDR", 3 * 2**39, 200e9)),
)
"""SambaNova's SN40L (arXiv 2405.07518; figures as secondary notes give them): 520 MiB, 64 GiB at about 1.8 TB/s, up to
1.5 TiB at about 200 GB/s. Of the SRAM's bandwidth nothing is known here: it is counted as without end."""
GPU = Host("GPU of 80 GB", (Tier("HBM", 80 * 10**9, 3.35e12), Tier("host memory", 2**38, 64e9)))
"""A two-tier host, nominal: an H100 SXM's 80 GB at 3.35 TB/s, and an eighth of a DGX's 2 TiB behind PCIe 5.0 x16."""


@dataclass(frozen=True)
class Weights:
    """A model's bytes, and of these what a token reads; all where `active` is left out."""

    bytes: int
    active: int | None = None


@dataclass(frozen=True)
class Request:
    """What a router decided: the model, when it was asked (seconds) and how many tokens it writes."""

    model: str
    at: float = 0.0
    tokens: int = 128


@dataclass(frozen=True)
class Plan:
    """How a host is run: `batch` requests of a model at once at most; the rest as `Resident` takes it."""

    policy: Policy = "lru"
    order: Order = "fcfs"
    batch: int = 16
    pinned: tuple[str, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ConfigError(f"order={self.order}; {suggest(self.order, get_args(Order))}")
        if self.batch < 1:
            raise ConfigError(f"batch={self.batch} must be at least 1")

    def __str__(self) -> str:
        return ", ".join([self.policy, self.order, *([f"{len(self.pinned)} pinned"] if self.pinned else [])])


@dataclass(frozen=True)
class Simulated:
    """What a trace came to.

    Attributes:
        loads: models moved into the tier that they run from. hit_ratio: requests that caused no such load, of all.
        moved: bytes, over all hops. switching: seconds of loading; waiting: of these, what was stood still for.
        latency: mean seconds from asking to the last token; p95 likewise. seconds: until all were answered.
    """

    host: str
    plan: str
    requests: int
    loads: int
    hit_ratio: float
    moved: int
    switching: float
    waiting: float
    latency: float
    p95: float
    seconds: float


def simulate(
    trace: Sequence[Request], models: Mapping[str, Weights], host: Host, plan: Plan | None = None
) -> Simulated:
    """Run a trace on a host.

    Raises:
        ConfigError: no request, an unknown model, or models that the last tier does not hold.
    """
    plan = plan or Plan()
    _check(trace, models, host)
    memory = _Memory(models, host, plan)
    coming = sorted(trace, key=lambda request: request.at)[::-1]
    queue: list[Request] = []
    now, latencies = 0.0, list[float]()
    while coming or queue:
        now = now if queue else max(now, coming[-1].at)
        while coming and coming[-1].at <= now:
            queue.append(coming.pop())
        batch, queue = _batch(queue, plan)
        memory.waiting([request.model for request in queue])
        begun = memory.ready(batch[0].model, now)
        now = begun + memory.seconds(batch[0].model, max(request.tokens for request in batch))
        memory.ahead(batch[0].model, begun, now)
        latencies += [begun + memory.seconds(request.model, request.tokens) - request.at for request in batch]
    latencies.sort()
    n = len(latencies)
    return Simulated(
        host.name, str(plan), n, memory.loads, 1 - memory.demanded / n, memory.moved, memory.switching, memory.stood,
        math.fsum(latencies) / n, latencies[math.ceil(0.95 * n) - 1], now,
    )  # fmt: skip


def compare(
    trace: Sequence[Request], models: Mapping[str, Weights], hosts: Sequence[Host], plans: Sequence[Plan]
) -> list[Simulated]:
    """Every plan on every host."""
    return [simulate(trace, models, host, plan) for host in hosts for plan in plans]


COLUMNS: dict[str, Callable[[Simulated], str]] = {
    "host": lambda found: found.host,
    "plan": lambda found: found.plan,
    "hit ratio": lambda found: f"{found.hit_ratio:.2f}",
    "loads": lambda found: f"{found.loads:,}",
    "moved, GB": lambda found: f"{found.moved / 1e9:,.1f}",
    "switching, s": lambda found: f"{found.switching:,.2f}",
    "waited for, s": lambda found: f"{found.waiting:,.2f}",
    "latency, s": lambda found: f"{found.latency:,.2f}",
    "p95, s": lambda found: f"{found.p95:,.2f}",
    "all, s": lambda found: f"{found.seconds:,.1f}",
}


def table(found: Sequence[Simulated]) -> Table:
    """One row a plan and host."""
    from rich.table import Table

    shown = Table(title=f"{found[0].requests} requests, simulated" if found else "simulated")
    for name in COLUMNS:
        shown.add_column(name, justify="left" if name in ("host", "plan") else "right")
    for one in found:
        shown.add_row(*[show(one) for show in COLUMNS.values()])
    return shown


def _check(trace: Sequence[Request], models: Mapping[str, Weights], host: Host) -> None:
    if not trace:
        raise ConfigError("a trace of no request cannot be simulated")
    for request in trace:
        if request.model not in models:
            raise ConfigError(f"the trace asks for {request.model!r}; {suggest(request.model, models)}")
        if not (0 <= request.at < math.inf and request.tokens >= 0):
            raise ConfigError(f"{request}: its time and its tokens must be at least 0")
    held, last = sum(weights.bytes for weights in models.values()), host.tiers[-1]
    if held > last.bytes:
        raise ConfigError(
            f"the models take {held:,} bytes, and {host.name}'s {last.name} holds {last.bytes:,}: use fewer"
        )


def _batch(queue: Sequence[Request], plan: Plan) -> tuple[list[Request], list[Request]]:
    """Who runs next, of those that wait, and who waits on."""
    model = queue[0].model
    others = (i for i, request in enumerate(queue) if request.model != model)
    until = next(others, len(queue)) if plan.order == "fcfs" else len(queue)
    taken = [i for i, request in enumerate(queue[:until]) if request.model == model][: plan.batch]
    runs = frozenset(taken)
    return [queue[i] for i in taken], [request for i, request in enumerate(queue) if i not in runs]


class _Memory:
    """A host's tiers above the last, on a clock that is counted."""

    def __init__(self, models: Mapping[str, Weights], host: Host, plan: Plan) -> None:
        self._models, self._tiers = models, host.tiers
        self._home = {
            name: next(i for i, tier in enumerate(host.tiers) if weights.bytes <= tier.bytes)
            for name, weights in models.items()
        }
        self.kept = [self._resident(level, plan) for level in range(len(host.tiers) - 1)]
        self.loads = self.demanded = self.moved = 0
        self.switching = self.stood = 0.0
        self._free, self._ready = 0.0, dict[str, float]()

    def _resident(self, level: int, plan: Plan) -> Resident:
        sizes = {name: weights.bytes for name, weights in self._models.items() if self._home[name] <= level}
        pinned = [name for name in plan.pinned if name in sizes]
        shares = {name: share for name, share in plan.shares.items() if name in sizes}
        check_fit(sizes, self._tiers[level].bytes, pinned)
        return Resident(sizes, self._tiers[level].bytes, policy=plan.policy, pinned=pinned, shares=shares)

    def waiting(self, names: Sequence[str]) -> None:
        for kept in self.kept:
            kept.waiting = names

    def seconds(self, name: str, tokens: int) -> float:
        """That a model takes for a prompt and so many tokens."""
        weights = self._models[name]
        read = weights.bytes if weights.active is None else weights.active
        return (1 + tokens) * read / self._tiers[self._home[name]].bandwidth

    def ready(self, name: str, now: float) -> float:
        """When a model that is needed now can run."""
        if self._home[name] < len(self.kept):
            resident = self.kept[self._home[name]]
            missing = name not in resident.cache.sizes
            before = resident.cache.misses
            resident.use(name)
            self.demanded += resident.cache.misses - before
            if missing:
                self._move(name, now)
        begins = max(now, self._ready.get(name, 0.0))
        self.stood += begins - now
        return begins

    def ahead(self, running: str, now: float, until: float) -> None:
        """Begin the loads ahead that the link has time for while a model runs."""
        for level, kept in enumerate(self.kept):
            among: Collection[str] = [name for name, home in self._home.items() if home == level]
            while max(self._free, now) < until and (found := kept.ahead(among, [running])):
                self._move(found[0], now)

    def _move(self, name: str, now: float) -> None:
        """Bring a model up from the nearest tier that it lies in, all hops one after the other."""
        home, weights = self._home[name], self._models[name]
        below = home + 1
        while below < len(self.kept) and name not in self.kept[below].cache.sizes:
            self.kept[below].use(name)
            below += 1
        seconds = math.fsum(weights.bytes / tier.bandwidth for tier in self._tiers[home + 1 : below + 1])
        self._free = self._ready[name] = max(self._free, now) + seconds
        self.loads += 1
        self.moved += weights.bytes * (below - home)
        self.switching += seconds
