"""A gateway and the backends behind it, over real HTTP in threads, for tests."""

from __future__ import annotations

import asyncio
import json
import socket
import sqlite3
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from openai import AsyncOpenAI, OpenAI

from moesaic.llms.gateway.app import Gateway, build
from moesaic.llms.gateway.config import read_config
from moesaic.llms.gateway.connections import bounded
from moesaic.llms.gateway.routers import Router

KEY = "a-key-that-is-long-enough"
SECRET = "the-secret-key-of-the-backend"
WORDS = ["Hel", "lo ", "wörld", "!"]


@dataclass
class Got:
    """A request as a backend got it."""

    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        return dict(json.loads(self.raw))


Behaviour = Callable[[Got, asyncio.StreamWriter], Awaitable[None]]


def whole(content: Any, status: str = "200 OK", *headers: str) -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def delta(text: str, finish: str | None = None, model: str = "mock-1") -> dict[str, Any]:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [choice]}


def completion(text: str = "".join(WORDS), model: str = "mock-1", usage: tuple[int, int] = (7, 3)) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    head = {"id": "c1", "object": "chat.completion", "created": 1, "model": model}
    return {**head, "choices": [choice], "usage": counts}


async def plain(got: Got, out: asyncio.StreamWriter) -> None:
    """Answers as OpenAI does, each model by its own name."""
    body = got.body
    if got.path.endswith("embeddings"):
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}]
        usage = {"prompt_tokens": 4, "total_tokens": 4}
        out.write(whole({"object": "list", "data": data, "model": body["model"], "usage": usage}))
    elif got.path.endswith("/v1/completions"):
        choice = {"index": 0, "text": "done", "logprobs": None, "finish_reason": "stop"}
        content = {"id": "c", "object": "text_completion", "created": 1, "model": body["model"], "choices": [choice]}
        if body.get("stream"):
            out.write(HEAD + chunk(event(content)) + chunk(b"data: [DONE]\n\n") + chunk(b""))
        else:
            out.write(whole(content))
    elif body.get("stream"):
        out.write(HEAD)
        for word in WORDS:
            out.write(chunk(event(delta(word, model=body["model"]))))
            await out.drain()
        out.write(chunk(event(delta("", "stop"))) + chunk(b"data: [DONE]\n\n") + chunk(b""))
    else:
        out.write(whole(completion(model=body["model"])))


def reset(out: asyncio.StreamWriter) -> None:
    """Break a connection off so that the other side sees an error."""
    place = out.get_extra_info("socket")
    place.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    out.transport.abort()


@dataclass
class Mock:
    """An HTTP server that behaves as it is told for each model, and keeps what it got."""

    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    got: list[Got] = field(default_factory=list)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().split("\r\n")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines if line)}
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
                got = Got(first.split()[1], headers, raw)
                self.got.append(got)
                await self.behaviours.get(got.body["model"], plain)(got, out)
                await out.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            out.close()

    def names(self) -> list[str]:
        return [got.body["model"] for got in self.got]


@contextmanager
def mocking() -> Iterator[Mock]:
    """A mock backend in a thread."""
    mock, ready = Mock(), threading.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        server = await asyncio.start_server(mock.serve, "127.0.0.1", 0)
        mock.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        async with server:
            await server.serve_forever()

    def main() -> None:
        asyncio.set_event_loop(loop)
        task = loop.create_task(run())
        mock.stop = lambda: loop.call_soon_threadsafe(task.cancel)  # type: ignore[attr-defined]
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            for other in asyncio.all_tasks(loop):
                other.cancel()
            loop.run_until_complete(asyncio.sleep(0))

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield mock
    finally:
        mock.stop()  # type: ignore[attr-defined]
        thread.join(10)


def model(name: str, mock: Mock | str, **more: Any) -> dict[str, Any]:
    endpoint = mock if isinstance(mock, str) else mock.url
    given = {"name": name, "endpoint": endpoint, "input_price": 1.0, "output_price": 2.0, "parameters": 1}
    return {**given, "connect": 2.0, "idle": 5.0, "total": 20.0, **more}


def write(folder: Path, models: list[dict[str, Any]], **more: Any) -> Path:
    file = folder / "gateway.yaml"
    file.write_text(json.dumps({"models": models, "policy": {"retries": 0}, **more}))
    return file


@dataclass
class Served:
    """A gateway that runs. Books are read out of its file."""

    url: str
    folder: Path
    gateway: Gateway
    loop: asyncio.AbstractEventLoop

    def client(self, key: str = KEY, **more: Any) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, **more)

    def async_client(self, key: str = KEY, **more: Any) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=self.url, api_key=key, max_retries=0, **more)

    def port(self) -> int:
        return int(self.url.split(":")[2].split("/")[0])

    def run(self, work: Any) -> Any:
        """The result of a coroutine in the gateway's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def rows(self) -> list[dict[str, Any]]:
        """The ledger once nothing is open, oldest first."""

        async def settled() -> None:
            while self.gateway.metrics.running:
                await asyncio.sleep(0.01)
            await self.gateway.writer.written()

        self.run(settled())
        return read_rows(self.folder)

    def trace(self) -> list[dict[str, Any]]:
        self.rows()
        return [json.loads(line) for line in (self.folder / "trace.jsonl").read_text().splitlines()]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    base = sqlite3.connect(folder / "ledger.sqlite")
    base.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in base.execute("SELECT * FROM calls ORDER BY id")]
    finally:
        base.close()


@contextmanager
def serving(file: Path, routers: Mapping[str, Router] | None = None) -> Iterator[Served]:
    """A gateway in a thread of its own, over HTTP."""
    found: dict[str, Any] = {}
    ready, place = threading.Event(), socket.create_server(("127.0.0.1", 0))

    async def run() -> None:
        config = read_config(file)
        found["gateway"] = build(config, routers)
        found["loop"] = asyncio.get_running_loop()
        await found["gateway"].start()
        options = uvicorn.Config(
            found["gateway"], log_level="error", lifespan="on", timeout_graceful_shutdown=2,
            http=bounded(config.settings.body_seconds),
        )  # fmt: skip
        found["server"] = uvicorn.Server(options)
        ready.set()
        await found["server"].serve(sockets=[place])

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert ready.wait(20)
    url = f"http://127.0.0.1:{place.getsockname()[1]}/v1"
    try:
        yield Served(url, file.parent, found["gateway"], found["loop"])
    finally:
        found["server"].should_exit = True
        thread.join(20)
        assert not thread.is_alive()
