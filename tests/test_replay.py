"""The replay server, asked by OpenAI's own client: recorded answers, and nothing else."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from openai import APIStatusError, AuthenticationError, NotFoundError, OpenAI
from starlette.applications import Starlette

from moesaic.cli.serve import listening
from moesaic.errors import ConfigError, DataError
from moesaic.llms.catalog import Catalog
from moesaic.llms.replay import Replay, build, estimated_tokens, read_responses
from moesaic.llms.tables import Table

CATALOG = Catalog.of(
    [
        {"name": "small", "aliases": ["s"], "input_price": 0.1, "output_price": 0.2, "parameters": 1},
        {"name": "large", "input_price": 1, "output_price": 2, "parameters": 70},
        {"name": "elsewhere", "input_price": 1, "output_price": 2, "parameters": 7},
    ]
)
PROMPTS = ("What is 1 + 1?", "Name a fruit.", "What is 1 + 1?")
TABLE = Table(
    PROMPTS, ("math", "food", "math"), ("small", "large"),
    np.array([[1, 0.5], [0, 1], [0, 0]]), np.array([[1e-6, 5e-4], [2e-6, 6e-4], [0, 0]]),
)  # fmt: skip
RESPONSES = {"small": {PROMPTS[0]: "It is\n2, naïve one."}}


def served(app: Starlette) -> Iterator[str]:
    socket = listening("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets=[socket]),))
    thread.start()
    yield f"http://127.0.0.1:{socket.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    yield from served(build(Replay(TABLE, CATALOG, RESPONSES)))


def client(url: str, key: str = "-") -> OpenAI:
    return OpenAI(base_url=url, api_key=key, max_retries=0)


def chat(prompt: Any) -> list[Any]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]


def test_a_recorded_text_is_said_with_its_price_and_marked(url: str) -> None:
    for model in ("small", "s"):
        raw = client(url).chat.completions.with_raw_response.create(model=model, messages=chat(PROMPTS[0]))
        answer = raw.parse()
        assert answer.model == "small"
        assert answer.choices[0].message.content == RESPONSES["small"][PROMPTS[0]]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.prompt_tokens == estimated_tokens(PROMPTS[0]) == 4
        assert answer.usage.completion_tokens == 5, "19 bytes and the ï's second"
        assert {key: raw.headers[f"x-moesaic-{key}"] for key in ("replayed", "cost", "score")} == {
            "replayed": "1", "cost": "1e-06", "score": "1",
        }  # fmt: skip
    parts = [{"type": "text", "text": PROMPTS[0][:4]}, {"type": "text", "text": PROMPTS[0][4:]}]
    assert client(url).chat.completions.create(model="small", messages=chat(parts)).choices[0].message.content


def test_where_no_text_was_recorded_usage_comes_to_the_recorded_cost(url: str) -> None:
    raw = client(url).chat.completions.with_raw_response.create(model="large", messages=chat(PROMPTS[1]))
    answer = raw.parse()
    assert answer.choices[0].message.content == "replayed: large scored 1; its text was not recorded"
    usage = answer.usage
    assert CATALOG["large"].cost(usage.prompt_tokens, usage.completion_tokens) == pytest.approx(6e-4, abs=1e-6)
    assert float(raw.headers["x-moesaic-cost"]) == pytest.approx(6e-4)


def test_a_stream_is_the_same_text_and_usage(url: str) -> None:
    chunks = list(
        client(url).chat.completions.create(
            model="small", messages=chat(PROMPTS[0]), stream=True, stream_options={"include_usage": True}
        )
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == RESPONSES["small"][PROMPTS[0]]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 9
    assert len({chunk.id for chunk in chunks}) == 1
    silent = list(client(url).chat.completions.create(model="small", messages=chat(PROMPTS[0]), stream=True))
    assert all(chunk.choices for chunk in silent)


def test_what_was_not_recorded_is_a_line(url: str) -> None:
    asks: list[tuple[str, Any, str]] = [
        ("small", "Name a\nvegetable.", "no outcome is recorded for the prompt 'Name a vegetable.'"),
        ("nobody", PROMPTS[0], "no model 'nobody'"),
        ("elsewhere", PROMPTS[0], "no model 'elsewhere' in the table"),
    ]
    for model, prompt, said in asks:
        with pytest.raises(NotFoundError, match=said) as error:
            client(url).chat.completions.create(model=model, messages=chat(prompt))
        assert "\n" not in error.value.body["message"]  # type: ignore[index]
        assert error.value.code == ("not_recorded" if model == "small" else "model_not_found")


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[]", b"null", b"{}", b'{"model": "small", "messages": []}', b'{"model": "small", "messages": "x"}',
        b'{"model": "small", "messages": [{"role": "system", "content": "x"}]}', b"\xff\xfe", b"[" * 100_000,
        b'{"model": "small", "messages": [{"role": "user", "content": null}]}',
        b'{"model": "small", "messages": [{"role": "user", "content": [{"text": 1}]}]}',
        b'{"model": "small", "messages": [{"role": "user"}], "stream_options": 1}',
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused(url: str, body: bytes) -> None:
    request = urllib.request.Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=10)
    assert error.value.code == 400
    assert "a chat is JSON with a model" in json.load(error.value)["error"]["message"]


def test_models_and_health(url: str) -> None:
    assert [model.id for model in client(url).models.list()] == ["small", "large"]
    with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=10) as answer:
        assert json.load(answer) == {"status": "ok", "replayed": 3}


def test_a_key_is_asked_for() -> None:
    running = served(build(Replay(TABLE, CATALOG), key="secret"))
    url = next(running)
    with pytest.raises(AuthenticationError):
        client(url, "guess").models.list()
    assert client(url, "secret").models.list().data
    with pytest.raises(APIStatusError) as error:
        client(url, "secret").chat.completions.create(model="small", messages=chat("x"))
    assert error.value.status_code == 404
    next(running, None)


def test_of_a_prompt_that_stands_twice_the_first_counts_and_prices_stand_in_for_costs() -> None:
    replay = Replay(Table(PROMPTS, TABLE.categories, TABLE.models, TABLE.scores), CATALOG)
    found = replay.answer("large", PROMPTS[0])
    assert found.score == 0.5
    assert found.cost == pytest.approx(CATALOG["large"].cost(found.input_tokens, found.output_tokens))
    with pytest.raises(ConfigError, match="no model 'other'"):
        Replay(Table(("x",), ("",), ("other",), np.ones((1, 1))), CATALOG)


def test_responses_are_read_from_csv(tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    file.write_text('prompt,a,b,a_response,b|model_response\n"x, y",1,0,"one\ntwo",zwei\n"x, y",1,0,later,\n', "utf-8")
    assert read_responses(file) == {"a": {"x, y": "one\ntwo"}, "b": {"x, y": "zwei"}}
    for text, said in (
        ("prompt,a\nx,1\n", "holds no responses"),
        ("a_response\nx\n", "holds no responses"),
        ("", "no r"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=said):
            read_responses(file)
    file.write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot be read"):
        read_responses(file)
    with pytest.raises(DataError, match="cannot be read: "):
        read_responses(tmp_path / "none.csv")


def test_published_responses_are_replayed() -> None:
    file = Path(__file__).parents[2] / "shared" / "data" / "llm_routing" / "routellm" / "gsm8k_responses.csv"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    found = read_responses(file)
    assert {model: len(texts) for model, texts in found.items()}.keys() == {
        "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview",
    }  # fmt: skip
    prompts = tuple(found["gpt-4-1106-preview"])
    priced = [{"name": name, "input_price": 1, "output_price": 1, "parameters": 1} for name in found]
    replay = Replay(
        Table(prompts, ("",) * len(prompts), tuple(found), np.ones((len(prompts), 2))), Catalog.of(priced), found
    )
    assert "$18 every day" in replay.answer("gpt-4-1106-preview", prompts[0]).text
