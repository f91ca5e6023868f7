"""The simulator of machines that are not there: the engine's decisions, on a clock that is counted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from moesaic.errors import ConfigError
from moesaic.ffn.serving.engine import Engine
from moesaic.ffn.serving.simulator import Machine, coming, simulate
from tests.test_engine import EXPERT, folder, model, prompts  # noqa: F401

ONE = Machine(layers=1, expert_bytes=10, budget=10, bandwidth=10.0, layer_seconds=1.0)


ROOMY = Machine(layers=1, expert_bytes=10, budget=20, bandwidth=10.0, layer_seconds=1.0)


@pytest.mark.parametrize("policy", ["lru", "fifo"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_it_moves_what_the_engine_moves(folder: Path, policy: Any, prefetch: bool) -> None:  # noqa: F811
    for kept in (2, 3, 5):
        engine = Engine(folder, budget=kept * EXPERT, policy=policy, prefetch=prefetch, batch_tokens=4)
        for prompt in prompts():
            engine.add(prompt, max_new_tokens=9)
        list(engine.run())
        engine.close()
        machine = Machine(engine.num_layers, EXPERT, kept * EXPERT, bandwidth=1e6, layer_seconds=1e-3)
        found = simulate([b.experts for b in engine.batches], machine, policy=policy, prefetch=prefetch)
        residency = engine.residency
        assert (found.hits, found.misses, found.moved) == (residency.hits, residency.misses, residency.moved)


def test_what_is_read_on_demand_is_waited_for() -> None:
    found = simulate([[0], [0], [1]], ONE, prefetch=False)
    assert (found.hits, found.misses, found.moved) == (1, 2, 20)
    assert (found.loading, found.waiting, found.seconds) == (2.0, 2.0, 5.0)


def test_a_layer_computes_while_the_next_ones_expert_is_read() -> None:
    two = Machine(layers=3, expert_bytes=10, budget=20, bandwidth=10.0, layer_seconds=0.75)
    ahead, demand = (simulate([[0]], two, prefetch=prefetch) for prefetch in (True, False))
    assert (demand.waiting, demand.seconds) == (3.0, 3.0 + 3 * 0.75)
    assert (ahead.waiting, ahead.seconds) == (1.5, 1.5 + 3 * 0.75), "one read in full, a quarter of each that follows"
    assert ahead.moved == demand.moved == 30


def test_belady_knows_the_batches_that_follow() -> None:
    assert coming([[3], [1, 3], [0]]) == {3: 1, 1: 2, 0: 3}
    trace = [[0], [1], [2], [0], [1], [2], [0], [1]]
    assert simulate(trace, ROOMY, prefetch=False).hits == 3
    assert simulate(trace, ROOMY, prefetch=False, policy="lru").hits == 0


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(ConfigError, match="above 0"):
        Machine(layers=1, expert_bytes=10, budget=10, bandwidth=0.0, layer_seconds=1.0)
    with pytest.raises(ConfigError, match="hold no expert"):
        Machine(layers=1, expert_bytes=10, budget=9, bandwidth=1.0, layer_seconds=1.0)
    sizes: dict[str, Any] = vars(ONE)
    for other in ({"layer_seconds": math.nan}, {"layers": 1.5}, {"bandwidth": "fast"}):
        with pytest.raises(ConfigError, match="must be a"):
            Machine(**sizes | other)
    batches: Any
    for batches in ([[0], []], [0, 1], [["a"]], [[0.5]]):
        with pytest.raises(ConfigError, match="a batch is a list of whole numbers"):
            simulate(batches, ONE)


def test_a_batch_names_each_expert_once_and_a_trace_may_be_read_once() -> None:
    assert simulate([[0, 0], [1, 0, 1]], ROOMY) == simulate(iter([[0], [0, 1]]), ROOMY)
    assert simulate([[0, 0], [1, 0, 1]], ROOMY).hits == 1
