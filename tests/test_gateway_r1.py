"""A policy behind the gateway: rounds, money, clients that leave, many at once, and what is refused."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, BadRequestError, InternalServerError, OpenAI, RateLimitError

from moesaic.errors import ConfigError
from moesaic.llms.gateway import telling
from moesaic.llms.gateway.asker import Asker
from moesaic.llms.gateway.calls import PICO
from moesaic.llms.gateway.config import read_config
from moesaic.llms.gateway.keys import hash_of
from moesaic.llms.router_r1.engine import STEP, Written
from moesaic.llms.router_r1.folder import POLICY, Asking, load, save
from moesaic.llms.router_r1.local import LocalPolicy
from moesaic.llms.router_r1.prompt import helper
from moesaic.models.embedded import load_model
from tests.gateways import KEY, Got, Mock, Served, completion, mocking, model, read_rows, serving, whole, write
from tests.tiny_folders import save_model

NAME = "moesaic/r"
KEYS: list[dict[str, Any]] = [{"id": "k", "hash": hash_of(KEY), "budget": 1.0}]
ADDS, ENDS = "<think> sum </think><search> adder: two and two </search>", "<think> so </think><answer> 4 </answer>"
ASKS = "<think> verse </think><search> poet: a line </search>"
REPLY = "\n\n<information>four</information>\n\n"
MILLIONTH = PICO // 10**6


@dataclass
class Says:
    """A policy that says the lines of the question it is asked, and keeps what it reads. It holds one at a time."""

    lines: dict[str, list[str]]
    read_: list[str] = field(default_factory=list)
    wrote: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    holds: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, prompts: Sequence[str]) -> Saying:
        self.prompts += prompts
        question = prompts[0].rpartition("Question: ")[2].strip()
        return Saying(self, iter(self.lines[question]))


@dataclass
class Saying:
    policy: Says
    lines: Iterator[str]

    def write(self, who: Sequence[int]) -> list[Written]:
        assert list(who) == [0]
        assert self.policy.holds.acquire(blocking=False), "two rollouts write at once"
        try:
            time.sleep(0.002)
            text = next(self.lines)
            while text == "on and on":
                STEP.get()()
                time.sleep(0.01)
            self.policy.wrote.append(text)
        finally:
            self.policy.holds.release()
        return [Written(text, len(text.split()))]

    def read(self, who: int, text: str) -> tuple[int, ...]:
        self.policy.read_.append(text)
        return ()

    def clip(self, text: str, tokens: int) -> str:
        return " ".join(text.split()[:tokens])


@pytest.fixture
def mock() -> Iterator[Mock]:
    with mocking() as found:
        found.behaviours["adder"] = saying("four")
        found.behaviours["poet"] = saying("a line of seven words in a row", (9, 5))
        yield found


def saying(text: str, usage: tuple[int, int] = (7, 3), wait: float = 0.0) -> Any:
    async def answer(got: Got, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(wait)
        out.write(whole(completion(text, got.body["model"], usage)))

    return answer


def policy(**lines: list[str]) -> Says:
    return Says({"q": [ADDS, ASKS, ENDS], **lines})


def file_of(tmp_path: Path, mock: Mock, **more: Any) -> Path:
    models = [model("adder", mock), model("poet", mock, output_price=4.0), model("known", "")]
    return write(tmp_path, models, **{"keys": KEYS, "trace": {"file": "trace.jsonl"}, **more})


def asking(says: Any, **more: Any) -> dict[str, Any]:
    return {NAME: Asker(NAME, says, Asking(models=("adder",), **more))}


def ask(server: Served, question: str = "q", budget: str | None = None, **more: Any) -> Any:
    """The answer, and headers with it."""
    headers = {} if budget is None else {"x-moesaic-budget": budget}
    return server.client().chat.completions.with_raw_response.create(
        model=more.pop("model", NAME), messages=[{"role": "user", "content": question}], extra_headers=headers, **more
    )


def requests(server: Served) -> list[dict[str, Any]]:
    """Rows of requests, without those of searches."""
    return [row for row in server.rows() if row["path"] != "search"]


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


# -- money -------------------------------------------------------------------------------------------------------------


def test_a_budget_below_one_call_asks_nobody(mock: Mock, tmp_path: Path) -> None:
    says = policy()
    with serving(file_of(tmp_path, mock), asking(says)) as server:
        raw = ask(server, budget="0.000001")
        assert raw.parse().choices[0].message.content == "4"
        assert (mock.got, raw.headers["x-moesaic-cost"]) == ([], "0.000000000")
        assert says.read_ == ["\n\n<information>None</information>\n\n"] * 2
        assert len(server.rows()) == 1
        (line,) = server.trace()
        assert line["budget"] == 1e-6
        assert all("0.000001000 of its budget are left" in r["said"] for r in line["rounds"])


def test_no_call_is_made_that_could_go_beyond_the_budget(mock: Mock, tmp_path: Path) -> None:
    """What the first may cost is reserved, and what it did cost is gone: the second would fit alone, but no longer."""
    with serving(file_of(tmp_path, mock), asking(policy(), max_tokens=100)) as server:
        ask(server)
        first, second = (row["reserved"] for row in server.rows()[1:])
        spent = server.rows()[1]["cost"]
        assert first < second
        for budget, models in (
            (second, ["adder"]),
            (second + spent - 1, ["adder"]),
            (second + spent, ["adder", "poet"]),
        ):
            mock.got.clear()
            ask(server, budget=f"{budget / PICO:.12f}")
            assert mock.names() == models


@pytest.mark.parametrize("budget", ["", "a", "-1", "1e3", "nan", "0x1", "1,5", ".5", "0.1234567890123", "9" * 7])
def test_a_budget_that_is_none_is_refused(mock: Mock, tmp_path: Path, budget: str) -> None:
    with serving(file_of(tmp_path, mock), asking(policy())) as server:
        for name in (NAME, "adder"):
            with pytest.raises(BadRequestError, match="decimal number of USD"):
                ask(server, budget=budget, model=name)
        assert not server.rows()


def test_a_budget_holds_for_every_request_and_the_file_has_a_default(mock: Mock, tmp_path: Path) -> None:
    with serving(file_of(tmp_path, mock, request_budget=1e-6), asking(policy())) as server:
        with pytest.raises(BadRequestError, match="of its budget are left"):
            ask(server, model="adder", max_tokens=8)
        assert ask(server, model="adder", max_tokens=8, budget="0.01").headers["x-moesaic-cost"] == "0.000013000"
        assert ask(server).headers["x-moesaic-cost"] == "0.000000000"
        assert ask(server, budget="0.01").headers["x-moesaic-cost"] == "0.000042000"
    for wrong in (-1, 2e6, float("nan")):
        with pytest.raises(ConfigError, match="request_budget"):
            read_config(file_of(tmp_path, mock, request_budget=wrong))


def test_a_keys_limits_hold_for_searches(mock: Mock, tmp_path: Path) -> None:
    """A search is a request more, in the place of the one that it belongs to."""
    for limit, names in (
        ({"at_once": 1}, ["adder", "poet"]), ({"requests_per_minute": 2}, ["adder"]),
        ({"tokens_per_minute": 100}, []), ({"budget": 1e-5}, []),
    ):  # fmt: skip
        mock.got.clear()
        with serving(
            file_of(tmp_path, mock, keys=[KEYS[0] | limit], ledger=f"{next(iter(limit))}.sqlite"), asking(policy())
        ) as server:
            assert ask(server).parse().choices[0].message.content == "4"
            assert mock.names() == names
    with serving(
        file_of(tmp_path, mock, keys=[KEYS[0] | {"budget": 0.0}], ledger="none.sqlite"), asking(policy())
    ) as server:
        with pytest.raises(RateLimitError):
            ask(server)


# -- clients that leave, and the gateway that stops --------------------------------------------------------------------


def begun(server: Served, question: str = "q", *, stream: bool = False) -> http.client.HTTPConnection:
    line = http.client.HTTPConnection("127.0.0.1", server.port(), timeout=10)
    body = {"model": NAME, "messages": [{"role": "user", "content": question}], "stream": stream}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    line.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return line


def until(done: Any) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["cancel", "drain", "partial"])
def test_a_client_that_leaves_ends_the_rollout(mock: Mock, tmp_path: Path, how: str, stream: bool) -> None:
    """It leaves while the second search is asked: that is billed as the file says, and no third is made."""
    mock.behaviours["poet"] = saying("a line", (9, 5), wait=0.5)
    says = policy(q=[ADDS, ASKS, ADDS, ENDS], another=[ENDS])
    with serving(file_of(tmp_path, mock, on_disconnect=how), asking(says)) as server:
        line = begun(server, stream=stream)
        if stream:
            found = line.getresponse()
            while b"poet" not in found.fp.readline():  # type: ignore[union-attr]
                pass
            until(lambda: mock.names() == ["adder", "poet"])
            found.close()
        until(lambda: mock.names() == ["adder", "poet"])
        line.close()
        until(lambda: not server.gateway.metrics.running)
        own, first, second = server.rows()
        ended = {"cancel": "cancelled", "drain": "drained", "partial": "partial"}[how]
        assert (own["ended"], own["status"], own["cost"]) == (ended, 499, 0)
        assert (first["ended"], first["cost"]) == ("whole", 13 * MILLIONTH)
        assert (second["ended"], second["status"]) == (ended, 200 if how == "drain" else 499)
        read = second["own_input"]
        assert second["cost"] == {"cancel": 0, "drain": 9 + 4 * 5, "partial": read}[how] * MILLIONTH
        assert says.wrote == [ADDS, ASKS]
        assert len(server.trace()[-1]["rounds"]) == 2
        assert server.gateway.writer.ledger._accounts["k"].reserved == 0
        assert ask(server, "another").parse().choices[0].message.content == "4"


def test_a_client_that_leaves_in_a_generation_frees_the_policy(mock: Mock, tmp_path: Path) -> None:
    says = policy(long=["on and on"], short=[ENDS])
    with serving(file_of(tmp_path, mock), asking(says)) as server:
        line = begun(server, "long")
        until(says.holds.locked)
        line.close()
        assert ask(server, "short").parse().choices[0].message.content == "4"
        assert sorted(row["ended"] for row in server.rows()) == ["partial", "whole"]


def test_a_client_that_takes_nothing_is_left(mock: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "TAKING", 0.3)
    says = policy(q=["x" * 10_000_000] * 4)
    with serving(file_of(tmp_path, mock), asking(says, turns=3)) as server:
        line = begun(server, stream=True)
        assert line.getresponse().status == 200
        until(lambda: not server.gateway.metrics.running)
        line.close()
        assert [row["ended"] for row in server.rows()] == ["partial"]


def test_a_gateway_that_stops_lets_rollouts_end(mock: Mock, tmp_path: Path) -> None:
    mock.behaviours["adder"] = saying("four", wait=0.5)
    found = []
    with serving(file_of(tmp_path, mock), asking(policy(q=[ADDS, ADDS, ENDS]))) as server:
        asked = threading.Thread(target=lambda: found.append(ask(server).parse().choices[0].message.content))
        asked.start()
        until(lambda: mock.got)
    asked.join()
    assert (found, mock.names()) == (["4"], ["adder"] * 2)


@pytest.mark.parametrize("where", ["search", "generation"])
def test_a_gateway_that_has_waited_breaks_rollouts_off(mock: Mock, tmp_path: Path, where: str) -> None:
    mock.behaviours["adder"] = saying("four", wait=30)
    says = policy(q=[ADDS, ENDS] if where == "search" else ["on and on"])
    with serving(file_of(tmp_path, mock), asking(says)) as server:
        line = begun(server)
        until(lambda: mock.got or says.holds.locked())
    line.close()
    assert {(row["state"], row["ended"]) for row in read_rows(tmp_path)} == {("settled", "partial")}
    until(lambda: not says.holds.locked())


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
