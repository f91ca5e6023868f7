"""Serving by expert: batches of few experts, and caches that know what comes."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.ffn.serving.batching import Item, choose
from moesaic.routing.residency import Future, Residency, best, replay

TRACES = st.lists(st.integers(0, 5), max_size=14)


# -- caches --------------------------------------------------------------------------------------------------------


@given(TRACES, st.integers(1, 4))
def test_9_beladys_policy_is_the_best_there_is(trace: list[int], slots: int) -> None:
    assert replay(trace, slots, "belady").hits == best(trace, slots)


@given(st.lists(st.integers(0, 9), max_size=80), st.integers(1, 6), st.integers(0, 3))
def test_9_no_policy_beats_belady_on_any_trace(trace: list[int], slots: int, seed: int) -> None:
    most = replay(trace, slots, "belady").hits
    assert all(replay(trace, slots, policy, seed=seed).hits <= most for policy in ("lru", "fifo", "random"))
    for ahead in (0, 3):
        assert replay(trace, slots, "belady", horizon=ahead).hits <= most
    assert replay(trace, slots, "belady", horizon=0).hits == replay(trace, slots, "lru").hits
    assert replay(trace, slots, "belady", horizon=len(trace)).hits == most


@given(st.lists(st.integers(0, 6), max_size=60), st.integers(1, 9))
def test_counts_add_up_and_the_limit_holds(trace: list[int], slots: int) -> None:
    for policy in ("lru", "fifo", "random", "belady"):
        cache = replay(trace, slots, policy)
        assert cache.hits + cache.misses == len(trace)
        assert cache.moved == cache.misses
        assert len(cache.sizes) == min(slots, len(set(trace)))


def test_policies_say_who_leaves() -> None:
    uses = ["a", "b", "a", "c"]
    assert replay(uses, 2, "lru").sizes.keys() == {"a", "c"}
    assert replay(uses, 2, "fifo").sizes.keys() == {"b", "c"}
    assert replay([*uses, "b"], 2, "belady").sizes.keys() >= {"b"}
    future = Future("abcab", horizon=3)
    assert (future("a"), future("b")) == (3, 1)
    future.now = 1
    assert future("c") == 2
    assert future("x") == float("inf")


def test_bytes_are_kept_within_the_limit_and_what_is_pinned_stays() -> None:
    cache = Residency(10, "lru")
    assert cache.use("a", 4) == cache.use("b", 4) == []
    assert cache.use("c", 6, pinned={"b"}) == ["a"]
    before = dict(cache.sizes)
    with pytest.raises(ConfigError, match="5 bytes of d do not fit into the 10 of the cache"):
        cache.use("d", 5, pinned={"b", "c"})
    assert cache.sizes == before, "nothing is given up for what does not fit"
    assert cache.use("e", 1, count=False) == ["b"]
    assert (cache.hits, cache.misses, cache.moved) == (0, 3, 15)


def test_a_use_that_follows_a_load_ahead_is_a_miss() -> None:
    cache = Residency(1, "lru")

    def used(key: str) -> tuple[int, int, int]:
        cache.use(key, 1)
        return cache.hits, cache.misses, cache.moved

    cache.use("a", 1, count=False)
    assert used("a") == (0, 1, 1)
    assert used("a") == (1, 1, 1)
    cache.use("b", 1, count=False)
    assert used("a") == (1, 2, 3)
    assert used("b") == (1, 3, 4)
    assert used("b") == (2, 3, 4), "that it was read ahead is forgotten once it leaves"


# -- batches -------------------------------------------------------------------------------------------------------

ORDERS = ["experts", "fcfs", "decode-first", "prefill-first"]
PROMPTS = st.tuples(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.just(False), st.integers(0, 6))
WRITTEN = st.tuples(st.lists(st.integers(0, 6), min_size=1, max_size=1), st.just(True), st.integers(0, 6))
WAITING = st.lists(PROMPTS | WRITTEN, max_size=30).map(lambda waiting: sorted(waiting, key=lambda item: item[2]))


def items(waiting: Any) -> list[Item]:
    return [Item(i, tuple(experts), since, decodes) for i, (experts, decodes, since) in enumerate(waiting)]


def rest_of(waiting: list[Item], batch: list[Item]) -> list[Item]:
    """What still waits after a batch."""
    ran = {item.request: item.tokens for item in batch}
    left = [replace(item, experts=item.experts[ran.get(item.request, 0) :]) for item in waiting]
    return [item for item in left if item.experts]


def unique(batch: list[Item]) -> int:
    return len({expert for item in batch for expert in item.experts})


@given(WAITING, st.integers(1, 20), st.sampled_from(ORDERS))
def test_10_every_token_runs_once_in_its_order_within_the_budget(waiting: Any, budget: int, order: Any) -> None:
    left, ran, now = items(waiting), defaultdict(tuple), 6
    while left:
        batch = choose(left, budget, order, now=now, max_wait=5)
        assert sum(item.tokens for item in batch) == min(budget, sum(item.tokens for item in left))
        assert len({item.request for item in batch}) == len(batch)
        whole = {item.request: item for item in left}
        for item in batch:
            assert item == whole[item.request].first(item.tokens)
            ran[item.request] += item.experts
        left = rest_of(left, batch)
        now += 1
    assert ran == {i: tuple(experts) for i, (experts, *_) in enumerate(waiting)}
    assert choose([], budget, order) == []


@given(WAITING, st.integers(1, 20))
def test_10_written_tokens_take_as_few_experts_as_can_be_whatever_prompts_wait(waiting: Any, budget: int) -> None:
    left = items(waiting)
    while left:
        batch = choose(left, budget, now=6)
        written = [item for item in left if item.decodes]
        ran = [item for item in batch if item.decodes]
        assert len(ran) == min(budget, len(written))
        counts = sorted(Counter(item.experts[0] for item in written).values(), reverse=True)
        assert unique(ran) == next(n for n in range(len(counts) + 1) if sum(counts[:n]) >= len(ran))
        assert unique(ran) <= unique(choose(written, budget, "fcfs"))
        left = rest_of(left, batch)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 20))
def test_10_a_snapshot_of_single_tokens_takes_as_few_experts_as_can_be(experts: list[int], budget: int) -> None:
    batch = choose([Item(i, (e,), 0) for i, e in enumerate(experts)], budget)
    assert len(batch) == min(budget, len(experts))
    counts = sorted(Counter(experts).values(), reverse=True)
    assert unique(batch) == next(n for n in range(1, len(counts) + 1) if sum(counts[:n]) >= len(batch))


def test_nobody_starves() -> None:
    rare, now, left = Item("rare", (6,), 0), 0, [Item("rare", (6,), 0)]
    while True:
        left += [Item(f"{now} {i}", (0,), now) for i in range(4)]
        batch = choose(left, 4, now=now, max_wait=10)
        left = [item for item in left if item not in batch]
        if rare in batch:
            break
        now += 1
    assert now == 10


def test_a_prompt_goes_as_far_as_its_experts_are_there() -> None:
    prompt = Item("p", (1, 1, 2, 4), 0)
    waiting = [prompt, *(Item(i, (e,), 0, decodes=True) for i, e in enumerate([3, 3, 1, 2, 2]))]
    assert choose(waiting, 2) == waiting[4:], "what was written goes first, the longest queue of it"
    assert choose(waiting, 6) == [prompt.first(1), *waiting[1:]]
    assert choose(waiting, 8) == [prompt.first(3), *waiting[1:]]
    prompts = [prompt, Item("q", (2, 1), 0), Item("r", (4,), 0)]
    assert choose(prompts, 5) == [prompt.first(3), prompts[1]], "4 comes last, and is the rarest"
    assert choose(prompts, 3) == [prompt.first(3)]
    assert choose(waiting, 2, "prefill-first") == [prompt.first(2)]
    assert choose(waiting, 7, "prefill-first") == [prompt, *waiting[1:4]]
    assert choose(waiting, 2, "decode-first") == waiting[1:3]
    assert choose(waiting, 7, "decode-first") == [*waiting[1:], prompt.first(2)]
    assert choose(waiting, 5, "fcfs") == [prompt, waiting[1]]
    assert choose(waiting, 5, now=9, max_wait=9) == [prompt, waiting[1]], "those that have waited too long"


@pytest.mark.parametrize("seed", range(3))
def test_the_specifications_simulation(seed: int) -> None:
    """Seven experts, 64 requests whose tokens keep their expert at 0.95: its figures, within a few points."""
    draw = random.Random(seed)
    now = [draw.randrange(7) for _ in range(64)]
    trace, taken = [], {"experts": [], "fcfs": []}
    for step in range(300):
        now = [e if draw.random() < 0.95 else draw.randrange(7) for e in now]
        waiting = [Item(i, (e,), step) for i, e in enumerate(now)]
        for order, found in taken.items():
            found.append(unique(choose(waiting, 16, order)))
        trace.append(now[step % 64])
        trace += draw.sample(now, 7)
    mean = {order: sum(found) / len(found) for order, found in taken.items()}
    assert mean["fcfs"] > 6
    assert mean["experts"] <= 0.5 * mean["fcfs"]
    ratio = {p: [replay(trace, k, p).hits / len(trace) for k in (2, 3, 4, 5)] for p in ("lru", "random", "belady")}
    assert all(b - max(a, r) > 0.1 for a, r, b in zip(ratio["lru"], ratio["random"], ratio["belady"], strict=True))
    near = replay(trace, 5, "belady", horizon=16).hits / replay(trace, 5, "belady").hits
    assert near > 0.99


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda: choose([], 1, "best"), "unknown order 'best'"),  # type: ignore[arg-type]
        (lambda: choose([], 0), "a batch of 0 tokens holds nothing"),
        (lambda: Residency(1, "mru"), "unknown policy 'mru'"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_one_clear_line(asked: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked()
