"""Asking models of a catalog over HTTP: several at once, a few tries each, and nothing twice that would be the same."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

from moesaic.errors import first_line
from moesaic.llms.catalog import Model
from moesaic.llms.gateway.policy import retry_after, wait
from moesaic.llms.gateway.tokens import estimate
from moesaic.llms.router_r1.engine import Reply
from moesaic.llms.router_r1.prompt import helper


class HttpPool:
    """Models at OpenAI-compatible endpoints.

    Attributes:
        asked, hits: queries so far, and those of them whose reply was known.
    """

    def __init__(
        self,
        *,
        at_once: int = 10,
        retries: int = 2,
        max_tokens: int = 512,
        temperature: float = 0.0,
        timeout: float | None = None,
        bare: bool = False,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """
        Args:
            at_once: requests. retries: tries after the first, for what may pass. max_tokens: of a reply.
            temperature: at 0 a model's reply to a query is kept, and not asked for again.
            timeout: seconds of one try; the model's own `total` where None.
            bare: send the query as it is, without the words around it (`prompt.helper`).
        """
        self.retries, self.max_tokens, self.temperature = retries, max_tokens, temperature
        self.timeout, self.bare, self._sleep = timeout, bare, sleep
        self.asked = self.hits = 0
        self._known: dict[tuple[str, str, str], Future[Reply]] = {}
        self._lock, self._workers = Lock(), ThreadPoolExecutor(at_once, thread_name_prefix="pool")

    def ask(self, calls: Sequence[tuple[Model, str]]) -> list[Reply]:
        return [future.result() for future in [self._begin(*call) for call in calls]]

    def _begin(self, model: Model, query: str) -> Future[Reply]:
        self.asked += 1
        if self.temperature:
            return self._workers.submit(self._reply, model, query)
        with self._lock:
            key = (model.endpoint, model.served_as or model.name, query)
            known = self._known.get(key)
            if known is not None and not (known.done() and known.result().failure):
                self.hits += 1
                return known
            made = self._known[key] = self._workers.submit(self._reply, model, query)
            return made

    def _reply(self, model: Model, query: str) -> Reply:
        begun, why = time.perf_counter(), ""
        for tries in range(self.retries + 1):
            try:
                found = self._once(model, query)
            except _Passing as error:
                why = str(error)
                if tries < self.retries:
                    self._sleep(min(model.total, wait(tries + 1) if error.seconds is None else error.seconds))
                continue
            except Exception as error:  # whatever an endpoint sends: it is told, and the rollout goes on
                why = first_line(error) or type(error).__name__
                break
            return Reply(*found, seconds=time.perf_counter() - begun)
        return Reply("", seconds=time.perf_counter() - begun, failure=f"{model.name}: {why}")

    def _once(self, model: Model, query: str) -> tuple[str, int]:
        """A reply and its completion tokens. Raises _Passing for what another try may mend."""
        content = query if self.bare else helper(query)
        body = {
            "model": model.served_as or model.name, "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": 1,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if key := model.key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{model.endpoint}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with _OPENER.open(request, timeout=self.timeout or model.total) as answer:
                said: Any = json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code in (408, 409, 429) or error.code >= 500:
                raise _Passing(f"HTTP {error.code}", retry_after(error.headers.get("Retry-After"))) from None
            raise
        except (OSError, ValueError) as error:
            raise _Passing(first_line(error) or type(error).__name__) from None
        text = said["choices"][0]["message"]["content"] or ""
        tokens = (said.get("usage") or {}).get("completion_tokens")
        return text, tokens if isinstance(tokens, int) else estimate(len(text.encode("utf-8", "replace")))

    def close(self) -> None:
        self._workers.shutdown(cancel_futures=True)


class _Passing(Exception):
    """What may pass: a busy endpoint, a broken connection. `seconds` is what it asked for."""

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **more: Any) -> None:
        """An endpoint does not send us, with its key, elsewhere."""


_OPENER = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
