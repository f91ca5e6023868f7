"""Asking models of a catalog over HTTP: several at once, a few tries each, and nothing twice that would be the same."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from threading import Lock, Semaphore, Thread
from typing import Any

from moesaic.errors import first_line
from moesaic.llms.catalog import Model
from moesaic.llms.gateway.policy import retry_after, wait
from moesaic.llms.gateway.tokens import estimate
from moesaic.llms.router_r1.engine import Reply
from moesaic.llms.router_r1.prompt import helper

LONGEST_WAIT = 10.0
"""Seconds between two tries at most, whatever an endpoint asks for."""
LARGEST = 4 * 2**20
"""Bytes of an answer."""
MOST_TOKENS = 10_000_000
"""Of a reply whose model's context is not known."""


class HttpPool:
    """Models at OpenAI-compatible endpoints.

    Attributes:
        asked, hits: queries so far, and those of them whose reply was known. failed: why how many did not answer.
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
        self.failed: Counter[str] = Counter()
        self._lock, self._slots = Lock(), Semaphore(at_once)

    def ask(self, calls: Sequence[tuple[Model, str]]) -> list[Reply]:
        return [future.result() for future in [self._begin(*call) for call in calls]]

    def _begin(self, model: Model, query: str) -> Future[Reply]:
        self.asked += 1
        if self.temperature:
            return self._submit(model, query)
        with self._lock:
            key = (model.endpoint, model.served_as or model.name, query)
            known = self._known.get(key)
            if known is not None and not (known.done() and known.result().failure):
                self.hits += 1
                return known
            made = self._known[key] = self._submit(model, query)
            return made

    def _submit(self, model: Model, query: str) -> Future[Reply]:
        future: Future[Reply] = Future()

        def work() -> None:
            with self._slots:
                if future.set_running_or_notify_cancel():
                    future.set_result(self._reply(model, query))

        Thread(target=work, name="pool", daemon=True).start()  # one that hangs does not keep the process
        return future

    def _reply(self, model: Model, query: str) -> Reply:
        content, begun = query if self.bare else helper(query), time.perf_counter()
        body = {
            "messages": [{"role": "user", "content": content}], "max_tokens": self.max_tokens,
            "temperature": self.temperature, "top_p": 1,
        }  # fmt: skip
        try:
            said = post(model, body, timeout=self.timeout, retries=self.retries, sleep=self._sleep)
            text = text_of(said["choices"][0]["message"]["content"])
            tokens = completion_tokens(said, text, model)
        except Exception as error:  # whatever an endpoint sends: it is told, and the rollout goes on
            why = hidden(f"{model.name}: {first_line(error) or type(error).__name__}", model)
            with self._lock:
                self.failed[why] += 1
            return Reply("", seconds=time.perf_counter() - begun, failure=why)
        return Reply(hidden(text, model), tokens, time.perf_counter() - begun)

    def close(self) -> None:
        """Ask no more of what waits."""
        for future in self._known.values():
            future.cancel()


def text_of(content: object) -> str:
    """A message's text: as it is, or of its parts; half surrogates become question marks. Raises ValueError."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if content is not None and not isinstance(content, str):
        raise ValueError("its answer is no text")
    return (content or "").encode("utf-8", "replace").decode()


def hidden(text: str, model: Model) -> str:
    """A text without the model's key, which an endpoint may repeat."""
    key = os.environ.get(model.key_env, "") if model.key_env else ""
    return text.replace(key, "***") if key else text


def post(
    model: Model,
    body: Mapping[str, Any],
    *,
    timeout: float | None = None,
    retries: int = 2,
    sleep: Callable[[float], object] = time.sleep,
) -> Any:
    """What a model's endpoint answers to the body of a chat completion, which it is named in here.

    Args:
        timeout: seconds of one try; the model's own `total` where None. retries: tries after the first, for what may
            pass. sleep: between them.
    Raises:
        Exception: its first line says why there is no answer.
    """
    for tries in range(1, retries + 2):
        try:
            return _once(model, body, timeout or model.total)
        except _Passing as error:
            if tries > retries:
                raise
            sleep(min(LONGEST_WAIT, wait(tries) if error.seconds is None else error.seconds))
    raise AssertionError("retries are from 0 on")


def completion_tokens(said: Mapping[str, Any], text: str, model: Model) -> int:
    """As an endpoint counts them; estimated from the text where it does not, or where there cannot be so many."""
    tokens = (said.get("usage") or {}).get("completion_tokens")
    if type(tokens) is int and 0 <= tokens <= (model.context or MOST_TOKENS):
        return tokens
    return estimate(len(text.encode("utf-8", "replace")))


def _once(model: Model, body: Mapping[str, Any], timeout: float) -> Any:
    """One try. Raises _Passing for what another may mend."""
    headers, end = {"Content-Type": "application/json"}, time.monotonic() + timeout
    if key := model.key():
        headers["Authorization"] = f"Bearer {key}"
    data = json.dumps({"model": model.served_as or model.name, **body}).encode()
    request = urllib.request.Request(f"{model.endpoint}/chat/completions", data, headers)
    try:
        with _OPENER.open(request, timeout=timeout) as answer:
            parts, size = [], 0
            while part := answer.read1():
                parts.append(part)
                size += len(part)
                if size > LARGEST:
                    raise OverflowError(f"its answer has more than {LARGEST:,} bytes")
                if time.monotonic() > end:
                    raise TimeoutError("timed out")
        return json.loads(b"".join(parts))
    except urllib.error.HTTPError as error:
        if error.code in (408, 409, 429) or error.code >= 500:
            raise _Passing(f"HTTP {error.code}", retry_after(error.headers.get("Retry-After"))) from None
        if error.code in _TELLING:
            words = " ".join(error.read(300).decode("utf-8", "replace").split())
            raise ConnectionError(f"HTTP {error.code}: {words}") from None
        raise
    except (OSError, ValueError) as error:
        raise _Passing(first_line(error) or type(error).__name__) from None


_TELLING = (400, 404, 422)
"""What an endpoint says of these tells what to change: a field that it does not take, a model that it does not have."""


class _Passing(Exception):
    """What may pass: a busy endpoint, a broken connection. `seconds` is what it asked for."""

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **more: Any) -> None:
        """An endpoint does not send us, with its key, elsewhere."""


_OPENER = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
