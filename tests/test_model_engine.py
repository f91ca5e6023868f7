"""Local models loaded and evicted by the engine."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import AdapterError, ConfigError
from moesaic.llms.residency.engine import Engine
from moesaic.llms.residency.sources import Source, held_bytes, of_base, of_run
from tests.composing import make


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
