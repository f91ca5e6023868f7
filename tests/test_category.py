"""The category of a prompt: encoders, calibration, uncertainty."""

from __future__ import annotations

import math
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import ConfigError, DataError
from moesaic.llms.coe import calibration, encoders
from moesaic.llms.coe.bank import Bank, nearest
from moesaic.llms.coe.calibration import Isotonic, Temperature, calibration_error, conformal_level, entropy, log_loss
from moesaic.llms.coe.category import CategoryRouter
from moesaic.llms.coe.encoders import Tfidf, grams
from moesaic.llms.coe.folds import folds_of
from moesaic.llms.coe.taxonomy import Taxonomy
from moesaic.llms.coe.uncertainty import KINDS, Rule
from tests.toy_prompts import prompts

TEXTS, KINDS_OF = prompts(150)
NEW, NEW_KINDS = prompts(90, seed=1)


@pytest.fixture(scope="module", params=["logistic", "knn"])
def router(request: pytest.FixtureRequest) -> CategoryRouter:
    return CategoryRouter.fit(TEXTS, KINDS_OF, classifier=request.param)


def labels(router: CategoryRouter, kinds: list[str]) -> np.ndarray:
    return np.array([router.categories.index(kind) for kind in kinds])


# -- encoders ------------------------------------------------------------------------------------------------------


def test_tfidf_is_what_its_equation_says() -> None:
    made = Tfidf.fit(TEXTS)
    among = Counter(gram for text in TEXTS for gram in {*grams(text)})
    text = NEW[0]
    row = np.zeros(len(made.grams))
    for gram, count in Counter(grams(text)).items():
        if gram in made.grams:
            rarity = 1 + math.log((1 + len(TEXTS)) / (1 + among[gram]))
            row[made.grams.index(gram)] = (1 + math.log(count)) * rarity
    expected = row / np.linalg.norm(row) @ made.directions
    assert made([text])[0] == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)
    whole = np.array([np.linalg.norm(made([t])[0]) for t in NEW])
    assert whole == pytest.approx(np.ones(len(NEW)), abs=1e-5)


def test_tfidf_sees_neither_case_nor_white_space_and_nothing_in_what_it_does_not_know() -> None:
    made = Tfidf.fit(TEXTS)
    assert np.array_equal(made([f"\n\n {NEW[0].upper()}\t"]), made([NEW[0]]))
    assert not made(["", "ЖЖЖ", "\x00"]).any()
    assert np.array_equal(made(NEW), np.concatenate([made([text]) for text in NEW]))


def test_a_long_prompt_is_told_by_its_beginning_and_its_end() -> None:
    start, end = "heron " * 100, "anvil " * 34
    assert grams(start + "zinc " * 10_000 + end) == grams(start + "brass " * 20_000 + end)


def test_joined_encoders_share_a_cosine_equally() -> None:
    joined = encoders.fitted("tfidf+tfidf", TEXTS)
    one = encoders.fitted("tfidf", TEXTS)
    assert joined(NEW) @ joined(NEW).T == pytest.approx(one(NEW) @ one(NEW).T, abs=1e-5)
    again = encoders.restored(*joined.state())
    assert np.array_equal(again(NEW), joined(NEW))


def test_encoders_that_are_none_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"model folder /nowhere/at-all has no config\.json") as error:
        encoders.fitted("/nowhere/at-all", TEXTS)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="nothing to tell them by"):
        encoders.fitted("tfidf", ["", " "])


def test_minilm_tells_meaning_and_is_known_again() -> None:
    import torch

    made, threads = encoders.fitted("minilm", []), torch.get_num_threads()
    cat, kitten, bond = made(["A cat sleeps.", "A kitten naps.", "Bond yields rose."])
    assert cat @ kitten > cat @ bond + 0.3
    assert made(["A cat sleeps."])[0] == pytest.approx(cat, abs=1e-5)
    assert torch.get_num_threads() == threads
    arrays, values = made.state()
    assert encoders.restored(arrays, values).name == "minilm"
    with pytest.raises(ConfigError, match="is another model than this router was fitted with"):
        encoders.restored({"probe": -arrays["probe"]}, values)


# -- the bank ------------------------------------------------------------------------------------------------------


def test_the_nearest_are_those_of_a_full_search() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 20)).astype(np.float32)
    bank = Bank.fit(rows, seed=0)
    new = rng.standard_normal((7, 20)).astype(np.float32)
    at, cosines = bank.nearest(bank.of(new), 5)
    centred, middle = rows - rows.mean(0), new - rows.mean(0)  # 20 directions: all there are, so cosines stay
    every = (middle / np.linalg.norm(middle, axis=1)[:, None]) @ (centred / np.linalg.norm(centred, axis=1)[:, None]).T
    for i in range(7):
        assert {*at[i]} == {*np.argsort(-every[i])[:5]}
        assert sorted(cosines[i]) == pytest.approx(sorted(every[i])[-5:], abs=1e-4)
    assert nearest(bank.keys[:3], bank.of(new), 5)[0].shape == (7, 3)


def test_what_was_fitted_to_is_less_novel_than_anything_else(router: CategoryRouter) -> None:
    known, new, other = (router.novelty(texts).mean() for texts in (TEXTS, NEW, ["quantum chromodynamics lecture"] * 3))
    assert known < new < other <= 1


# -- probabilities -------------------------------------------------------------------------------------------------


def test_probabilities_sum_to_one_and_find_the_category(router: CategoryRouter) -> None:
    p = router.probabilities([*NEW, "", "ЖЖЖ", "heron " * 5000])
    assert p.shape == (93, 3)
    assert p.sum(axis=1) == pytest.approx(np.ones(93))
    assert (p >= 0).all()
    assert (p[:90].argmax(axis=1) == labels(router, NEW_KINDS)).mean() > 0.85
    assert router.held_out.sum(axis=1) == pytest.approx(np.ones(150))


def test_held_out_probabilities_are_worse_than_those_of_what_was_seen(router: CategoryRouter) -> None:
    seen, held = router.probabilities(TEXTS), router.held_out
    assert log_loss(seen, labels(router, KINDS_OF)) < log_loss(held, labels(router, KINDS_OF))


def test_two_categories_and_one() -> None:
    texts, kinds = zip(*[(t, k) for t, k in zip(TEXTS, KINDS_OF, strict=True) if k != "sums"], strict=True)
    two = CategoryRouter.fit(texts, kinds)
    p = two.probabilities(["heron wren nest", "anvil forge zinc"])
    assert p[0, 0] > 0.7
    assert p[1, 1] > 0.7
    one = CategoryRouter.fit(texts, ["any"] * len(texts), calibration="isotonic")
    assert np.array_equal(one.probabilities(NEW), np.ones((90, 1)))
    assert not entropy(one.probabilities(NEW)).any()


def test_folds_are_even_within_each_category() -> None:
    folds = folds_of(np.array([0] * 50 + [1] * 12), seed=3)
    assert np.bincount(folds[:50]).tolist() == [10] * 5
    assert max(np.bincount(folds[50:])) <= 3


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"classifier": "forest"}, ConfigError, "classifier=forest: "),
        ({"calibration": "platt"}, ConfigError, "calibration=platt: "),
        ({"categories": ["rare", *KINDS_OF[1:]]}, DataError, "category 'rare' has 1 prompts, and 5 are needed"),
        ({"categories": KINDS_OF[1:]}, DataError, "a category for each"),
    ],
)
def test_what_no_router_can_be_fitted_to_is_one_line(given: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as found:
        CategoryRouter.fit(**{"prompts": TEXTS, "categories": KINDS_OF, **given})
    assert "\n" not in str(found.value)


# -- calibration ---------------------------------------------------------------------------------------------------


def overconfident(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, three times as sure as they should be, and what was drawn by the right ones."""
    rng = np.random.default_rng(seed)
    logits = 1.2 * rng.standard_normal((count, 4))
    right = calibration.softmax(logits)
    drawn = np.array([rng.choice(4, p=row) for row in right])
    return calibration.softmax(3 * logits), drawn


@pytest.mark.parametrize("kind", calibration.CALIBRATIONS)
def test_calibration_lowers_the_error_on_prompts_it_has_not_seen(kind: str) -> None:
    p, y = overconfident(3000, 0)
    q, z = overconfident(3000, 1)
    made = calibration.fit(kind, p, y)
    assert calibration_error(made(q), z) < 0.3 * calibration_error(q, z)
    assert log_loss(made(q), z) < log_loss(q, z)
    assert made(q).sum(axis=1) == pytest.approx(np.ones(3000))
    again = calibration.restored(*made.state())
    assert np.array_equal(again(q), made(q))


def test_a_temperature_is_found_and_keeps_the_order() -> None:
    p, y = overconfident(5000, 2)
    made = Temperature.fit(p, y)
    assert made.t == pytest.approx(3, rel=0.1)
    assert np.array_equal(made(p).argmax(axis=1), p.argmax(axis=1))
    assert isinstance(calibration.fit(None, p, y), Temperature)
    assert calibration.fit(None, p, y)(p) == pytest.approx(p)
    assert isinstance(calibration.fit("isotonic", p, y), Isotonic)


@pytest.mark.parametrize("kind", calibration.CALIBRATIONS)
def test_calibration_of_a_router_is_not_worse_on_held_out_prompts(kind: str) -> None:
    bare = CategoryRouter.fit(TEXTS, KINDS_OF, calibration=None)
    made = CategoryRouter.fit(TEXTS, KINDS_OF, calibration=kind)
    many, kinds = prompts(600, seed=5)
    y = labels(bare, kinds)
    assert calibration_error(made.probabilities(many), y) <= calibration_error(bare.probabilities(many), y) + 0.01


def test_the_calibration_error_is_the_mean_gap_over_bins() -> None:
    p = np.array([[0.9, 0.1], [0.92, 0.08], [0.55, 0.45], [0.2, 0.8]])
    y = np.array([0, 1, 0, 1])
    gaps = {13: abs(0.9 + 0.92 - 1), 8: abs(0.55 - 1), 12: abs(0.8 - 1)}  # bins of a fifteenth
    assert calibration_error(p, y) == pytest.approx(sum(gaps.values()) / 4)


# -- uncertainty ---------------------------------------------------------------------------------------------------

rows_of_probabilities = st.lists(
    st.lists(st.floats(0.001, 1), min_size=4, max_size=4), min_size=1, max_size=30
).map(lambda rows: np.array(rows) / np.array(rows).sum(axis=1, keepdims=True))  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(rows_of_probabilities)
def test_entropy_and_its_thresholds(p: np.ndarray) -> None:
    u = entropy(p)
    assert u == pytest.approx([-sum(x * math.log(x) for x in row) / math.log(4) for row in p])
    assert not Rule("entropy", 1.0).uncertain(u).any()
    assert Rule("entropy", -1e-9).uncertain(u).all()
    kept = [(~Rule("entropy", tau).uncertain(u)).mean() for tau in np.linspace(1, -0.1, 23)]
    assert all(before >= after for before, after in pairwise(kept))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 0.25, 0.5, 0.75]), st.booleans()), min_size=1, max_size=30))
def test_risk_and_coverage_as_counted_one_by_one(found: list[tuple[float, bool]]) -> None:
    u, right = np.array([f[0] for f in found]), np.array([f[1] for f in found])
    tau, coverage, risk = calibration.risk_coverage(u, right)
    assert [*tau] == sorted({*u})
    for t, c, r in zip(tau, coverage, risk, strict=True):
        kept = [ok for value, ok in found if value <= t]
        assert c == pytest.approx(len(kept) / len(found))
        assert r == pytest.approx(1 - sum(kept) / len(kept))
    for accuracy in (0.5, 0.9):
        good = [t for t, r in zip(tau, risk, strict=True) if 1 - r >= accuracy]
        assert calibration.threshold(u, right, accuracy) == (good[-1] if good else -1)


def test_conformal_sets_hold_the_true_category_as_often_as_asked() -> None:
    p, y = overconfident(2000, 3)
    q, z = overconfident(4000, 4)
    for miss in (0.05, 0.2):
        sets = q >= conformal_level(p, y, miss)
        assert sets[np.arange(4000), z].mean() == pytest.approx(1 - miss, abs=0.025)
    assert conformal_level(p[:3], y[:3], 0.1) == 0  # too few to promise anything but all


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_keeps_what_is_right_often_enough(kind: str) -> None:
    texts, kinds = prompts(300, mixed=0.6)
    router = CategoryRouter.fit(texts, kinds)
    y = labels(router, kinds)
    right = router.held_out.argmax(axis=1) == y
    rule = Rule.fit(kind, router, y, accuracy=0.93)
    kept = ~rule.uncertain(rule.held_out(router))
    if kind == "none":
        assert kept.all()
    elif kind == "conformal":
        sizes = (router.held_out >= rule.level).sum(axis=1)
        assert np.array_equal(kept, sizes == 1)
    else:
        assert right.mean() < 0.93 <= right[kept].mean()
        assert 0 < kept.mean() < 1


@pytest.mark.parametrize(
    ("kind", "accuracy", "said"),
    [("doubt", 0.9, "uncertainty=doubt: "), ("entropy", 1.0, "accuracy=1.0 must be above 0 and below 1")],
)
def test_rules_that_are_none(kind: str, accuracy: float, said: str) -> None:
    router = CategoryRouter.fit(TEXTS, KINDS_OF)
    with pytest.raises(ConfigError, match=said):
        Rule.fit(kind, router, labels(router, KINDS_OF), accuracy)


# -- the taxonomy --------------------------------------------------------------------------------------------------


def test_prompts_take_the_nearest_category_and_general_where_none_is_near() -> None:
    ours = Taxonomy.read()
    assert {"coding", "math", "reasoning", "medical", "legal", "finance", "writing", "translation"} < {*ours.categories}
    encoder = encoders.fitted("tfidf", ours.texts)
    found, near = ours.label(["Write a Python function that reverses a list", "ЖЖЖ"], encoder)
    assert found == ["coding", "general"]
    assert near[0] > 0.3 > near[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("categories: {a: {description: x}}", "must hold two names at least"),
        ("categories: [a, b]", "must hold two names at least"),
        ("categories: {a: {description: x}, b: {}}", "b needs a description or examples"),
        ("categories: {a: {description: x}, b: {describes: y}}", "b must hold description and examples"),
        ("categories: {a: {description: x}, b: {examples: [1]}}", "b needs a description or examples, which are texts"),
        ("categories: {a: {description: x}, b: {examples: 5}}", "b needs a description or examples, which are texts"),
    ],
)
def test_a_taxonomy_that_is_none_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        Taxonomy.read(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tfid", "tfidf+minlm", "mini-lm"])
def test_a_slip_in_an_encoders_name_is_told_before_a_hub_is_asked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"did you mean '(tfidf|minilm)'"):
        encoders.fitted(name, TEXTS)
