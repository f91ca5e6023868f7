"""The local pool: rows, members and their catalog; trained for a few steps and asked over HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.data import examples
from moesaic.errors import TrainingError
from moesaic.llms import pool
from moesaic.llms.catalog import Catalog
from moesaic.llms.pool import LARGER, MEMBERS, TASKS, Member, billions, correct, entries, mixed, serving, train
from moesaic.llms.router_r1.asking import HttpPool
from moesaic.models.nano.tasks import list_of
from moesaic.runs.folder import read_json
from moesaic.runs.recipe import load_recipe
from tests.composing import make

SERVERS = """
import sys
from pathlib import Path
from moesaic.llms import pool

folder = Path(sys.argv[1])
with pool._process("x", folder, folder.parent) as (process, log):
    print(process.pid, flush=True)
    raise SystemExit(3)
"""


def test_mixed_rows_take_turns_and_no_list_of_training_is_asked() -> None:
    rows = mixed(1, train=40, validation=5, test=7)
    assert {split: len(found) for split, found in rows.items()} == {"train": 240, "validation": 30, "test": 42}
    for found in rows.values():
        assert [row["task"] for row in found[:6]] == [row["task"] for row in found[6:12]]
        assert {row["task"] for row in found} == {*TASKS}
    lists = {split: {list_of(row["prompt"]) for row in found} for split, found in rows.items()}
    assert not lists["train"] & (lists["validation"] | lists["test"])
    assert rows == mixed(1, train=40, validation=5, test=7) != mixed(2, train=40, validation=5, test=7)


def test_rows_are_written_as_training_reads_them(tmp_path: Path) -> None:
    rows = mixed(0, train=4, validation=2, test=3)
    pool.write_rows(tmp_path / "data", rows)
    for split, found in rows.items():
        read = examples.load(tmp_path / "data", split, tasks=TASKS)
        assert sorted((e.task, e.prompt, e.completion) for e in read) == sorted(tuple(row.values()) for row in found)


@pytest.mark.parametrize("member", [m for m in (*MEMBERS, *LARGER) if m.tasks], ids=lambda member: member.name)
def test_a_members_command_is_a_recipe(member: Member, tmp_path: Path) -> None:
    command = member.command(tmp_path / "data", tmp_path / "run", 3)
    assert command[1:5] == ["-m", "moesaic", "train", "lora"]
    recipe = load_recipe("lora", command[5:])
    assert (recipe.model, recipe.tasks, recipe.steps, recipe.seed) == (member.model, [*member.tasks], member.steps, 3)
    assert (recipe.adapter["r"], recipe.adapter["lora_alpha"]) == (member.rank, 2 * member.rank)
    assert sorted(recipe.adapter["target_modules"]) == ["down_proj", "gate_proj", "up_proj"]


def test_specialists_are_smaller_than_the_generalist_and_know_each_task_once() -> None:
    *specialists, generalist = MEMBERS
    assert sorted(task for member in specialists for task in member.tasks) == sorted(generalist.tasks)
    assert all(6 * member.rank == generalist.rank for member in specialists)


def test_a_member_as_it_is_adds_nothing_and_is_counted(tmp_path: Path) -> None:
    plain = Member("plain", tasks=())
    runs = train([plain], tmp_path / "none", tmp_path / "runs", 0)
    assert runs == {"plain": tmp_path / "runs" / "plain"}
    (entry,) = entries([plain], runs, {"plain": "http://127.0.0.1:1/v1"})
    catalog = Catalog.of([entry])
    assert catalog["plain"].size == billions(plain, runs["plain"]) == pytest.approx(0.0028041, abs=1e-6)
    assert catalog["plain"].description == "nano as it is"
    pool.write_rows(tmp_path / "data", mixed(0, train=1, validation=1, test=3))
    found = correct([plain], runs, tmp_path / "data", "test")
    assert {task: len(said) for task, said in found["plain"].items()} == dict.fromkeys(TASKS, 3)


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has a shell script stand for the interpreter that runs `moesaic`."""

    def runs(script: str) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return runs


def test_a_training_that_fails_is_one_line(tmp_path: Path, python: Callable[[str], None]) -> None:
    python("echo 'step 1 of 2'; echo 'moesaic: no space left' >&2; exit 2")
    with pytest.raises(TrainingError, match="training x ended with 2: moesaic: no space left"):
        train([Member("x")], tmp_path / "none", tmp_path / "runs", 0)


def test_a_server_that_does_not_come_up_is_one_line(
    tmp_path: Path, python: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    python("echo 'moesaic: no run folder' >&2; exit 2")
    with pytest.raises(TrainingError, match="serving x ended with 2: moesaic: no run folder"):
        with serving([Member("x")], {"x": tmp_path}, tmp_path):
            pass
    python("echo 'x: http://127.0.0.1:9/v1 (requests at once)' >&2; exec sleep 60")
    monkeypatch.setattr(pool, "STARTING", 0.3)
    with pytest.raises(TrainingError, match=r"serving x: no answer in 0 s; .*x\.serve\.log says more"):
        with serving([Member("x")], {"x": tmp_path}, tmp_path):
            pass


def test_a_server_that_does_not_end_is_killed(
    tmp_path: Path, python: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    python("trap '' TERM; echo up; while :; do sleep 0.05; done")
    monkeypatch.setattr(pool, "STOPPING", 0.3)
    with pool._process("x", tmp_path, tmp_path) as (process, log):
        while "up" not in log.read_text():
            time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL


def test_no_server_is_left_when_its_owner_ends(tmp_path: Path) -> None:
    make(tmp_path / "parts")
    ended = subprocess.run(
        [sys.executable, "-c", SERVERS, str(tmp_path / "parts" / "up")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 3, ended.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(ended.stdout), 0)


@pytest.mark.slow
def test_members_are_trained_and_answer_over_http_as_in_process(tmp_path: Path) -> None:
    members = [
        Member("order", tasks=("asc", "desc"), steps=3, batch_size=4),
        Member("lists", steps=3, batch_size=4, rank=48),
        Member("plain", tasks=()),
    ]
    rows = mixed(0, train=20, validation=2, test=3)
    pool.write_rows(tmp_path / "data", rows)
    runs = train(members, tmp_path / "data", tmp_path / "runs", 0)
    written = (runs["order"] / "results.json").stat().st_mtime_ns
    assert train(members, tmp_path / "data", tmp_path / "runs", 0) == runs
    assert (runs["order"] / "results.json").stat().st_mtime_ns == written, "what is trained is kept"
    trained = read_json(runs["lists"] / "results.json")["trainable_parameters"]
    assert billions(members[1], runs["lists"]) == pytest.approx(billions(members[2], runs["plain"]) + trained / 1e9)
    asking = HttpPool(bare=True, retries=0, max_tokens=16)
    with serving(members, runs, tmp_path) as catalog:
        assert [*catalog] == ["order", "lists", "plain"]
        assert catalog == Catalog.read(tmp_path / "catalog.yaml")
        endpoints = [model.endpoint for model in catalog.values()]
        assert len({*endpoints}) == 3
        found = correct(members, runs, tmp_path / "data", "test")
        for name, model in catalog.items():
            for row in rows["test"][:2]:
                (said,) = asking.ask([(model, row["prompt"])])
                assert (said.text.split() == row["completion"].split()) == found[name][row["task"]][0]
        (said,) = asking.ask([(replace(catalog["order"], served_as="lists"), "4 1 up =")])
        assert "HTTP Error 404" in said.failure
        models = list(catalog.values())
    assert all(said.failure for said in asking.ask([(model, "4 1 down =") for model in models]))
    asking.close()
