"""Compositions of experts: fitted, decided, saved; estimates of scores, prices, and what may not be fitted to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.errors import AdapterError, ConfigError, DataError
from moesaic.llms.coe.category import CategoryRouter
from moesaic.llms.coe.composition import FORMAT, MAPS, Composition
from moesaic.llms.coe.estimates import REPEAT, Estimates
from moesaic.llms.coe.fit import Fitting, fit, prices
from moesaic.llms.coe.folds import FOLDS
from moesaic.llms.coe.problem import GENERAL, Budget, InfeasibleBudget
from moesaic.llms.coe.uncertainty import KINDS
from moesaic.llms.tables import Table
from moesaic.runs import states
from moesaic.runs.states import read_state, write_state
from tests.toy_prompts import MODELS, WORDS, catalog, prompts, table

NEW, NEW_KINDS = prompts(60, seed=1)
OF = {"birds": "bird-1b", "metal": "metal-2b", "sums": "sums-3b"}


@pytest.fixture(scope="module")
def router() -> CategoryRouter:
    held = table()
    return CategoryRouter.fit(held.prompts, held.categories)


def made(router: CategoryRouter | None, budget: Budget | None = None, **settings: Any) -> Composition:
    chosen = Fitting(**{"encoder": "tfidf", "uncertainty": "none", **settings})
    return fit(table(), catalog(), budget, chosen, router=router)


# -- decisions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("map", MAPS)
def test_each_prompt_goes_to_the_expert_of_its_kind(router: CategoryRouter, map: str) -> None:
    found = made(router, Budget(resident=6), map=map).decide_many(NEW)
    assert {*OF.values()} >= {d.expert for d in found}
    assert np.mean([d.expert == OF[kind] for d, kind in zip(found, NEW_KINDS, strict=True)]) > 0.85


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_decisions_are_what_their_parts_say_and_the_same_in_bulk(router: CategoryRouter, map: str, kind: str) -> None:
    composition = made(router, map=map, uncertainty=kind, accuracy=0.97)
    texts = [*NEW, "", "quantum lecture", NEW[0].upper()]
    many = composition.decide_many(texts)
    assert [composition.decide(text).expert for text in texts] == [d.expert for d in many]
    p = composition.router.probabilities(texts)
    for row, d in zip(p, many, strict=True):
        assert [*d.probabilities.values()] == pytest.approx(row)
        assert d.confidence == pytest.approx(row.max())
        assert d.category == (GENERAL if d.uncertain else composition.router.categories[row.argmax()])
        if d.uncertain or map == "hard":
            assert d.expert == composition.solution.expert[d.category]
        else:
            assert d.scores[d.expert] == pytest.approx(max(d.scores.values()))
    assert many[0].expert == many[-1].expert
    assert any(d.uncertain for d in many) == (kind != "none")
    assert composition.decide_many([]) == []


def test_the_posterior_is_the_mean_over_categories(router: CategoryRouter) -> None:
    composition, t = made(router, map="posterior"), table()
    means = {k: t.scores[np.array(t.categories) == k].mean(axis=0) for k in WORDS}
    for d in composition.decide_many(NEW[:9]):
        for model, score in d.scores.items():
            column = MODELS.index(model)
            assert score == pytest.approx(sum(p * means[k][column] for k, p in d.probabilities.items()))


@pytest.mark.parametrize("map", MAPS)
def test_pins_hold_for_every_prompt(router: CategoryRouter, map: str) -> None:
    pins = {"birds": {"bird-1b": False, "all-9b": False}, "sums": {"metal-2b": True}}
    found = made(router, Budget(pins=pins), map=map).decide_many(NEW)
    assert all(d.expert == "metal-2b" for d in found if d.category == "sums")
    assert not {d.expert for d in found if d.category == "birds"} & {"bird-1b", "all-9b"}


@pytest.mark.parametrize("map", ["posterior", "blend"])
def test_caps_on_averages_hold_on_what_was_fitted_to(router: CategoryRouter, map: str) -> None:
    free = made(router, map=map).about["held_out"]
    capped = made(router, Budget(active=2.0, cost=1.9e-3), map=map).about["held_out"]
    assert free["average_active"] > 2.0
    assert capped["average_active"] <= 2.0
    assert 0.6 * free["score"] < capped["score"] < free["score"]


def test_a_few_prompts_of_no_category_are_left_out(router: CategoryRouter) -> None:
    t, told = table(), list[str]()
    held = table(categories=("", "general", *t.categories[2:]))
    how = Fitting(encoder="tfidf", uncertainty="none")
    found = fit(held, catalog(), settings=how, progress=told.append)
    assert any(line.startswith("left out: 2 prompts of no category") for line in told)
    assert found.router.categories == tuple(WORDS)
    rest = fit(t.rows(np.arange(2, len(t))), catalog(), settings=how)
    assert [d.expert for d in found.decide_many(NEW)] == [d.expert for d in rest.decide_many(NEW)]


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("mixed", [0.0, 0.15])
def test_caps_on_averages_hold_as_prompts_are_decided(map: str, mixed: float) -> None:
    """Where categories are told apart for sure, all prompts of one go over to another expert at one price."""
    texts, kinds = prompts(180, mixed=mixed)
    held = table(prompts=tuple(texts), categories=tuple(kinds))
    own = CategoryRouter.fit(held.prompts, held.categories)
    takes = {"active": {"all-9b": 9, "bird-1b": 1, "metal-2b": 2, "sums-3b": 3}}
    takes["cost"] = {name: 1e-3 * size for name, size in takes["active"].items()}
    for name, limit in (("active", 1.7), ("active", 2.6), ("active", 5.0), ("cost", 1.7e-3), ("cost", 4e-3)):
        chosen = Fitting(encoder="tfidf", uncertainty="entropy", map=map)
        found = fit(held, catalog(), Budget(**{name: limit}), chosen, router=own)  # type: ignore[arg-type]
        spent = np.mean([takes[name][d.expert] for d in found.decide_many(held.prompts)])
        assert spent <= limit * (1 + 1e-9), (name, limit)


def test_prices_are_the_least_with_which_caps_hold() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((400, 3))
    first, second = np.tile([1.0, 3.0, 9.0], (400, 1)), np.tile([2.0, 1.0, 8.0], (400, 1))

    def means(found: list[float], takes: list[np.ndarray]) -> list[float]:
        best = (scores - sum(p * t for p, t in zip(found, takes, strict=True))).argmax(axis=1)
        return [float(t[np.arange(400), best].mean()) for t in takes]

    assert prices([(scores, [first])], [9.0]) == [0.0]
    (found,) = prices([(scores, [first])], [3.0])
    assert means([found], [first])[0] <= 3.0 < means([0.999 * found], [first])[0] + 0.05
    both = prices([(scores, [first, second])], [3.0, 2.5])
    assert all(mean <= limit for mean, limit in zip(means(both, [first, second]), (3.0, 2.5), strict=True))
    assert prices([(scores, [first])], [1.0])[0] >= 0.4  # only the first expert is left


# -- estimates -----------------------------------------------------------------------------------------------------


def test_estimates_of_a_blend_are_better_than_those_of_categories(router: CategoryRouter) -> None:
    """Where scores hang on more than the category: here, on a word."""
    texts, kinds = prompts(300, seed=2)
    labels = np.array([[*WORDS].index(kind) for kind in kinds])
    own = CategoryRouter.fit(texts, kinds)
    scores = np.array([[float("what" in text.split()), 0.5] for text in texts])
    _, by_category = Estimates.fit(own, texts, labels, scores, blend=False)
    blend, found = Estimates.fit(own, texts, labels, scores, blend=True)
    assert np.square(found - scores).mean() < 0.8 * np.square(by_category - scores).mean()
    assert blend.mixture.sum() == pytest.approx(1)
    assert (blend.mixture >= 0).all()
    fresh, _ = prompts(100, seed=3)
    rows = own.embed(fresh)
    said = blend(own.bank, fresh, rows, own.of_rows(rows))[:, 0]
    there = np.array(["what" in text.split() for text in fresh])
    assert said[there].mean() > said[~there].mean() + 0.3


def test_a_prompt_that_was_seen_before_counts_by_half(router: CategoryRouter) -> None:
    t = table()
    labels = np.array([router.categories.index(kind) for kind in t.categories])
    scores = t.scores.copy()
    scores[3, 1] = np.nan
    estimates, _ = Estimates.fit(router, t.prompts, labels, scores, blend=True)
    asked = [t.prompts[3].upper() + " \n", t.prompts[3] + "x"]
    rows = np.repeat(router.embed([t.prompts[3]]), 2, axis=0)
    known, new = estimates(router.bank, asked, rows, router.of_rows(rows))
    expected = (1 - REPEAT) * new + REPEAT * t.scores[3]
    expected[1] = new[1]
    assert known == pytest.approx(expected)


def test_held_out_estimates_have_not_seen_their_fold(router: CategoryRouter) -> None:
    t = table()
    labels = np.array([router.categories.index(kind) for kind in t.categories])
    _, before = Estimates.fit(router, t.prompts, labels, t.scores, blend=False)
    here = router.folds == FOLDS - 1
    _, after = Estimates.fit(router, t.prompts, labels, np.where(here[:, None], 1 - t.scores, t.scores), blend=False)
    assert np.array_equal(before[here], after[here])
    assert not np.allclose(before[~here], after[~here])


# -- fitting -------------------------------------------------------------------------------------------------------


def test_general_has_an_expert_that_is_good_at_all(router: CategoryRouter) -> None:
    composition = made(router, uncertainty="entropy", accuracy=0.99, map="hard")
    assert composition.solution.expert[GENERAL] == "all-9b"
    assert composition.about["held_out"]["general"] > 0


def test_data_for_evaluation_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is for evaluation only: fit to another"):
        fit(table(evaluation_only=True), catalog(), settings=Fitting(encoder="tfidf"), out=tmp_path / "made")
    assert not [*tmp_path.iterdir()]


def test_a_table_without_categories_takes_those_of_the_taxonomy(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    told = "\n".join(f"  {kind}: {{description: {' '.join(words[:6])}}}" for kind, words in WORDS.items())
    file.write_text(f"categories:\n{told}\n")
    said: list[str] = []
    held = table(categories=("",) * 180)
    settings = Fitting(encoder="tfidf", uncertainty="none", taxonomy=str(file))
    composition = fit(held, catalog(), Budget(resident=6), settings, progress=said.append)
    assert {*composition.router.categories} - {GENERAL} == {*WORDS}
    assert "weak" in said[0]
    assert composition.about["labelled_by"] == str(file)
    found = composition.decide_many(NEW)
    assert np.mean([d.expert == OF[kind] for d, kind in zip(found, NEW_KINDS, strict=True)]) > 0.7


def test_rare_categories_become_general() -> None:
    t = table()
    kinds = ("rare",) * 3 + ("",) * 4 + t.categories[7:]
    said: list[str] = []
    settings = Fitting(encoder="tfidf", uncertainty="none")
    composition = fit(table(categories=kinds), catalog(), settings=settings, progress=said.append)
    assert composition.router.categories == ("birds", GENERAL, "metal", "sums")
    assert "of fewer than 5 prompts, and now general: rare" in said[0]


@pytest.mark.parametrize(
    ("settings", "budget", "error", "said"),
    [
        ({"map": "soft"}, Budget(), ConfigError, "map=soft: "),
        ({"taxonomy": "x.yaml"}, Budget(), ConfigError, "taxonomy= is for data without categories"),
        ({"accuracy": 1.5}, Budget(), ConfigError, "accuracy=1.5 must be above 0"),
        ({}, Budget(resident=0.5), InfeasibleBudget, "resident=0.5"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(
    router: CategoryRouter, settings: dict[str, Any], budget: Budget, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as found:
        made(router, budget, **settings)
    assert "\n" not in str(found.value)


# -- the folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {"map": "blend", "uncertainty": "novelty"},
    {"map": "hard", "calibration": "isotonic", "uncertainty": "entropy"},
    {"map": "posterior", "classifier": "knn", "uncertainty": "conformal", "encoder": "tfidf+tfidf"},
])  # fmt: skip
def test_a_composition_that_was_saved_decides_as_before(tmp_path: Path, settings: dict[str, Any]) -> None:
    composition = made(None, Budget(active=3.0), **settings)
    composition.save(tmp_path / "made")
    again = Composition.load(tmp_path / "made")
    assert again.decide_many(NEW) == composition.decide_many(NEW)
    assert again.solution == composition.solution
    assert again.about == json.loads(json.dumps(composition.about))
    assert {file.name for file in (tmp_path / "made").iterdir()} == {"state.json", "state.safetensors"}


def test_a_folder_is_replaced_only_where_that_is_asked(router: CategoryRouter, tmp_path: Path) -> None:
    composition = made(router)
    composition.save(tmp_path / "made")
    with pytest.raises(ConfigError, match="is already there; overwrite=true replaces it"):
        composition.save(tmp_path / "made")
    composition.save(tmp_path / "made", overwrite=True)
    (tmp_path / "made" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="holds files that are not a composition's"):
        composition.save(tmp_path / "made", overwrite=True)
    with pytest.raises(ConfigError, match="holds no composition; `moesaic llm fit` makes one"):
        Composition.load(tmp_path / "nothing")


def _set(*path: str, to: Any) -> Any:
    def change(values: dict[str, Any], arrays: dict[str, Any]) -> None:
        for name in path[:-1]:
            values = values[name]
        values[path[-1]] = to

    return change


def _array(name: str, to: Any) -> Any:
    def change(values: dict[str, Any], arrays: dict[str, Any]) -> None:
        arrays[name] = to(arrays[name])

    return change


def _surrogate(values: dict[str, Any], arrays: dict[str, Any]) -> None:
    values["router"]["categories"][0] = "\ud800"
    values["solution"]["expert"]["\ud800"] = values["experts"][0]


EDITS = {
    "classifier": _set("router", "classifier", to="evil"),
    "neighbours": _set("router", "neighbours", to=-5),
    "scores' neighbours": _set("estimates", "neighbours", to=[-3, 1.0]),
    "temperature": _set("router", "calibration", "t", to=1e-320),
    "surrogate": _surrogate,
    "directions": _array("router.encoder.directions", lambda held: np.ascontiguousarray(held[:, :3])),
    "mixture": _array("estimates.mixture", lambda held: np.ones(2)),
    "bias": _array("router.bias", lambda held: np.zeros(7)),
    "labels": _array("router.labels", lambda held: held.astype(float)),
    "recorded": _array("estimates.recorded", lambda held: held[1:]),
    "digests": _array("estimates.digests", lambda held: held[1:]),
    "active": _array("active", lambda held: held[1:]),
}


@pytest.mark.parametrize("classifier", ["logistic", "knn"])
def test_a_composition_that_was_edited_is_refused_as_it_is_read(
    tmp_path: Path, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "write_json", lambda file, content: file.write_text(json.dumps(content)))
    place = tmp_path / "made"
    made(None, map="blend", classifier=classifier).save(place)
    kept, values = read_state(place, version=FORMAT)
    kept["estimates.mixture"] = np.array([0.5, 0.25, 0.25])
    for what, change in EDITS.items():
        if classifier == "knn" and what == "bias":
            continue
        if classifier == "logistic" and what == "neighbours":
            continue
        arrays, edited = dict(kept), json.loads(json.dumps(values))
        change(edited, arrays)
        write_state(place, arrays, {k: v for k, v in edited.items() if k != "format"}, version=FORMAT)
        with pytest.raises(AdapterError, match=r"is damaged .*: fit it again"):
            Composition.load(place)
    write_state(place, kept, {k: v for k, v in values.items() if k != "format"}, version=FORMAT)
    Composition.load(place)


def test_too_few_prompts_are_said_to_be(tmp_path: Path) -> None:
    one = Table(("a prompt",), ("rare",), ("bird-1b",), np.ones((1, 1)), source="few.jsonl")
    with pytest.raises(DataError, match=r"^few\.jsonl has 1 prompt, and 5 of a category are needed$"):
        fit(one, catalog(), None, Fitting(encoder="tfidf"))


def test_a_damaged_folder_is_one_line(router: CategoryRouter, tmp_path: Path) -> None:
    place = tmp_path / "made"
    made(router, map="blend").save(place)
    text, weights = (place / "state.json").read_text(), (place / "state.safetensors").read_bytes()
    values = json.loads(text)
    damage = {
        "state.json": [b"", b"{", b"[]", text[:-40].encode(), text.replace("bird-1b", "bird-2b").encode(),
                       json.dumps({**values, "format": 99}).encode()],
        "state.safetensors": [b"", weights[:-9], weights[:200], bytes([weights[-1] ^ 1]).join([weights[:-1], b""])],
    }  # fmt: skip
    for name, broken in damage.items():
        whole = (place / name).read_bytes()
        for content in broken:
            (place / name).write_bytes(content)
            with pytest.raises(AdapterError, match=r"is damaged .*: fit it again") as error:
                Composition.load(place)
            assert "\n" not in str(error.value)
        (place / name).write_bytes(whole)
    assert Composition.load(place).decide(NEW[0])
