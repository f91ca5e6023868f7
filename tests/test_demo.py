"""The demo: both acts at a size that shows nothing but that they work, interrupted and gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moesaic.adapters.merges import MERGES
from moesaic.cli.demo import adapters, workers
from moesaic.cli.demo.adapters import _verdict as verdict_of_adapters
from moesaic.cli.demo.mixture import _verdict as verdict_of_mixture
from moesaic.cli.demo.settings import DemoSettings
from moesaic.cli.main import main
from moesaic.errors import ConfigError

SMALL = ["adapter_steps=2", "steps=2", "train_per_task=60", "test_per_task=2"]


class Here:
    """Does in this process, in order, what the demo gives to its workers."""

    def each(self, function: Any, items: Any, *rest: Any) -> Iterator[tuple[Any, Any]]:
        for item in list(items):
            yield item, function(item, *rest)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def alone() -> Iterator[Here]:
        yield Here()

    monkeypatch.setattr(workers, "workers", alone)
    monkeypatch.setattr(adapters, "GATE_STEPS", 2)


def test_both_acts_end_in_figures_and_words(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "demo"
    assert main(["demo", f"out={out}", *SMALL]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("act one", "own adapter", "answered by", "Merged into one", "act two", "trained parameters"):
        assert words in said
    found = json.loads((out / "results.json").read_text())
    one, two = found["adapters"], found["mixture"]
    assert one["scores"].keys() == {"base", *MERGES, "uniform", "retrieval", "glider", "own"}
    assert all(len(by_task) == 6 for by_task in one["scores"].values())
    assert one["best_merge"] in MERGES
    assert {row["adapter"] for row in one["answers"]} <= two["scores"]["lora"].keys()
    assert two["runs"]["lora"]["trainable_parameters"] == pytest.approx(
        two["runs"]["hotmoe"]["trainable_parameters"], rel=0.01
    )
    assert "overhead" not in said, "one run each says nothing of speed"

    files = [out / "adapters" / "results.json", out / "mixture" / "lora" / "adapter" / "adapter_model.safetensors"]
    before = [file.stat().st_mtime_ns for file in files]
    (out / "results.json").unlink()  # as an interruption in act two leaves it
    (out / "mixture" / "results.json").unlink()
    assert main(["demo", f"out={out}", *SMALL]) == 0
    assert "going on from what is there" in caplog.text
    assert [file.stat().st_mtime_ns for file in files] == before, "what is done and trained is kept"
    assert "act two" in capsys.readouterr().out
    again = json.loads((out / "results.json").read_text())
    assert again["mixture"]["scores"] == two["scores"]

    assert main(["demo", f"out={out}", *SMALL, "seed=1"]) == 2
    assert "holds a demo with seed=0, now 1: set it back, or overwrite=true" in capsys.readouterr().err
    assert main(["demo", f"out={out}", *SMALL, "act=mixture"]) == 0
    assert json.loads((out / "results.json").read_text())["adapters"] == one, "the other act is left alone"


def test_an_interrupted_act_keeps_what_is_trained(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "moesaic", "demo", f"out={out}", "act=adapters"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        logs = [out / "adapters" / task / "metrics.jsonl" for task in ("asc", "desc")]
        for _ in range(3000):
            if all(log.is_file() and log.read_text().count("\n") > 3 for log in logs):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "what is trained is kept, and the same command goes on from there" in said
    steps = {path.parent.parent.parent.name for path in (out / "adapters").glob("*/checkpoints/*/trainer_state.json")}
    assert steps == {"asc", "desc"}, "both are saved at the step that they had reached"
    assert not list((out / "adapters").glob("*/results.json"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["act=three"], "act=three; known: adapters, both, mixture"),
        (["act=adaptors"], "did you mean 'adapters'"),
        (["adapter_steps=0"], "adapter_steps=0 must be at least 1"),
        (["lr=nan"], "lr=nan must be a finite number"),
        (["train_per_task=200000"], "at most 200000"),
        (["prompt=x"], "prompt is a setting of `moesaic generate` and `moesaic inspect`"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_made(
    settings: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", f"out={tmp_path / 'demo'}", *settings]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_folder_that_is_no_demos_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("thesis.tex", "mine"), ("settings.json", "{}"), ("demo.json", '{"a": 1}')):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(content)
        assert main(["demo", f"out={folder}"]) == 2
        assert "holds files that are not a demo's" in capsys.readouterr().err
        assert (folder / name).read_text() == content


def test_verdicts_say_what_came_out() -> None:
    def act_one(merged: float, routed: float) -> str:
        scores = {"merge-svd": merged, "retrieval": routed, "glider": 0.1, "own": 0.9}
        by_task = {arm: {"max": share} for arm, share in scores.items()}
        return verdict_of_adapters({"scores": by_task, "test_lists": 900, "best_merge": "merge-svd"})

    assert act_one(0.1, 0.9).endswith(
        "routed by retrieval, 90.0 %; each asked its own task alone, 90.0 %. Routing keeps what merging loses."
    )
    assert act_one(0.8, 0.5).endswith("Merging was better here.")
    assert act_one(0.51, 0.5).endswith("Routing and merging are level here.")
    assert act_one(0.1, 0.1).endswith("Routing and merging are level here.")
    assert "are level (+0.1 points" in verdict_of_mixture({"base": 0, "lora": 0.9, "hotmoe": 0.901}, 900)
    assert "10.0 points below" in verdict_of_mixture({"base": 0, "lora": 0.9, "hotmoe": 0.8}, 900)
    assert "did not learn" in verdict_of_mixture({"base": 0, "lora": 0.9, "hotmoe": 0.05}, 900)


def test_acts_are_those_asked_for() -> None:
    assert DemoSettings().acts == ("adapters", "mixture")
    assert DemoSettings(act="mixture").acts == ("mixture",)
    with pytest.raises(ConfigError):
        DemoSettings(act="none").check()
