"""Which language models are in memory: the policies."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.llms.residency.policy import Resident

NAMES = "abcdef"
TRACES = st.lists(st.sampled_from(NAMES), max_size=60)
SIZES = st.fixed_dictionaries({name: st.integers(1, 9) for name in NAMES})
SHARES = st.fixed_dictionaries({name: st.floats(0, 1) for name in NAMES})


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
