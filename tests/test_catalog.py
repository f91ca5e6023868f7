"""Catalogs of language models: what is exact, what is missing, what is ambiguous."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesaic.errors import ConfigError
from moesaic.llms.catalog import Catalog

SMALL: dict[str, Any] = {"name": "small-1b", "input_price": 0.1, "output_price": 0.2, "parameters": 1}
LARGE: dict[str, Any] = {"name": "large-70b", "aliases": ["large"], "input_price": 1, "output_price": 2.5,
                         "parameters": 70, "active": 12.5, "endpoint": "http://127.0.0.1:8000/v1"}  # fmt: skip


def test_models_are_found_by_name_and_alias_alone(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("models:\n- {name: a, aliases: [b], input_price: 0.5, output_price: 0, parameters: 7}\n")
    catalog = Catalog.read(file)
    assert [*catalog] == ["a"]
    assert catalog.resolve("b") is catalog.resolve("a") is catalog["a"]
    with pytest.raises(ConfigError, match="no model 'A'; "):
        catalog.resolve("A")


def test_a_model_that_a_table_scores_and_a_catalog_lacks_is_named_with_both() -> None:
    held = Catalog.of([{**SMALL, "name": "a", "aliases": ["x/a"]}], "models.yaml")
    assert [model.name for model in held.scored(["x/a", "a"], "t.jsonl")] == ["a", "a"]
    with pytest.raises(
        ConfigError, match=r"models.yaml has no model 'b', of which t.jsonl has scores: add it; known: "
    ):
        held.scored(["a", "b"], "t.jsonl")


def test_costs_and_sizes() -> None:
    small, large = Catalog.of([SMALL, LARGE]).values()
    assert large.cost(1_000_000, 2_000_000) == pytest.approx(6.0)
    assert (small.size, small.active_size, large.size, large.active_size) == (1, 1, 70, 12.5)


def test_a_key_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = Catalog.of([{**SMALL, "key_env": "SMALL_KEY"}]).values()
    with pytest.raises(ConfigError, match="model small-1b: SMALL_KEY is not set"):
        model.key()
    monkeypatch.setenv("SMALL_KEY", "secret")
    assert model.key() == "secret"
    assert "secret" not in repr(model)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "names no model"),
        ([SMALL, SMALL], "small-1b could mean small-1b or small-1b"),
        ([LARGE, {**SMALL, "aliases": ["large"]}], "large could mean large-70b or small-1b"),
        ([{**SMALL, "output_price": None}], "output_price is missing .USD a million tokens"),
        ([{**SMALL, "input_price": -1}], "input_price=-1.0 must be at least 0"),
        ([{**SMALL, "input_price": float("nan")}], "input_price=nan must be"),
        ([{**SMALL, "parameters": 0}], "parameters=0.0 must be above 0"),
        ([{**SMALL, "context": 0}], "context=0 must be above 0"),
        ([{**SMALL, "input_price": "much"}], "model small-1b: input_price"),
        ([{**SMALL, "prize": 1}], "a model's prize: "),
        ([{**SMALL, "name": ""}], "a name is a line of 1 to 200"),
        ([{**SMALL, "name": "a\nb"}], "a name is a line"),
        ([{**SMALL, "name": "moesaic/coe"}], "are the gateway's own"),
        ([{**SMALL, "endpoint": "ftp://x"}], "endpoint='ftp://x' must be"),
        ([{**SMALL, "endpoint": "http://user:pass@x/v1"}], "must be http://HOST"),
        ([{**SMALL, "examples": {"mmlu": 1.5}}], "scores between 0 and 1"),
        (["x"], "models must be a list"),
        (None, "models must be a list"),
    ],
)
def test_what_no_catalog_can_hold_is_one_line(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        Catalog.of(given)
    assert "\n" not in str(error.value)
