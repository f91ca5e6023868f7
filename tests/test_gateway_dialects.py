"""Responses and messages through the gateway, and the mixture that answers in its process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, OpenAI

from moesaic.errors import ConfigError, MissingDependency
from moesaic.llms.gateway.app import build
from moesaic.llms.gateway.config import read_config
from moesaic.llms.gateway.openapi import document
from tests.gateways import (
    HEAD,
    WORDS,
    Got,
    Mock,
    Served,
    chunk,
    completion,
    delta,
    event,
    mocking,
    model,
    serving,
    whole,
    write,
)

CALL = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}
TOOL: dict[str, Any] = {"type": "object", "properties": {"town": {"type": "string"}}}


@pytest.fixture(scope="module")
def mock() -> Iterator[Mock]:
    with mocking() as found:
        yield found


@pytest.fixture(scope="module")
def server(mock: Mock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(
        write(tmp_path_factory.mktemp("dialects"), [model(name, mock) for name in ("a", "tools", "bad")])
    ) as found:
        mock.behaviours |= {"tools": calls, "bad": breaks}
        yield found


async def calls(got: Got, out: asyncio.StreamWriter) -> None:
    """Says a word, then calls a function, in parts where it streams."""
    if not got.body.get("stream"):
        content = completion("so:")
        content["choices"][0] |= {"finish_reason": "tool_calls"}
        content["choices"][0]["message"]["tool_calls"] = [CALL]
        out.write(whole(content))
        return
    out.write(HEAD + chunk(event(delta("so:"))))
    for given in ({**CALL, "function": {"name": "weather", "arguments": ""}},
                  {"function": {"arguments": '{"town": '}}, {"function": {"arguments": '"Oslo"}'}}):  # fmt: skip
        part = delta("")
        part["choices"][0]["delta"] = {"tool_calls": [{"index": 0, **given}]}
        out.write(chunk(event(part)))
    last = {**delta("", "tool_calls"), "usage": completion()["usage"]}
    out.write(chunk(event(last)) + chunk(b"data: [DONE]\n\n") + chunk(b""))


async def breaks(got: Got, out: asyncio.StreamWriter) -> None:
    if got.body.get("stream"):
        out.write(HEAD + chunk(event(delta("so:"))) + chunk(b""))
    else:
        out.write(whole({"choices": []}))


def client(server: Served) -> OpenAI:
    return server.client("-")


def post(server: Served, body: dict[str, Any]) -> Any:
    return client(server)._client.post(f"{server.url}/messages", json=body)


def events(text: str) -> list[dict[str, Any]]:
    found = []
    for part in text.strip().split("\n\n"):
        kind, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
    return found


# -- responses ---------------------------------------------------------------------------------------------------------


def test_a_response_is_a_chat_said_otherwise(server: Served, mock: Mock) -> None:
    given: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "what weather?"}]},
        {"type": "function_call", "call_id": "t1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "t1", "output": "rain"},
    ]
    tool: Any = {"type": "function", "name": "weather", "parameters": TOOL, "strict": True}
    found = client(server).responses.create(
        model="a", input=given, instructions="be brief", max_output_tokens=9, tools=[tool], temperature=0.5
    )
    assert (found.output_text, found.status) == ("".join(WORDS), "completed")
    assert found.usage is not None
    assert (found.usage.input_tokens, found.usage.output_tokens) == (7, 3)
    assert mock.got[-1].body == {
        "model": "a",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "what weather?"},
            {"role": "assistant", "content": None,
             "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        ],
        "temperature": 0.5, "max_completion_tokens": 9,
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": TOOL, "strict": True}}],
    }  # fmt: skip
    assert server.rows()[-1]["path"] == "/v1/responses"


def test_a_streamed_response_is_the_whole_one(server: Served) -> None:
    with client(server).responses.stream(model="tools", input="weather?") as stream:
        kinds = [part.type for part in stream]
        found = stream.get_final_response()
    same = client(server).responses.create(model="tools", input="weather?")
    for one in (found, same):
        assert one.output_text == "so:"
        call = one.output[-1]
        assert call.type == "function_call"
        assert (call.call_id, call.name, call.arguments) == ("t1", "weather", '{"town": "Oslo"}')
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.done") == 2


def test_what_a_chat_has_no_word_for_is_refused_by_name(server: Served, mock: Mock) -> None:
    before = len(mock.got)
    for more, said in (
        ({"previous_response_id": "r"}, "previous_response_id is not served"),
        ({"tools": [{"type": "web_search"}]}, "tools of type web_search"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "items of type item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "parts of type input_image"),
        ({"input": 5}, "not what /v1/responses takes"),
        ({"store": True}, "store is not served"),
        ({"include": ["reasoning.encrypted_content"]}, "include is not served"),
        ({"truncation": "auto"}, "truncation is not served"),
        ({"max_tool_calls": 1}, "max_tool_calls is not served"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary is not served"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format of type grammar"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice of type web_search"),
        ({"extra_body": {"another": 1}}, "another is not served"),
        ({"extra_body": {"tools": "search"}}, "tools: a list is wanted"),
        ({"extra_body": {"tool_choice": 1}}, "tool_choice: a text or an object is wanted"),
        ({"extra_body": {"store": 0}}, "store is not served"),
        ({"tools": [{"type": "function", "name": 1, "parameters": {}}]}, "not what /v1/responses takes"),
    ):
        with pytest.raises(APIStatusError, match=said) as raised:
            client(server).responses.create(**{"model": "a", "input": "x", **more})  # type: ignore[call-overload]
        assert raised.value.status_code == 400
    assert len(mock.got) == before


def test_what_a_chat_has_a_word_for_is_passed_on(server: Served, mock: Mock) -> None:
    schema = {"type": "json_schema", "name": "n", "schema": TOOL, "strict": True}
    client(server).responses.create(  # type: ignore[call-overload]
        model="a", input="x", text={"format": schema, "verbosity": "low"}, top_logprobs=5, reasoning={"effort": "low"},
        service_tier="flex", store=False, include=[], truncation="disabled",
    )  # fmt: skip
    assert mock.got[-1].body == {
        "model": "a", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 5, "logprobs": True,
        "service_tier": "flex", "reasoning_effort": "low", "verbosity": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": TOOL, "strict": True}},
    }  # fmt: skip
    client(server).responses.create(model="a", input="x", service_tier="auto", text={"format": {"type": "text"}})
    assert mock.got[-1].body == {"model": "a", "messages": [{"role": "user", "content": "x"}]}


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_message_is_a_chat_said_otherwise(server: Served, mock: Mock) -> None:
    body = {
        "model": "tools", "max_tokens": 9, "system": [{"type": "text", "text": "be brief"}], "stop_sequences": ["x"],
        "tools": [{"name": "weather", "description": "d", "input_schema": TOOL}], "tool_choice": {"type": "any"},
        "messages": [
            {"role": "user", "content": "what weather?"},
            {"role": "assistant", "content": [
                {"type": "text", "text": "hm"},
                {"type": "tool_use", "id": "t0", "name": "weather", "input": {"t": "Å"}},
            ]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t0", "content": "rain"},
                                         {"type": "text", "text": "and there?"}]},
        ],
    }  # fmt: skip
    found = post(server, body).json()
    assert found["content"] == [
        {"type": "text", "text": "so:"}, {"type": "tool_use", "id": "t1", "name": "weather", "input": {"town": "Oslo"}},
    ]  # fmt: skip
    assert (found["stop_reason"], found["usage"]) == ("tool_use", {"input_tokens": 7, "output_tokens": 3})
    asked = mock.got[-1].body
    assert [message["role"] for message in asked["messages"]] == ["system", "user", "assistant", "tool", "user"]
    assert json.loads(asked["messages"][2]["tool_calls"][0]["function"]["arguments"]) == {"t": "Å"}
    assert (asked["tool_choice"], asked["stop"], asked["max_tokens"]) == ("required", ["x"], 9)


@pytest.mark.parametrize(("more", "said"), [
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking is not served"),
    ({"top_k": 5}, "top_k is not served"),
    ({"mcp_servers": [{"type": "url", "url": "http://x"}]}, "mcp_servers is not served"),
    ({"container": "c"}, "container is not served"),
    ({"system": {"type": "text"}}, "system: a text or a list is wanted"),
    ({"tools": [{"name": "f", "input_schema": "x"}]}, "not what /v1/messages takes"),
    ({"tool_choice": {"type": "x", "name": "n"}}, "tool_choice of type x"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools of type web_search_20250305"),
    ({"tools": [{"name": "f", "input_schema": {}, "defer_loading": True}]}, "tools: defer_loading is not served"),
])  # fmt: skip
def test_what_a_message_means_beyond_a_chat_is_refused_by_name(
    server: Served, mock: Mock, more: dict[str, Any], said: str
) -> None:
    before = len(mock.got)
    found = post(server, {"model": "a", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}], **more})
    assert (found.status_code, said in found.json()["error"]["message"]) == (400, True)
    assert len(mock.got) == before


def test_errors_of_tools_and_one_tool_at_a_time_are_said(server: Served, mock: Mock) -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": "boom", "is_error": True}
    tools = [{"type": "custom", "name": "f", "input_schema": TOOL, "strict": True, "cache_control": {}}]
    choice = {"type": "tool", "name": "f", "disable_parallel_tool_use": True}
    idle = {"thinking": {"type": "disabled"}, "service_tier": "auto", "top_k": None, "mcp_servers": []}
    body = {"model": "a", "max_tokens": 9, "messages": [{"role": "user", "content": [result]}], "tools": tools}
    assert post(server, {**body, **idle, "tool_choice": choice}).status_code == 200
    function = {"name": "f", "description": "", "parameters": TOOL, "strict": True}
    assert mock.got[-1].body == {
        "model": "a", "messages": [{"role": "tool", "tool_call_id": "t", "content": "error: boom"}], "max_tokens": 9,
        "tools": [{"type": "function", "function": function}], "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    }  # fmt: skip


def test_a_number_that_json_has_not_is_refused(server: Served, mock: Mock) -> None:
    before, text = len(mock.got), '{"model": "a", "temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}'
    told = client(server)._client.post(
        f"{server.url}/messages", content=text, headers={"Content-Type": "application/json"}
    )
    assert (told.status_code, len(mock.got)) == (400, before)


def test_a_streamed_message_is_the_whole_one(server: Served) -> None:
    body = {"model": "tools", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    told = events(post(server, {**body, "stream": True}).text)
    assert [part["type"] for part in told] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "content_block_start",
        "content_block_delta", "content_block_delta", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert json.loads("".join(p["delta"].get("partial_json", "") for p in told if "delta" in p)) == {"town": "Oslo"}
    assert told[-2]["delta"]["stop_reason"] == "tool_use"
    assert told[-2]["usage"] == post(server, body).json()["usage"]


def test_errors_are_in_a_form_that_both_clients_read(server: Served) -> None:
    for body in ({"model": "a"}, {"model": "a", "messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}):
        found = post(server, body)
        assert (found.status_code, found.json()["type"]) == (400, "error")
        assert found.json()["error"]["type"] == "invalid_request_error"
    body = {"model": "bad", "messages": [{"role": "user", "content": "x"}]}
    assert post(server, body).status_code == 502
    assert events(post(server, {**body, "stream": True}).text)[-1]["type"] == "error"
    with pytest.raises(APIStatusError):
        client(server).responses.create(model="bad", input="x")
    with client(server).responses.create(model="bad", input="x", stream=True) as stream:
        assert [part.type for part in stream][-1] == "response.failed"


# -- other backends, and the document ----------------------------------------------------------------------------------


def test_providers_need_litellm_and_say_so(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, [model("a", "litellm:vendor/model")]))
    with pytest.raises(MissingDependency, match=r"pip install 'moesaic\[litellm\]'"):
        asyncio.run(build(config).start())
    config = read_config(write(tmp_path, [model("a", "litellm:model")]))
    with pytest.raises(ConfigError, match="PROVIDER/MODEL is wanted"):
        asyncio.run(build(config).start())


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, [model("a", f"run:{tmp_path / 'gone'}")]))
    with pytest.raises(ConfigError, match="gone"):
        asyncio.run(build(config).start())


def test_the_document_describes_every_path(server: Served) -> None:
    told = client(server)._client.get(server.url.removesuffix("/v1") + "/openapi.json").json()
    assert told == json.loads(json.dumps(document()))
    assert len(told["paths"]) == 9
