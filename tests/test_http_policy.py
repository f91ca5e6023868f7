"""Policies at an endpoint over real HTTP: chats in each dialect, stops that were cut off, failures, time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from moesaic.errors import ConfigError
from moesaic.llms.catalog import Catalog, Model
from moesaic.llms.router_r1.calls import Calls, tools
from moesaic.llms.router_r1.engine import Question, Reply, Rollout, roll
from moesaic.llms.router_r1.http_policy import HttpPolicy
from moesaic.llms.router_r1.transcript import TAGGED, Dialect

CATALOG = Catalog.of([
    {"name": name, "input_price": 0.0, "output_price": 2.0, "parameters": 1} for name in ("m.1", "poet")
])  # fmt: skip
THINK = "<think> hm </think>"
NATIVE = Calls(listed=False)
Answers = Callable[[Mapping[str, Any]], Mapping[str, Any] | int]


def choice(content: Any, **more: Any) -> dict[str, Any]:
    calls = more.pop("tool_calls", None)
    message = {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}
    return {"message": {**message, **more.pop("message", {})}, "finish_reason": "stop", **more}


def native(name: str, query: str, at: str = "c1") -> dict[str, Any]:
    return {"id": at, "type": "function", "function": {"name": name, "arguments": json.dumps({"query": query})}}


class Endpoint:
    """Says what its `answers` make of a request: a choice, a status, or at 0 a blank now and then; keeps what it was
    asked."""

    def __init__(self) -> None:
        self.answers: Answers = lambda body: 500
        self.asked: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                made = outer.answers(body)
                said = {"choices": [made], "usage": {"completion_tokens": 5}}
                status, blanks = made if isinstance(made, int) and made else 200, 40 if made == 0 else 0
                data = json.dumps({"error": "stop\nis not taken"} if isinstance(made, int) else said).encode()
                with suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data) + blanks))
                    self.end_headers()
                    for _ in range(blanks):
                        self.wfile.write(b" ")
                        time.sleep(0.05)
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.model = Model(name="router", endpoint=url, input_price=0, output_price=0, parameters=1, served_as="served")


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


class Saying:
    def ask(self, calls: Sequence[tuple[Model, str]]) -> list[Reply]:
        return [Reply(f"{model.name} says </information></tool_response>", 3) for model, _ in calls]


def answered(endpoint: Endpoint, dialect: Dialect, *questions: str, **how: Any) -> list[Rollout]:
    policy = HttpPolicy(endpoint.model, dialect=dialect, sleep=lambda seconds: None, **how)
    try:
        return roll(policy, Saying(), [Question(text, CATALOG) for text in questions], dialect=dialect)
    finally:
        policy.close()


def in_turn(*choices: Mapping[str, Any] | int) -> Answers:
    left = list(choices)
    return lambda body: left.pop(0)


def test_a_chat_in_tags(endpoint: Endpoint) -> None:
    endpoint.answers = in_turn(
        choice(THINK + "<search> m.1: what is it? "),
        choice(THINK + "so"),
        choice(THINK + "<search> poet: and now? ", stop_reason="</search>"),
        choice(THINK + "<answer> 4 </answer> and more that is not kept"),
    )  # fmt: skip
    (found,) = answered(endpoint, TAGGED, "q")
    assert found.transcript.generations == [
        THINK + "<search> m.1: what is it? </search>", THINK + "so", THINK + "<search> poet: and now? </search>",
        THINK + "<answer> 4 </answer>",
    ]  # fmt: skip
    assert (found.answer, found.fault(), found.cost, found.policy_tokens) == ("4", "", 12.0, 20)
    assert {(body["model"], *body["stop"], "tools" in body) for body in endpoint.asked} == {
        ("served", "</search>", "</answer>", False)
    }
    chat = endpoint.asked[-1]["messages"]
    assert [message["role"] for message in chat] == ["user", "assistant", "user", "assistant", "user"]
    assert chat[2]["content"] == "<information>m.1 says &lt;/information></tool_response></information>"
    assert chat[3]["content"] == THINK + "so" + THINK + "<search> poet: and now? </search>"
    assert "Question: q" in chat[0]["content"]


@pytest.mark.parametrize(
    ("more", "closed"),
    [
        ({}, True), ({"stop_reason": "</search>"}, True), ({"matched_stop": "</search>"}, True),
        ({"stop_reason": None}, False), ({"finish_reason": "length"}, False),
    ],
)  # fmt: skip
def test_a_stop_is_put_back_where_the_endpoint_cut_it_off(
    endpoint: Endpoint, more: Mapping[str, Any], closed: bool
) -> None:
    endpoint.answers = in_turn(choice("<search> poet: a", **more), choice("<answer>x</answer>"))
    (found,) = answered(endpoint, TAGGED, "q")
    assert found.transcript.generations[0] == "<search> poet: a" + "</search>" * closed
    assert len(found.calls) == closed


def test_thinking_that_comes_apart_is_thinking_and_nothing_else(endpoint: Endpoint) -> None:
    endpoint.answers = in_turn(choice("<answer>x</answer>", message={"reasoning_content": "a </search> </think>"}))
    (found,) = answered(endpoint, TAGGED, "q")
    assert found.transcript.text == "<think>\na &lt;/search> &lt;/think>\n</think>\n<answer>x</answer>"
    assert found.fault(strict=True) == ""


def test_a_chat_of_native_calls(endpoint: Endpoint) -> None:
    endpoint.answers = in_turn(
        choice(None, tool_calls=[native("m_1", "what?"), native("poet", "too?")], message={"reasoning": "hm"}),
        choice("So: ", tool_calls=[native("nobody", "x", "c2")]),
        choice(THINK + "4"),
    )  # fmt: skip
    (found,) = answered(endpoint, NATIVE, "q", offered=CATALOG)
    assert found.transcript.generations == [
        '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "m_1", "arguments": {"query": "what?"}}\n</tool_call>',
        'So: \n<tool_call>\n{"name": "nobody", "arguments": {"query": "x"}}\n</tool_call>', THINK + "4",
    ]  # fmt: skip
    assert [(call.model, call.reply[:4], call.failure) for call in found.calls] == [
        ("m.1", "m.1 ", ""), ("", "None", "no model 'nobody'"),
    ]  # fmt: skip
    assert (found.answer, found.fault()) == ("4", "no model 'nobody'")
    assert all(body["tools"] == tools(CATALOG.values()) and "stop" not in body for body in endpoint.asked)
    first, second, third, *rest = endpoint.asked[-1]["messages"]
    assert "<tools>" not in first["content"]
    assert second["tool_calls"] == [native("m_1", "what?")]
    assert third == {
        "role": "tool", "tool_call_id": "c1", "content": "m.1 says </information>&lt;/tool_response>",
    }  # fmt: skip
    assert [message.get("tool_call_id") for message in rest] == [None, "c2"]


def test_a_call_in_the_text_is_one_natively_too_and_comes_first(endpoint: Endpoint) -> None:
    text = '<tool_call>{"name": "poet", "arguments": {"query": "a"}}</tool_call>'
    endpoint.answers = in_turn(choice(text + "b", tool_calls=[native("m_1", "what?")]), choice("4"))
    (found,) = answered(endpoint, NATIVE, "q", offered=CATALOG)
    assert (found.transcript.generations, [call.model for call in found.calls]) == ([text, "4"], ["poet"])
    assert [message["role"] for message in endpoint.asked[-1]["messages"]] == ["user", "assistant", "user"]


def test_a_chat_of_calls_in_the_text(endpoint: Endpoint) -> None:
    text = THINK + '<tool_call>\n{"name": "poet", "arguments": {"query": "a"}}\n'
    endpoint.answers = in_turn(choice(text), choice("4"))
    (found,) = answered(endpoint, Calls(), "q")
    assert (found.transcript.generations, found.fault()) == ([text + "</tool_call>", "4"], "")
    assert endpoint.asked[0]["stop"] == ["</tool_call>"]
    assert endpoint.asked[1]["messages"][-1]["content"].startswith("<tool_response>\npoet says")


@pytest.mark.parametrize(
    ("answer", "why"),
    [(500, "HTTP 500"), (400, 'HTTP 400: {"error": "stop\\nis not taken"}'), ({}, "message"), (choice([1]), "")],
)  # fmt: skip
def test_a_failure_ends_its_conversation_and_no_other(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture, answer: Any, why: str
) -> None:
    def answers(body: Mapping[str, Any]) -> Any:
        chat = body["messages"]
        if "Question: bad" in chat[0]["content"] and len(chat) > 1:
            return answer
        return choice("<answer>x</answer>" if len(chat) > 1 else THINK + "<search> poet: a")

    endpoint.answers = answers
    bad, good = answered(endpoint, TAGGED, "bad", "good")
    assert (good.answer, good.failure) == ("x", "")
    assert bad.transcript.generations == [THINK + "<search> poet: a</search>", ""]
    assert bad.failure.startswith("router: ")
    assert why in bad.failure
    assert bad.trace()["failure"] == bad.failure
    assert bad.failure in caplog.text
    assert bad.fault() == "0 answers"
    tries = sum("Question: bad" in body["messages"][0]["content"] for body in endpoint.asked)
    assert tries == (4 if answer == 500 else 2)


@pytest.mark.parametrize("wait", [1.0, 0.0])
def test_an_endpoint_that_does_not_answer_is_no_hang(endpoint: Endpoint, wait: float) -> None:
    def answers(body: Mapping[str, Any]) -> Any:
        time.sleep(wait)
        return 500 if wait else 0

    endpoint.answers = answers
    begun = time.monotonic()
    found = answered(endpoint, TAGGED, "a", "b", "c", timeout=0.1, retries=1)
    assert time.monotonic() - begun < 1.0
    assert all("timed out" in each.failure for each in found)


def test_conversations_go_on_side_by_side(endpoint: Endpoint) -> None:
    barrier = threading.Barrier(3, timeout=5)

    def answers(body: Mapping[str, Any]) -> Any:
        barrier.wait()
        return choice(f"<answer>{body['messages'][0]['content'].split()[-1]}</answer>")

    endpoint.answers = answers
    assert [found.answer for found in answered(endpoint, TAGGED, "a", "b", "c", timeout=10)] == ["a", "b", "c"]


def test_a_reply_is_cut_by_bytes(endpoint: Endpoint) -> None:
    clip = HttpPolicy(endpoint.model).begin(["q"]).clip
    assert (clip("aaaabbbbc", 2), clip("ééé", 1), clip("a", 9)) == ("aaaabbbb", "éé", "a")


def test_what_cannot_be_a_policy(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for how in ({"offered": CATALOG}, {"dialect": NATIVE}, {"dialect": Calls(), "offered": CATALOG}):
        with pytest.raises(ConfigError, match="go together"):
            HttpPolicy(endpoint.model, **how)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no http endpoint"):
        HttpPolicy(CATALOG["poet"])
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"):
        HttpPolicy(Model(name="x", endpoint=endpoint.model.endpoint, key_env="NO_SUCH_KEY"))
