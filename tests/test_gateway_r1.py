"""A policy behind the gateway: rounds, many at once, what is served and what is refused, and folders."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, BadRequestError, InternalServerError, OpenAI

from moesaic.errors import ConfigError
from moesaic.llms.gateway.calls import PICO
from moesaic.llms.gateway.config import read_config
from moesaic.llms.router_r1.engine import STEP
from moesaic.llms.router_r1.folder import POLICY, Asking, load, save
from moesaic.llms.router_r1.local import LocalPolicy
from moesaic.llms.router_r1.prompt import helper
from moesaic.models.embedded import load_model
from tests.gateways import KEY, Got, Mock, Served, mocking, model, serving, whole, write
from tests.rounds import (
    ADDS,
    ASKS,
    ENDS,
    KEYS,
    MILLIONTH,
    NAME,
    REPLY,
    ask,
    asking,
    file_of,
    policy,
    requests,
    saying,
    until,
)
from tests.tiny_folders import save_model


@pytest.fixture
def mock() -> Iterator[Mock]:
    with mocking() as found:
        found.behaviours["adder"] = saying("four")
        found.behaviours["poet"] = saying("a line of seven words in a row", (9, 5))
        yield found


def test_a_policy_that_calls_functions_is_told_and_tells_in_its_own_way(mock: Mock, tmp_path: Path) -> None:
    call = '{"name": "adder", "arguments": {"query": "two and two"}}'
    says = policy(q=[f"<think>sum</think>\n<tool_call>\n{call}\n</tool_call>", "<think>so</think>\n4"])
    with serving(file_of(tmp_path, mock), asking(says, dialect="calls")) as server:
        message = ask(server).parse().choices[0].message
        assert message.content == "4"
        assert message.reasoning_content == (
            f"<think>sum</think>\n<tool_call>\n{call}\n</tool_call>\n<tool_response>\nfour\n</tool_response>\n"
            "<think>so</think>\n"
        )
        assert "<tools>" in says.prompts[0]
        assert [row["path"] for row in server.rows()].count("search") == 1


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_a_policy_asks_and_answers(mock: Mock, tmp_path: Path) -> None:
    says = policy()
    with serving(file_of(tmp_path, mock), asking(says, max_tokens=50)) as server:
        raw = ask(server)
        choice, usage = raw.parse().choices[0], raw.parse().usage
        assert (choice.message.content, choice.finish_reason, raw.parse().model) == ("4", "stop", NAME)
        assert choice.message.reasoning_content == (
            f"{ADDS}{REPLY}{ASKS}\n\n<information>a line of seven words in a row</information>\n\n<think> so </think>"
        )
        assert usage.completion_tokens == sum(len(line.split()) for line in (ADDS, ASKS, ENDS))
        assert says.read_[0] == REPLY
        assert "LLM-Name must be one of: [adder, poet]" in says.prompts[0]
        sent = {"messages": [{"role": "user", "content": helper("two and two")}], "max_tokens": 50}
        assert mock.got[0].body == {"model": "adder", **sent, "temperature": 0.0, "top_p": 1}
        own, first, second = server.rows()
        assert (own["path"], own["asked"], own["ended"], own["cost"]) == ("/v1/chat/completions", NAME, "whole", 0)
        assert [(row["path"], row["served"], row["router"], row["key"], row["ended"]) for row in (first, second)] == [
            ("search", "adder", NAME, "k", "whole"), ("search", "poet", NAME, "k", "whole"),
        ]  # fmt: skip
        assert [first["cost"] // MILLIONTH, second["cost"] // MILLIONTH] == [7 + 2 * 3, 9 + 4 * 5]
        assert first["cost"] + second["cost"] == round(float(raw.headers["x-moesaic-cost"]) * PICO)
        rounds = json.loads(raw.headers["x-moesaic-rounds"])
        assert [(r["model"], r["tokens"], r["said"]) for r in rounds] == [
            ("adder", [7, 3], "ok"),
            ("poet", [9, 5], "ok"),
        ]
        assert sum(r["cost"] for r in rounds) == pytest.approx(float(raw.headers["x-moesaic-cost"]))
        assert all(r["latency"] > 0 for r in rounds)
        *searches, line = server.trace()
        assert line["rounds"] == rounds
        assert [s["within"] for s in searches] == [line["request"]] * 2 == [raw.headers["x-moesaic-request"]] * 2
        assert [s["request"] for s in searches] == [r["request"] for r in rounds]
        assert "two and two" not in (tmp_path / "trace.jsonl").read_text()
        assert server.gateway.writer.ledger.balance(read_config(tmp_path / "gateway.yaml").keys[0])[1] == 0


def test_rounds_stream_as_they_come(mock: Mock, tmp_path: Path) -> None:
    go = threading.Event()

    async def held(got: Got, out: asyncio.StreamWriter) -> None:
        await asyncio.to_thread(go.wait, 10)
        await saying("four")(got, out)

    mock.behaviours["adder"] = held
    with serving(file_of(tmp_path, mock), asking(policy())) as server:
        stream = server.client().chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "q"}], stream=True
        )
        chunks = [next(stream)]
        assert chunks[0].choices[0].delta.reasoning_content == ADDS  # while its search is still asked
        assert chunks[0].choices[0].delta.role == "assistant"
        go.set()
        chunks += stream
        told = [chunk.choices[0].delta for chunk in chunks]
        thoughts = [getattr(delta, "reasoning_content", None) for delta in told]
        assert thoughts[:3] == [ADDS, REPLY, ASKS]
        assert thoughts[-3:] == ["<think> so </think>", None, None]
        assert [delta.content for delta in told] == [None] * 5 + ["4", None]
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 6 + ["stop"]
        assert chunks[-1].usage.completion_tokens == requests(server)[0]["own_output"] > 0


def test_what_cannot_be_asked_reads_none(mock: Mock, tmp_path: Path) -> None:
    """Nobody by that name, one that is known by figures alone, one that breaks, one that says no, one that rests."""
    broken, no = saying("", (0, 0)), ADDS.replace("adder", "poet")
    lines = [ADDS.replace("adder", "nobody"), ADDS.replace("adder", "known"), ADDS, no, ADDS, ENDS]

    async def breaks(got: Got, out: asyncio.StreamWriter) -> None:
        out.write(whole({}, "500 No"))

    async def refuses(got: Got, out: asyncio.StreamWriter) -> None:
        out.write(whole({"error": {"message": "no"}}, "400 No"))

    mock.behaviours |= {"adder": breaks, "poet": refuses, "broken": broken}
    more = {"policy": {"retries": 0, "failures": 1, "rest": 60}}
    says = policy(q=lines)
    with serving(file_of(tmp_path, mock, **more), asking(says, turns=5)) as server:
        raw = ask(server)
        assert raw.parse().choices[0].message.content == "4"
        assert says.read_ == ["\n\n<information>None</information>\n\n"] * 5
        assert mock.names() == ["adder", "poet"]
        assert float(raw.headers["x-moesaic-cost"]) == 0
        assert [(r["model"], r["said"]) for r in server.trace()[-1]["rounds"]] == [
            (None, "there is no such model"), (None, "there is no such model"), ("adder", "it answered 500"),
            ("poet", "400"), ("adder", "left alone for a while"),
        ]  # fmt: skip
        assert [row["ended"] for row in server.rows()] == ["whole", "failed", "refused", "failed"]


def test_a_search_goes_by_its_models_fallbacks(mock: Mock, tmp_path: Path) -> None:
    async def breaks(got: Got, out: asyncio.StreamWriter) -> None:
        out.write(whole({}, "500 No"))

    mock.behaviours["adder"] = breaks
    with serving(file_of(tmp_path, mock, fallbacks={"adder": ["poet"]}), asking(policy(q=[ADDS, ENDS]))) as server:
        assert json.loads(ask(server).headers["x-moesaic-rounds"])[0]["model"] == "poet"
        assert [(row["served"], row["attempts"]) for row in server.rows()] == [(None, 0), ("poet", 2)]


@pytest.mark.parametrize("stream", [False, True])
def test_no_answer_is_no_error_but_as_far_as_it_may_go(mock: Mock, tmp_path: Path, stream: bool) -> None:
    says = policy(q=[ADDS, ADDS, ADDS])
    with serving(file_of(tmp_path, mock), asking(says, turns=2)) as server:
        if stream:
            chunks = list(ask(server, stream=True).parse())
            assert chunks[-1].choices[0].finish_reason == "length"
            assert not any(chunk.choices[0].delta.content for chunk in chunks)
        else:
            choice = ask(server).parse().choices[0]
            assert (choice.message.content, choice.finish_reason) == ("", "length")
            assert choice.message.reasoning_content == (ADDS + REPLY) * 2 + ADDS
        assert mock.names() == ["adder"] * 2
        assert requests(server)[0]["status"] == 200


def test_no_generation_begins_beyond_max_tokens(mock: Mock, tmp_path: Path) -> None:
    says = policy()
    with serving(file_of(tmp_path, mock), asking(says)) as server:
        found = ask(server, max_tokens=len(ADDS.split()) + 1).parse()
        assert (found.choices[0].finish_reason, says.wrote, mock.names()) == ("length", [ADDS, ASKS], ["adder"])
        assert found.usage.completion_tokens == len(ADDS.split()) + len(ASKS.split())


@pytest.mark.parametrize("stream", [False, True])
def test_a_policy_that_fails_is_told(mock: Mock, tmp_path: Path, stream: bool) -> None:
    with serving(file_of(tmp_path, mock), asking(policy(q=[ADDS]))) as server:
        with pytest.raises(APIError) as raised:
            list(ask(server, stream=stream).parse())
        assert "moesaic/r failed" in str(raised.value)
        assert isinstance(raised.value, InternalServerError) != stream
        own = requests(server)[0]
        assert (own["ended"], own["status"]) == (("broken", 200) if stream else ("failed", 500))
        assert ask(server, model="adder").parse().choices[0].message.content == "four"


# -- many at once ------------------------------------------------------------------------------------------------------


def test_rounds_of_others_go_on_while_one_waits_for_a_reply(mock: Mock, tmp_path: Path) -> None:
    """The first one's search is answered once all others have been answered whole."""
    says = policy(first=[ADDS, ENDS], **{f"q{i}": [ASKS, ASKS, ENDS] for i in range(8)})
    others_done = threading.Event()

    async def held(got: Got, out: asyncio.StreamWriter) -> None:
        assert await asyncio.to_thread(others_done.wait, 10)
        await saying("four")(got, out)

    mock.behaviours["adder"] = held

    async def run(server: Served) -> list[str]:
        client = server.async_client()

        async def one(question: str) -> str:
            found = await client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": question}])
            return str(found.choices[0].message.content)

        first = asyncio.create_task(one("first"))
        await asyncio.to_thread(until, lambda: mock.got)
        others = await asyncio.gather(*(one(f"q{i}") for i in range(8)))
        assert not first.done()
        others_done.set()
        return [await first, *others]

    with serving(file_of(tmp_path, mock), asking(says)) as server:
        assert asyncio.run(run(server)) == ["4"] * 9
        rows = server.rows()
        assert len(rows) == 9 + 1 + 16
        assert sum(row["cost"] for row in rows) == (13 + 16 * 29) * MILLIONTH
        assert {row["ended"] for row in rows} == {"whole"}


# -- what is served ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "more", "said"),
    [
        ("chat/completions", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not served"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format is not served"),
        ("chat/completions", {"logprobs": True}, "logprobs is not served"),
        ("chat/completions", {"stop": ["x"]}, "stop is not served"),
        ("chat/completions", {"n": 2}, "gives one answer"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 16_385}]}, "1 to 16,384 characters"),
        ("chat/completions", {"messages": [{"role": "user", "content": " "}]}, "1 to 16,384 characters"),
        ("chat/completions", {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:"}}]}]}, "reads text alone"),
        ("completions", {"prompt": "q"}, "answers chats alone"),
        ("embeddings", {"input": "q"}, "answers chats alone"),
        ("responses", {"input": "q", "tools": [{"type": "function", "name": "f"}]}, "tools is not served"),
    ],
)  # fmt: skip
def test_what_a_policy_does_not_do_is_refused_by_name(
    mock: Mock, tmp_path: Path, path: str, more: dict[str, Any], said: str
) -> None:
    body = {"model": NAME, **({"messages": [{"role": "user", "content": "q"}]} if "chat" in path else {}), **more}
    with serving(file_of(tmp_path, mock), asking(policy())) as server:
        with pytest.raises(BadRequestError, match=said):
            server.client().post(f"/{path}", body=body, cast_to=object)
        assert not server.rows()


def test_a_dry_run_is_refused(mock: Mock, tmp_path: Path) -> None:
    with serving(file_of(tmp_path, mock), asking(policy())) as server:
        with pytest.raises(BadRequestError, match="nothing to tell before"):
            server.client(default_headers={"x-moesaic-dry-run": "1"}).chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "q"}]
            )
        assert (server.rows(), mock.got) == ([], [])


def test_a_conversation_is_one_question_with_its_roles(mock: Mock, tmp_path: Path) -> None:
    text = "system: be brief\n\nuser: hi\n\nassistant: yes\n\nuser: and now"
    said = [("system", "be brief"), ("user", "hi"), ("assistant", "yes"), ("user", "and now")]
    with serving(file_of(tmp_path, mock), asking(policy(**{text: [ENDS]}))) as server:
        found = server.client().post(
            "/chat/completions", cast_to=object,
            body={"model": NAME, "messages": [{"role": role, "content": content} for role, content in said]},
        )  # fmt: skip
        assert found["choices"][0]["message"]["content"] == "4"  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
def test_the_thin_forms_carry_the_answer(mock: Mock, tmp_path: Path, stream: bool) -> None:
    with serving(file_of(tmp_path, mock), asking(policy())) as server:
        client = server.client()
        if stream:
            events = list(client.responses.create(model=NAME, input="q", stream=True))
            assert [event.delta for event in events if event.type == "response.output_text.delta"] == ["4"]
            last = events[-1]
            assert last.type == "response.completed"
            response = last.response
        else:
            response = client.responses.create(model=NAME, input="q")
        assert response.output_text == "4"
        assert response.usage is not None
        assert response.usage.output_tokens == sum(len(line.split()) for line in (ADDS, ASKS, ENDS))
        raw = OpenAI(base_url=server.url, api_key=KEY)._client.post(
            f"{server.url}/messages", headers={"x-api-key": KEY},
            json={"model": NAME, "max_tokens": 500, "stream": stream, "messages": [{"role": "user", "content": "q"}]},
        )  # fmt: skip
        if stream:
            assert '"type": "text_delta", "text": "4"' in raw.text
            assert raw.text.rstrip().endswith('data: {"type": "message_stop"}')
        else:
            assert raw.json()["content"] == [{"type": "text", "text": "4"}]


def test_a_policy_stands_among_the_models(mock: Mock, tmp_path: Path) -> None:
    with serving(file_of(tmp_path, mock), asking(policy())) as server:
        assert [card.id for card in server.client().models.list()] == [NAME, "adder", "poet"]


# -- a folder ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A policy of random weights, as a run keeps it."""
    loaded = load_model(str(save_model(tmp_path / "base", "causal")))
    made = tmp_path / "made" / POLICY
    made.mkdir(parents=True)
    save(LocalPolicy(loaded.model, loaded.tokenizer), Asking(("adder",), turns=1, max_new_tokens=4), made)
    return made.parent


def test_a_folder_is_served_and_kept_until_it_changes(mock: Mock, tmp_path: Path, folder: Path) -> None:
    file = file_of(tmp_path, mock, routers={"r": "made"})
    with serving(file) as server:
        found = ask(server, "sort 3 1 2 :").parse()
        assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 8)
        before = server.gateway.state.router(NAME)
        server.run(server.gateway.reload(read_config(file)))
        assert server.gateway.state.router(NAME) is before
        learned, asked = load(folder)
        save(learned, asked, folder / POLICY)
        assert folder / POLICY / "router_r1.json" in read_config(file).beside
        server.run(server.gateway.reload(read_config(file)))
        assert server.gateway.state.router(NAME) is not before
        assert ask(server, "sort 3 1 2 :").parse().usage.completion_tokens == 8


def test_a_catalog_without_the_models_that_it_learned_is_refused(mock: Mock, tmp_path: Path, folder: Path) -> None:
    file = file_of(tmp_path, mock, routers={"r": "made"})
    with serving(file) as server:
        for models in ([model("poet", mock)], [model("poet", mock), model("adder", "")]):
            with pytest.raises(ConfigError, match=r"made: it learned to ask models that the catalog lacks: .*adder"):
                server.run(
                    server.gateway.reload(
                        read_config(
                            write(tmp_path, models, keys=KEYS, routers={"r": "made"}, trace={"file": "trace.jsonl"})
                        )
                    )
                )
        assert ask(server, "sort 1 :").parse().choices[0].finish_reason == "length"


def test_a_local_policy_stops_between_two_tokens(folder: Path) -> None:
    made, _ = load(folder)
    made.max_new_tokens = 10**6
    steps = []

    def step() -> None:
        steps.append(1)
        if len(steps) == 5:
            raise RuntimeError("stop")

    before = STEP.set(step)
    try:
        with pytest.raises(RuntimeError, match="stop"):
            made.begin(["sort 3 1 2 :"]).write([0])
    finally:
        STEP.reset(before)
    assert len(steps) == 5
