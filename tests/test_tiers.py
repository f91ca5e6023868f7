"""The simulator of hosts with tiers of memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
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
