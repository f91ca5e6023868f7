"""Which language models are in memory: the policies, the engine that loads them, and the simulator of larger hosts."""

from __future__ import annotations

import asyncio
import math
import threading
import time
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import AdapterError, ConfigError
from moesaic.llms.residency.engine import Engine
from moesaic.llms.residency.policy import Resident
from moesaic.llms.residency.simulator import (
    GPU,
    SN40L,
    Host,
    Plan,
    Request,
    Tier,
    Weights,
    compare,
    simulate,
    table,
)
from moesaic.llms.residency.sources import Source, held_bytes, of_base, of_run
from tests.composing import make

NAMES = "abcdef"
TRACES = st.lists(st.sampled_from(NAMES), max_size=60)
SIZES = st.fixed_dictionaries({name: st.integers(1, 9) for name in NAMES})
SHARES = st.fixed_dictionaries({name: st.floats(0, 1) for name in NAMES})


# -- policies ----------------------------------------------------------------------------------------------------------


@given(TRACES, SIZES, st.integers(9, 30), SHARES, st.sampled_from(["lru", "prefetch"]), st.integers(0, 6))
def test_memory_holds_what_fits_and_a_hit_loads_nothing(
    trace: list[str], sizes: dict[str, int], limit: int, shares: dict[str, float], policy: Any, known: int
) -> None:
    resident = Resident(sizes, limit, policy=policy, shares=shares)
    for at, name in enumerate(trace):
        resident.waiting = trace[at + 1 : at + 1 + known]
        there, moved = name in resident.cache.sizes, resident.cache.moved
        left = resident.use(name)
        assert name in resident.cache.sizes
        assert resident.cache.moved == moved + (0 if there else sizes[name])
        assert not (there and left)
        assert resident.cache.held == sum(sizes[held] for held in resident.cache.sizes) <= limit
        found = resident.ahead(NAMES, busy=[name])
        assert resident.cache.held <= limit
        assert name in resident.cache.sizes, "one in use stays"
        assert found is None or (policy == "prefetch" and found[0] in resident.cache.sizes)
    assert resident.cache.hits + resident.cache.misses == len(trace)


@given(TRACES, SIZES, st.integers(9, 30))
def test_lru_is_the_naive_one(trace: list[str], sizes: dict[str, int], limit: int) -> None:
    resident, naive, hits = Resident(sizes, limit), OrderedDict[str, int](), 0
    for name in trace:
        if name in naive:
            hits += 1
            naive.move_to_end(name)
        else:
            while sum(naive.values()) + sizes[name] > limit:
                naive.popitem(last=False)
            naive[name] = sizes[name]
        resident.use(name)
        assert resident.cache.sizes == naive
    assert resident.cache.hits == hits


@given(TRACES, st.integers(1, 5))
def test_more_memory_never_adds_misses_of_lru_where_models_are_alike(trace: list[str], slots: int) -> None:
    def misses(slots: int) -> int:
        resident = Resident(dict.fromkeys(NAMES, 7), 7 * slots)
        for name in trace:
            resident.use(name)
        return resident.cache.misses

    assert misses(slots + 1) <= misses(slots)


@given(TRACES, st.integers(1, 5))
def test_what_waits_is_a_better_guide_than_what_was(trace: list[str], slots: int) -> None:
    counts = []
    for policy in ("lru", "prefetch"):
        resident = Resident(dict.fromkeys(NAMES, 1), slots, policy=policy)  # type: ignore[arg-type]
        for at, name in enumerate(trace):
            resident.waiting = trace[at + 1 :]
            resident.use(name)
        counts.append(resident.cache.hits)
    assert counts[1] >= counts[0]


def test_who_is_needed_next_is_loaded_ahead_and_who_is_needed_last_leaves() -> None:
    resident = Resident(dict.fromkeys(NAMES, 1), 2, policy="prefetch", shares={"a": 0.5, "b": 0.2})
    resident.waiting = ["d"]
    assert [resident.next_use(name) for name in "dabc"] == [0, 3, 6, math.inf]
    assert resident.use("b") == resident.use("c") == []
    assert resident.ahead(NAMES) == ("d", ["c"])
    assert resident.ahead(NAMES) == ("a", ["b"])
    assert resident.ahead(NAMES) is None, "those that are in are needed sooner"
    assert resident.use("c", busy=["d"]) == ["a"]
    assert Resident({"a": 1}, 1).ahead("a") is None


def test_pinned_models_and_those_in_use_stay() -> None:
    resident = Resident({"a": 4, "b": 5, "c": 5}, 10, pinned=["a"])
    for name in "abcbc":
        resident.use(name)
        assert "a" in resident.cache.sizes or name != "c"
    before = dict(resident.cache.sizes)
    with pytest.raises(ConfigError, match="beside what is in use"):
        resident.use("b", busy=["c"])
    assert resident.cache.sizes == before


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"limit": 8}, "b takes 9 bytes of 8: raise the limit"),
        ({"limit": 9, "pinned": ["a"]}, "b takes 9 bytes of 9 beside 3 of pinned ones"),
        ({"limit": 11, "pinned": ["a", "b"]}, "the pinned models take 12 bytes of 11"),
        ({"limit": 20, "pinned": ["x"]}, "no model 'x' to pin"),
        ({"limit": 20, "shares": {"x": 1}}, "no model 'x' to pin or to expect"),
        ({"limit": 20, "policy": "lfu"}, "policy=lfu; "),
        ({"limit": 20, "sizes": {"a": 0}}, "a takes 0 bytes"),
    ],
)
def test_what_cannot_be_held_is_one_line(how: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        Resident(how.pop("sizes", {"a": 3, "b": 9}), how.pop("limit"), **how)
    assert "\n" not in str(error.value)


# -- the engine --------------------------------------------------------------------------------------------------------


class Disk:
    """Models that are words; their loads wait for `free`, and no two run at once."""

    def __init__(self, **sizes: int) -> None:
        self.sizes, self.loads, self.moves = sizes, list[str](), list[tuple[str, str]]()
        self.running = 0
        self.free = threading.Event()
        self.free.set()
        self.broken = set[str]()

    def sources(self) -> dict[str, Source]:
        return {name: self.source(name, size) for name, size in self.sizes.items()}

    def source(self, name: str, size: int) -> Source:
        def load() -> str:
            self.running += 1
            assert self.running == 1, "one load at a time"
            self.loads.append(name)
            assert self.free.wait(5)
            time.sleep(0.001)
            self.running -= 1
            if name in self.broken:
                raise OSError(5, "Input/output error")
            return name

        return Source(size, load, lambda _: self.sizes[name], lambda model, to: self.moves.append((model, to)))


async def used(engine: Engine, name: str) -> None:
    async with engine.use(name) as model:
        assert model == name
        await asyncio.sleep(0)


@given(st.lists(st.sampled_from("abcd"), max_size=25), st.integers(4, 10), st.sampled_from(["lru", "prefetch"]))
def test_many_at_once_are_all_served_within_the_cap(trace: list[str], limit: int, policy: Any) -> None:
    disk = Disk(a=1, b=2, c=3, d=4)

    async def run() -> dict[str, Any]:
        engine = Engine(disk.sources(), limit, policy=policy, shares={"d": 0.5, "a": 0.5})

        async def one(name: str) -> None:
            async with engine.use(name) as model:
                assert model == name
                for _ in range(3):
                    await asyncio.sleep(0)
                    assert name in engine.figures()["resident"]["memory"], "one in use is never evicted"
                    assert engine.figures()["memory"]["resident_bytes"] <= limit

        await asyncio.gather(*map(one, trace))
        await engine.close()
        return engine.figures()

    found = asyncio.run(run())
    memory = found["memory"]
    assert memory["hits"] + memory["misses"] == len(trace)
    assert memory["loads"] == len(disk.loads) >= memory["misses"]
    assert memory["loaded_bytes"] == sum(disk.sizes[name] for name in disk.loads)
    assert memory["evictions"] <= memory["loads"]
    assert (found["waiting"], found["in_use"]) == (0, {})


def test_one_after_the_other_it_loads_what_the_policy_says() -> None:
    disk = Disk(a=1, b=1, c=1)

    async def run() -> Engine:
        engine = Engine(disk.sources(), 2)
        for name in "abacab":
            await used(engine, name)
        return engine

    engine = asyncio.run(run())
    figures = engine.figures()["memory"]
    assert disk.loads == ["a", "b", "c", "b"]
    assert (figures["hits"], figures["misses"], figures["evictions"]) == (2, 4, 2)
    assert figures["load_seconds"] > 0.004


def test_who_is_there_does_not_wait_for_the_loads_of_others() -> None:
    disk = Disk(a=1, b=1)

    async def run() -> None:
        engine = Engine(disk.sources(), 2)
        await used(engine, "a")
        disk.free.clear()
        second = asyncio.create_task(used(engine, "b"))
        await asyncio.sleep(0.01)
        await asyncio.wait_for(used(engine, "a"), 1)
        assert not second.done()
        disk.free.set()
        await second

    asyncio.run(run())


def test_room_is_made_once_those_in_use_have_ended_and_nobody_overtakes() -> None:
    disk = Disk(a=2, b=2)
    order = []

    async def run() -> None:
        engine = Engine(disk.sources(), 3)

        async def one(name: str, mark: str) -> None:
            async with engine.use(name):
                order.append(mark)

        async with engine.use("a"):
            waiting = [asyncio.create_task(one("b", "b")), asyncio.create_task(one("a", "a again"))]
            await asyncio.sleep(0.01)
            assert not order
            assert engine.figures()["waiting"] == 2
        await asyncio.gather(*waiting)

    asyncio.run(run())
    assert order == ["b", "a again"]
    assert disk.loads == ["a", "b", "a"]


def test_a_request_that_leaves_is_forgotten_and_its_load_is_kept() -> None:
    disk = Disk(a=1, b=1)

    async def run() -> None:
        engine = Engine(disk.sources(), 1)
        disk.free.clear()
        gone = asyncio.create_task(used(engine, "a"))
        behind = asyncio.create_task(used(engine, "b"))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.01)
        disk.free.set()
        await asyncio.wait_for(behind, 5)
        granted = asyncio.create_task(used(engine, "b"))
        await asyncio.sleep(0)
        granted.cancel()  # between the grant and the block
        await asyncio.gather(granted, return_exceptions=True)
        assert engine.figures()["in_use"] == {}
        await asyncio.wait_for(used(engine, "a"), 5)

    asyncio.run(run())
    assert disk.loads == ["a", "b", "a"]


def test_who_waits_is_loaded_ahead_while_another_runs() -> None:
    disk = Disk(a=1, b=1, c=1)

    async def run() -> dict[str, Any]:
        engine = Engine(disk.sources(), 2, policy="prefetch", shares={"b": 0.9, "c": 0.1})
        async with engine.use("a"):
            while disk.loads != ["a", "b"] or engine.figures()["memory"]["loads"] < 2:
                await asyncio.sleep(0.001)
        await used(engine, "b")
        await engine.close()
        return engine.figures()["memory"]

    found = asyncio.run(run())
    assert (found["loads"], found["loads_ahead"], found["misses"]) == (3, 2, 2), "then c, as a has no share"


def test_pinned_models_are_there_from_the_start() -> None:
    disk = Disk(a=1, b=1, c=1)

    async def run() -> None:
        engine = Engine(disk.sources(), 2, pinned=["a"])
        await engine.start()
        for name in "bcbc":
            await used(engine, name)
            assert "a" in engine.figures()["resident"]["memory"]

    asyncio.run(run())
    assert disk.loads == ["a", "b", "c", "b", "c"]


def test_a_device_holds_fewer_than_memory_does() -> None:
    disk = Disk(a=1, b=1, c=1)

    async def run() -> dict[str, Any]:
        engine = Engine(disk.sources(), 2, device="cuda", device_limit=1)
        for name in "abac":
            await used(engine, name)
        return engine.figures()

    found = asyncio.run(run())
    assert disk.loads == ["a", "b", "c"]
    assert disk.moves == [
        ("a", "cuda"), ("a", "cpu"), ("b", "cuda"), ("b", "cpu"), ("a", "cuda"), ("a", "cpu"), ("c", "cuda"),
    ]  # fmt: skip
    assert found["resident"] == {"memory": ["a", "c"], "cuda": ["c"]}
    assert (found["memory"]["misses"], found["cuda"]["misses"], found["memory"]["hits"]) == (3, 4, 1)


def test_what_cannot_be_loaded_is_one_line_and_the_others_go_on() -> None:
    disk = Disk(a=1, b=1)
    disk.broken = {"a"}

    async def run() -> None:
        engine = Engine(disk.sources(), 2, policy="prefetch", shares={"a": 1})
        together = await asyncio.gather(used(engine, "a"), used(engine, "a"), used(engine, "b"), return_exceptions=True)
        assert [type(one) for one in together] == [AdapterError, AdapterError, type(None)]
        assert str(together[0]) == "a cannot be loaded: [Errno 5] Input/output error"
        assert disk.loads.count("a") == 1, "nor is it loaded ahead again"
        disk.broken.clear()
        await used(engine, "a")
        with pytest.raises(ConfigError, match="no model 'x' here; "):
            await used(engine, "x")
        disk.sizes["b"] = 9
        await engine.close()
        with pytest.raises(ConfigError, match="closed"):
            await used(engine, "a")

    asyncio.run(run())


def test_a_model_that_takes_more_than_its_files_say_is_refused_where_that_is_too_much() -> None:
    disk = Disk(a=3, b=3)

    async def run() -> None:
        engine = Engine(disk.sources(), 5)
        disk.sizes["a"] = 5
        await used(engine, "a")
        assert engine.figures()["memory"]["resident_bytes"] == 5
        disk.sizes["b"] = 6
        with pytest.raises(ConfigError, match="b takes 6 bytes, not 3 as its files say: raise the limit"):
            await used(engine, "b")
        await used(engine, "a")

    asyncio.run(run())


def test_closing_refuses_who_waits() -> None:
    disk = Disk(a=1)

    async def run() -> None:
        engine = Engine(disk.sources(), 1)
        disk.free.clear()
        waiting = asyncio.create_task(used(engine, "a"))
        await asyncio.sleep(0.01)
        threading.Timer(0.05, disk.free.set).start()
        await engine.close()
        with pytest.raises(ConfigError, match="the models were closed"):
            await waiting

    asyncio.run(run())


def test_real_models_take_what_their_files_say_and_take_turns(tmp_path: Path) -> None:
    make(tmp_path)
    sources = {"up": of_run(tmp_path / "up"), "max": of_run(tmp_path / "max"), "nano": of_base("nano")}

    async def run() -> dict[str, Any]:
        engine = Engine(sources, max(source.bytes for source in sources.values()) + 1000)
        before: Any = lambda: None  # noqa: E731
        for name in sources:
            async with engine.use(name) as model:
                assert held_bytes(model) == sources[name].bytes
                assert before() is None, "one that left is out of memory before the next comes in"
                before = weakref.ref(model.model)
                assert (model.recipe.model if name != "nano" else model.kind) in ("nano", "causal")
                del model
        return engine.figures()["memory"]

    found = asyncio.run(run())
    assert found["evictions"] == 2
    assert found["loaded_bytes"] == sum(source.bytes for source in sources.values())
    with pytest.raises(ConfigError, match=r"takes .* bytes of 1,000: raise the limit"):
        Engine(sources, 1000)
    (tmp_path / "up" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(AdapterError) as error:
        of_run(tmp_path / "up")
    assert "\n" not in str(error.value)


# -- the simulator -----------------------------------------------------------------------------------------------------

SMALL = Host("small", (Tier("fast", 10, 10.0), Tier("slow", 100, 2.0)))
TWO = {"a": Weights(10), "b": Weights(6)}


def test_loads_take_bytes_over_bandwidth_and_tokens_a_read_each() -> None:
    trace = [Request("a", 0, 4), Request("a", 0, 9), Request("b", 0, 0)]
    found = simulate(trace, TWO, SMALL)
    # a: 10 / 2 to load, (1 + 9) reads of 10 / 10 for both at once; b: 6 / 2 to load, one read of 6 / 10
    assert (found.loads, found.moved, found.switching, found.waiting) == (2, 16, 8.0, 8.0)
    assert found.seconds == pytest.approx(5 + 10 + 3 + 0.6)
    assert found.latency == pytest.approx((10 + 15 + 18.6) / 3)
    assert (found.p95, found.hit_ratio) == (pytest.approx(18.6), pytest.approx(1 / 3))


def test_a_batch_by_expert_switches_less_and_one_at_a_time_reads_more() -> None:
    trace = [Request(name, 0, 1) for name in "ababab"]
    fcfs, expert = (simulate(trace, TWO, SMALL, Plan(order=order)) for order in ("fcfs", "expert"))  # type: ignore[arg-type]
    assert (fcfs.loads, expert.loads) == (6, 2)
    assert expert.seconds < fcfs.seconds
    single = simulate(trace, TWO, SMALL, Plan(order="expert", batch=1))
    assert single.seconds > expert.seconds


def test_who_waits_is_loaded_while_another_runs() -> None:
    host = Host("roomy", (Tier("fast", 20, 10.0), Tier("slow", 100, 2.0)))
    trace = [Request("a", 0, 9), Request("b", 0, 9)]
    demand, ahead = (simulate(trace, TWO, host, Plan(policy=policy)) for policy in ("lru", "prefetch"))  # type: ignore[arg-type]
    assert (demand.switching, demand.waiting) == (8.0, 8.0)
    assert (ahead.switching, ahead.waiting) == (8.0, 5.0), "b's 3 s pass while a runs for 10"
    assert demand.seconds - ahead.seconds == pytest.approx(3.0)


def test_a_model_runs_from_the_fastest_tier_that_it_fits_into_and_comes_up_hop_by_hop() -> None:
    host = Host("three", (Tier("small", 4, math.inf), Tier("fast", 10, 10.0), Tier("slow", 100, 2.0)))
    models = {"tiny": Weights(4), "mid": Weights(8), "huge": Weights(40, active=2)}
    tiny = simulate([Request("tiny", tokens=100)], models, host)
    assert (tiny.moved, tiny.seconds) == (8, pytest.approx(4 / 2 + 4 / 10)), "and tokens take no time there"
    mid = simulate([Request("mid", tokens=0)], models, host)
    assert (mid.moved, mid.seconds) == (8, pytest.approx(8 / 2 + 8 / 10))
    huge = simulate([Request("huge", tokens=2)], models, host)
    assert (huge.loads, huge.hit_ratio, huge.seconds) == (0, 1.0, pytest.approx(3 * 2 / 2)), "read from where it lies"


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.integers(0, 5)), min_size=1, max_size=25),
    st.sampled_from(["lru", "prefetch"]),
    st.sampled_from(["fcfs", "expert"]),
    st.integers(1, 4),
)
def test_every_request_is_answered_and_time_adds_up(trace: Any, policy: Any, order: Any, batch: int) -> None:
    models = dict.fromkeys("abc", Weights(10))
    requests = [Request(*one) for one in trace]
    plan = Plan(policy, order, batch)
    found, more = (
        simulate(requests, models, Host("h", (Tier("fast", 10 * slots, 10.0), Tier("slow", 100, 2.0))), plan)
        for slots in (1, 3)
    )
    assert found.requests == len(trace)
    assert found.switching == pytest.approx(5.0 * found.loads)
    assert found.moved == 10 * found.loads
    assert found.waiting >= -1e-9
    assert more.loads == len({one[0] for one in trace})
    if policy == "lru" and order == "fcfs":
        assert found.waiting == pytest.approx(found.switching), "nothing is loaded ahead"
    least = max(request.at + (1 + request.tokens) * 1.0 for request in requests)
    assert found.seconds >= least - 1e-9


def test_presets_are_compared_in_a_table() -> None:
    models = {f"7b-{i}": Weights(14 * 10**9) for i in range(10)}
    trace = [Request(f"7b-{i % 10}", at=0.1 * i, tokens=64) for i in range(30)]
    plans = [Plan(), Plan(order="expert"), Plan("prefetch"), Plan(pinned=("7b-0",))]
    found = compare(trace, models, [SN40L, GPU, SN40L.times(8)], plans)
    assert len(found) == 12
    node = found[8]
    assert node.loads == 10, "eight sockets hold all ten"
    assert node.switching == pytest.approx(10 * 14e9 / (8 * 200e9))
    shown = table(found)
    assert shown.row_count == 12
    assert [str(column.header) for column in shown.columns][:3] == ["host", "plan", "hit ratio"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: simulate([], TWO, SMALL), "a trace of no request"),
        (lambda: simulate([Request("c")], TWO, SMALL), "the trace asks for 'c'"),
        (lambda: simulate([Request("a", -1)], TWO, SMALL), "must be at least 0"),
        (lambda: simulate([Request("a")], {"a": Weights(101)}, SMALL), "slow holds 100: use fewer"),
        (lambda: Plan(order="lifo"), "order=lifo; "),  # type: ignore[arg-type]
        (lambda: Plan(batch=0), "batch=0 must be"),
        (lambda: Host("none", ()), "host none: one tier"),
        (lambda: Host("slow", (Tier("x", 1, 0.0),)), "a bandwidth above 0"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        given()
    assert "\n" not in str(error.value)
