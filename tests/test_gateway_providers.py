"""Models behind LiteLLM: what they are asked with, and what a client has no say in."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from openai import APIStatusError

from tests.gateways import SECRET, Served, completion, model, serving, write

USER: Any = [{"role": "user", "content": "hi there"}]


class Answer:
    def model_dump_json(self) -> str:
        return json.dumps(completion())


class Standin(ModuleType):
    """LiteLLM as far as it is asked; `got` is each call's arguments."""

    def __init__(self) -> None:
        super().__init__("litellm")
        self.got: list[dict[str, Any]] = []

    async def acompletion(self, **given: Any) -> Answer:
        self.got.append(given)
        return Answer()

    aembedding = atext_completion = acompletion


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Standin:
    found = Standin()
    monkeypatch.setitem(sys.modules, "litellm", found)
    monkeypatch.setenv("PROVIDER_KEY", SECRET)
    return found


@pytest.fixture
def server(litellm: Standin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    given = model("a", "litellm:vendor/large", key_env="PROVIDER_KEY")
    with serving(write(tmp_path_factory.mktemp("providers"), [given], policy={"retries": 0, "failures": 1})) as found:
        yield found


def ask(server: Served, path: str = "chat/completions", **body: Any) -> Any:
    given = body if path != "chat/completions" else {"messages": USER, **body}
    return server.client("-")._client.post(f"{server.url}/{path}", json={"model": "a", **given})


def test_what_openai_has_a_meaning_for_is_passed_on(server: Served, litellm: Standin) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "see"}, picture]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    more = {"temperature": 0.5, "max_tokens": 9, "stop": ["x"], "seed": 1, "tools": tools, "reasoning_effort": "low"}
    assert ask(server, messages=messages, **more, logit_bias=None).status_code == 200
    ours = {"model": "vendor/large", "api_key": SECRET, "timeout": 5.0, "num_retries": 0, "drop_params": False}
    assert litellm.got[-1] == {"messages": messages, **more, **ours}
    assert ask(server, "completions", prompt="hi", suffix="!", echo=True).status_code == 200
    assert ask(server, "embeddings", input=["hi"], dimensions=8).status_code == 200
    assert litellm.got[-1] == {"input": ["hi"], "dimensions": 8, **ours}


@pytest.mark.parametrize("name", [
    "fallbacks", "api_base", "base_url", "api_key", "api_version", "aws_bedrock_runtime_endpoint", "headers",
    "extra_headers", "extra_body", "mock_response", "num_retries", "max_retries", "timeout", "custom_llm_provider",
    "model_list", "litellm_params", "callbacks", "success_callback", "vertex_credentials", "metadata", "drop_params",
    "allowed_openai_params", "context_window_fallback_dict", "caching", "shared_session", "_skip_mcp_handler", "x",
])  # fmt: skip
def test_what_litellm_would_act_on_is_refused_by_name(server: Served, litellm: Standin, name: str) -> None:
    for value in ("http://127.0.0.1:1/", [{"api_base": "http://127.0.0.1:1/"}], 1):
        found = ask(server, **{name: value})
        assert (found.status_code, found.json()["error"]["param"]) == (400, name)
        assert found.json()["error"]["type"] == "invalid_request_error"
    assert not litellm.got
    assert ask(server).status_code == 200  # the breaker, which one failure opens, was not told


@pytest.mark.parametrize(("body", "said"), [
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]},
     "send it as a data: URL"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}]},
     "send it as a data: URL"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "that is no image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "https://x"}}]}]}, "file_id"),
    ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "https://x"}}]}]}, "data: URL"),
    ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": "x"}]}]}, "parts of type video_url"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image_url": "x"}]}]}, "image_url"),
    ({"messages": [{"role": "user", "content": "x", "images": ["http://127.0.0.1/"]}]}, "messages.0.images"),
    ({"tools": [{"type": "mcp", "server_url": "http://127.0.0.1/"}]}, "a list of functions"),
    ({"tools": 5}, "a list of functions"),
])  # fmt: skip
def test_nothing_is_fetched_for_a_client(server: Served, litellm: Standin, body: dict[str, Any], said: str) -> None:
    found = ask(server, **body)
    assert (found.status_code, said in found.json()["error"]["message"]) == (400, True)
    assert not litellm.got


def test_a_field_of_chats_is_none_of_embeddings(server: Served, litellm: Standin) -> None:
    assert ask(server, "embeddings", input="x", messages=USER).status_code == 400
    with pytest.raises(APIStatusError, match="api_base is not passed on"):
        server.client("-").embeddings.create(model="a", input="x", extra_body={"api_base": "http://127.0.0.1:1"})
    assert not litellm.got
