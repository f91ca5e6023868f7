"""The gateway over real HTTP: pass-through, streams, routing, chats that keep their expert, budgets of many at once."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, RateLimitError

from moesaic.errors import ConfigError
from moesaic.llms.catalog import Catalog
from moesaic.llms.gateway.calls import PICO
from moesaic.llms.gateway.keys import hash_of
from moesaic.llms.gateway.routers import Composed, Decision, open_router
from tests.gateways import (
    HEAD,
    KEY,
    SECRET,
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

USER = [{"role": "user", "content": "hi there"}]


@dataclass
class Stub:
    """A router that says what it is told, and keeps what it was asked."""

    name: str = "moesaic/stub"
    decisions: list[Decision] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def decide(self, prompt: str, *, session: str) -> Decision:
        self.asked.append((prompt, session))
        if not self.decisions:
            raise RuntimeError(f"nothing for {prompt}")
        return self.decisions[-1]


@pytest.fixture(scope="module")
def mock() -> Iterator[Mock]:
    with mocking() as found:
        yield found


@pytest.fixture(autouse=True)
def fresh(mock: Mock) -> None:
    mock.behaviours.clear()
    mock.got.clear()


@pytest.fixture(scope="module")
def router() -> Stub:
    return Stub()


@pytest.fixture(scope="module")
def server(mock: Mock, router: Stub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two models, one of them by another name, a router, and an account of somebody with no end to it."""
    patch = pytest.MonkeyPatch()
    patch.setenv("BACKEND_KEY", SECRET)
    models = [
        model("small", mock, aliases=["s"], key_env="BACKEND_KEY"),
        model("large", mock, served_as="vendor/large-v2", input_price=10.0, output_price=20.0),
        model("known by figures alone", ""),
    ]
    keys = [{"id": "all", "hash": hash_of(KEY)}]
    file = write(tmp_path_factory.mktemp("gateway"), models, keys=keys, trace={"file": "trace.jsonl"})
    with serving(file, {router.name: router}) as found:
        yield found
    patch.undo()


def post(server: Served, body: bytes | str, path: str = "/v1/chat/completions", **headers: str) -> Any:
    """A raw request; the response has `body` and `told`, its x-moesaic headers."""
    line = http.client.HTTPConnection("127.0.0.1", server.port(), timeout=30)
    given = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **headers}
    line.request("POST", path, body.encode() if isinstance(body, str) else body, given)
    found: Any = line.getresponse()
    found.body = found.read()
    found.told = {k[10:]: v for k, v in found.getheaders() if k.startswith("x-moesaic-")}
    line.close()
    return found


# -- passing through ---------------------------------------------------------------------------------------------------


def test_a_request_is_passed_on_to_the_byte_but_for_the_models_name(server: Served, mock: Mock) -> None:
    sent = '{ "messages":[{"role":"user","content":"h\\u00e9 \\ud83d"}],\n "model" : "large","x_new":1e400, "big":%d}'
    sent %= 10**30
    assert post(server, sent).status == 200
    assert mock.got[0].raw == sent.replace('"large"', '"vendor/large-v2"').encode()
    small = sent.replace("large", "small")
    assert post(server, small).status == 200
    assert mock.got[1].raw == small.encode()


def test_answers_come_back_to_the_byte(server: Served, mock: Mock) -> None:
    said = json.dumps(completion(), indent=3).encode() + b"\n \n"

    async def spaced(got: Got, out: asyncio.StreamWriter) -> None:
        out.write(whole(said))

    mock.behaviours["small"] = spaced
    assert post(server, json.dumps({"model": "small", "messages": USER})).body == said


def test_backends_get_their_own_key_and_nobody_elses_headers(server: Served, mock: Mock) -> None:
    server.client().chat.completions.create(model="s", messages=USER, extra_headers={"x-secret": "mine"})
    server.client().chat.completions.create(model="large", messages=USER)
    first, second = (got.headers for got in mock.got)
    assert first["authorization"] == f"Bearer {SECRET}"
    assert "authorization" not in second
    assert set(first) == {"host", "content-type", "accept", "accept-encoding", "authorization", "content-length"}


def test_streams_join_to_the_same_text(server: Served) -> None:
    with server.client().chat.completions.create(model="small", messages=USER, stream=True) as stream:
        parts = [part.choices[0].delta.content for part in stream]
    assert [*filter(None, parts)] == WORDS

    async def several() -> list[str]:
        client = server.async_client()
        streams = [client.chat.completions.create(model="large", messages=USER, stream=True) for _ in range(8)]
        return ["".join([p.choices[0].delta.content or "" async for p in await stream]) for stream in streams]

    assert asyncio.run(several()) == ["".join(WORDS)] * 8


def test_a_stream_cut_anywhere_is_passed_on_to_the_byte(server: Served, mock: Mock) -> None:
    """Events with \\r\\n, comments, and cuts within characters and between the newlines that end an event."""
    text = b": hello\r\n\r\n" + event(completion("wörld")).replace(b"\n\n", b"\r\n\r\n")
    text += event(completion("日本")).replace(b"data: ", b"event: x\ndata:") + b"data: [DONE]\n\n"

    async def cut(got: Got, out: asyncio.StreamWriter) -> None:
        out.write(HEAD)
        for at in range(0, len(text), 7):
            out.write(chunk(text[at : at + 7]))
            await out.drain()
        out.write(chunk(b""))

    mock.behaviours["small"] = cut
    assert post(server, json.dumps({"model": "small", "messages": USER, "stream": True})).body == text


def test_tool_calls_pass_both_ways(server: Served, mock: Mock) -> None:
    call = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Łódź"}'}}

    async def calls(got: Got, out: asyncio.StreamWriter) -> None:
        content = completion("")
        content["choices"][0] |= {"finish_reason": "tool_calls"}
        content["choices"][0]["message"] |= {"content": None, "tool_calls": [call]}
        out.write(whole(content))

    mock.behaviours["small"] = calls
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    found = server.client().chat.completions.create(model="small", messages=USER, tools=[tool])  # type: ignore[list-item]
    (made,) = found.choices[0].message.tool_calls or []
    assert made.to_dict() == call
    assert mock.got[0].body["tools"] == [tool]


def test_completions_and_embeddings_pass(server: Served, mock: Mock) -> None:
    client = server.client()
    assert client.completions.create(model="small", prompt="once").choices[0].text == "done"
    assert client.embeddings.create(model="small", input=["a", "b"], encoding_format="float").data[0].embedding == [
        0.5, -0.25,
    ]  # fmt: skip
    assert [got.path for got in mock.got] == ["/v1/completions", "/v1/embeddings"]
    last = server.rows()[-1]
    assert (last["path"], last["backend_input"], last["backend_output"]) == ("/v1/embeddings", 4, 0)


def test_models_are_listed_with_routers_and_aliases(server: Served) -> None:
    client = server.client()
    assert [card.id for card in client.models.list()] == ["moesaic/stub", "small", "s", "large"]
    assert client.models.retrieve("moesaic/stub").owned_by == "moesaic"
    with pytest.raises(NotFoundError):
        client.models.retrieve("known by figures alone")


@pytest.mark.parametrize("name", ["nobody", "known by figures alone", "moesaic/else", "SMALL"])
def test_an_unknown_model_is_a_404_in_openais_form(server: Served, mock: Mock, name: str) -> None:
    with pytest.raises(NotFoundError) as raised:
        server.client().chat.completions.create(model=name, messages=USER)
    assert raised.value.code == "model_not_found"
    assert not mock.got


def test_a_backends_refusal_of_the_request_is_handed_on(server: Served, mock: Mock) -> None:
    async def no(got: Got, out: asyncio.StreamWriter) -> None:
        out.write(whole({"error": {"message": "too long", "code": "context_length_exceeded"}}, "400 Bad Request"))

    mock.behaviours["small"] = no
    for stream in (False, True):
        with pytest.raises(BadRequestError, match="too long"):
            server.client().chat.completions.create(model="small", messages=USER, stream=stream)
    row = server.rows()[-1]
    assert (row["ended"], row["cost"], row["status"], row["state"]) == ("refused", 0, 400, "settled")


# -- routing -----------------------------------------------------------------------------------------------------------


def test_the_chosen_expert_answers_and_the_headers_say_why(server: Served, mock: Mock, router: Stub) -> None:
    router.decisions = [Decision("large", "maths", 0.75)]
    found = post(server, json.dumps({"model": "moesaic/stub", "messages": [*USER, {"role": "user", "content": "2+2"}]}))
    assert router.asked[-1] == ("2+2", "")
    assert mock.names() == ["vendor/large-v2"]
    told = found.told
    assert (told["router"], told["category"], told["confidence"]) == ("moesaic/stub", "maths", "0.7500")
    assert (told["expert"], told["model"], told["price"], told["attempts"]) == ("large", "large", "10/20", "1")
    assert float(told["cost"]) == pytest.approx((7 * 10 + 3 * 20) / 1e6)
    assert 0 < float(told["latency"]) < 30
    row = server.rows()[-1]
    assert (row["category"], row["expert"], row["served"], row["served_id"]) == (
        "maths",
        "large",
        "large",
        "vendor/large-v2",
    )
    assert row["cost"] == 130 * PICO // 10**6
    assert (row["own_input"], row["backend_input"], row["own_output"], row["backend_output"]) == (11, 7, 4, 3)


def test_a_dry_run_tells_the_decision_and_calls_nobody(server: Served, mock: Mock, router: Stub) -> None:
    router.decisions = [Decision("small", "law", 0.5, uncertain=True)]
    sent = json.dumps({"model": "moesaic/stub", "messages": USER, "stream": True})
    told = json.loads(post(server, sent, **{"x-moesaic-dry-run": "1"}).body)
    assert not mock.got
    assert (told["expert"], told["category"], told["uncertain"], told["fallbacks"]) == ("small", "law", True, ["large"])
    row = server.rows()[-1]
    assert (row["ended"], row["cost"], row["reserved"], row["state"]) == ("dry", 0, 0, "settled")


@pytest.mark.parametrize(
    ("headers", "more"),
    [({"x-moesaic-session": "c"}, {}), ({}, {"user": "u"}), ({}, {"prompt_cache_key": "k"}), ({}, {})],
)
def test_a_chat_keeps_its_expert_unless_the_gain_exceeds_the_penalty(
    server: Served, router: Stub, headers: dict[str, str], more: dict[str, str]
) -> None:
    """The penalty is 0.1. A request of no chat goes where the router says."""

    def turn(expert: str, small: float, large: float) -> str:
        router.decisions = [Decision(expert, "x", 0.9, scores={"small": small, "large": large})]
        return str(
            post(server, json.dumps({"model": "moesaic/stub", "messages": USER, **more}), **headers).told["model"]
        )

    chat = bool(headers or more)
    assert turn("small", 0.9, 0.1) == "small"
    assert turn("large", 0.5, 0.59) == ("small" if chat else "large")
    assert server.trace()[-1]["kept"] is chat
    assert turn("large", 0.4, 0.6) == "large"
    assert turn("small", 0.5, 0.5) == ("large" if chat else "small")


def test_a_router_that_fails_is_a_500_without_a_word_of_the_prompt(
    server: Served, router: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    router.decisions = []
    found = post(server, json.dumps({"model": "moesaic/stub", "messages": [{"role": "user", "content": "xyzzy"}]}))
    assert found.status == 500
    assert "xyzzy" not in found.body.decode() + caplog.text
    router.decisions = [Decision("gone")]
    assert post(server, json.dumps({"model": "moesaic/stub", "messages": USER})).status == 500


def test_a_prompt_that_names_an_address_leads_nowhere(server: Served, mock: Mock, router: Stub) -> None:
    """Nor does a body that does."""
    with mocking() as other:
        router.decisions = [Decision("small")]
        for name in ("small", "moesaic/stub", other.url, f"small@{other.url}"):
            body = {"model": name, "messages": [{"role": "user", "content": other.url}], "base_url": other.url,
                    "api_base": other.url, "endpoint": other.url}  # fmt: skip
            post(server, json.dumps(body), **{"x-forwarded-host": other.url, "x-base-url": other.url})
        assert not other.got
        assert mock.names() == ["small", "small"]


class Fitted:
    """As much of a composition as a router asks."""

    experts = ("small", "large")

    def decide(self, prompt: str) -> Any:
        scores = {"small": 0.4, "large": 0.6}
        return SimpleNamespace(expert="large", category=prompt, confidence=0.7, uncertain=False, scores=scores)


def test_a_composition_routes_if_the_catalog_has_its_experts(tmp_path: Path) -> None:
    models = [model(name, "http://127.0.0.1:1/v1") for name in Fitted.experts]
    found = Composed("moesaic/coe", Fitted(), Catalog.of(models), tmp_path)
    decision = found.decide("law", session="")
    assert (decision.expert, decision.category, decision.scores["small"]) == ("large", "law", 0.4)
    with pytest.raises(ConfigError, match="its expert 'large' has no endpoint"):
        Composed("moesaic/coe", Fitted(), Catalog.of(models[:1]), tmp_path)
    with pytest.raises(ConfigError, match="is no folder; `moesaic llm fit` makes one"):
        open_router("coe", tmp_path / "gone", Catalog.of(models))


# -- many at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_budget_that_fits_ten_admits_exactly_ten_of_64(mock: Mock, tmp_path: Path, stream: bool) -> None:
    """Each may cost 2 tokens (of 4 bytes, and 4 of its message) at 1 and 8 at 2 USD a million."""

    async def slow(got: Got, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        if stream:
            done = event({**delta("a" * 32, "stop"), "usage": completion(usage=(6, 8))["usage"]})
            out.write(HEAD + chunk(done) + chunk(b"data: [DONE]\n\n") + chunk(b""))
        else:
            out.write(whole(completion("a" * 32, usage=(6, 8))))

    mock.behaviours["small"] = slow
    keys = [{"id": "ten", "hash": hash_of(KEY), "budget": 10 * (6 * 1 + 8 * 2) / 1e6}]

    async def ask(server: Served) -> list[Any]:
        client = server.async_client()

        async def one() -> None:
            found = await client.chat.completions.create(model="small", messages=USER, max_tokens=8, stream=stream)
            if stream:
                assert [part.choices[0].delta.content async for part in found] == ["a" * 32]  # type: ignore

        return await asyncio.gather(*(one() for _ in range(64)), return_exceptions=True)

    with serving(write(tmp_path, [model("small", mock)], keys=keys)) as server:
        answered = asyncio.run(ask(server))
        refused = [said for said in answered if said is not None]
        assert (len(mock.got), len(refused)) == (10, 54)
        for error in refused:
            assert isinstance(error, RateLimitError)
            assert (error.code, error.response.headers["x-should-retry"]) == ("insufficient_quota", "false")
        rows = server.rows()
        assert [row["state"] for row in rows] == ["settled"] * 10
        assert sum(row["cost"] for row in rows) == round(keys[0]["budget"] * PICO)  # type: ignore[operator]


def test_a_reservation_that_was_not_used_up_is_given_back(mock: Mock, tmp_path: Path) -> None:
    """A budget for one worst case admits one after the other as long as each costs less."""
    keys = [{"id": "k", "hash": hash_of(KEY), "budget": (6 + 2 * 100) / 1e6}]
    with serving(write(tmp_path, [model("small", mock)], keys=keys)) as server:
        client = server.client()
        client.chat.completions.create(model="small", messages=USER, max_tokens=100)
        assert [row["cost"] * 1e6 / PICO for row in server.rows()] == [13]
        with pytest.raises(RateLimitError, match=r"of which 0\.000193 are left; this request may cost 0\.000194"):
            client.chat.completions.create(model="small", messages=USER, max_tokens=94)
        client.chat.completions.create(model="small", messages=USER, max_tokens=93)
