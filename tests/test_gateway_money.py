"""What is reserved, billed and booked, whatever a client asks and a backend sends."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.llms.gateway.calls import LARGEST
from moesaic.llms.gateway.config import read_config
from moesaic.llms.gateway.keys import hash_of
from moesaic.llms.gateway.routers import Decision
from moesaic.llms.gateway.tokens import HELD, Counter
from tests.gateways import (
    HEAD,
    KEY,
    Behaviour,
    Got,
    Mock,
    Served,
    chunk,
    completion,
    delta,
    event,
    mocking,
    model,
    plain,
    serving,
    whole,
    write,
)

USER = [{"role": "user", "content": "hi there"}]
KEYS = [{"id": "k", "hash": hash_of(KEY), "budget": 1000.0}]
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
OWN: dict[str, Any] = {
    CHAT: {"messages": USER}, MESSAGES: {"messages": USER, "max_tokens": 50}, RESPONSES: {"input": "hi there"}
}  # fmt: skip


@pytest.fixture
def mock() -> Iterator[Mock]:
    with mocking() as found:
        yield found


def sending(content: Any, status: str = "200 OK") -> Behaviour:
    async def answer(got: Got, out: asyncio.StreamWriter) -> None:
        out.write(whole(content, status))

    return answer


def streaming(*parts: Any, end: bool = True) -> Behaviour:
    async def answer(got: Got, out: asyncio.StreamWriter) -> None:
        out.write(HEAD + b"".join(chunk(event(part)) for part in parts))
        out.write((chunk(b"data: [DONE]\n\n") if end else b"") + chunk(b""))

    return answer


@pytest.fixture
def server(mock: Mock, tmp_path: Path) -> Iterator[Served]:
    """In front of one model `a`."""
    with serving(write(tmp_path, [model("a", mock)], keys=KEYS)) as found:
        yield found


def ask(server: Served, path: str = CHAT, method: str = "POST", **body: Any) -> tuple[int, Any]:
    """Status and answer."""
    line = http.client.HTTPConnection("127.0.0.1", server.port(), timeout=20)
    given = {"model": "a"} | OWN.get(path, {}) | body
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


# -- what is billed ----------------------------------------------------------------------------------------------------

BIG = "lorem ipsum " * 1000


@pytest.mark.parametrize(
    "more",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"description": BIG}}}},
        {"messages": [{"role": "user", "name": BIG, "content": "x"}]},
        {"messages": [{"role": "assistant", "reasoning_content": BIG, "content": "x"}]},
        {"messages": [{"role": "assistant", "thinking_blocks": [{"type": "thinking", "thinking": BIG}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": BIG}]}]},
        {"messages": [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": BIG}}]},
        {"messages": [{"role": BIG, "content": "x"}]},
        {"prediction": {"type": "content", "content": BIG}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {BIG: {}}}}]},
        {"guided_regex": BIG},
        {"path": COMPLETIONS, "prompt": "x", "suffix": BIG},
        {"path": COMPLETIONS, "prompt": [1, 2], "suffix": BIG},
    ],
)
def test_all_that_a_model_reads_is_counted(server: Served, more: dict[str, Any]) -> None:
    assert ask(server, max_tokens=1, **more)[0] == 200
    assert len(BIG) // 4 <= server.rows()[-1]["own_input"] < len(BIG) // 4 + 40


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9000}},
        {"type": "input_audio", "input_audio": {"data": "A" * 9000, "format": "wav"}},
    ],
)
def test_a_picture_or_a_sound_counts_as_a_thousand_tokens(server: Served, part: dict[str, Any]) -> None:
    said = [{"role": "user", "content": [{"type": "text", "text": "four"}, part, part]}]
    assert ask(server, messages=said, max_tokens=1, user=BIG)[0] == 200
    assert server.rows()[-1]["own_input"] == 4 + 1 + 2 * 1000


@pytest.mark.parametrize(
    "written",
    [
        {"content": BIG},
        {"content": [{"type": "text", "text": BIG}]},
        {"reasoning_content": BIG, "reasoning": BIG},
        {"reasoning": BIG, "reasoning_details": [{"type": "reasoning.text", "text": BIG, "signature": "s" * 900}]},
        {"refusal": BIG},
        {"function_call": {"arguments": BIG}},
        {"tool_calls": [{"index": 0, "id": "t1", "type": "function", "function": {"arguments": BIG}}]},
        {"audio": {"transcript": BIG, "data": "A" * 9000}},
        {"thinking_blocks": [{"type": "thinking", "thinking": BIG}]},
    ],
)
def test_all_that_a_model_writes_is_counted_once(server: Served, mock: Mock, written: dict[str, Any]) -> None:
    part = delta("", "stop")
    part["choices"][0]["delta"] = {"role": "assistant", **written}
    mock.behaviours["a"] = streaming(part)
    assert ask(server, stream=True)[0] == 200
    assert server.rows()[-1]["own_output"] == len(BIG) // 4


@pytest.mark.parametrize("tokenizer", [True, False])
def test_pieces_count_as_the_whole_does_and_few_are_kept(tokenizer: bool, tmp_path: Path) -> None:
    if tokenizer:
        from tokenizers import Tokenizer, models, pre_tokenizers

        made = Tokenizer(models.WordLevel({"word": 0, "?": 1}, unk_token="?"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.save(str(tmp_path / "tokenizer.json"))
    counter = Counter({"m": tmp_path} if tokenizer else {})
    tally = counter.tally("m")
    for _ in range(HELD):
        tally.add("wo")
        tally.add("rd ")
        assert sum(map(len, tally._held)) <= HELD
    whole = counter.count("m", ["word " * HELD])
    assert whole <= tally.total() <= whole + 2 * 5  # a word cut in two where a chunk ends
    assert tally.total() == tally.total()
    before = tally.total()
    tally.add("word " * HELD)
    assert tally.total() > before + HELD * 0.9
    assert sum(map(len, tally._held)) <= HELD


def usage(prompt: Any, answer: Any) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": answer}}


@pytest.mark.parametrize(
    ("told", "tokens"),
    [
        (usage(7, 3), (7, 3)),
        (usage(7, None), (7, 4)),
        ({"usage": {"prompt_tokens": 7}}, (7, 4)),
        ({"usage": {"completion_tokens": 3}}, (6, 3)),
        ({"usage": "lots"}, (6, 4)),
        (usage("7", 3.5), (6, 4)),
        (usage(-7, True), (6, 4)),
        (usage(999_999_999, 51), (6, 50)),
        (usage(10**30, 50), (6, 50)),
    ],
)
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_backends_count_is_billed_as_far_as_it_can_be_true(
    server: Served, mock: Mock, told: dict[str, Any], tokens: tuple[int, int], path: str
) -> None:
    """By our count the prompt has 6 tokens, the answer 4."""
    mock.behaviours["a"] = sending(completion() | told)
    status, answer = ask(server, path, max_tokens=50)
    row = server.rows()[-1]
    assert (status, row["status"], row["ended"]) == (200, 200, "whole")
    assert row["cost"] == (tokens[0] + 2 * tokens[1]) * 10**6
    if path == MESSAGES:
        assert answer["usage"] == {"input_tokens": tokens[0], "output_tokens": tokens[1]}


def test_a_context_bounds_what_can_be_counted(mock: Mock, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mock.behaviours["a"] = sending(completion() | usage(1001, 2001))
    with serving(write(tmp_path, [model("a", mock, context=1000)], reserve_output=20)) as server:
        assert ask(server, n=2)[0] == 200
        (row,) = server.rows()
    assert (row["backend_input"], row["backend_output"], row["cost"]) == (1001, 2001, (6 + 2 * 40) * 10**6)
    assert sum("more tokens than there can be" in line for line in caplog.messages) == 1


@pytest.mark.parametrize(("told", "billed"), [((0, 0), (6, 4)), ((9, 2), (9, 4)), ((5, 30), (6, 30))])
def test_of_a_stream_that_breaks_off_the_larger_count_is_billed(
    server: Served, mock: Mock, told: tuple[int, int], billed: tuple[int, int]
) -> None:
    mock.behaviours["a"] = streaming(delta("sixteen letters.") | usage(*told), end=False)
    assert ask(server, stream=True)[0] == 200
    row = server.rows()[-1]
    assert (row["ended"], row["cost"]) == ("broken", (billed[0] + 2 * billed[1]) * 10**6)


# -- answers that are odd ----------------------------------------------------------------------------------------------


def calling(given: Any) -> dict[str, Any]:
    content = completion()
    call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": given}}
    content["choices"][0] = {
        "index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": None, "tool_calls": [call]}
    }  # fmt: skip
    return content


@pytest.mark.parametrize(
    ("given", "shown"),
    [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), (None, {}), ('{"a": "Os', {"INVALID_JSON": '{"a": "Os'}),
     ("[1]", {"INVALID_JSON": "[1]"}), ("[" * 100_000, {"INVALID_JSON": "[" * 100_000})],
)  # fmt: skip
def test_arguments_are_passed_on_even_if_they_are_cut_off(server: Served, mock: Mock, given: Any, shown: Any) -> None:
    mock.behaviours["a"] = sending(calling(given))
    _, message = ask(server, MESSAGES, max_tokens=50)
    assert (message["content"][0]["input"], message["stop_reason"]) == (shown, "max_tokens")
    _, response = ask(server, RESPONSES)
    assert isinstance(response["output"][0]["arguments"], str)
    assert [row["cost"] for row in server.rows()[-2:]] == [13 * 10**6] * 2


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "content", ["half \ud83d", [{"type": "text", "text": "half "}, {"type": "text", "text": "\ud83d"}]]
)
def test_odd_texts_are_passed_on(server: Served, mock: Mock, path: str, stream: bool, content: Any) -> None:
    mock.behaviours["a"] = streaming(delta(content, "stop")) if stream else sending(completion(content))
    status, told = ask(server, path, stream=stream)
    shown = told if stream else json.dumps(told)
    assert (status, json.dumps("half \ud83d") in shown or '"half \\ud83d"' in shown) == (200, True)
    assert server.rows()[-1]["ended"] == "whole"


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", [None, 5, {"content": 5}])
def test_who_gets_an_error_is_billed_nothing(server: Served, mock: Mock, path: str, stream: bool, said: Any) -> None:
    content = completion() | {"choices": [5] if said is None else [{"message": said, "delta": said}]}
    mock.behaviours["a"] = streaming(content) if stream else sending(content)
    status, told = ask(server, path, stream=stream)
    row = server.rows()[-1]
    assert (status, "is no chat's" in json.dumps(told)) == (502, True)
    assert (row["status"], row["ended"], row["cost"]) == (502, "failed", 0)


def test_an_answer_without_choices_is_no_message(server: Served, mock: Mock) -> None:
    mock.behaviours["a"] = sending(completion() | {"choices": []})
    assert [ask(server, path)[0] for path in (CHAT, MESSAGES, RESPONSES)] == [200, 502, 502]
    assert [row["cost"] for row in server.rows()] == [13 * 10**6, 0, 0]


def test_a_stream_that_must_be_kept_whole_has_an_end(mock: Mock, tmp_path: Path) -> None:
    async def long(got: Got, out: asyncio.StreamWriter) -> None:
        out.write(HEAD)
        for _ in range(20):
            out.write(chunk(event(delta("x" * 500))))
            await out.drain()
            await asyncio.sleep(0.01)
        out.write(chunk(b"data: [DONE]\n\n") + chunk(b""))

    mock.behaviours["a"] = long
    with serving(write(tmp_path, [model("a", mock)], largest_answer=3000, policy={"failures": 1})) as server:
        assert "more than 3,000 bytes" in ask(server, RESPONSES, stream=True)[1]
        assert "message_stop" in ask(server, MESSAGES, stream=True)[1]
        assert [row["ended"] for row in server.rows()] == ["broken", "whole"]


def test_a_prompt_that_was_never_sent_is_not_billed(tmp_path: Path) -> None:
    """Its backend takes no connection, as others wait for it."""
    place, waiting = socket.create_server(("127.0.0.1", 0), backlog=0), []
    for _ in range(3):
        other = socket.socket()
        other.setblocking(False)
        other.connect_ex(place.getsockname())
        waiting.append(other)
    url = f"http://127.0.0.1:{place.getsockname()[1]}/v1"
    with serving(write(tmp_path, [model("a", url)], on_disconnect="partial")) as server:
        line = http.client.HTTPConnection("127.0.0.1", server.port(), timeout=10)
        line.request("POST", CHAT, json.dumps({"model": "a", "messages": USER}), {"Content-Type": "application/json"})
        while not server.gateway.metrics.running:
            time.sleep(0.01)
        time.sleep(0.2)
        line.close()
        deadline = time.monotonic() + 10
        while not (rows := server.rows()) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert [(row["ended"], row["cost"], row["served"]) for row in rows] == [("partial", 0, None)]
    for other in (place, *waiting):
        other.close()
