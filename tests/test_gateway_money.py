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
from moesaic.llms.gateway.config import read_config
from moesaic.llms.gateway.keys import hash_of
from moesaic.llms.gateway.routers import Decision
from tests.gateways import KEY, Behaviour, Got, Mock, Served, completion, mocking, model, plain, serving, whole, write

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


# -- what a client can do to others ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["404 Not Found", "405 Method Not Allowed", "403 No", "501 No", "307 Elsewhere"])
def test_a_path_that_a_model_does_not_serve_closes_it_for_nobody(mock: Mock, tmp_path: Path, status: str) -> None:
    async def chats(got: Got, out: asyncio.StreamWriter) -> None:
        await (plain if got.path.endswith(CHAT) else sending({}, status))(got, out)

    mock.behaviours["a"] = chats
    with serving(write(tmp_path, [model("a", mock)], policy={"failures": 1, "retries": 3})) as server:
        told, content = ask(server, EMBEDDINGS, input="x")
        assert (told, "does not serve this" in content["error"]["message"]) == (502, True)
        assert len(mock.got) == 1
        assert ask(server)[0] == 200


def test_an_answer_that_is_too_long_closes_a_model_for_nobody(mock: Mock, tmp_path: Path) -> None:
    mock.behaviours["a"] = sending(completion("x" * 5000))
    with serving(write(tmp_path, [model("a", mock)], policy={"failures": 1}, largest_answer=2000)) as server:
        assert ask(server)[0] == 502
        mock.behaviours.pop("a")
        assert ask(server)[0] == 200


class Said:
    name, expert = "moesaic/r", "a"

    def decide(self, prompt: str, *, session: str) -> Decision:
        return Decision(self.expert, "", 0.05, False, {})


def test_a_chat_whose_expert_is_gone_takes_the_new_decision(mock: Mock, tmp_path: Path) -> None:
    router = Said()
    file = write(tmp_path, [model("a", mock), model("b", mock)])
    with serving(file, {"moesaic/r": router}) as server:
        assert ask(server, model="moesaic/r", user="u")[0] == 200
        router.expert = "b"
        server.run(server.gateway.reload(read_config(write(tmp_path, [model("b", mock)]))))
        assert [ask(server, model="moesaic/r", user="u")[0] for _ in range(2)] == [200, 200]
        assert [row["served"] for row in server.rows()] == ["a", "b", "b"]


# -- what is reserved --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "prompts"), [("hi", 1), (["hi"] * 5, 5), ([1, 2, 3], 1), ([[1], [2, 3]], 2)]
)  # fmt: skip
def test_each_prompt_is_reserved_for(mock: Mock, tmp_path: Path, prompt: Any, prompts: int) -> None:
    with serving(write(tmp_path, [model("a", mock, input_price=0.0)])) as server:
        assert ask(server, COMPLETIONS, prompt=prompt, n=3, max_tokens=100)[0] == 200
        (row,) = server.rows()
    assert row["reserved"] == prompts * 3 * 100 * 2 * 10**6
