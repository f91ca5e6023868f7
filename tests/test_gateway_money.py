"""What is reserved, billed and booked, whatever a client asks and a backend sends."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.llms.gateway.calls import LARGEST
from moesaic.llms.gateway.keys import hash_of
from moesaic.llms.gateway.routers import Decision
from tests.gateways import KEY, Behaviour, Got, Mock, Served, completion, mocking, model, serving, whole, write

USER = [{"role": "user", "content": "hi there"}]
KEYS = [{"id": "k", "hash": hash_of(KEY), "budget": 1000.0}]
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


@pytest.fixture
def mock() -> Iterator[Mock]:
    with mocking() as found:
        yield found


def sending(content: Any, status: str = "200 OK") -> Behaviour:
    async def answer(got: Got, out: asyncio.StreamWriter) -> None:
        out.write(whole(content, status))

    return answer


def ask(server: Served, path: str = CHAT, method: str = "POST", **body: Any) -> tuple[int, Any]:
    """Status and answer."""
    line = http.client.HTTPConnection("127.0.0.1", server.port(), timeout=20)
    given = {"model": "a"} | ({"messages": USER} if path == CHAT else {}) | body
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    line.request(method, path, json.dumps(given), headers)
    found = line.getresponse()
    raw = found.read()
    line.close()
    return found.status, json.loads(raw) if found.getheader("content-type") == "application/json" else raw.decode()


# -- rows that cannot be written ---------------------------------------------------------------------------------------


class Halves:
    name = "moesaic/r"

    def decide(self, prompt: str, *, session: str) -> Decision:
        return Decision("a", "half \ud83d", 0.5, False, {})


def test_half_surrogates_are_booked_as_question_marks(mock: Mock, tmp_path: Path) -> None:
    mock.behaviours["a"] = sending(completion(model="x\ud800"))
    file = write(tmp_path, [model("a", mock), model("b", mock)], keys=KEYS, trace={"file": "trace.jsonl"})
    with serving(file, {"moesaic/r": Halves()}) as server:
        assert [ask(server, model=name)[0] for name in ("a", "moesaic/r", "b")] == [200, 200, 200]
        assert [row["served_id"] for row in server.rows()] == ["x?", "x?", "b"]
        assert server.rows()[1]["category"] == "half ?"
        status, text = ask(server, "/metrics", "GET")
        assert (status, 'category="half ?"' in text) == (200, True)


def test_what_the_books_cannot_hold_is_refused_by_itself(mock: Mock, tmp_path: Path) -> None:
    with serving(write(tmp_path, [model("a", mock), model("dear", mock, output_price=8000.0)])) as server:
        status, told = ask(server, model="dear", n=128, max_tokens=10_000_000)
        assert (status, "more than the books can hold" in told["error"]["message"]) == (400, True)
        assert ask(server)[0] == 200
        assert [row["asked"] for row in server.rows()] == ["a"]
    assert LARGEST < 128 * 10_000_000 * 8000 * 10**6
