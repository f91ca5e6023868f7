"""Where models answer: OpenAI-compatible endpoints over HTTP. `local.py` has this process's, `providers.py` LiteLLM's.

Addresses come out of the catalog alone; redirections are not followed, and neither proxies nor credentials of the
environment are used.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from moesaic.errors import MissingDependency, first_line, path_of
from moesaic.llms.catalog import Catalog, Model
from moesaic.llms.gateway.policy import retry_after
from moesaic.llms.gateway.replies import SENDING, Backend, Failed, Reply

PREFIX = "/v1"


class Endpoint:
    """An OpenAI-compatible endpoint."""

    def __init__(self, session: Any, model: Model) -> None:
        from aiohttp import ClientTimeout
        from yarl import URL

        self._session = session
        self._base, self._url = model.endpoint.rstrip("/"), URL
        self._urls: dict[str, Any] = {}
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key := model.key():
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout = ClientTimeout(total=model.total, connect=model.connect, sock_read=model.idle)
        self._model = model

    async def open(self, path: str, body: bytes) -> Reply:
        if path not in self._urls:
            self._urls[path] = self._url(self._base + path.removeprefix(PREFIX))
        SENDING.get().done = False
        try:
            response = await self._session.post(
                self._urls[path], data=body, headers=self._headers, timeout=self._timeout, allow_redirects=False
            )
        except Exception as error:
            raise self._failed(error) from None

        async def read() -> bytes:
            try:
                return bytes(await response.content.readany())
            except Exception as error:
                raise self._failed(error) from None

        headers = response.headers
        wait = retry_after(headers.get("Retry-After"))
        return Reply(response.status, headers.get("Content-Type", ""), wait, read, response.close)

    async def close(self) -> None:
        pass

    def _failed(self, error: Exception) -> Failed:
        """What went wrong, without a word that the endpoint chose."""
        from aiohttp import ClientConnectorError, ClientError, ConnectionTimeoutError, SocketTimeoutError

        model = self._model
        if isinstance(error, ConnectionTimeoutError):
            return Failed(f"no connection within {model.connect:g} s", status=504)
        if isinstance(error, SocketTimeoutError):
            return Failed(f"it sent nothing for {model.idle:g} s", status=504)
        if isinstance(error, asyncio.TimeoutError):
            return Failed(f"no end within {model.total:g} s", status=504)
        if isinstance(error, ClientConnectorError):
            return Failed(f"no connection: {error.strerror or type(error.os_error).__name__}")
        if isinstance(error, ClientError | OSError):
            return Failed(f"the connection broke off ({type(error).__name__})")
        return Failed(f"it cannot be asked: {type(error).__name__} {first_line(error)[:80]}")


class Backends:
    """The backends of a catalog, which share connections. One event loop's."""

    def __init__(self) -> None:
        self._session: Any = None
        self._by_model: dict[str, tuple[Model, Backend]] = {}

    def __getitem__(self, model: str) -> Backend:
        return self._by_model[model][1]

    async def opened(self, catalog: Catalog, here: Path) -> dict[str, tuple[Model, Backend]]:
        """Backends of the models that have an endpoint; those that stay as they were are kept.

        Args:
            here: where relative folders begin.

        Raises:
            ConfigError, MissingDependency: one cannot be had; nothing has changed then.
        """
        found: dict[str, tuple[Model, Backend]] = {}
        fresh = []
        try:
            for model in catalog.values():
                if not model.endpoint:
                    continue
                held = self._by_model.get(model.name)
                if held is None or held[0] != model:
                    held = model, await self._open(model, here)
                    fresh.append(held[1])
                found[model.name] = held
        except BaseException:
            await _closed(fresh)
            raise
        return found

    def use(self, found: dict[str, tuple[Model, Backend]]) -> list[Backend]:
        """Take what `opened` gave; returns those that are no longer needed, once their last call has ended."""
        kept = {id(backend) for _, backend in found.values()}
        before, self._by_model = self._by_model, found
        return [backend for _, backend in before.values() if id(backend) not in kept]

    async def forget(self, found: dict[str, tuple[Model, Backend]]) -> None:
        """Close what `opened` opened anew, where it is not used after all."""
        kept = {id(backend) for _, backend in self._by_model.values()}
        await _closed([backend for _, backend in found.values() if id(backend) not in kept])

    async def close(self) -> None:
        await _closed([backend for _, backend in self._by_model.values()])
        if self._session is not None:
            await self._session.close()

    async def _open(self, model: Model, here: Path) -> Backend:
        kind, _, rest = model.endpoint.partition(":")
        if kind == "run":
            from moesaic.llms.gateway.local import open_run

            return await open_run(model, here / path_of(rest))
        if kind == "litellm":
            from moesaic.llms.gateway.providers import open_litellm

            return open_litellm(model, rest)
        return Endpoint(self._connected(), model)

    def _connected(self) -> Any:
        if self._session is None:
            try:
                from aiohttp import ClientSession, DummyCookieJar, TCPConnector, TraceConfig
            except ImportError:
                raise MissingDependency("aiohttp", "llms") from None
            sending = TraceConfig()
            sending.on_request_headers_sent.append(_sent)
            self._session = ClientSession(
                connector=TCPConnector(limit=0, keepalive_timeout=30),
                cookie_jar=DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=["User-Agent"],
                trace_configs=[sending],
            )
        return self._session


async def _sent(*_: Any) -> None:
    SENDING.get().done = True


async def _closed(backends: list[Backend]) -> None:
    for backend in backends:
        await backend.close()
