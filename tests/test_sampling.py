"""Task-interleaved order: even at every stretch, the same for the same seed."""

import math
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.data.sampling import InterleavedSampler, interleave, quotas
from moesaic.errors import ConfigError, DataError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def groups_of(sizes):
    start, groups = 0, []
    for n in sizes:
        groups.append(list(range(start, start + n)))
        start += n
    return groups


@given(SIZES, st.sampled_from([0.5, 1.0, 3.0, math.inf]))
def test_quotas_are_powers_of_the_sizes(sizes, temperature):
    shares = quotas(sizes, temperature)
    raw = [n ** (1 / temperature) for n in sizes]
    assert shares == pytest.approx([r / sum(raw) for r in raw])


@given(SIZES, st.integers(0, 5), st.sampled_from([1.0, 2.0, math.inf]))
def test_every_prefix_is_within_a_constant_of_its_quota(sizes, seed, temperature):
    groups = groups_of(sizes)
    task_of = {row: t for t, rows in enumerate(groups) for row in rows}
    shares = quotas(sizes, temperature)
    counts = Counter()
    for n, row in enumerate(interleave(groups, 150, seed=seed, temperature=temperature), 1):
        counts[task_of[row]] += 1
        for t, share in enumerate(shares):
            assert abs(counts[t] - n * share) <= max(1.0, len(sizes) / 2)


@given(st.integers(1, 6), st.integers(0, 9))
def test_infinite_temperature_is_a_round_robin(tasks, seed):
    groups = groups_of([3 + t for t in range(tasks)])
    task_of = {row: t for t, rows in enumerate(groups) for row in rows}
    order = [task_of[r] for r in interleave(groups, tasks * 10, seed=seed)]
    assert sorted(order[:tasks]) == list(range(tasks))
    assert order == order[:tasks] * 10


@given(SIZES, st.integers(0, 5))
def test_within_a_task_every_row_comes_once_a_cycle(sizes, seed):
    groups = groups_of(sizes)
    drawn = list(interleave(groups, 3 * sum(sizes), seed=seed, temperature=1))
    for rows in groups:
        mine = [r for r in drawn if r in set(rows)]
        for start in range(0, len(mine) - len(rows) + 1, len(rows)):
            assert sorted(mine[start : start + len(rows)]) == rows


def test_the_order_is_a_function_of_the_seed():
    groups = groups_of([20, 30])
    one, again, other = (list(interleave(groups, 100, seed=s)) for s in (1, 1, 2))
    assert one == again
    assert one != other


def test_a_cycle_is_shuffled_anew():
    rows = list(range(30))
    drawn = list(interleave([rows], 60, seed=0))
    assert drawn[:30] != drawn[30:]
    assert drawn[:30] != rows


def test_the_sampler_gives_the_whole_run_and_starts_over_alike():
    sampler = InterleavedSampler(["b", "a", "b", "b"], 50, seed=3)
    assert len(sampler) == len(list(sampler)) == 50
    assert list(sampler) == list(sampler)
    assert set(islice(sampler, 50)) == {0, 1, 2, 3}


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="temperature"):
        quotas([1, 2], 0)
    with pytest.raises(DataError, match="without examples"):
        quotas([1, 0], 1)
