"""River's classifiers as experts: what the protocol asks for, and that they are saved whole and read with care."""

from __future__ import annotations

import collections
import copy
import functools
import json
import math
import random
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesaic.errors import AdapterError, ConfigError, DataError, MissingDependency
from moesaic.trees.graph import decode, encode
from moesaic.trees.river_trees import RiverTrees

pytest.importorskip("river")
from river import ensemble, forest, linear_model, multiclass, naive_bayes, neighbors, preprocessing, proba, stats, tree

ONE = np.ones(1)


def rows(count: int, *, classes: int = 4, holes: float = 0.0, seed: int = 0) -> list[tuple[NDArray[np.float64], int]]:
    """Rows (4,) whose classes the first feature tells; after half of them, the third."""
    draw = np.random.default_rng(seed)
    x = draw.random((count, 4))
    y = (np.where(np.arange(count) < count // 2, x[:, 0], x[:, 2]) * classes).astype(int)
    x[draw.random(x.shape) < holes] = np.nan
    return [*zip(x, y.tolist(), strict=True)]


def through_json(state: tuple[dict[str, Any], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays, values = state
    return {name: array.copy() for name, array in arrays.items()}, json.loads(json.dumps(values, allow_nan=False))


def same(one: RiverTrees, other: RiverTrees) -> bool:
    (arrays, values), (others, told) = one.state(), other.state()
    return values == told and all(arrays[name].tobytes() == others[name].tobytes() for name in arrays)


FAST: dict[str, Any] = {"grace_period": 50, "delta": 1e-3}
CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "hoeffding": lambda: tree.HoeffdingTreeClassifier(**FAST),
    "adaptive": lambda: tree.HoeffdingAdaptiveTreeClassifier(**FAST),
    "fast_decision": lambda: tree.ExtremelyFastDecisionTreeClassifier(**FAST, min_samples_reevaluate=300),
    "gaussian_bayes": naive_bayes.GaussianNB,
    "logistic": linear_model.LogisticRegression,
    "forest": lambda: forest.ARFClassifier(n_models=3),
    "scaled_softmax": lambda: preprocessing.StandardScaler() | linear_model.SoftmaxRegression(),
    "exhaustive": lambda: tree.HoeffdingTreeClassifier(
        **FAST, leaf_prediction="mc", splitter=tree.splitter.ExhaustiveSplitter()
    ),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_what_is_read_predicts_and_learns_on_bit_for_bit(name: str) -> None:
    classes = 2 if name == "logistic" else 4
    stream = rows(1000 if name in ("exhaustive", "fast_decision") else 3000, classes=classes)
    early = len(stream) * 3 // 5
    bank = RiverTrees(2, expert=CLASSIFIERS[name]())
    weights = np.random.default_rng(1).poisson(1.0, (len(stream), 2)).astype(float)
    for (x, y), w in zip(stream[:early], weights, strict=False):
        bank.learn(x, y, w)
    if hasattr(bank.experts[0], "n_leaves"):
        assert bank.experts[0].n_leaves > 2
    bank.prepare(1)
    other = RiverTrees(2, expert=CLASSIFIERS[name]())
    other.restore(*through_json(bank.state()))
    assert same(bank, other)
    for (x, y), w in zip(stream[early:], weights[early:], strict=True):
        assert bank.predict(x, classes).tobytes() == other.predict(x, classes).tobytes()
        for held in (bank, other):
            held.learn(x, y, w)
    assert same(bank, other)
    for held in (bank, other):
        held.reset(1)
    assert same(bank, other)


def test_a_leaf_that_is_told_its_answer_learns_as_rivers_own_does() -> None:
    bank, own = RiverTrees(3), [RiverTrees(1).experts[0] for _ in range(3)]
    chance, asked = np.random.default_rng(2), 0
    for x, y in rows(3000, classes=4, holes=0.05):
        row = {j: value for j, value in enumerate(x.tolist()) if value == value}
        if chance.random() < 0.9:
            votes = bank.predict(x, 4)
            for k, expert in enumerate(own):
                found = np.array([expert.predict_proba_one(row).get(c, 0.0) for c in range(4)])
                np.testing.assert_array_equal(votes[k], found / found.sum() if found.sum() else np.full(4, 0.25))
        asked += len(bank._said)
        weights = chance.poisson(1.0, 3).astype(float)
        for _ in range(int(chance.integers(1, 3))):
            bank.learn(x, y, weights)
            for expert, w in zip(own, weights.tolist(), strict=True):
                if w:
                    expert.learn_one(row, y, w=w)
    assert asked > 2000
    assert all(expert.n_leaves > 2 for expert in own)
    other = RiverTrees(3)
    other.experts = own
    assert same(bank, other)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_predicting_changes_nothing(name: str) -> None:
    bank = RiverTrees(2, expert=CLASSIFIERS[name]())
    for x, y in rows(300, classes=2):
        bank.learn(x, y, np.ones(2))
    before = copy.deepcopy(bank)
    for x, _ in rows(50, holes=0.3, seed=1):
        votes = bank.predict(x, 4)
        np.testing.assert_allclose(votes.sum(1), 1.0)
        np.testing.assert_array_equal(bank.predict(x, 4, [1]), votes[1:])
        assert (votes[:, 2:] == 0).all(), "classes that nobody has met"
    assert same(bank, before)


def test_who_knows_nothing_gives_every_class_the_same() -> None:
    bank = RiverTrees(3)
    np.testing.assert_array_equal(bank.predict(np.zeros(2), 4), np.full((3, 4), 0.25))
    assert bank.predict(np.zeros(2), 4, []).shape == (0, 4)
    bank.learn(np.zeros(2), 3, np.array([1.0, 0.0, 0.0]))
    np.testing.assert_array_equal(bank.predict(np.zeros(2), 4, [1, 0]), [[0.25] * 4, [0.0, 0.0, 0.0, 1.0]])
    np.testing.assert_array_equal(bank.predict(np.zeros(2), 2, [0]), [[0.5, 0.5]])


def test_the_paper_names_the_trees() -> None:
    made = RiverTrees(1).experts[0]
    assert type(made) is tree.HoeffdingTreeClassifier
    assert (made.grace_period, made.delta, made.leaf_prediction, made.binary_split) == (50, 1e-7, "nba", False)


def test_an_expert_of_weight_0_stays_as_it_is_and_a_weight_is_so_many_rows() -> None:
    bank = RiverTrees(2)
    bank.learn(np.zeros(2), 0, np.array([2.5, 0.0]))
    assert bank.experts[0].summary["total_observed_weight"] == 2.5
    assert bank.experts[1].summary["total_observed_weight"] == 0
    counted = RiverTrees(2, expert=naive_bayes.GaussianNB())
    counted.learn(np.zeros(2), 0, np.array([3.0, 0.0]))
    assert [expert.class_counts for expert in counted.experts] == [{0: 3}, {}]


def test_features_and_classes_may_come_later_and_be_missing() -> None:
    bank = RiverTrees(1)
    bank.learn(np.array([1.0, np.nan]), 0, ONE)
    bank.learn(np.array([2.0, 1.0, 5.0]), 6, ONE)
    bank.learn(np.array([np.nan]), 1, ONE)
    assert bank.predict(np.array([np.nan, np.nan, np.nan, 3.0]), 8).shape == (1, 8)
    seen: list[dict[int, float]] = []
    expert = bank.experts[0]
    bank.experts[0] = type("Spy", (), {"predict_proba_one": lambda self, x: seen.append(x) or {}})()
    bank.predict(np.array([1.0, np.nan, 3.0]), 2)
    assert seen == [{0: 1.0, 2: 3.0}]
    bank.experts[0] = expert
    for x, y in rows(500, holes=0.5):
        bank.predict(x, 4)
        bank.learn(x, y, ONE)


def test_a_reset_expert_is_new_or_the_one_that_grew_beside_it() -> None:
    stream = rows(200)
    bank, late = RiverTrees(2), RiverTrees(2)
    for number, (x, y) in enumerate(stream):
        bank.learn(x, y, np.array([1.0, 2.0]))
        if number == 50:
            bank.prepare(1)
        if number == 100:
            bank.prepare(1)
        if number > 100:
            late.learn(x, y, np.array([0.0, 2.0]))
    bank.reset(1)
    bank.reset(0)
    assert same(bank, late)
    assert not bank.beside
    bank.reset(1)
    assert same(bank, RiverTrees(2))


def test_seeds_make_experts_different_and_the_same_again() -> None:
    bank = RiverTrees(2, expert=forest.ARFClassifier(n_models=2), seed=7)
    bank.add(2)
    assert bank.size == 4
    bank.reset(3)
    bank.prepare(0)
    assert [e.seed for e in (*bank.experts, bank.beside[0])] == [7, 8, 9, 10, 7]


def test_a_classifier_that_only_names_classes_may_be_an_expert() -> None:
    voting = ensemble.VotingClassifier([naive_bayes.GaussianNB(), naive_bayes.GaussianNB()])
    bank = RiverTrees(1, expert=voting)
    bank.learn(np.zeros(2), 1, ONE)
    np.testing.assert_array_equal(bank.predict(np.zeros(2), 3), [[0.0, 1.0, 0.0]])


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (-1, True, 1.5):
        with pytest.raises(ConfigError, match="whole number, 0 or more"):
            RiverTrees(size)  # type: ignore[arg-type]
    for expert in (linear_model.LinearRegression(), 3):
        with pytest.raises(ConfigError, match="no classifier of river's"):
            RiverTrees(1, expert=expert)
    bank = RiverTrees(2, expert=linear_model.LogisticRegression())
    with pytest.raises(DataError, match="OneVsRestClassifier"):
        bank.learn(np.zeros(2), 2, np.ones(2))
    with pytest.raises(DataError, match="from 0"):
        bank.learn(np.zeros(2), -1, np.ones(2))
    with pytest.raises(DataError, match="1 weights and 2 experts"):
        bank.learn(np.zeros(2), 1, ONE)
    for verb in (bank.reset, bank.prepare):
        with pytest.raises(DataError, match="no expert 2"):
            verb(2)
    RiverTrees(1, expert=multiclass.OneVsRestClassifier(linear_model.LogisticRegression())).learn(np.zeros(2), 2, ONE)
    monkeypatch.setitem(sys.modules, "river", None)
    with pytest.raises(MissingDependency, match=r"river: pip install 'moesaic\[trees\]'"):
        RiverTrees(1)


def test_a_state_of_another_bank_is_refused() -> None:
    bank = RiverTrees(2)
    arrays, values = bank.state()
    with pytest.raises(AdapterError, match="bank of 3"):
        RiverTrees(3).restore(arrays, values)
    with pytest.raises(AdapterError, match="HoeffdingTreeClassifier, and those of this bank GaussianNB"):
        RiverTrees(2, expert=naive_bayes.GaussianNB()).restore(arrays, values)
    for graph in (None, {}, [], "river"):
        with pytest.raises(AdapterError, match="damaged"):
            bank.restore(arrays, values | {"graph": graph})
    first, *others = encode([bank.expert, bank.experts, {5: bank.expert}]), encode([]), encode({"a": bank.expert})
    for tables, found in (first, *others):
        with pytest.raises(AdapterError, match="damaged"):
            bank.restore(found, values | {"graph": tables})
    with pytest.raises(AdapterError, match="cannot be saved"):
        RiverTrees(1, expert=neighbors.KNNClassifier()).state()


# -- objects as data ---------------------------------------------------------------------------------------------

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
keys = st.recursive(plain, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4)
everything = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.sets(keys, max_size=3)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict)
        | st.dictionaries(keys, inner, max_size=3).map(lambda d: collections.defaultdict(list, d))
        | st.dictionaries(keys, st.integers(), max_size=3).map(collections.Counter)
        | st.lists(inner, max_size=3).map(lambda held: collections.deque(held, maxlen=3))
    ),
    max_leaves=12,
)


def again(obj: Any) -> Any:
    tables, arrays = encode(obj, "a.")
    assert set(arrays) == {"a.tokens", "a.reals", "a.wholes", "a.bytes"}
    return decode(json.loads(json.dumps(tables)), arrays, "a.")


def shown(obj: Any) -> Any:
    """With kinds told apart and floats by their bits."""
    if isinstance(obj, float):
        return struct.pack("d", obj)
    if isinstance(obj, dict):
        return type(obj), getattr(obj, "default_factory", None), [(shown(k), shown(v)) for k, v in obj.items()]
    if isinstance(obj, set | frozenset):
        return type(obj), sorted(repr(shown(item)) for item in obj)
    if isinstance(obj, list | tuple | collections.deque):
        return type(obj), getattr(obj, "maxlen", None), [*map(shown, obj)]
    return type(obj), obj


@settings(deadline=None, max_examples=150)
@given(everything)
def test_plain_data_comes_back_exactly(obj: Any) -> None:
    assert shown(again(obj)) == shown(obj)


def test_numbers_and_chance_come_back_exactly() -> None:
    chance = random.Random(3)
    chance.gauss(0, 1)
    arrays = [np.arange(6).reshape(2, 3).astype(k) for k in ("f4", "f8", "i8", "u1", "?", "c16")]
    arrays += [np.asfortranarray(arrays[0]), np.zeros((2, 0, 3)), np.array(2.5)]
    found, kept, one, big = again([chance, arrays, np.float32(0.1), 1 << 70])
    assert [found.random() for _ in range(5)] + [found.gauss(0, 1)] == [chance.random() for _ in range(5)] + [
        chance.gauss(0, 1)
    ]
    for old, new in zip(arrays, kept, strict=True):
        assert (old.dtype, old.shape, old.tobytes()) == (new.dtype, new.shape, new.tobytes())
        assert old.flags.f_contiguous == new.flags.f_contiguous
        assert new.flags.writeable
    assert (type(one), one, big) == (np.float32, np.float32(0.1), 1 << 70)


def test_what_is_shared_stays_shared_and_circles_and_depth_are_no_trouble() -> None:
    inner: list[Any] = []
    circle = {"self": inner, "pair": (inner, inner)}
    inner.append(circle)
    found = again(circle)
    assert found["self"][0] is found
    assert found["pair"][0] is found["pair"][1] is found["self"]
    deep: list[Any] = []
    for _ in range(20_000):
        deep = [deep]
    found, depth = again(deep), 0
    while found:
        (found,), depth = found, depth + 1
    assert depth == 20_000
    made = again(collections.defaultdict(functools.partial(stats.Var, ddof=0)))
    assert made["new"].ddof == 0
    many: Any = ()
    for _ in range(200):
        many = (many,)
    with pytest.raises(AdapterError, match="deep"):
        encode(many)


def test_what_a_gaussian_samples_by_is_left_out_and_what_an_estimator_draws_by_is_kept() -> None:
    pair = [proba.Gaussian(), proba.Gaussian(seed=4)]
    for one in pair:
        one.update(1.0)
        one.update(3.0)
    assert sum(array.nbytes for array in encode(pair)[1].values()) < 500
    found = again(pair)
    assert [(one.mu, one.sigma) for one in found] == [(one.mu, one.sigma) for one in pair]
    assert found[1].sample() == proba.Gaussian(seed=4)._from_state(2, 2.0, 2.0, 1, seed=4).sample()
    assert math.isfinite(found[0].sample())


class Own:
    pass


@pytest.mark.parametrize(
    "obj",
    [Own(), len, Own, lambda: 0, object(), sys, np.array([None]), np.datetime64("2020-01-01"), [{1: {Own(): 2}}],
     tree.HoeffdingTreeClassifier().learn_one, range(3), 1j,
     type("Var", (stats.Var,), {"__module__": "river.stats.var"})()],
    ids=lambda obj: type(obj).__name__,
)  # fmt: skip
def test_what_is_not_known_is_not_saved(obj: Any) -> None:
    with pytest.raises(AdapterError, match="cannot be saved"):
        encode(obj)


def test_another_release_is_named() -> None:
    tables, arrays = encode([1])
    with pytest.raises(AdapterError, match=r"river 0\.1\.2 wrote this.*pip install river==0\.1\.2"):
        decode(tables | {"river": "0.1.2"}, arrays)


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("builtins", "eval"), ("river.utils.math", "norm_pdf"), ("river.stats.var", "stats"),
     ("river.datasets.base", "RemoteDataset"), ("river.stats.var", "Var.update"), ("river.stats", "Var"),
     ("river.none", "X"), ("river", "tree"), ("river.stats..var", "Var"), ("subprocess", "Popen"),
     ("river.stats.var", "__name__"), ("functools", "partial"), ("river._river_rust.stats", "RsRollingIQR")],
)  # fmt: skip
def test_a_file_that_names_what_it_may_not_is_refused(module: str, name: str) -> None:
    for obj in (stats.Var(), stats.Var):
        tables, arrays = encode(obj)
        tables["classes"][0] = [module, name]
        with pytest.raises(AdapterError, match="cannot be saved or read"):
            decode(tables, arrays)


def test_a_class_is_only_made_as_it_may_be() -> None:
    tables, arrays = encode(stats.Var())
    for classes, shape in (
        ([["builtins", "dict"]], ["object", 0, []]),
        ([["river._river_rust.drift", "AdaptiveWindowing"]], ["object", 0, []]),
        ([["river.stats.var", "Var"]], ["native", 0, []]),
        ([["copy", "deepcopy"]], ["object", 0, []]),
        ([["river.stats.var", "Var"]], ["object", 0, ["__class__"]]),
        ([["river.stats.var", "Var"]], ["object", 0, [3]]),
        ([["river.stats.var", "Var"]], ["object", 1, []]),
        ([["river.stats.base", "Univariate"]], ["object", 0, ["mean"]]),
        ([], ["thing", -1, []]),
        ([], ["object", -1, []]),
        ([], 3),
    ):
        with pytest.raises(AdapterError):
            decode(tables | {"classes": classes, "shapes": [shape]}, arrays)


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_refused_or_read_but_never_breaks(capfd: pytest.CaptureFixture[str]) -> None:
    bank = RiverTrees(1, expert=forest.ARFClassifier(n_models=1))
    for x, y in rows(40):
        bank.learn(x, y, ONE)
    tables, arrays = encode([bank.experts, (1, "a"), {2: 1 << 80}, np.ones(3), functools.partial(stats.Var, ddof=0)])
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        broken = {name: array.copy() for name, array in arrays.items()}
        stream = broken[("tokens", "wholes", "bytes")[draw.integers(3)]]
        stream[draw.integers(len(stream))] = draw.integers(0, np.iinfo(stream.dtype).max)
        try:
            decode(tables, broken)
        except AdapterError:
            refused += 1
    assert refused > 150
    for name, array in arrays.items():
        cut = [array[:-1], array.astype(np.float32), array[None], np.append(array, array[:1])]
        for wrong in (*cut, None):
            with pytest.raises(AdapterError):
                decode(tables, arrays | {name: wrong})
        with pytest.raises(AdapterError):
            decode(tables, {k: v for k, v in arrays.items() if k != name})
    for name in tables:
        for value in (None, 3, [3], [[]], ["a"]):
            with pytest.raises(AdapterError):
                decode(tables | {name: value}, arrays)


def test_objects_take_few_bytes() -> None:
    bank = RiverTrees(1)
    for x, y in rows(90):
        bank.learn(x, y, ONE)
    assert bank.experts[0].n_leaves == 1
    arrays, values = bank.state()
    estimators = 4 * 4  # of each class and feature: weight, mean, variance, least and most
    assert sum(array.nbytes for array in arrays.values()) < 600 + estimators * 2 * 5 * 8
    assert len(json.dumps(values)) < 2000


def test_each_expert_sees_its_share_of_the_features_and_keeps_it_when_more_come() -> None:
    bank = RiverTrees(4, share=0.5, seed=3)
    views = [bank._view(k, 8) for k in range(4)]
    assert len({tuple(view) for view in views}) > 1
    assert all(bank._view(k, 12)[: len(views[k])] == views[k] for k in range(4))
    assert all(bank._view(k, 1) == [0] for k in range(4))
    draw = np.random.default_rng(0)
    for _ in range(300):
        bank.learn(draw.normal(size=8), int(draw.integers(2)), np.ones(4))
    x = draw.normal(size=8)
    before = bank.predict(x, 2)
    for k in range(4):
        other = x.copy()
        other[[j for j in range(8) if j not in views[k]]] += 5
        assert np.array_equal(bank.predict(other, 2)[k], before[k])
        assert np.array_equal(bank.predict(x, 2, [k])[0], before[k])
