"""Jobs on a real Ray cluster of two workers; one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from moesaic.compare.run import run
from moesaic.runs.cluster import AGAIN, on_ray
from tests.tiny_folders import write_world


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_job_whose_worker_is_killed_is_given_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def work(number: int) -> int:
        begun = Path(f"begun-{number}")  # relative to this process's folder
        begun.write_text(begun.read_text() + "|" if begun.exists() else "|")
        if number == 1 and len(begun.read_text()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    with on_ray(work, range(4)) as ended:
        assert dict(ended) == {0: 0, 1: 1, 2: 4, 3: 9}
    assert [len(Path(f"begun-{number}").read_text()) for number in range(4)] == [1, 2, 1, 1]


def test_a_job_that_kills_every_worker_or_raises_is_told_and_the_others_go_on() -> None:
    def work(number: int) -> int:
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 1:
            raise ValueError("no such thing")
        return number

    with on_ray(work, range(3)) as ended:
        found = dict(ended)
    assert found.pop(2) == 2
    assert all(str(why).startswith("its task ended: ") for why in found.values())
    assert AGAIN > 0


@pytest.mark.slow
def test_a_comparison_whose_worker_is_killed_in_mid_cell_is_complete(tmp_path: Path) -> None:
    world, out, steps = write_world(tmp_path), tmp_path / "out", 60
    killed: list[int] = []

    def kill() -> None:
        """The worker whose cell is the first to have made a step."""
        while not any(file.stat().st_size for file in out.glob("cells/*/metrics.jsonl")):
            time.sleep(0.05)
        cell = next(p for p in psutil.process_iter(["cmdline"]) if "moesaic.compare.cells" in (p.info["cmdline"] or []))
        killed.append(cell.ppid())
        os.kill(cell.ppid(), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    shared = [f"model={world / 'encoder'}", f"data={world / 'encoder-data'}", f"steps={steps}", "batch_size=4"]
    assert run([*shared, "warmup=1", "threads=1", "methods=mola", "seeds=0", "engine=ray", f"out={out}"]) == 0
    assert killed
    summary = json.loads((out / "comparison.json").read_text())
    assert not summary["missing"]
    for cell in out.glob("cells/*"):
        assert json.loads((cell / "results.json").read_text())["steps"] == steps


def test_jobs_that_nobody_waits_for_any_more_are_called_off(tmp_path: Path) -> None:
    def work(number: int) -> int:
        for _ in range(0 if number == 0 else 1200):
            time.sleep(0.05)  # an interrupt is seen between two instructions
        (tmp_path / str(number)).touch()
        return number

    begun = time.monotonic()
    with on_ray(work, range(3)) as ended:
        assert next(ended) == (0, 0)
    assert time.monotonic() - begun < 30
    assert [file.name for file in tmp_path.iterdir()] == ["0"]
