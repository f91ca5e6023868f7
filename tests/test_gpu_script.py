"""`make gpu`: what it asks for, in which order, and what it shows."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu.py"


@pytest.fixture
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(ratio: float) -> dict[str, float]:
    return {"ms": 1.0, "ratio": ratio, "low": ratio, "high": ratio, "to_base": ratio}


@pytest.fixture
def asked(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was run; suites leave a figure in their file."""
    commands: list[list[str]] = []

    def run(command: list[str], **settings: Any) -> Any:
        assert settings["timeout"] >= 1
        commands.append(command[2:])
        if "bench" in command:
            named = dict(part.split("=", 1) for part in command if "=" in part)
            file = Path(named["out"])
            found = json.loads(file.read_text()) if file.exists() else {"machine": {"device": "a GPU"}}
            rows = {"lora": row(1.0), "mola": row(1.04)}
            made = {"train": {"model_step": rows}, "decode": {"decode": {"1": rows, "8": {"lora": row(1.0)}}},
                    "crossover": {"crossover": {"limit": 192}}, "compiled": {"compiled": rows}}  # fmt: skip
            file.write_text(json.dumps({**found, **made[named["suites"]]}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_without_a_device_the_tests_skip_and_no_more_is_done(
    gpu: Any,
    asked: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main(["2048"], folder=tmp_path) == 0
    assert asked == [["pytest", "-m", "gpu", "-q"]]
    assert "nothing to measure" in capsys.readouterr().out


def test_each_suite_at_each_width_and_a_short_table_last(
    gpu: Any, asked: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert gpu.main(["64", "128"], device="cpu", rounds=2, folder=tmp_path) == 0
    assert len(asked) == 1 + 2 * len(gpu.SUITES)
    assert {"device=cpu", "dtype=bfloat16", "d=64", "suites=train", f"out={tmp_path}/bench-cpu-64.json"} <= {*asked[1]}
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "a GPU, d=64, bf16: time, LoRA of rank 64 is 1, rank space up to E*r = 192"
    assert said[1].split() == ["train", "captured", "decode,", "1", "rows", "decode,", "8", "rows"]
    assert said[3].split() == ["mola", "1.04", "1.04", "1.04"]


def test_the_time_ends(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(command: list[str], timeout: float, **settings: Any) -> Any:
        if "bench" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.main(["64"], device="cpu", folder=tmp_path) == 1
    assert "train at d=64: no time left" in capsys.readouterr().out
