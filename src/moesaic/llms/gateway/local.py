"""Models of this process: a mixture that is loaded here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, MissingDependency
from moesaic.llms.catalog import Model
from moesaic.llms.gateway.replies import Failed, Reply
from moesaic.llms.gateway.requests import EMBEDDINGS

_SLICE = 0.05
"""Seconds between two looks whether the last call of a mixture that is let go has ended."""


class Run:
    """A run folder's mixture behind the same application that `moesaic serve` has, asked without a network.

    Its requests share every forward where the model can (see `serving.engine`).
    """

    def __init__(self, model: Model, engine: Any, app: Any) -> None:
        self._model, self._engine, self._app = model, engine, app

    async def open(self, path: str, body: bytes) -> Reply:
        if path == EMBEDDINGS:
            raise Failed("a mixture writes answers, it embeds nothing", status=400, again=False, counts=False)
        sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        gone = asyncio.Event()
        task = asyncio.ensure_future(self._app(_scope(path, body), _receiving(body, gone), sent.put))
        task.add_done_callback(lambda _: sent.put_nowait({"type": "end"}))

        def close() -> None:
            gone.set()
            task.cancel()

        try:
            async with asyncio.timeout(self._model.idle):
                head = await sent.get()
        except TimeoutError:
            close()
            raise Failed(f"it wrote nothing for {self._model.idle:g} s", status=504) from None
        except BaseException:
            close()
            raise
        if head["type"] != "http.response.start":
            raise Failed("the mixture failed")
        kind = next((v.decode() for k, v in head["headers"] if k == b"content-type"), "")
        return Reply(head["status"], kind, None, self._reading(sent), close)

    async def close(self) -> None:
        while self._engine.running():
            await asyncio.sleep(_SLICE)
        self._engine.close()

    def _reading(self, sent: asyncio.Queue[dict[str, Any]]) -> Callable[[], Awaitable[bytes]]:
        end, more = asyncio.get_running_loop().time() + self._model.total, True

        async def read() -> bytes:
            nonlocal more
            part = b""
            while more and not part:
                message = await before(end, self._model, sent.get())
                if message["type"] != "http.response.body":
                    raise Failed("the mixture failed in the middle of an answer")
                more, part = message.get("more_body", False), message.get("body", b"")
            return part

        return read


async def before(end: float, model: Model, coming: Awaitable[Any]) -> Any:
    """What is awaited, if it comes before the loop's clock says `end`. Raises Failed otherwise."""
    try:
        async with asyncio.timeout_at(end):
            return await coming
    except TimeoutError:
        raise Failed(f"no end within {model.total:g} s", status=504) from None


def _scope(path: str, body: bytes) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"host", b"localhost")]
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": None, "server": ("localhost", 80),
    }  # fmt: skip


def _receiving(body: bytes, gone: asyncio.Event) -> Callable[[], Any]:
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def open_run(model: Model, folder: Path) -> Run:
    """Load a run's mixture. Raises MoesaicError where the folder holds none."""
    if not folder.is_dir():
        raise ConfigError(f"model {model.name}: {folder} is no folder of a run")
    try:
        from moesaic.serving.app import build
    except ImportError as error:
        raise MissingDependency(str(error.name), "llms") from None
    from moesaic.serving.engine import opened

    engine = await opened(await asyncio.to_thread(_loaded, folder))
    return Run(model, engine, build(engine, model.served_as or model.name))


def _loaded(folder: Path) -> Any:
    from moesaic.evaluation.opening import load, open_adapter

    return load(open_adapter(str(folder)))
