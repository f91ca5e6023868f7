"""Router-R1's rewards: the published table, the window of costs, and answers as they are compared."""

from __future__ import annotations

import json
import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.llms.router_r1.rewards import WINDOW, CostWindow, Rewards, exact_match, f1, normalised

COSTS = st.floats(0, 1e6)


def naive_ranks(costs: list[float]) -> list[float]:
    """As released: a window that the cost itself is in."""
    window: deque[float] = deque(maxlen=WINDOW)
    found = []
    for cost in costs:
        window.append(math.sqrt(cost))
        low, high = np.percentile(list(window), 5), np.percentile(list(window), 95)
        inside = (math.sqrt(cost) - low) / (high - low) if high - low >= 1e-8 else 0.5
        found.append(1 - min(max(inside, 0), 1) if high - low >= 1e-8 else 0.5)
    return found


@given(st.lists(COSTS, max_size=40))
def test_costs_are_ranked_among_those_before(costs: list[float]) -> None:
    window = CostWindow()
    found = [window.add(cost) for cost in costs]
    assert found == pytest.approx(naive_ranks(costs))
    assert all(0 <= c <= 1 for c in found)
    assert found[:1] == [0.5] * len(costs[:1])
    again = CostWindow(**json.loads(json.dumps(window.state())))
    assert again.add(7.0) == window.add(7.0)


def test_equal_costs_rank_in_the_middle_and_the_oldest_is_forgotten() -> None:
    window = CostWindow()
    assert {window.add(4.0) for _ in range(5)} == {0.5}
    for i in range(WINDOW):
        window.add(float(i))
    assert len(window) == WINDOW
    assert window.state()["values"][0] == 0.0


@given(st.lists(COSTS, min_size=2, max_size=30), COSTS, COSTS)
def test_in_a_frozen_window_less_cost_is_never_worth_less(seen: list[float], a: float, b: float) -> None:
    window = CostWindow()
    for cost in seen:
        window.add(cost)
    low, high = sorted((a, b))
    assert window.rank(low) >= window.rank(high)
    for alpha in (0.3, 1.0):
        of = [(1 - alpha) + alpha * window.rank(cost) for cost in (low, high)]
        assert of[0] >= of[1]


@given(st.floats(0, 1), st.booleans(), st.booleans(), COSTS)
def test_the_published_table(alpha: float, sound: bool, right: bool, cost: float) -> None:
    rewards = Rewards(alpha)
    rewards.window.add(3.0)
    found = rewards("" if sound else "two answers", "Beijing" if right else "Rome", ["beijing"], cost)
    if not sound:
        assert (found.total, found.fault) == (-1.0, "two answers")
    elif not right:
        assert found.total == 0.0
    else:
        assert found.total == pytest.approx((1 - alpha) + alpha * found.cost_rank)
    assert abs(found.total) <= 1
    if alpha == 0:
        assert found.total in (-1.0, 0.0, 1.0)


def test_f1_takes_the_place_of_exact_match() -> None:
    rewards = Rewards(0.5, "f1")
    assert rewards("", "the great wall", ["Great Wall of China"], 1.0).total == pytest.approx(0.5 * 2 / 3 + 0.25)
    assert rewards("", "Rome", ["Great Wall"], 1.0).total == 0.0


@pytest.mark.parametrize(
    ("answer", "truths", "em", "shared"),
    [
        ("The  Beijing!", ["beijing"], 1.0, 1.0),
        ("U.S.A.", ["usa"], 1.0, 1.0),
        ("a cat", ["dog", "An cat"], 1.0, 1.0),
        ("yes it is", ["yes"], 0.0, 0.0),
        ("no", ["no"], 1.0, 1.0),
        ("noanswer", ["something"], 0.0, 0.0),
        ("cat dog", ["dog bird fish"], 0.0, 2 / 5),
        ("dog dog", ["dog"], 0.0, 2 / 3),
        ("", ["x"], 0.0, 0.0),
        ("x", [], 0.0, 0.0),
    ],
)
def test_answers_are_compared_as_published(answer: str, truths: list[str], em: float, shared: float) -> None:
    assert exact_match(answer, truths) == em
    assert f1(answer, truths) == pytest.approx(shared)


def test_punctuation_goes_before_articles() -> None:
    assert normalised("A.B. the-an Theory") == "ab thean theory"
    assert normalised("The; cat,  (an) Answer") == "cat answer"


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"alpha": float("nan")}, {"metric": "bleu"}])
def test_rewards_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Rewards(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        CostWindow([-1.0])
