"""Statistics of comparisons: known answers, and a bootstrap beside the textbook one."""

import math
import random
import statistics

import pytest

from moesaic.evaluation import metrics


def test_spread_is_of_a_sample_and_unknown_for_one_value():
    assert metrics.spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert metrics.spread([4.0]) == (4.0, None)


def test_mean_relative_difference_on_a_hand_made_case():
    found = metrics.mean_relative_difference({"a": 0.6, "b": 0.9}, {"a": 0.5, "b": 1.0})
    assert found == pytest.approx((20 - 10) / 2)
    assert metrics.mean_relative_difference({"a": 0.6}, {"a": 0.0}) is None
    with pytest.raises(ValueError, match="same tasks"):
        metrics.mean_relative_difference({"a": 0.6}, {"b": 0.5})


def test_the_bootstrap_of_equal_answers_is_a_point():
    assert metrics.paired_bootstrap([[0.0] * 30, [0.0] * 10]) == (0.0, 0.0)
    low, high = metrics.paired_bootstrap([[1.0] * 30, [0.0] * 10])
    assert (low, high) == pytest.approx((0.5, 0.5)), "tasks weigh the same, whatever their size"


def test_the_bootstrap_agrees_with_redrawing_rows_one_by_one():
    random_ = random.Random(0)
    tasks = [[random_.choice([-1, 0, 0, 1 / 3, 1]) for _ in range(n)] for n in (40, 25)]
    means = sorted(
        statistics.fmean(statistics.fmean(random_.choices(task, k=len(task))) for task in tasks) for _ in range(4000)
    )
    low, high = metrics.paired_bootstrap(tasks)
    assert low == pytest.approx(means[100], abs=0.02)
    assert high == pytest.approx(means[3899], abs=0.02)


def test_the_bootstrap_covers_as_wide_as_the_normal_approximation_and_narrows_with_the_level():
    rows = [1.0] * 300 + [-1.0] * 200 + [0.0] * 500
    error = statistics.pstdev(rows) / math.sqrt(len(rows))
    low, high = metrics.paired_bootstrap([rows])
    assert low == pytest.approx(0.1 - 1.96 * error, abs=0.003)
    assert high == pytest.approx(0.1 + 1.96 * error, abs=0.003)
    inner = metrics.paired_bootstrap([rows], level=0.5)
    assert low < inner[0] < inner[1] < high


def test_the_bootstrap_is_the_same_each_time_and_another_with_another_seed():
    rows = [[0.0, 1.0, -1.0, 1.0, 0.5]]
    assert metrics.paired_bootstrap(rows) == metrics.paired_bootstrap(rows)
    drawn = [metrics.paired_bootstrap([[random.Random(s).gauss(0, 1) for s in range(50)]], seed=s) for s in (1, 2)]
    assert drawn[0] != drawn[1]
