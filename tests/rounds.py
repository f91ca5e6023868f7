"""A scripted policy behind a gateway, for tests."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.llms.gateway.asker import Asker
from moesaic.llms.gateway.calls import PICO
from moesaic.llms.gateway.keys import hash_of
from moesaic.llms.router_r1.engine import STEP, Written
from moesaic.llms.router_r1.folder import Asking
from tests.gateways import KEY, Got, Mock, Served, completion, model, whole, write

NAME = "moesaic/r"
KEYS: list[dict[str, Any]] = [{"id": "k", "hash": hash_of(KEY), "budget": 1.0}]
ADDS, ENDS = "<think> sum </think><search> adder: two and two </search>", "<think> so </think><answer> 4 </answer>"
ASKS = "<think> verse </think><search> poet: a line </search>"
REPLY = "\n\n<information>four</information>\n\n"
MILLIONTH = PICO // 10**6


@dataclass
class Says:
    """A policy that says the lines of the question it is asked, and keeps what it reads. It holds one at a time."""

    lines: dict[str, list[str]]
    read_: list[str] = field(default_factory=list)
    wrote: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    holds: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, prompts: Sequence[str]) -> Saying:
        self.prompts += prompts
        question = prompts[0].rpartition("Question: ")[2].strip()
        return Saying(self, iter(self.lines[question]))


@dataclass
class Saying:
    policy: Says
    lines: Iterator[str]

    def write(self, who: Sequence[int]) -> list[Written]:
        assert list(who) == [0]
        assert self.policy.holds.acquire(blocking=False), "two rollouts write at once"
        try:
            time.sleep(0.002)
            text = next(self.lines)
            while text == "on and on":
                STEP.get()()
                time.sleep(0.01)
            self.policy.wrote.append(text)
        finally:
            self.policy.holds.release()
        return [Written(text, len(text.split()))]

    def read(self, who: int, text: str) -> tuple[int, ...]:
        self.policy.read_.append(text)
        return ()

    def clip(self, text: str, tokens: int) -> str:
        return " ".join(text.split()[:tokens])


def saying(text: str, usage: tuple[int, int] = (7, 3), wait: float = 0.0) -> Any:
    async def answer(got: Got, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(wait)
        out.write(whole(completion(text, got.body["model"], usage)))

    return answer


def policy(**lines: list[str]) -> Says:
    return Says({"q": [ADDS, ASKS, ENDS], **lines})


def file_of(tmp_path: Path, mock: Mock, **more: Any) -> Path:
    models = [model("adder", mock), model("poet", mock, output_price=4.0), model("known", "")]
    return write(tmp_path, models, **{"keys": KEYS, "trace": {"file": "trace.jsonl"}, **more})


def asking(says: Any, **more: Any) -> dict[str, Any]:
    return {NAME: Asker(NAME, says, Asking(models=("adder",), **more))}


def ask(server: Served, question: str = "q", budget: str | None = None, **more: Any) -> Any:
    """The answer, and headers with it."""
    headers = {} if budget is None else {"x-moesaic-budget": budget}
    return server.client().chat.completions.with_raw_response.create(
        model=more.pop("model", NAME), messages=[{"role": "user", "content": question}], extra_headers=headers, **more
    )


def requests(server: Served) -> list[dict[str, Any]]:
    """Rows of requests, without those of searches."""
    return [row for row in server.rows() if row["path"] != "search"]


def begun(server: Served, question: str = "q", *, stream: bool = False) -> http.client.HTTPConnection:
    line = http.client.HTTPConnection("127.0.0.1", server.port(), timeout=10)
    body = {"model": NAME, "messages": [{"role": "user", "content": question}], "stream": stream}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    line.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return line


def until(done: Any) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
