"""`moesaic llm` as people type it: what it says is what was recorded; and what it says to what cannot be."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.cli.main import main
from moesaic.errors import ConfigError
from moesaic.llms.catalog import Catalog
from moesaic.llms.coe import encoders, frontier
from moesaic.llms.coe.category import CategoryRouter
from moesaic.llms.coe.composition import Composition
from moesaic.llms.coe.fit import fit
from moesaic.llms.coe.fitting import Fitting
from moesaic.llms.coe.problem import GENERAL, Budget, Problem
from moesaic.llms.coe.replayed import replayed, timed
from moesaic.llms.tables import Table
from moesaic.report.coe import benched, decided
from tests.toy_prompts import MODELS, WORDS, catalog, table

SIZES = {"all-9b": 9.0, "bird-1b": 1.0, "metal-2b": 2.0, "sums-3b": 3.0}
TEST = table(90, seed=1)
UNSURE = "quantum lecture of 3"


def said(capsys: pytest.CaptureFixture[str], *line: str, code: int = 0) -> str:
    assert main(["llm", *line]) == code
    told = capsys.readouterr()
    return told.out if code == 0 else told.err


def write(file: Path, t: Table) -> None:
    rows = [
        {"prompt": prompt, "category": category, "scores": dict(zip(t.models, scores, strict=True)),
         **({} if t.costs is None else {"costs": dict(zip(t.models, t.costs[i].tolist(), strict=True))})}
        for i, (prompt, category, scores) in enumerate(zip(t.prompts, t.categories, t.scores.tolist(), strict=True))
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_log(file: Path, t: Table, known: int) -> None:
    """Every third score is missing; of the first prompts alone the category is told."""
    rows = [
        {"prompt": prompt, "model": model, "score": t.scores[i, m],
         **({"category": t.categories[i]} if i < known else {})}
        for i, prompt in enumerate(t.prompts) for m, model in enumerate(t.models) if (i + m) % 3
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_catalog(file: Path, **more: Any) -> None:
    models = [{"name": n, "parameters": b, "input_price": b, "output_price": b, **more} for n, b in SIZES.items()]
    file.write_text(json.dumps({"models": models}))  # JSON is YAML


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("llm")
    write(here / "train.jsonl", table())
    write(here / "test.jsonl", TEST)
    write(here / "plain.jsonl", table(90, categories=("",) * 90, costs=None))
    write_log(here / "log.jsonl", table(), 150)
    write_catalog(here / "models.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert main(["llm", "fit", *FIT, "out=coe"]) == 0
    return here


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


DATA = ["data=train.jsonl", "catalog=models.yaml"]
FIT = [*DATA, "encoder=tfidf"]
BENCH = ["bench", "coe", "data=test.jsonl", "catalog=models.yaml", "rounds=2"]


# -- fit -----------------------------------------------------------------------------------------------------------


def test_what_is_fitted_is_what_python_fits(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = json.loads(said(capsys, "fit", *FIT, "resident=6", f"out={tmp_path / 'made'}", "--json"))
    made = fit(table(source="train.jsonl"), catalog(), Budget(resident=6), Fitting(encoder="tfidf"))
    assert told == json.loads(
        json.dumps({"out": str(tmp_path / "made"), "solution": asdict(made.solution), **made.about})
    )
    assert Composition.load(tmp_path / "made").decide_many(TEST.prompts) == made.decide_many(TEST.prompts)


def test_the_mapping_is_the_best_of_all_within_the_limit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = ["fit", *FIT, "map=hard", "uncertainty=none", "resident=5.5", f"out={tmp_path / 'made'}", "--json"]
    found = json.loads(said(capsys, *line))["solution"]
    t = table()
    means = {k: t.scores[np.array(t.categories) == k].mean(axis=0) for k in WORDS}
    every = [c for c in product(MODELS, repeat=3) if sum(SIZES[m] for m in {*c}) <= 5.5]
    scores = [np.mean([means[k][MODELS.index(m)] for k, m in zip(WORDS, c, strict=True)]) for c in every]
    assert tuple(found["expert"][k] for k in WORDS) == every[int(np.argmax(scores))]
    assert found["score"] == pytest.approx(max(scores))
    assert found["resident_size"] == sum(SIZES[m] for m in found["resident"]) <= 5.5


def test_the_tables_of_a_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = said(capsys, "fit", *FIT, f"out={tmp_path / 'made'}")
    made = Composition.load(tmp_path / "made")
    for category, expert in made.solution.expert.items():
        assert [category, expert] in cells(told)
    held = made.about["held_out"]
    assert ["score, %", f"{100 * held['score']:.1f}"] in [row[:2] for row in cells(told)]
    assert ["resident, B", f"{made.solution.resident_size:.1f}", ", ".join(made.solution.resident)] in cells(told)
    assert ["USD a million prompts", f"{1e6 * held['average_cost']:,.0f}", "as recorded"] in cells(told)
    assert told.endswith(f"written: {tmp_path / 'made'}\n")


def test_a_log_is_fitted_and_what_it_lacks_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = ["fit", "data=log.jsonl", "catalog=models.yaml", "encoder=tfidf", "uncertainty=none"]
    told = said(capsys, *line, f"out={tmp_path / 'made'}")
    made = Composition.load(tmp_path / "made")
    assert {*made.router.categories} == {*WORDS, GENERAL}, "prompts without a category are of general"
    assert f"of the {100 * made.about['held_out']['seen']:.1f} % that their expert saw of held-out prompts" in told
    assert "USD" not in told


def test_no_limit_is_no_limit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = ["fit", *FIT, "resident=inf", "active=.inf", f"out={tmp_path / 'made'}", "--json"]
    budget = json.loads(said(capsys, *line), parse_constant=pytest.fail)["budget"]
    assert budget == {"resident": None, "active": None, "cost": None, "experts": None, "pins": {}}


def test_pins_are_given_on_the_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pins = "pins={birds: {all-9b: true}, sums: {sums-3b: false}}"
    found = json.loads(said(capsys, "fit", *FIT, pins, f"out={tmp_path / 'made'}", "--json"))["solution"]["expert"]
    assert found["birds"] == "all-9b"
    assert found["sums"] != "sums-3b"


def test_an_interrupted_fit_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for cls, name in ((CategoryRouter, "fit"), (Composition, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(cls, name, stop)
            told = said(capsys, "fit", *FIT, f"out={tmp_path / 'made'}", code=130)
            assert told.splitlines()[-1] == "moesaic: interrupted"
        assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("setting", ["resident=0.5", "active=0.5", "pins={birds: {bird-9b: true}}"])
def test_what_is_there_stays_where_a_fit_fails(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, setting: str
) -> None:
    shutil.copytree(place / "coe", tmp_path / "coe")
    said(capsys, "fit", *FIT, f"out={tmp_path / 'coe'}", "overwrite=true", setting, code=2)
    before, after = (
        {file.name: file.read_bytes() for file in where.iterdir()} for where in (place / "coe", tmp_path / "coe")
    )
    assert before == after
    assert "overwrite=true replaces it" in said(capsys, "fit", *FIT, f"out={tmp_path / 'coe'}", code=2)


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("map=hrad", "map=hrad: did you mean 'hard'?"),
        ("classifier=svm", "classifier=svm: known: knn, logistic"),
        ("calibration=x", "calibration=x: known: isotonic, temperature"),
        ("uncertainty=x", "uncertainty=x: known: conformal, entropy"),
        ("accuracy=1", "accuracy=1.0 must be above 0 and below 1"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("seed=99999999999999999999", "seed=99999999999999999999 must be at least 0 and at most"),
        ("z=-1", "z=-1.0 must be a number from 0 on"),
        ("resident=-1", "resident=-1.0 must be at least 0"),
        ("resident=nan", "resident=nan must be at least 0"),
        ("resident=0.5", "no mapping fits resident=0.5, where 1 is the least"),
        ("experts=0", "no mapping fits experts=0, where 1 is the least"),
        ("experts=1.5", "experts=1.5 must be a whole number"),
        ("pins={brids: {all-9b: true}}", "pins: no category 'brids'; did you mean 'birds'?"),
        ("pins={birds: {bird-9b: true}}", "pins: no model 'bird-9b'; did you mean 'bird-1b'?"),
        ("pins={birds: bird-1b}", "must be true or false by two names, such as {A: {B: true}}"),
        ("pins=birds", "pins=birds must be true or false by two names"),
        ("pins.birds=x", "unknown key 'pins.birds'; known: "),
        ("taxonomy=mine.yaml", "taxonomy= is for data without categories"),
        ("encoder=", "encoder= names none; known: tfidf, minilm"),
        ("encoder=tfidf+", "encoder=tfidf+ names none"),
        ("out=", "out is missing"),
        ("out=models.yaml", "models.yaml holds files that are not a composition's"),
        ("out=/dev/null", "out=/dev/null is a device"),
        ("format=lgo", "no format 'lgo' of outcomes; did you mean 'log'?"),
    ],
)
def test_settings_are_refused_before_anything_takes_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str, wanted: str
) -> None:
    monkeypatch.setattr(encoders.Tfidf, "fit", pytest.fail)
    told = said(capsys, "fit", *FIT, f"out={tmp_path / 'made'}", setting, code=2)
    assert wanted in told.splitlines()[-1]
    assert not [*tmp_path.iterdir()]


# -- route ---------------------------------------------------------------------------------------------------------


def test_routes_are_decisions(capsys: pytest.CaptureFixture[str], tmp_path: Path, place: Path) -> None:
    made = Composition.load(place / "coe")
    texts = [*TEST.prompts[:6], UNSURE, "a\u2028b"]
    (tmp_path / "asked.txt").write_text("\ufeff" + "\n\n".join(texts) + "\n", encoding="utf-8")
    found = json.loads(said(capsys, "route", "coe", f"file={tmp_path / 'asked.txt'}", "--json"))
    every = made.decide_many(texts)
    assert found == [{"prompt": text, **asdict(decision)} for text, decision in zip(texts, every, strict=True)]
    assert [row["expert"] for row in found] == [made.decide(text).expert for text in texts]
    told, decision = cells(said(capsys, "route", "coe", f"prompt={texts[0]}")), made.decide(texts[0])
    sure = f"{100 * decision.confidence:.1f}"
    assert told[0] == [texts[0][:59] + "…", decision.expert, decision.category, sure]
    assert [decision.category, sure] in told
    assert all([name, f"{100 * decision.scores[name]:.1f}"] in told for name in made.experts)
    assert [UNSURE, made.solution.expert[GENERAL], f"{GENERAL} (not sure)"] in [
        row[:3] for row in cells(said(capsys, "route", "coe", f"prompt={UNSURE}"))
    ]


def test_a_prompt_comes_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a heron\nand its nest"))
    (found,) = json.loads(said(capsys, "route", "coe", "prompt=-", "--json"))
    assert found == {
        "prompt": "a heron\nand its nest",
        **asdict(Composition.load(place / "coe").decide(found["prompt"])),
    }
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff heron"), "utf-8", errors))
        assert "standard input is no text in UTF-8" in said(capsys, "route", "coe", "prompt=-", code=2)
    for none in (io.StringIO(" \n"), None):
        monkeypatch.setattr(sys, "stdin", none)
        assert "is empty: there is nothing to answer" in said(capsys, "route", "coe", "prompt=-", code=2)


def test_what_a_terminal_would_obey_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "route", "coe", "prompt=heron \x1b[31m nest\x00 [bold]wing[/bold]")
    assert "\x1b" not in told
    assert "heron �[31m nest� [bold]wing[/bold]" in told


def test_nor_is_it_in_names_of_categories(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = table()
    rows = tuple(f"{kind}\x1b[31m\n" for kind in held.categories)
    write(tmp_path / "scores.jsonl", replace(held, categories=("rare\x1b[31m", *rows[1:])))
    shutil.copy("models.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["llm", "fit", "data=scores.jsonl", "catalog=models.yaml", "encoder=tfidf", "out=made"]) == 0
    assert main(["llm", "route", "made", "prompt=heron"]) == 0
    told = "".join(capsys.readouterr())
    assert "birds�[31m" in told
    assert "rare�[31m" in told
    assert "\x1b" not in told


# -- bench ---------------------------------------------------------------------------------------------------------


def test_figures_of_a_bench_are_those_of_the_table(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    found = json.loads(said(capsys, *BENCH, "--json"))
    made, scores, n = Composition.load(place / "coe"), TEST.scores, np.arange(len(TEST))
    assert TEST.costs is not None
    chosen = np.array([MODELS.index(made.decide(prompt).expert) for prompt in TEST.prompts])
    best, sizes = int(scores.mean(axis=0).argmax()), np.array([*SIZES.values()])
    oracle = np.array([min((m for m in range(4) if row[m] == max(row)), key=lambda m: sizes[m]) for row in scores])
    wanted = {"composition": chosen, "best_single": np.full(90, best), "largest": np.full(90, 0), "oracle": oracle}
    for name, picks in wanted.items():
        arm = found["arms"][name]
        assert arm["score"] == pytest.approx(np.mean([scores[i, pick] for i, pick in enumerate(picks)]))
        assert arm["ahead"] == pytest.approx((scores[n, picks] - scores[:, best]).mean())
        assert arm["average_active"] == pytest.approx(np.mean([sizes[pick] for pick in picks]))
        assert arm["average_cost"] == pytest.approx(TEST.costs[n, picks].mean())
        for ends, of in (("", scores[n, picks]), ("ahead_", scores[n, picks] - scores[:, best])):
            low, high = arm[f"{ends}low"], arm[f"{ends}high"]
            assert low <= of.mean() <= high
            assert high - low == pytest.approx(2 * 1.96 * of.std() / np.sqrt(90), rel=0.15, abs=0.02)
    assert found["arms"]["best_single"]["model"] == MODELS[best]
    assert found["arms"]["largest"]["model"] == "all-9b"
    assert found["arms"]["oracle"]["score"] == scores.max(axis=1).mean()
    assert scores.min(axis=1).mean() <= found["arms"]["random_expert"]["score"] <= scores.max(axis=1).mean()
    assert found["experts"] == {m: np.mean(chosen == MODELS.index(m)) for m in made.experts}
    decisions = made.decide_many(TEST.prompts)
    assert found["general"] == np.mean([decision.uncertain for decision in decisions])
    likeliest = [max(d.probabilities, key=lambda k: d.probabilities[k]) for d in decisions]
    assert found["category_accuracy"] == np.mean([a == b for a, b in zip(likeliest, TEST.categories, strict=True)])
    assert 0 < found["milliseconds"]["median"] <= found["milliseconds"]["p95"]


def test_a_composition_with_a_budget_is_held_against_the_best_that_fits_it() -> None:
    made = fit(table(), catalog(), Budget(resident=6), Fitting(encoder="tfidf", uncertainty="none"))
    within = max(range(1, 4), key=lambda m: TEST.scores[:, m].mean())  # the largest exceeds the budget by itself
    arm = replayed(made, TEST, catalog())["arms"]["best_within"]
    assert (arm["model"], arm["score"]) == (MODELS[within], pytest.approx(TEST.scores[:, within].mean()))


def test_a_bench_is_what_python_says_and_its_tables_show_it(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    told = json.loads(said(capsys, *BENCH, "seed=3", "--json"))
    ours = replayed(Composition.load(place / "coe"), table(90, 1, source="test.jsonl"), catalog(), seed=3)
    assert {k: v for k, v in told.items() if k != "milliseconds"} == json.loads(json.dumps(ours))
    shown = cells(said(capsys, *BENCH, "seed=3"))
    for grid in benched(told)[:2]:
        assert all(row in shown for row in grid.rows)
    (row,) = [row for row in shown if row[0] == "composition"]
    arm = told["arms"]["composition"]
    assert row[1:3] == [f"{100 * arm['score']:.1f}", f"{100 * arm['low']:.1f} to {100 * arm['high']:.1f}"]
    assert row[3].startswith(f"{100 * arm['ahead']:+.1f} (".replace("-", "−"))


def test_only_categories_that_the_router_knows_can_be_right(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kinds = ("fish",) * 30 + ("",) * 30 + TEST.categories[60:]
    write(tmp_path / "t.jsonl", table(90, 1, categories=kinds))
    every = json.loads(said(capsys, *BENCH, "--json"))["category_accuracy"]
    some = json.loads(said(capsys, *BENCH, f"data={tmp_path / 't.jsonl'}", "--json"))["category_accuracy"]
    assert some > 0.8 < every
    told = said(capsys, *BENCH, "data=plain.jsonl")
    assert "category right" not in told
    assert "USD" not in told


def test_models_go_by_other_names_too(place: Path) -> None:
    entries = [{"name": n, "aliases": [f"org/{n}"], "parameters": b, "input_price": b, "output_price": b}
               for n, b in SIZES.items()]  # fmt: skip
    made, other = Composition.load(place / "coe"), table(90, 1, models=tuple(f"org/{n}" for n in MODELS))
    assert replayed(made, other, Catalog.of(entries)) == replayed(made, TEST, catalog())


def test_a_bench_on_what_it_was_fitted_to_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llm", "bench", "coe", *DATA, "rounds=1"]) == 0
    assert "coe was fitted to train.jsonl: on other prompts it would do worse" in capsys.readouterr().err


def test_data_for_evaluation_is_replayed_and_not_fitted_to(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [
        {"global_index": f"{kind}_{i}", "question": text,
         "models": {m: {"score": s, "cost": 1e-3} for m, s in zip(MODELS, TEST.scores[i].tolist(), strict=True)}}
        for i, (text, kind) in enumerate(zip(TEST.prompts, TEST.categories, strict=True))
    ]  # fmt: skip
    file = tmp_path / "arena.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for action, out in (("fit", f"out={tmp_path / 'made'}"), ("frontier", f"out={tmp_path / 'x.svg'}")):
        told = said(capsys, action, f"data={file}", "catalog=models.yaml", out, code=2)
        assert "is for evaluation only: fit to another" in told
    found = json.loads(said(capsys, *BENCH, f"data={file}", "--json"))
    assert found["arms"]["oracle"]["score"] == TEST.scores.max(axis=1).mean()
    assert [*tmp_path.iterdir()] == [file]


def test_each_decision_is_timed_by_itself(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Composition, "decide", lambda self, prompt: asked.append(prompt))
    timed(Composition.load(place / "coe"), ["a", "b", "c"], 4)
    assert asked == ["a", "b", "c", "a", "b", "c", "a"], "three to warm up, then four"


# -- frontier ------------------------------------------------------------------------------------------------------


def test_a_frontier_is_what_python_finds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "new" / "picture.svg"
    rows = json.loads(said(capsys, "frontier", *DATA, f"out={file}", "--json"))
    points = frontier.frontier(Problem.of_table(table(), catalog()))
    assert rows == json.loads(json.dumps(frontier.rows(points)))
    assert file.read_text().count("<svg") == 1
    assert [entry.name for entry in file.parent.iterdir()] == ["picture.svg"]
    limits, scores = [row["limit"] for row in rows], [row["score"] for row in rows]
    assert limits == sorted({*limits})
    assert scores == sorted({*scores})
    t = table()
    for row in rows:
        picks = [MODELS.index(row["expert"][kind]) for kind in t.categories]
        assert row["score"] == pytest.approx(t.scores[np.arange(180), picks].mean())
        assert row["limit"] == sum(SIZES[m] for m in {*row["expert"].values()})
    told = cells(said(capsys, "frontier", *DATA))
    assert [[row["resident"], f"{100 * row['score']:.1f}"] for row in rows] == [
        [line[-1].split(", "), line[1]] for line in told if line[0][0].isdigit()
    ]


def test_a_frontier_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(said(capsys, "frontier", "data=log.jsonl", "catalog=models.yaml", "over=experts", "--json"))
    assert [row["limit"] for row in rows] == sorted({len(row["resident"]) for row in rows})
    assert all({*row["expert"]} == {*WORDS, GENERAL} for row in rows)


# -- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (["fti"], "llm fti: no such action; did you mean 'fit'?"),
        (["fit"], "data is missing: data=…"),
        (["fit", "data=train.jsonl"], "catalog is missing: catalog=…"),
        (["fit", "coe", *FIT], "llm fit takes key=value settings alone, not coe"),
        (["fit", "reisdent=3"], "did you mean 'resident'?"),
        (["fit", "data=no.jsonl", "catalog=models.yaml"], "no such file: no.jsonl"),
        (["fit", "data=train.jsonl", "catalog=no.yaml"], "catalog=no.yaml: no such file"),
        (["fit", "data=train.jsonl", "catalog=coe"], "cannot read coe/default_llm.json: No such file"),
        (["fit", "data=train.jsonl", "catalog=train.jsonl"], "train.jsonl:2: this is not YAML"),
        (["fit", "data=empty.jsonl", "catalog=models.yaml"], "empty.jsonl holds no rows"),
        (["fit", "data=train.jsonl", "catalog=empty.jsonl"], "empty.jsonl must hold `key: value` lines"),
        (["fit", "data=train.jsonl", "catalog=few.yaml"], "few.yaml has no model 'all-9b', of which train.jsonl has"),
        (["fit", "data=train.jsonl", "catalog=models.yaml", "format=llmrouter"], "needs default_query_train.jsonl"),
        (["fit", "data=plain.jsonl", "catalog=models.yaml", "taxonomy=no.yaml"], "no.yaml cannot be read: No such"),
        (["frontier", *DATA, "out=x.png"], "out=x.png must end in .svg"),
        (["frontier", *DATA, "out=folder.svg"], "out=folder.svg is a folder; name a file"),
        (["frontier", *DATA, "over=size"], "over=size: known: active, cost"),
        (["frontier", *DATA, "step=nan"], "step=nan must be a number from 0 on"),
        (["frontier", *DATA, "resident=0.5"], "no mapping fits resident=0.5"),
        (["frontier", "data=plain.jsonl", "catalog=models.yaml"], "plain.jsonl has no categories"),
        (["frontier", "data=log.jsonl", "catalog=models.yaml", "over=cost"], "over=cost needs a table with costs"),
        (["route"], "llm route takes one folder, a composition's, not none"),
        (["route", "coe", "prompt=two", "words"], "not coe, words (values with spaces want quotes)"),
        (["route", "coe"], "give prompt=… or file=…"),
        (["route", "coe", "prompt=x", "file=models.yaml"], "give prompt=… or file=…"),
        (["route", "coe", "prompt=   "], "give prompt=… or file=…"),
        (["route", "coe", "prompt=\udcff"], "no text"),
        (["route", "coe", "file=no.txt"], "file=no.txt cannot be read: No such file"),
        (["route", "coe", "file=empty.jsonl"], "file=empty.jsonl is empty"),
        (["route", "coe", "file=bytes.bin"], "file=bytes.bin cannot be read: it is not UTF-8"),
        (["route", "nowhere", "prompt=x"], "nowhere holds no composition; `moesaic llm fit` makes one"),
        (["route", "broken", "prompt=x"], "broken is damaged"),
        (["bench", "broken", "data=test.jsonl", "catalog=models.yaml"], "broken is damaged"),
        (["bench", "coe"], "data is missing"),
        ([*BENCH, "data=log.jsonl"], "log.jsonl:1: a log, where not every model saw every prompt"),
        ([*BENCH, "data=other.jsonl"], "other.jsonl has no scores of bird-1b"),
        ([*BENCH, "catalog=few.yaml"], "few.yaml has no model 'all-9b', of which test.jsonl has scores: add it"),
        ([*BENCH, "rounds=0"], "rounds=0 must be at least 1"),
        ([*BENCH, "seed=-1"], "seed=-1 must be at least 0"),
        (["serve"], "llm serve takes one file, a gateway's, not none"),
        (["serve", "models.yaml", "port=80"], "port=80: settings of a gateway stand in its file"),
        (["serve", "models.yaml", "--json"], "--json: settings of a gateway stand in its file"),
        (["serve", "no.yaml"], "no.yaml cannot be read: No such file"),
        (["serve", "coe"], "coe cannot be read: Is a directory"),
        (["serve", "open.yaml"], "open.yaml:2: this is not YAML"),
        (["serve", "typo.yaml"], "unknown key 'modles'; did you mean 'models'?"),
        (["serve", "bytes.bin"], "bytes.bin is not a YAML file that can be read"),
    ],
)
def test_bad_input_is_one_line(
    line: list[str], wanted: str, capsys: pytest.CaptureFixture[str], place: Path, broken: set[str]
) -> None:
    told = said(capsys, *line, code=2)
    assert wanted in told
    assert len(told.strip().splitlines()) == 1 + told.startswith("labelling")
    assert {entry.name for entry in place.iterdir()} == broken


@pytest.fixture(scope="module")
def broken(place: Path) -> set[str]:
    """What lies there, with files that cannot be used."""
    (place / "empty.jsonl").touch()
    (place / "bytes.bin").write_bytes(b"\xff\xfe\x00")
    (place / "folder.svg").mkdir()
    (place / "open.yaml").write_text("models: [\n")
    (place / "typo.yaml").write_text("modles: []\n")
    (place / "few.yaml").write_text("models: [{name: bird-1b, parameters: 1, input_price: 1, output_price: 1}]\n")
    write(place / "other.jsonl", table(9, models=MODELS[:1], scores=table(9).scores[:, :1], costs=None))
    shutil.copytree(place / "coe", place / "broken")
    (place / "broken" / "state.json").write_text("{")
    return {entry.name for entry in place.iterdir()}


def test_help_is_of_the_action(capsys: pytest.CaptureFixture[str]) -> None:
    cases = ("fit", "classifier", "rounds"), ("bench", "rounds", "classifier"), ("route", "prompt", "resident")
    for action, there, not_there in cases:
        with pytest.raises(SystemExit):
            main(["llm", action, "--help"])
        told = capsys.readouterr().out.partition("settings of")[2]
        assert f"  {there} " in told
        assert f"  {not_there} " not in told
    with pytest.raises(SystemExit):
        main(["llm", "serve", "--help"])
    told = capsys.readouterr().out
    assert "serve has no settings" in told
    assert "settings of" not in told


def test_the_seed_of_a_fit_is_checked_in_python_too() -> None:
    with pytest.raises(ConfigError, match="seed=-1 must be at least 0"):
        fit(table(), catalog(), settings=Fitting(encoder="tfidf", seed=-1))


def test_long_prompts_are_cut() -> None:
    decision = type("D", (), {"expert": "a", "category": "k", "confidence": 1.0, "uncertain": False})
    shown = decided(["x" * 60, "y\n z" + "y" * 99], [decision, decision])[0].rows
    assert [row[0] for row in shown] == ["x" * 60, "y z" + "y" * 56 + "…"]


def cells(told: str) -> list[list[str]]:
    """Rows of printed tables."""
    lines = [line for line in told.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
