"""Hoeffding trees in arrays against trees written from their definition, and ADWIN against river's."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from river import drift

from moesaic.errors import AdapterError
from moesaic.trees.arrays import hoeffding
from moesaic.trees.arrays.adwin import Adwin
from moesaic.trees.arrays.pool import ArrayTrees

PLAIN: dict[str, Any] = {"share": 1.0, "grace_period": 50, "delta": 0.01, "tau": 0.05}


class Leaf:
    """A leaf by the book: every value is kept, and all figures are made of them anew."""

    def __init__(self, used: list[int], classes: int, counts: list[float]) -> None:
        self.used, self.counts, self.rows = used, counts, []
        self.classes, self.right = classes, [0.0, 0.0]
        self.seen, self.due, self.split = 0.0, 0.0, None

    def majority(self) -> int:
        return int(np.argmax(self.counts))

    def bayes(self, x: NDArray[Any]) -> NDArray[Any]:
        logs = np.full(self.classes, -np.inf)
        for c in range(self.classes):
            if self.counts[c] <= 0:
                continue
            logs[c] = math.log(self.counts[c])
            for j in self.used:
                weights, mean, variance = self.normal(j, c)
                if weights <= 0 or math.isnan(x[j]):
                    continue
                far = 0.0 if x[j] == mean else math.inf
                if variance > 1e-20 * mean**2:
                    logs[c] -= 0.5 * math.log(2 * math.pi * variance)
                    far = (x[j] - mean) ** 2 / (2 * variance)
                logs[c] -= min(far, 30.0)
        if np.isinf(logs).all():
            return np.full(self.classes, 1 / self.classes)
        found = np.exp(logs - logs.max())
        return found / found.sum()

    def normal(self, j: int, c: int) -> tuple[float, float, float]:
        kept = [(w, x[j]) for x, y, w in self.rows if y == c and not math.isnan(x[j])]
        total = sum(w for w, _ in kept)
        if not kept:
            return 0.0, 0.0, 0.0
        mean = sum(w * v for w, v in kept) / total
        return total, mean, sum(w * (v - mean) ** 2 for w, v in kept) / (total - 1) if total > 1 else 0.0

    def answer(self, x: NDArray[Any]) -> NDArray[Any]:
        if self.right[0] > self.right[1]:
            return np.array(self.counts) / sum(self.counts)
        return self.bayes(x)


def entropy(weights: Any) -> float:
    shares = np.array([w for w in weights if w > 0]) / sum(weights) if sum(weights) > 0 else np.ones(1)
    return float(-(shares * np.log2(shares)).sum())


def best_split(leaf: Leaf) -> tuple[tuple[int, float, list[list[float]]] | None, float]:
    gains = []
    for j in leaf.used:
        values = [x[j] for x, _, _ in leaf.rows if not math.isnan(x[j])]
        if not values or min(values) == max(values):
            continue
        tried = []
        for q in range(1, 11):
            at = min(values) + (max(values) - min(values)) * q / 11
            sides: list[list[float]] = [[], []]
            for c in range(leaf.classes):
                weight, mean, variance = leaf.normal(j, c)
                below = (
                    0.5 * (1 + math.erf((at - mean) / math.sqrt(2 * variance)))
                    if variance > 1e-20 * mean**2
                    else float(mean <= at)
                )
                sides[0].append(weight * below)
                sides[1].append(weight * (1 - below))
            whole = sum(map(sum, sides))
            if min(map(sum, sides)) <= 0.01 * whole:
                continue
            known = entropy([leaf.normal(j, c)[0] for c in range(leaf.classes)])
            gain = known - sum(sum(side) / whole * entropy(side) for side in sides)
            tried.append((gain, at, sides))
        if tried:
            gain, at, sides = max(tried, key=lambda found: found[0])
            gains.append((gain, j, at, sides))
    gains = sorted((found for found in gains if found[0] > 0), key=lambda found: -found[0])
    if not gains or entropy(leaf.counts) <= 0:
        return None, 0.0
    reach, total = math.log2(max(leaf.classes, 2)), sum(leaf.counts)
    enough = reach**2 * math.log(1 / PLAIN["delta"]) / 2
    eps, gap = math.sqrt(enough / total), gains[0][0] - (gains[1][0] if len(gains) > 1 else 0.0)
    if gap > eps or eps < PLAIN["tau"]:
        return gains[0][1:], 0.0
    return None, enough / max(gap, PLAIN["tau"]) ** 2 - total if entropy(leaf.counts) > eps else 0.0


class Tree:
    def __init__(self, features: int, classes: int) -> None:
        self.root = Leaf(list(range(features)), classes, [0.0] * classes)

    def find(self, x: NDArray[Any]) -> Leaf:
        node = self.root
        while node.split is not None:
            j, at, left, right, missing = node.split
            node = missing if math.isnan(x[j]) else left if x[j] <= at else right
        return node

    def learn(self, x: NDArray[Any], y: int, weight: float) -> None:
        leaf = self.find(x)
        leaf.right[0] += weight * (leaf.majority() == y)
        leaf.right[1] += weight * (int(leaf.bayes(x).argmax()) == y)
        leaf.rows.append((x, y, weight))
        leaf.counts[y] += weight
        leaf.seen += weight
        if leaf.seen < max(PLAIN["grace_period"], leaf.due):
            return
        found, missing = best_split(leaf)
        leaf.seen, leaf.due = 0.0, hoeffding.PATIENCE * missing
        if found is not None:
            j, at, sides = found
            left, right = (Leaf(leaf.used, leaf.classes, list(side)) for side in sides)
            leaf.split = j, at, left, right, left if sum(sides[0]) >= sum(sides[1]) else right


def rows(count: int, *, classes: int = 3, seed: int = 0, missing: float = 0.0) -> tuple[Any, Any]:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(count, 4)) + np.array([0, 1, 2, 3])
    y = np.where(x[:, 1] > 1, 1 + (x[:, 2] > 2.3) * (classes - 2), 0)
    x[draw.random(x.shape) < missing] = np.nan
    return x, y


def both(count: int, **how: Any) -> tuple[ArrayTrees, Tree]:
    pool, tree = ArrayTrees(1, **PLAIN), Tree(4, 3)
    for number, (x, y) in enumerate(zip(*rows(count, **how), strict=True)):
        found = pool.predict(x, 3)[0]
        np.testing.assert_allclose(found, tree.find(x).answer(x), rtol=1e-6, atol=1e-9)
        weight = float(number % 3)
        pool.learn(x, int(y), np.array([weight]))
        if weight:
            tree.learn(x, int(y), weight)
    return pool, tree


def size(leaf: Leaf) -> int:
    return 1 if leaf.split is None else size(leaf.split[2]) + size(leaf.split[3])


def test_a_tree_is_what_its_definition_says() -> None:
    pool, tree = both(700)
    assert pool.forest.leaves[0] == size(tree.root) > 3


def test_missing_values_go_with_the_most_and_are_left_out_of_the_rest() -> None:
    pool, tree = both(600, missing=0.2, seed=1)
    assert pool.forest.leaves[0] == size(tree.root) > 1


def bank(count: int = 600, size: int = 4, **how: Any) -> ArrayTrees:
    pool = ArrayTrees(size, seed=3, **how)
    draw = np.random.default_rng(5)
    for x, y in zip(*rows(count), strict=True):
        pool.learn(x, int(y), draw.poisson(6, size).astype(float))
    return pool


def same(one: ArrayTrees, other: ArrayTrees) -> bool:
    arrays, others = one.state()[0], other.state()[0]
    return all(np.array_equal(arrays[name], others[name], equal_nan=True) for name in arrays)


def test_answering_changes_nothing_and_a_weight_of_0_leaves_a_tree_as_it_is() -> None:
    pool, x = bank(), rows(40, seed=9)[0]
    before = copy.deepcopy(pool)
    for row in x:
        found = pool.predict(row, 3)
        assert np.allclose(found.sum(axis=1), 1)
        assert np.array_equal(pool.predict(row, 3, which=[2, 0]), found[[2, 0]])
    assert same(pool, before)
    pool.learn(x[0], 1, np.array([0.0, 2.0, 0.0, 0.0]))
    for k, changed in enumerate((False, True, False, False)):
        leaf = pool.forest.leaf[hoeffding.find(pool.forest, x[0], pool.roots[k])]
        assert (pool.forest.counts[leaf].sum() != before.forest.counts[leaf].sum()) == changed


def test_experts_that_know_nothing_give_every_class_the_same() -> None:
    assert np.array_equal(ArrayTrees(2).predict(np.array([1.0, 2.0]), 4), np.full((2, 4), 0.25))


def test_features_and_classes_may_come_later() -> None:
    pool = bank(share=1.0)
    x = rows(1, seed=2)[0][0]
    before = pool.predict(x, 3)
    wider = np.append(x, [0.5, 0.5])
    pool.predict(wider, 6)
    np.testing.assert_allclose(pool.predict(wider, 6)[:, :3], before, rtol=1e-12)
    draw = np.random.default_rng(0)
    for _ in range(1500):
        y = int(draw.integers(2)) * 5
        pool.learn(np.append(draw.normal(size=5), y + draw.normal()), y, np.full(4, 3.0))
    x = np.zeros(6)
    for value, wanted in ((0.0, 0), (5.0, 5)):
        x[5] = value
        assert (pool.predict(x, 6).argmax(axis=1) == wanted).all()


def test_an_expert_begins_anew_or_as_the_one_that_grew_beside_it() -> None:
    pool, x = bank(), rows(1, seed=2)[0][0]
    pool.reset(1)
    assert np.array_equal(pool.predict(x, 3)[1], np.full(3, 1 / 3))
    assert pool.predict(x, 3)[0].max() > 0.5
    pool.prepare(2)
    draw = np.random.default_rng(1)
    for row, y in zip(*rows(300, seed=4), strict=True):
        pool.learn(row, int(y), draw.poisson(6, 4).astype(float))
    beside = hoeffding.find(pool.forest, x, pool.beside[2])
    kept = pool.forest.counts[pool.forest.leaf[beside]].copy()
    pool.reset(2)
    assert np.array_equal(pool.forest.counts[pool.forest.leaf[hoeffding.find(pool.forest, x, pool.roots[2])]], kept)
    assert pool.beside[2] == -1
    free = pool.forest.tops.copy()
    for _ in range(50):
        pool.prepare(0)
        pool.reset(0)
        pool.reset(3)
    assert (pool.forest.tops >= free).all(), "what is felled is used again"


def test_a_tree_has_no_more_leaves_than_it_may() -> None:
    pool = bank(3000, size=2, max_leaves=5)
    assert pool.forest.leaves[:2].tolist() == [5, 5]
    assert len(pool.forest.counts) < 100


def test_what_is_saved_goes_on_exactly() -> None:
    pool, again = bank(900), ArrayTrees(4, seed=8)
    pool.reset(3)
    pool.prepare(1)
    again.restore(*pool.state())
    for row, y in zip(*rows(900, seed=6), strict=True):
        assert np.array_equal(pool.predict(row, 3), again.predict(row, 3))
        for held in (pool, again):
            held.learn(row, int(y), np.array([1.0, 2.0, 3.0, 0.0]))
        if pool.forest.leaves[0] % 3 == 0:
            for held in (pool, again):
                held.reset(0)
    assert same(pool, again)


@pytest.mark.parametrize(
    ("name", "value"),
    [("left", 10**6), ("left", -1), ("leaf", 10**6), ("used", 99), ("feature", 99), ("free_nodes", 10**6), ("tops", -5),
     ("missing", -3), ("roots", 10**6), ("beside", 10**6), ("order", 7), ("free_leaves", -1)],
)  # fmt: skip
def test_damaged_trees_are_refused(name: str, value: int) -> None:
    pool = bank()
    arrays, values = pool.state()
    inner = int(np.flatnonzero(arrays["feature"] >= 0)[0])
    flat = arrays[name].reshape(-1)
    leaf = hoeffding.find(pool.forest, rows(1)[0][0], pool.roots[0])
    flat[{"left": inner, "missing": inner, "feature": inner, "leaf": leaf}.get(name, 0)] = value
    with pytest.raises(AdapterError, match="damaged"):
        ArrayTrees(4).restore(arrays, values)


def test_what_is_checked_holds_for_every_bank_that_has_learned() -> None:
    for count, prepared in ((1, ()), (400, (0,)), (1500, (1, 2))):
        pool = bank(count)
        for k in prepared:
            pool.prepare(k)
        pool.reset(0)
        for x, y in zip(*rows(200, seed=8), strict=True):
            pool.learn(x, int(y), np.full(4, 2.0))
        ArrayTrees(4).restore(*pool.state())


def test_more_experts_leave_those_beside_others_as_they_are() -> None:
    pool = bank()
    pool.prepare(1)
    for x, y in zip(*rows(900, seed=8), strict=True):
        pool.learn(x, int(y), np.full(4, 3.0))
    own, beside = pool.forest.leaves[:4].tolist(), pool.forest.leaves[5]
    assert beside > 1
    pool.add(3)
    assert pool.forest.leaves.tolist() == [*own, 1, 1, 1, 0, beside, 0, 0, 0, 0, 0]
    ArrayTrees(7).restore(*pool.state())
    pool.reset(1)
    assert pool.forest.leaves[1] == beside


def test_trees_in_a_circle_and_other_banks_are_refused() -> None:
    arrays, values = bank().state()
    inner = int(np.flatnonzero(arrays["feature"] >= 0)[0])
    arrays["left"][inner] = arrays["roots"][0]
    with pytest.raises(AdapterError, match="damaged"):
        ArrayTrees(4).restore(arrays, values)
    arrays, values = bank().state()
    with pytest.raises(AdapterError, match="bank of 3"):
        ArrayTrees(3).restore(arrays, values)
    arrays["weight"] = arrays["weight"][:, :1]
    with pytest.raises(AdapterError, match="damaged"):
        ArrayTrees(4).restore(arrays, values)


@pytest.mark.parametrize("delta", [0.002, 0.05])
def test_adwin_is_rivers(delta: float) -> None:
    draw = np.random.default_rng(0)
    rates = np.repeat([0.2, 0.45, 0.1, 0.12, 0.6], 700)
    values = (draw.random(len(rates)) < rates).astype(float)
    theirs, ours = (
        drift.ADWIN(delta=delta, clock=32, max_buckets=5, min_window_length=5, grace_period=10),
        Adwin(2, delta),
    )
    risen = []
    for value in values:
        if theirs.drift_detected:  # it begins anew with the next value
            ours.reset(0)
        theirs.update(value)
        found = ours.add(np.array([value, 0.3]))
        assert ours.whole[0, 0] == theirs.width
        assert ours.whole[0, 1] == pytest.approx(theirs.total)
        assert ours.whole[0, 2] == pytest.approx(theirs.variance, abs=1e-9)
        risen.append(found[0])
        assert not found[1]
    where = np.flatnonzero(risen)
    assert ((where >= 700) & (where < 1400)).any(), "from 0.2 to 0.45"
    assert not ((where >= 1500) & (where < 2800)).any(), "a mean that falls is no drift of an expert's"
    assert (where >= 2800).any()


def test_random_numbers_are_even_and_independent() -> None:
    state = np.array([7], np.uint64)
    drawn = np.array([hoeffding.uniform(state) for _ in range(20_000)])
    assert 0 <= drawn.min() < drawn.max() < 1
    assert drawn.mean() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 20_000))
    assert drawn.var() == pytest.approx(1 / 12, rel=0.05)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 4 / math.sqrt(20_000)
