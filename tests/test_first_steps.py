"""What somebody runs into who composes adapters for the first time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moesaic import nano
from moesaic.cli.main import main
from moesaic.data.examples import has_split
from moesaic.errors import AdapterError
from moesaic.lora.loading import read_config
from moesaic.models.embedded import embedded_name
from moesaic.models.gguf import SMOLLM2, SMOLLM2_SHA256
from tests.composing import TASKS, asked, make


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def composed(place: Path) -> Path:
    """Of the whole folder, by the default method where there is data."""
    folder = place.parent / "composed"
    shutil.copytree(place, place.parent / "loras", ignore=shutil.ignore_patterns("data"))
    given = ["model=nano", "adapter.ignore_base=true", "adapter.encoder=hashing", f"data={place / 'data'}"]
    assert main(["compose", f"adapters={place.parent / 'loras'}", *given, f"out={folder}"]) == 0
    return folder


def test_a_folder_of_adapters_stands_for_those_in_it(composed: Path) -> None:
    assert read_config(composed / "adapter").experts == sorted(TASKS)


def test_rows_make_retrieval_the_default_and_nothing_makes_arrow(composed: Path, place: Path, tmp_path: Path) -> None:
    assert read_config(composed / "adapter").method == "retrieval"
    assert main(asked(place, tmp_path / "out")) == 0
    assert read_config(tmp_path / "out" / "adapter").method == "arrow"


def test_what_is_scored_are_the_tasks_that_experts_are_called_after(
    composed: Path, place: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more"
    for task in (*TASKS, "stranger"):
        (more / task).mkdir(parents=True)
        (more / task / "train.jsonl").write_text(json.dumps({"task": task, "prompt": "a", "completion": "b"}))
    assert main(["eval", str(composed), f"data={more}", "split=train", "limit=1"]) == 0
    assert json.loads((composed / "eval-train.json").read_text())["tasks"].keys() == set(TASKS)
    assert main(["eval", str(composed), f"data={more}", "split=train", "limit=1", "tasks=stranger"]) == 0
    assert json.loads((composed / "eval-train.json").read_text())["tasks"].keys() == {"stranger"}


def test_a_base_that_has_a_name_is_called_by_it() -> None:
    assert embedded_name(f"/elsewhere/{Path(SMOLLM2).stem}-{SMOLLM2_SHA256[:12]}.1") == "smollm2"
    assert embedded_name(str(nano.path())) == "nano"
    assert embedded_name("meta-llama/Llama-3.2-1B") is None


def test_a_prompt_may_stand_alone_and_is_answered(composed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(composed), "3 4 down =", "answer=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == "3 4 down ="
    assert isinstance(found["answer"], str)
    assert main(["inspect", str(composed), "3 4 down =", "answer=0"]) == 0
    assert "answer:" not in capsys.readouterr().out
    for settings, said in (
        (["promt=x"], "unknown key 'promt'; did you mean 'prompt'"),
        (["x", "answer=-1"], "at least 0"),
    ):
        assert main(["inspect", str(composed), *settings]) == 2
        assert said in capsys.readouterr().err


def test_the_next_command_is_one_that_works(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["method=retrieval", "adapter.encoder=hashing"]
    assert main(asked(place, tmp_path / "a", *given, f"data={place / 'data'}")) == 0
    assert f"next: moesaic eval {tmp_path / 'a'}\n" in capsys.readouterr().out
    shutil.copytree(place / "data", tmp_path / "data")
    (tmp_path / "data" / "validation.jsonl").unlink()
    assert main(asked(place, tmp_path / "b", *given, f"data={tmp_path / 'data'}")) == 0
    said = capsys.readouterr().out
    assert f"next: moesaic eval {tmp_path / 'b'} data=HELD_OUT_ROWS" in said
    assert "import moesaic; PeftModel.from_pretrained" in said


def test_a_split_is_had_only_where_all_tasks_have_it(place: Path, tmp_path: Path) -> None:
    for task in ("a", "b"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "train.jsonl").write_text('{"prompt": "p", "completion": "c"}')
    (tmp_path / "a" / "validation.jsonl").write_text('{"prompt": "p", "completion": "c"}')
    assert has_split(tmp_path, "train")
    assert not has_split(tmp_path, "validation")
    assert has_split(tmp_path, "validation", ["a"])
    assert has_split(place / "data", "validation")
    assert not has_split(place / "data" / "train.jsonl", "validation")
    assert not has_split("owner/name", "validation")


def test_an_adapter_without_rows_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"task": task, "prompt": "1", "completion": "2"} for task in ("up", "down", "sorting")]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(asked(place, tmp_path / "out", "method=retrieval", f"data={tmp_path / 'data'}")) == 2
    said = capsys.readouterr().err
    assert "no rows of adapter 'max': those of data are of down, sorting, up" in said
    assert "'adapters={TASK: FOLDER, …}'" in said


def test_the_other_folder_is_named(composed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(composed / "adapter"), "x", "answer=0"]) == 0
    assert main(["compose", f"extend={composed / 'adapter'}", "drop=up", f"out={composed.parent / 'other'}"]) == 2
    assert f"it lies in one, {composed}" in capsys.readouterr().err
    with pytest.raises(AdapterError, match="that of this run is"):
        read_config(composed)
