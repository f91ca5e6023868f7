"""A gateway's life: a file that changes under it, SIGTERM while it answers, and SIGKILL."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIConnectionError, APIError, AsyncOpenAI, NotFoundError, OpenAI

from moesaic.errors import ConfigError
from moesaic.llms.coe.fit import Fitting, fit
from moesaic.llms.coe.problem import Budget
from moesaic.llms.gateway import app, local
from moesaic.llms.gateway import serve as serving_
from moesaic.llms.gateway.calls import PICO
from moesaic.llms.gateway.config import read_config
from moesaic.llms.gateway.keys import hash_of
from moesaic.llms.gateway.serve import listening, serve, watch
from tests.gateways import (
    HEAD,
    KEY,
    WORDS,
    Got,
    Mock,
    chunk,
    completion,
    delta,
    event,
    mocking,
    model,
    read_rows,
    serving,
    whole,
    write,
)
from tests.toy_prompts import MODELS, table
from tests.toy_prompts import WORDS as WORDS_OF
from tests.toy_prompts import catalog as of_toy

USER: Any = [{"role": "user", "content": "hi there"}]
MAIN = """import logging, sys
from moesaic.llms.gateway.serve import serve
logging.basicConfig(level=20)
serve(sys.argv[1])"""


@pytest.fixture(scope="module")
def mock() -> Iterator[Mock]:
    with mocking() as found:
        yield found


class Process:
    """A gateway in a process of its own."""

    def __init__(self, file: Path) -> None:
        self.folder, self.log = file.parent, file.with_name(f"log-{time.monotonic_ns()}")
        with self.log.open("a") as out:
            self._process = subprocess.Popen([sys.executable, "-c", MAIN, str(file)], stdout=out, stderr=out)
        self.url = self.said("http://")[-1].split(":serve:")[-1].split("serve:")[-1]

    def said(self, what: str, count: int = 1) -> list[str]:
        """Lines of its log with a text, once there are so many."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            lines = [line for line in self.log.read_text().splitlines() if what in line]
            if len(lines) >= count:
                return lines
            assert self._process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"no {what!r} in {self.log.read_text()}")

    def end(self, sign: signal.Signals) -> int:
        self._process.send_signal(sign)
        return self._process.wait(30)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    running: list[Process] = []

    def start(file: Path) -> Process:
        running.append(Process(file))
        return running[-1]

    yield start
    for process in running:
        process._process.kill()
        process._process.wait()


def ask(url: str, name: str = "a") -> str:
    client = OpenAI(base_url=url, api_key=KEY, max_retries=0)
    return str(client.chat.completions.create(model=name, messages=USER, max_tokens=8).choices[0].message.content)


def test_a_file_that_changes_is_gone_by_and_a_broken_one_is_not(
    mock: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving_, "EVERY", 0.02)
    caplog.set_level("INFO")
    models = [model("a", mock)]
    file = write(tmp_path, models)

    def said(what: str) -> None:
        deadline = time.monotonic() + 20
        while not any(what in line for line in caplog.messages):
            assert time.monotonic() < deadline, caplog.messages
            time.sleep(0.01)
        assert all("\n" not in line for line in caplog.messages)
        caplog.clear()

    with serving(file) as server:
        watching = asyncio.run_coroutine_threadsafe(watch(server.gateway, file), server.loop)
        time.sleep(0.1)
        with pytest.raises(NotFoundError):
            ask(server.url, "b")
        write(tmp_path, [*models, model("b", mock)])
        said("has changed, and is in force")
        assert ask(server.url, "b") == "".join(WORDS)
        for broken in ("models: [", json.dumps({"models": models, "prot": 1}), json.dumps({"models": []}), ""):
            file.write_text(broken)
            said("; the configuration before it stays in force")
            assert ask(server.url, "b") == "".join(WORDS)
        write(tmp_path, models, port=1234)
        said("port cannot change while the gateway runs")
        file.unlink()
        said("stays in force")
        write(tmp_path, models, keys=[{"id": "k", "hash": hash_of(KEY)}])
        said("has changed")
        with pytest.raises(NotFoundError):
            ask(server.url, "b")
        assert [row["key"] for row in server.rows()] == ["anybody"] * 5
        watching.cancel()


def test_a_catalog_and_a_router_that_change_are_gone_by_too(
    mock: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_, "EVERY", 0.02)
    catalog, made = tmp_path / "models.yaml", tmp_path / "made"
    catalog.write_text(json.dumps({"models": [model(name, mock) for name in MODELS]}))
    file, told = tmp_path / "gateway.yaml", list[str]()
    file.write_text(json.dumps({"catalog": "models.yaml", "routers": {"coe": "made"}}))
    pins = [{kind: {name: True} for kind in WORDS_OF} for name in MODELS[:2]]
    how = Fitting(encoder="tfidf", uncertainty="none")
    fit(table(), of_toy(), Budget(pins=pins[0]), how, out=made)

    def next_said(count: int) -> None:
        deadline = time.monotonic() + 30
        while len(told) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def model_of(router: str) -> str:
        client = OpenAI(base_url=server.url, api_key=KEY, max_retries=0)
        return client.chat.completions.create(model=router, messages=USER).model

    with serving(file) as server:
        watching = asyncio.run_coroutine_threadsafe(watch(server.gateway, file, told.append), server.loop)
        time.sleep(0.1)
        assert model_of("moesaic/coe") == MODELS[0]
        fit(table(), of_toy(), Budget(pins=pins[1]), how, out=made, overwrite=True)
        next_said(1)
        assert model_of("moesaic/coe") == MODELS[1]
        catalog.write_text(json.dumps({"models": [model(name, mock) for name in (*MODELS, "another")]}))
        next_said(2)
        assert model_of("another") == "another"
        watching.cancel()


def test_a_request_goes_by_the_file_that_it_came_under(mock: Mock, tmp_path: Path) -> None:
    with serving(write(tmp_path, [model("a", mock)])) as server, mocking() as other:

        async def slow(got: Got, out: asyncio.StreamWriter) -> None:
            await asyncio.to_thread(write, tmp_path, [model("a", other)])
            await asyncio.wrap_future(
                asyncio.run_coroutine_threadsafe(
                    server.gateway.reload(read_config(tmp_path / "gateway.yaml")), server.loop
                )
            )
            out.write(whole(completion()))

        mock.behaviours["a"] = slow
        assert ask(server.url) == "".join(WORDS)
        assert not other.got
        del mock.behaviours["a"]
        ask(server.url)
        assert len(other.got) == 1


def test_sigterm_lets_calls_end_and_books_each_once(mock: Mock, tmp_path: Path, started: Any) -> None:
    """Eight streams run; new requests are turned away, and the eight end whole."""
    mock.got.clear()

    async def slow(got: Got, out: asyncio.StreamWriter) -> None:
        out.write(HEAD)
        for word in WORDS:
            out.write(chunk(event(delta(word))))
            await out.drain()
            await asyncio.sleep(0.3)
        out.write(chunk(b"data: [DONE]\n\n") + chunk(b""))

    mock.behaviours["s"] = slow
    process = started(
        write(tmp_path, [model("a", mock), model("s", mock)], port=0, keys=[{"id": "k", "hash": hash_of(KEY)}])
    )

    async def run() -> list[str]:
        client = AsyncOpenAI(base_url=process.url, api_key=KEY, max_retries=0)
        streams = [await client.chat.completions.create(model="s", messages=USER, stream=True) for _ in range(8)]
        process._process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        with pytest.raises(APIConnectionError):
            await client.chat.completions.create(model="a", messages=USER)
        return ["".join([part.choices[0].delta.content or "" async for part in stream]) for stream in streams]

    assert asyncio.run(run()) == ["".join(WORDS)] * 8
    assert process._process.wait(30) in (0, -signal.SIGTERM)
    rows = read_rows(tmp_path)
    assert [(row["state"], row["ended"]) for row in rows] == [("settled", "whole")] * 8
    assert len({row["id"] for row in rows}) == len(mock.got) == 8
    assert "Traceback" not in process.log.read_text()


def test_calls_that_do_not_end_in_time_are_broken_off_and_booked(mock: Mock, tmp_path: Path, started: Any) -> None:
    async def silent(got: Got, out: asyncio.StreamWriter) -> None:
        out.write(HEAD + chunk(event(delta("word"))))
        await out.drain()
        await asyncio.sleep(30)

    mock.behaviours["s"] = silent
    process = started(write(tmp_path, [model("s", mock, idle=60)], port=0, drain_seconds=1))
    client = OpenAI(base_url=process.url, api_key="-", max_retries=0)
    stream = client.chat.completions.create(model="s", messages=USER, stream=True)
    assert next(iter(stream)).choices[0].delta.content == "word"
    process.end(signal.SIGTERM)
    (row,) = read_rows(tmp_path)
    assert (row["state"], row["ended"], row["cost"]) == ("settled", "partial", (6 + 2) * PICO // 10**6)
    assert "Traceback" not in process.log.read_text()


def test_sigkill_loses_no_budget_and_sighup_reads_the_file(mock: Mock, tmp_path: Path, started: Any) -> None:
    """Two calls are settled at 13 and 13; three that run are killed, at 6 + 2 * 8 each."""
    mock.got.clear()

    async def silent(got: Got, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    mock.behaviours["s"] = silent
    keys = [{"id": "k", "hash": hash_of(KEY), "budget": 1.0}]
    file = write(tmp_path, [model("a", mock), model("s", mock, idle=60)], port=0, keys=keys)
    process = started(file)
    ask(process.url)
    process._process.send_signal(signal.SIGHUP)
    process.said("has changed, and is in force")
    ask(process.url)

    async def run() -> None:
        client = AsyncOpenAI(base_url=process.url, api_key=KEY, max_retries=0)
        asking = [
            asyncio.create_task(client.chat.completions.create(model="s", messages=USER, max_tokens=8))
            for _ in range(3)
        ]
        while mock.names().count("s") < 3:
            await asyncio.sleep(0.02)
        process.end(signal.SIGKILL)
        for outcome in await asyncio.gather(*asking, return_exceptions=True):
            assert isinstance(outcome, APIError)

    asyncio.run(run())
    again = started(file)
    assert "3 calls that a dead gateway left are booked as they were reserved" in again.log.read_text()
    ask(again.url)
    again.end(signal.SIGTERM)
    costs = [(row["state"], row["cost"] * 10**6 // PICO) for row in read_rows(tmp_path)]
    assert costs == [("settled", 13)] * 2 + [("abandoned", 22)] * 3 + [("settled", 13)]


def test_a_ledger_that_somebody_locks_does_not_keep_a_gateway_from_ending(
    mock: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "SETTLING", 0.3)
    other = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None, check_same_thread=False)

    async def locks(got: Got, out: asyncio.StreamWriter) -> None:
        other.execute("BEGIN IMMEDIATE")
        out.write(whole(completion()))

    mock.behaviours["locks"] = locks
    with serving(write(tmp_path, [model("locks", mock)])) as server:
        assert ask(server.url, "locks") == "".join(WORDS)
        begun = time.monotonic()
    assert time.monotonic() - begun < 5
    assert "1 calls that have ended are not in the ledger: its next start books them as reserved" in caplog.messages
    other.execute("ROLLBACK")
    other.close()


def test_a_reload_that_fails_closes_what_it_opened(mock: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Opened:
        async def close(self) -> None:
            closed.append(self)

    async def opens(model: Any, folder: Path) -> Any:
        return Opened()

    monkeypatch.setattr(local, "open_run", opens)
    models = [model("a", mock), model("here", "run:here")]
    with serving(write(tmp_path, models[:1])) as server:
        for count in (1, 2):
            with pytest.raises(ConfigError, match="nowhere is no folder"):
                server.run(server.gateway.reload(read_config(write(tmp_path, models, routers={"r": "nowhere"}))))
            assert len(closed) == count
        server.run(server.gateway.reload(read_config(write(tmp_path, models))))
        with pytest.raises(ConfigError, match="nowhere is no folder"):
            server.run(server.gateway.reload(read_config(write(tmp_path, models, routers={"r": "nowhere"}))))
        assert len(closed) == 2  # the one that is in use stays open
        assert ask(server.url) == "".join(WORDS)
    assert len(closed) == 3


def test_an_address_that_cannot_be_had_is_said(tmp_path: Path, mock: Mock) -> None:
    with listening("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: "):
            serve(write(tmp_path, [model("a", mock)], port=port))
    with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid:1: "):
        listening("no.such.host.invalid", 1)
