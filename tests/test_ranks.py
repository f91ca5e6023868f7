"""Every method on two processes, by torchrun: DDP in a trainer and FSDP2 in a loop give what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import moesaic
from moesaic.errors import ConfigError
from moesaic.runs.folder import RunFolder
from moesaic.training.place import check_place
from tests import ranks
from tests.loops import collate
from tests.tiny import llama

REPOSITORY = Path(__file__).parents[1]


def launched(folder: Path, how: str, *methods: str, seconds: int = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return subprocess.run(
        [*command, "--nproc-per-node", str(ranks.RANKS), "tests/ranks.py", str(folder), how, *methods],
        cwd=REPOSITORY, timeout=seconds, text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


SAMPLE = {"ddp": ("hotmoe", "moelora"), "fsdp": ("lora-mixer", "moelora")}
"""Methods that share modules across layers, or whose loss looks at more than routing; the others are slow."""


Runs = Callable[[str, tuple[str, ...]], Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Where methods' runs on two processes are, by how the work is shared; each is made once."""

    @cache
    def made(how: str, methods: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        ended = launched(folder, how, *methods)
        assert ended.returncode == 0, ended.stderr[-2000:]
        return folder / how

    return made


def logits(adapter: Path) -> Tensor:
    """Of a plain model with a saved adapter."""
    model = PeftModel.from_pretrained(llama(initializer_range=0.5), str(adapter)).eval()
    by_prompt = model.peft_config["default"].scores(["one"]) is not None
    with torch.no_grad(), moesaic.routing_prompts(model, ["one", "two"]) if by_prompt else nullcontext():
        return model(**collate(ranks.examples()[:2])).logits  # type: ignore[no-any-return]


def cases() -> Iterator[Any]:
    for how, sample in SAMPLE.items():
        for methods in (sample, tuple(method for method in ranks.TRAINED if method not in sample)):
            marks = [] if methods is sample else [pytest.mark.slow]
            yield from (pytest.param(how, methods, name, id=f"{how}-{name}", marks=marks) for name in methods)


@pytest.mark.parametrize(("how", "methods", "method"), cases())
def test_losses_are_those_of_one_process_and_the_adapter_loads_anywhere(
    how: str, methods: tuple[str, ...], method: str, runs: Runs, tmp_path: Path
) -> None:
    ran = runs(how, methods)
    found = json.loads((ran / method / "losses.json").read_text())
    if how == "ddp":
        alone = ranks.in_a_trainer(method, tmp_path, gradient_accumulation_steps=ranks.RANKS)
    else:
        alone = ranks.in_a_loop(method, tmp_path)
    assert found.keys() == alone.keys()
    assert len(found["loss"]) == ranks.STEPS
    for key, values in alone.items():
        assert found[key] == pytest.approx(values, abs=1e-4), key
    torch.testing.assert_close(logits(ran / method / "adapter"), logits(tmp_path / "adapter"), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    ended = launched(tmp_path, "dies", "mola", seconds=120)
    assert ended.returncode != 0
    assert "SIGKILL" in ended.stderr
    assert not (tmp_path / "dies" / "mola" / "losses.json").exists()


def test_a_run_of_ours_is_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a run is one process: for several"):
        check_place(RunFolder(tmp_path / "run"), overwrite=False)
