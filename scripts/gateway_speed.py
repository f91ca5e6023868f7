"""What the gateway costs a request: `python scripts/gateway_speed.py [rounds=5] [requests=160] [peers=FOLDER]`.

One mock backend, and in front of it, each in a process of its own: the gateway (a key, a budget and a trace on), the
gateway with a router asked for each request, and bare relays that only read a body, post it and send back what comes,
by aiohttp and by httpx; with a FOLDER from gateway_peers.py, other gateways too. In every round each target is asked in
turn, one request at a time and 16 at once, streamed and not. CPU is that of the server process and its children, user
and system; added latency is the median beside the backend asked directly in the same round. Writes
results/gateway_speed.json.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gateway_peers

ROOT = Path(__file__).parents[1]
KEY = "a-key-of-the-speed-run"
WORDS = 32
TEXT = " ".join(["word"] * WORDS)
QUESTION = {"messages": [{"role": "user", "content": "Which of these planets has the most moons, and why? " * 8}]}
OURS = ("backend", "aiohttp", "httpx", "gateway")


# -- servers -----------------------------------------------------------------------------------------------------------


def answer(stream: bool) -> tuple[bytes, list[bytes]]:
    """Content type and parts of the mock's answer."""
    head = {"id": "chatcmpl-1", "created": 1, "model": "mock-1"}
    if not stream:
        choice = {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": WORDS, "total_tokens": 100 + WORDS}
        whole = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        return b"application/json", [json.dumps(whole).encode()]
    parts = []
    for i in range(WORDS):
        choice = {"index": 0, "delta": {"content": "word "}, "finish_reason": "stop" if i == WORDS - 1 else None}
        parts.append(
            b"data: %s\n\n" % json.dumps({**head, "object": "chat.completion.chunk", "choices": [choice]}).encode()
        )
    return b"text/event-stream", [*parts, b"data: [DONE]\n\n"]


async def body_of(receive: Any) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def send_all(send: Any, kind: bytes, parts: AsyncIterator[bytes]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    async for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def mock(scope: Any, receive: Any, send: Any) -> None:
    kind, parts = answer(json.loads(await body_of(receive) or b"{}").get("stream", False))

    async def each() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    await send_all(send, kind, each())


def by_aiohttp(backend: str) -> Any:
    """A relay and nothing more."""
    import aiohttp

    session = None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal session
        session = session or aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        body = await body_of(receive)
        async with session.post(backend, data=body, headers={"Content-Type": "application/json"}) as found:
            await send_all(send, found.headers["Content-Type"].encode(), found.content.iter_any())

    return app


def by_httpx(backend: str) -> Any:
    import httpx2 as httpx

    client = None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal client
        client = client or httpx.AsyncClient(limits=httpx.Limits(max_connections=None), trust_env=False)
        body = await body_of(receive)
        async with client.stream("POST", backend, content=body, headers={"Content-Type": "application/json"}) as found:
            await send_all(send, found.headers["Content-Type"].encode(), found.aiter_raw())

    return app


def gateway(backend: str) -> Any:
    from moesaic.llms.gateway.app import build
    from moesaic.llms.gateway.config import read_config
    from moesaic.llms.gateway.routers import Decision

    class Stub:
        name = "moesaic/stub"

        def decide(self, prompt: str, *, session: str) -> Decision:
            return Decision("mock", "planets", 0.9)

    folder = Path(tempfile.mkdtemp())
    model = {"name": "mock", "endpoint": backend.removesuffix("/chat/completions"), "input_price": 0.1,
             "output_price": 0.4, "parameters": 1}  # fmt: skip
    keys = [{"id": "speed", "env": "SPEED_KEY", "budget": 1e5, "requests_per_minute": 10**6}]
    file = folder / "gateway.yaml"
    file.write_text(json.dumps({"models": [model], "keys": keys, "trace": {"file": "trace.jsonl"}}))
    os.environ["SPEED_KEY"] = KEY
    return build(read_config(file), {"moesaic/stub": Stub()})


def serve(kind: str, port: int, backend: str) -> None:
    import uvicorn

    app = mock if kind == "backend" else {"aiohttp": by_aiohttp, "httpx": by_httpx, "gateway": gateway}[kind](backend)
    lifespan = "on" if kind == "gateway" else "off"
    uvicorn.run(app, port=port, log_level="warning", access_log=False, lifespan=lifespan)  # type: ignore[arg-type]


# -- load --------------------------------------------------------------------------------------------------------------


def said(whole: bytes, stream: bool) -> str:
    """The text of an answer."""
    if not stream:
        return json.loads(whole)["choices"][0]["message"]["content"]
    parts = [json.loads(line[6:]) for line in whole.decode().splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for part in parts for choice in part["choices"]).strip()


async def load(
    url: str, body: dict[str, Any], headers: dict[str, str], requests: int, at_once: int
) -> dict[str, float]:
    """Ask so many times; requests a second and seconds of the median request. The first answer is read."""
    import aiohttp

    data = json.dumps(body).encode()
    times: list[float] = []

    async def client(session: Any, count: int) -> None:
        for _ in range(count):
            begun = time.perf_counter()
            async with session.post(url, data=data, headers={"Content-Type": "application/json", **headers}) as found:
                whole = await found.read()
                times.append(time.perf_counter() - begun)
                right = found.status == 200 and TEXT[:4].encode() in whole
                if not right or (len(times) == 1 and said(whole, body["stream"]) != TEXT):
                    raise SystemExit(f"{url} answered {found.status}: {whole[:200]!r}")

    async with aiohttp.ClientSession() as session:
        begun = time.perf_counter()
        await asyncio.gather(*(client(session, requests // at_once) for _ in range(at_once)))
    return {"rate": len(times) / (time.perf_counter() - begun), "p50": statistics.median(times)}


def cpu(process: int) -> float:
    """Milliseconds that a process and its children have run, as Linux counts them, to the nanosecond."""
    clock = (~process << 3) | 2  # as clock_getcpuclockid(3) makes it; threads that have ended count
    files = Path(f"/proc/{process}/task").glob("*/children")
    children = [int(child) for file in files if file.exists() for child in file.read_text().split()]
    return time.clock_gettime(clock) * 1e3 + sum(map(cpu, children))


def measure(
    process: int, url: str, body: dict[str, Any], headers: dict[str, str], requests: int, at_once: int
) -> dict[str, float]:
    before = cpu(process)
    found = asyncio.run(load(url, body, headers, requests, at_once))
    found["cpu_ms"] = (cpu(process) - before) / (requests // at_once * at_once)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as place:
        return int(place.getsockname()[1])


def bound_to_us() -> None:
    """Linux ends this process when the one that started it ends, however it does."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def started(kind: str, port: int, backend: str, peers: str = "") -> subprocess.Popen[bytes]:
    if kind in gateway_peers.PEERS:
        command, environment = gateway_peers.command(Path(peers), kind, port)
        log = (Path(peers) / f"{kind}.log").open("wb")
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, preexec_fn=bound_to_us)
    else:
        command = [sys.executable, __file__, "serve", kind, str(port), backend]
        process = subprocess.Popen(command, preexec_fn=bound_to_us)
    for _ in range(3000):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return process
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.1)
    process.kill()
    raise SystemExit(f"{kind} did not start")


def main(rounds: int = 5, requests: int = 160, peers: str = "") -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    others = gateway_peers.PEERS if peers else ()
    ports = {kind: free_port() for kind in (*OURS, *others)}
    path = "/v1/chat/completions"
    backend = f"http://127.0.0.1:{ports['backend']}{path}"
    base = backend.removesuffix("/chat/completions")
    if peers:
        gateway_peers.configure(Path(peers), base)
    ours = {"Authorization": f"Bearer {KEY}"}
    targets = {kind: (kind, "mock", ours) for kind in OURS} | {"routed": ("gateway", "moesaic/stub", ours)}
    targets |= {kind: (kind, "mock", gateway_peers.headers(kind, base)) for kind in others}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    rows: list[dict[str, Any]] = []
    try:
        for kind, port in ports.items():
            processes[kind] = started(kind, port, backend, peers)
        for i in range(-1, rounds):
            for stream in (False, True):
                for at_once in (1, 16):
                    for target, (kind, model, headers) in targets.items():
                        body = {"model": model, "stream": stream, **QUESTION}
                        url = f"http://127.0.0.1:{ports[kind]}{path}"
                        told = {"round": i, "target": target, "stream": stream, "at_once": at_once}
                        found = measure(processes[kind].pid, url, body, headers, requests, at_once)
                        if i >= 0:
                            rows.append({**told, **found})
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
    table = summary(rows)
    print(*(json.dumps(row) for row in table), sep="\n")
    command = f"python scripts/gateway_speed.py {rounds} {requests}" + " peers=FOLDER" * bool(peers)
    content = {"command": command, "cpus": os.cpu_count(), "python": sys.version.split()[0],
               "versions": {kind: gateway_peers.version(Path(peers), kind) for kind in others},
               "table": table, "rounds": rows}  # fmt: skip
    (ROOT / "results" / "gateway_speed.json").write_text(json.dumps(content, indent=1) + "\n")


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over rounds; added latency is of the pairs in each round."""
    table = []
    for stream in (False, True):
        for at_once in (1, 16):
            of = {
                t: [r for r in rows if (r["target"], r["stream"], r["at_once"]) == (t, stream, at_once)]
                for t in dict.fromkeys(row["target"] for row in rows)
            }
            for target, found in of.items():
                added = [(row["p50"] - plain["p50"]) * 1e3 for row, plain in zip(found, of["backend"], strict=True)]
                table.append({
                    "target": target, "stream": stream, "at_once": at_once,
                    "cpu_ms": round(statistics.median(row["cpu_ms"] for row in found), 3),
                    "added_p50_ms": round(statistics.median(added), 3),
                    "requests_per_second": round(statistics.median(row["rate"] for row in found), 1),
                })  # fmt: skip
    return table


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        peers = [argument.removeprefix("peers=") for argument in sys.argv[1:] if argument.startswith("peers=")]
        numbers = [int(argument.split("=")[-1]) for argument in sys.argv[1:] if not argument.startswith("peers=")]
        main(*numbers, peers="".join(peers))
