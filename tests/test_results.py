"""What is said of results: the command they were made with, and the arms that need a word."""

import importlib
from pathlib import Path

import pytest

import moesaic
from moesaic.runs import results

SCRIPT = Path(__file__).parents[1] / "scripts" / "results.py"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (str(Path(moesaic.__file__).with_name("cli") / "main.py"), "moesaic"),
        (str(Path(moesaic.__file__).with_name("__main__.py")), "moesaic"),
        ("/somewhere/bin/moesaic", "moesaic"),
        ("/somewhere/mine.py", "mine.py"),
    ],
)
def test_a_command_is_what_a_user_types(program, said, monkeypatch):
    monkeypatch.setattr("sys.argv", [program, "compare", "a b.yaml"])
    assert results.command_line() == f"{said} compare 'a b.yaml'"


def test_arms_that_need_a_word_have_one(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script = importlib.import_module("results")
    mixer = {"method": "lora-mixer", "adapter": {}}
    arms = {"lora": {"method": "lora", "adapter": {}}, "lora-mixer": mixer}
    arms["half"] = {"method": "lora-mixer", "adapter": {"hard_fraction": 0.5}}
    settings = {"steps": 400, "schedule": "linear", "arms": arms}
    first, second = script.special(settings).split("; ")
    assert first.startswith("`lora-mixer` picks the expert by task id in the first 90 % of the steps")
    assert "learn in the last 40 steps alone" in first
    assert second.startswith("`half` picks the expert by task id in the first 50 %")
    controls = {name: {"method": "oracle", "adapter": {}} for name in ("oracle", "bound")}
    assert script.special(settings | {"arms": controls}).startswith("`oracle` gives each row the expert of its task")
    assert script.special(settings | {"arms": {}}) == ""


@pytest.mark.parametrize("page", ["findings", "results"])
def test_the_pages_in_docs_are_those_that_the_results_give(page, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script = importlib.import_module(page)
    docs = SCRIPT.parents[1] / "docs"
    assert script.page(docs.parent / "results") == (docs / f"{page}.md").read_text(encoding="utf-8")


def test_the_pictures_in_docs_are_those_that_the_results_give(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    docs = SCRIPT.parents[1] / "docs"
    drawn = {}
    pages = importlib.import_module("pages")
    for script in ("results_adapters", "results_ffn", "results_trees", "results_skills", "results_llms", "results_r1"):
        drawn |= pages.drawn(importlib.import_module(script).PICTURES, docs.parent / "results")
    assert drawn == {name: (docs / name).read_text(encoding="utf-8") for name in drawn}
    assert drawn.keys() == {path.name for path in docs.glob("*.svg")}


def test_the_figures_of_pages_are_those_that_the_results_give(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    docs = SCRIPT.parents[1] / "docs"
    pages = importlib.import_module("pages")
    for script in map(
        importlib.import_module, ("results_ffn", "results_trees", "results_skills", "results_llms", "results_r1")
    ):
        for name in script.BLOCKS:
            text = (docs / name).read_text(encoding="utf-8")
            assert pages.filled(script.BLOCKS, name, text, docs.parent / "results") == text
