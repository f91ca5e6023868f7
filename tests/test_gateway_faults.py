"""The gateway when backends fail and clients leave: tries, breakers, fallbacks, and who is billed for what."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, APIStatusError, InternalServerError, RateLimitError

from moesaic.llms.gateway import policy, relay
from moesaic.llms.gateway.calls import PICO
from moesaic.llms.gateway.keys import hash_of
from moesaic.llms.gateway.policy import Breaker, Policy, retry_after, wait
from tests.gateways import (
    HEAD,
    KEY,
    WORDS,
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
    reset,
    serving,
    whole,
    write,
)

USER = [{"role": "user", "content": "hi there"}]


@pytest.fixture(scope="module")
def mock() -> Iterator[Mock]:
    with mocking() as found:
        yield found


@pytest.fixture(autouse=True)
def fresh(mock: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "FIRST", 0.01)
    mock.behaviours.clear()
    mock.got.clear()


def faulty(status: str, *headers: str, times: int = 99) -> Behaviour:
    """Answers with an error so many times, then as it should."""
    left = [times]

    async def answer(got: Got, out: asyncio.StreamWriter) -> None:
        left[0] -= 1
        if left[0] >= 0:
            out.write(whole({"error": {"message": "the backend's own words"}}, status, *headers))
        else:
            await plain(got, out)

    return answer


async def silent(got: Got, out: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


async def hangs_up(got: Got, out: asyncio.StreamWriter) -> None:
    reset(out)


async def garbage(got: Got, out: asyncio.StreamWriter) -> None:
    out.write(b"\x00\x01 this is no HTTP\r\n\r\n")
    out.close()


async def no_json(got: Got, out: asyncio.StreamWriter) -> None:
    out.write(whole(b"<html>a proxy's page</html>"))


async def cut_short(got: Got, out: asyncio.StreamWriter) -> None:
    out.write(whole(completion())[:-20])
    out.close()


async def no_stream(got: Got, out: asyncio.StreamWriter) -> None:
    out.write(HEAD + chunk(b"data: {not json}\n\n") + chunk(b""))


def at_word(count: int, then: str) -> Behaviour:
    """A stream that fails after so many words."""

    async def answer(got: Got, out: asyncio.StreamWriter) -> None:
        out.write(HEAD)
        for word in WORDS[:count]:
            out.write(chunk(event(delta(word))))
            await out.drain()
            await asyncio.sleep(0.02)
        if then == "reset":
            out.write(chunk(b"data: {half an ev"))
            await out.drain()
            await asyncio.sleep(0.05)
            reset(out)
        elif then == "end":
            out.write(chunk(b""))
        elif then == "garbage":
            out.write(chunk(b"data: nonsense\n\n"))
        elif then == "error":
            out.write(chunk(event({"error": {"message": "out of memory"}})) + chunk(b""))
        elif then == "silence":
            await asyncio.sleep(30)

    return answer


def ask(server: Served, name: str = "a", stream: bool = False, **more: Any) -> str:
    found = server.client().chat.completions.create(model=name, messages=USER, stream=stream, **more)  # type: ignore
    if not stream:
        return str(found.choices[0].message.content)
    return "".join(part.choices[0].delta.content or "" for part in found)


# -- backends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "status", "said"),
    [
        (faulty("500 Internal Server Error"), 502, "answered 500"),
        (faulty("401 Unauthorized"), 502, "its endpoint, name or key in the catalog is wrong"),
        (faulty("302 Found", "Location: http://127.0.0.1:1/v1"), 502, "answered 302"),
        (silent, 504, "it sent nothing for 0.3 s"),
        (hangs_up, 502, "broke off"),
        (garbage, 502, "broke off"),
        (no_json, 502, "no JSON object"),
        (cut_short, 502, "broke off"),
    ],
)  # fmt: skip
def test_a_backend_that_fails_is_an_error_of_one_line_and_costs_nothing(
    mock: Mock, tmp_path: Path, behaviour: Behaviour, status: int, said: str
) -> None:
    mock.behaviours["a"] = behaviour
    with serving(write(tmp_path, [model("a", mock, idle=0.3)])) as server:
        with pytest.raises(APIStatusError, match=said) as raised:
            ask(server)
        assert raised.value.status_code == status
        assert "own words" not in str(raised.value)
        (row,) = server.rows()
    assert (row["ended"], row["cost"], row["status"], row["state"]) == ("failed", 0, status, "settled")


def test_a_backend_that_is_down_is_a_502(tmp_path: Path) -> None:
    with serving(write(tmp_path, [model("a", "http://127.0.0.1:1/v1")])) as server:
        with pytest.raises(InternalServerError, match="no answer of a: no connection"):
            ask(server)


@pytest.mark.parametrize("stream", [False, True])
def test_tries_are_bounded_and_stop_at_the_first_answer(mock: Mock, tmp_path: Path, stream: bool) -> None:
    with serving(write(tmp_path, [model("a", mock)], policy={"retries": 2})) as server:
        mock.behaviours["a"] = faulty("503 Service Unavailable", times=2)
        assert ask(server, stream=stream) == "".join(WORDS)
        assert len(mock.got) == 3
        mock.behaviours["a"] = faulty("503 Service Unavailable")
        with pytest.raises(InternalServerError):
            ask(server, stream=stream)
        assert len(mock.got) == 6
        assert [row["attempts"] for row in server.rows()] == [3, 3]


def test_a_stream_that_fails_before_its_first_event_is_tried_again(mock: Mock, tmp_path: Path) -> None:
    calls: list[Behaviour] = [no_stream, at_word(0, "reset"), at_word(0, "end"), at_word(0, "error"), plain]

    async def each(got: Got, out: asyncio.StreamWriter) -> None:
        await calls.pop(0)(got, out)

    mock.behaviours["a"] = each
    with serving(write(tmp_path, [model("a", mock)], policy={"retries": 4})) as server:
        assert ask(server, stream=True) == "".join(WORDS)
        assert not calls


@pytest.mark.parametrize("then", ["reset", "end", "garbage", "silence"])
def test_a_stream_that_fails_in_the_middle_ends_with_an_error_and_is_never_tried_again(
    mock: Mock, tmp_path: Path, then: str
) -> None:
    """What had come is billed: 4 + 2 tokens of the prompt and 2 of 5 bytes."""
    mock.behaviours["a"] = at_word(2, then)
    told: list[str] = []
    with serving(write(tmp_path, [model("a", mock, idle=0.3), model("b", mock)], policy={"retries": 3})) as server:
        stream = server.client().chat.completions.create(model="a", messages=USER, stream=True)  # type: ignore
        with pytest.raises(APIError, match="model a: "):
            told.extend(part.choices[0].delta.content or "" for part in stream)
        assert told == WORDS[:2]
        assert mock.names() == ["a"]
        (row,) = server.rows()
    assert (row["ended"], row["status"], row["own_output"]) == ("broken", 200, 2)
    assert row["cost"] == (6 * 1 + 2 * 2) * PICO // 10**6


def test_retry_after_is_waited_for_as_long_as_the_policy_says(mock: Mock, tmp_path: Path) -> None:
    more: dict[str, Any] = {"policy": {"retries": 1, "longest_wait": 2}}
    with serving(write(tmp_path, [model("a", mock), model("b", mock)], fallbacks={"b": ["a"]}, **more)) as server:
        mock.behaviours["a"] = faulty("429 Too Many Requests", "Retry-After: 1", times=1)
        begun = time.monotonic()
        assert ask(server) == "".join(WORDS)
        assert time.monotonic() - begun >= 1
        mock.behaviours["a"] = faulty("429 Too Many Requests", "Retry-After: 30")
        mock.got.clear()
        with pytest.raises(RateLimitError) as raised:
            ask(server)
        assert raised.value.response.headers["retry-after"] == "30"
        assert len(mock.got) == 1
        mock.behaviours["b"] = mock.behaviours.pop("a")
        assert ask(server, "b") == "".join(WORDS)  # by its fallback, at once


def test_fallbacks_are_the_experts_own(mock: Mock, tmp_path: Path) -> None:
    """Named ones in their order; none for a model that was asked for by name and has none."""
    models = [model(name, mock) for name in "abcd"]
    for name in "ad":
        mock.behaviours[name] = faulty("500 Internal Server Error")
    with serving(write(tmp_path, models, fallbacks={"a": ["d", "c"]}, trace={"file": "trace.jsonl"})) as server:
        assert ask(server) == "".join(WORDS)
        assert mock.names() == ["a", "d", "c"]
        with pytest.raises(InternalServerError):
            ask(server, "d")
        assert [row["served"] for row in server.rows()] == ["c", None]
        assert [a["model"] for a in server.trace()[0]["attempts"]] == ["a", "d", "c"]
        assert server.trace()[0]["asked"] == "a"


def test_an_open_breaker_spares_a_model_and_lets_one_request_try(mock: Mock, tmp_path: Path) -> None:
    more: dict[str, Any] = {"policy": {"retries": 0, "failures": 2, "rest": 4.0}, "fallbacks": {"a": ["b"]}}
    with serving(write(tmp_path, [model("a", mock), model("b", mock)], **more)) as server:
        mock.behaviours["a"] = faulty("500 Internal Server Error")
        for _ in range(4):
            assert ask(server) == "".join(WORDS)
        assert mock.names() == ["a", "b", "a", "b", "b", "b"]
        assert [row["attempts"] for row in server.rows()] == [2, 2, 1, 1]
        time.sleep(4.2)
        mock.behaviours.clear()
        mock.got.clear()
        assert ask(server) == ask(server) == "".join(WORDS)
        assert mock.names() == ["a", "a"]


def test_where_everybody_rests_a_client_is_told_when_to_come_back(mock: Mock, tmp_path: Path) -> None:
    mock.behaviours["a"] = hangs_up
    with serving(write(tmp_path, [model("a", mock)], policy={"retries": 0, "failures": 1, "rest": 60})) as server:
        for status in (502, 503):
            with pytest.raises(InternalServerError) as raised:
                ask(server)
            assert raised.value.status_code == status
        assert 58 <= int(raised.value.response.headers["retry-after"]) <= 60
        assert len(mock.got) == 1


# -- clients that leave ------------------------------------------------------------------------------------------------


def leave(server: Served, mock: Mock, *, stream: bool) -> None:
    """Ask, and hang up in the middle of the answer or, where it is no stream, before it."""
    line = http.client.HTTPConnection("127.0.0.1", server.port(), timeout=10)
    body = json.dumps({"model": "a", "messages": USER, "stream": stream})
    line.request(
        "POST", "/v1/chat/completions", body, {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    )
    if stream:
        found = line.getresponse()
        assert found.fp is not None
        while WORDS[1].encode() not in found.fp.readline():
            pass
        found.close()
    else:
        while not mock.got:
            time.sleep(0.01)
    line.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["cancel", "drain", "partial"])
def test_a_client_that_leaves_is_billed_as_the_policy_says(mock: Mock, tmp_path: Path, how: str, stream: bool) -> None:
    """The prompt has 4 + 2 tokens by our count; the whole answer 3 by ours (11 bytes), 3 and 7 by the backend's."""

    async def slow(got: Got, out: asyncio.StreamWriter) -> None:
        if not stream:
            await asyncio.sleep(0.5)
            out.write(whole(completion()))
            return
        out.write(HEAD)
        for word in (*WORDS[:2], *[""] * 5, *WORDS[2:]):
            out.write(chunk(event(delta(word))))
            await out.drain()
            await asyncio.sleep(0.05)
        out.write(chunk(b"data: [DONE]\n\n") + chunk(b""))
        done.append(got.path)

    done: list[str] = []
    mock.behaviours["a"] = slow
    keys = [{"id": "k", "hash": hash_of(KEY), "budget": 1.0}]
    with serving(write(tmp_path, [model("a", mock)], keys=keys, on_disconnect=how)) as server:
        leave(server, mock, stream=stream)
        deadline = time.monotonic() + 10
        while not (rows := server.rows()) and time.monotonic() < deadline:
            time.sleep(0.05)
        (row,) = rows
        millionths = row["cost"] * 1e6 / PICO
        assert (row["state"], row["status"]) == ("settled", 200 if how == "drain" else 499)
        assert row["ended"] == {"cancel": "cancelled", "drain": "drained", "partial": "partial"}[how]
        if how == "cancel":
            assert millionths == 0
        elif how == "drain":
            assert millionths == (6 + 2 * 4 if stream else 7 + 2 * 3)
        else:
            assert millionths == (6 + 2 * 2 if stream else 6)
        assert server.gateway.writer.ledger._accounts["k"].reserved == 0
    assert bool(done) == (stream and how == "drain")


# -- policies by themselves --------------------------------------------------------------------------------------------


def test_a_breaker_goes_through_its_states() -> None:
    now = [0.0]
    breaker = Breaker(Policy(failures=3, rest=10), clock=lambda: now[0])
    for _ in range(2):
        assert breaker.allows()
        breaker.failed()
    breaker.succeeded()
    for _ in range(3):
        assert breaker.state == "closed"
        breaker.failed()
    assert (breaker.state, breaker.allows(), breaker.remaining()) == ("open", False, 10)
    now[0] = 10.0
    assert breaker.state == "half-open"
    assert [breaker.allows() for _ in range(3)] == [True, False, False]
    breaker.failed()
    assert (breaker.state, breaker.remaining()) == ("open", 10)
    now[0] = 20.0
    assert breaker.allows()
    breaker.left()
    assert [breaker.allows(), breaker.allows()] == [True, False]
    breaker.succeeded()
    assert (breaker.state, breaker.allows(), breaker.allows()) == ("closed", True, True)


def test_waits_double_and_are_drawn_below_their_bound() -> None:
    assert [round(wait(tries, lambda: 1.0) / policy.FIRST) for tries in (1, 2, 3)] == [1, 2, 4]
    assert wait(60, lambda: 1.0) == policy.LONGEST
    assert wait(1, lambda: 0.0) == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("-2", 0.0), ("Thu, 01 Jan 1970 00:01:00 GMT", 50.0), ("soon", None), ("nan", None),
     ("inf", None), (None, None), ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0)],
)  # fmt: skip
def test_retry_after_is_a_number_or_a_date(text: str | None, seconds: float | None) -> None:
    assert retry_after(text, clock=lambda: 10.0) == seconds


def test_a_client_that_takes_nothing_is_left_in_the_end(
    mock: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backend goes on for ever, as fast as it is read."""
    monkeypatch.setattr(relay, "LONGEST", 0.0)

    async def endless(got: Got, out: asyncio.StreamWriter) -> None:
        out.write(HEAD)
        while True:
            out.write(chunk(event(delta("word " * 10_000))))
            await out.drain()

    mock.behaviours["a"] = endless
    more: dict[str, Any] = {"policy": {"retries": 0, "longest_wait": 0}}
    with serving(write(tmp_path, [model("a", mock, total=1.0)], **more)) as server:
        line = http.client.HTTPConnection("127.0.0.1", server.port(), timeout=10)
        body = json.dumps({"model": "a", "messages": USER, "stream": True})
        line.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        assert line.getresponse().status == 200
        deadline = time.monotonic() + 15
        while server.gateway.metrics.running and time.monotonic() < deadline:
            time.sleep(0.05)
        (row,) = server.rows()
        line.close()
    assert row["ended"] in ("partial", "broken")
    assert row["cost"] > 0
