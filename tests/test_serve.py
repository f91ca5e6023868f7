"""Answers of a mixture: `moesaic generate`, and `moesaic serve` asked by OpenAI's own client over HTTP."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from openai import APIStatusError, AsyncOpenAI, OpenAI
from peft import get_peft_model

import moesaic
from moesaic.cli.main import main
from moesaic.cli.serve import ServeSettings, check, listening
from moesaic.data import causal
from moesaic.data.examples import Example
from moesaic.errors import ConfigError, DataError, TrainingError
from moesaic.evaluation.answers import generate
from moesaic.evaluation.opening import load_run
from moesaic.evaluation.routed import routed
from moesaic.models.embedded import load_model
from moesaic.models.nano.pretrain import CHAT
from moesaic.serving.app import build
from moesaic.serving.asking import Asked, asked, of_messages, read_messages
from moesaic.serving.engine import Batched, OneByOne, opened
from moesaic.serving.text import Text
from moesaic.training.run import train
from tests.composing import asked as composing
from tests.composing import make
from tests.test_pages import blocks
from tests.tiny_folders import save_model, write_tasks

PROMPTS = [f"{i} 4 2 {i + 1} {word} =" for i in range(8) for word in ("up", "back")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of nano whose experts differ, and a composition that is routed by prompts."""
    root = tmp_path_factory.mktemp("serving")
    base = load_model("nano")
    torch.manual_seed(0)
    model = get_peft_model(base.model, moesaic.MoLAConfig(target_modules=["q_proj"], r=4, num_experts=3))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "router" in name:
                weight.normal_(std=0.2)
    model.peft_config["default"].base_model_name_or_path = "nano"
    model.save_pretrained(str(root / "mola"))
    given = ("method=retrieval", f"data={make(root / 'parts') / 'data'}", "adapter.encoder=hashing")
    assert main(composing(root / "parts", root / "retrieval", *given)) == 0
    return root


@dataclass
class Served:
    url: str
    engine: Any

    def client(self, **more: Any) -> OpenAI:
        return OpenAI(base_url=self.url, api_key="-", max_retries=0, **more)

    def port(self) -> int:
        return int(self.url.split(":")[2].split("/")[0])


def serve(folder: Path, **how: Any) -> Iterator[Served]:
    """A server in a thread of its own, over HTTP; ends with the iterator."""
    found: dict[str, Any] = {}
    ready, socket = threading.Event(), listening("127.0.0.1", 0)

    async def run() -> None:
        found["engine"] = await opened(load_run(folder), **how.pop("opening", {}))
        app = build(found["engine"], "served", **how)
        server = found["server"] = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        ready.set()
        try:
            await server.serve(sockets=[socket])
        finally:
            found["engine"].close()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(60)
    yield Served(f"http://127.0.0.1:{socket.getsockname()[1]}/v1", found["engine"])
    found["server"].should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def mola(place: Path) -> Iterator[Served]:
    yield from serve(place / "mola")


# -- the same answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mola", "retrieval"])
def test_sixteen_at_once_answer_as_one_by_one_and_as_generate_does(place: Path, name: str) -> None:
    """Routed by token, and by the prompt."""
    running = serve(place / name)
    server = next(running)
    assert isinstance(server.engine, Batched)
    client = AsyncOpenAI(base_url=server.url, api_key="-", max_retries=0)

    async def ask(prompt: str) -> str:
        found = await client.completions.create(model="served", prompt=prompt, max_tokens=12)
        return found.choices[0].text

    async def both() -> tuple[list[str], list[str]]:
        return await asyncio.gather(*map(ask, PROMPTS)), [await ask(prompt) for prompt in PROMPTS]

    at_once, in_turn = asyncio.run(both())
    assert next(running, None) is None
    prepared = load_run(place / name)
    alone = [generate(prepared, [Example("", prompt)], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert at_once == in_turn == alone
    assert len(set(at_once)) > 4


def test_a_stream_joins_to_the_answer(mola: Served) -> None:
    how: dict[str, Any] = {"model": "served", "prompt": PROMPTS[1], "max_tokens": 9}
    whole = mola.client().completions.create(**how)
    *parts, last = mola.client().completions.create(**how, stream=True, stream_options={"include_usage": True})
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert len(parts) >= whole.usage.completion_tokens > 1
    assert (parts[-1].choices[0].finish_reason, last.choices) == (whole.choices[0].finish_reason, [])
    assert last.usage == whole.usage
    assert whole.usage.prompt_tokens + whole.usage.completion_tokens == whole.usage.total_tokens

    async def read() -> str:
        client = AsyncOpenAI(base_url=mola.url, api_key="-")
        return "".join([p.choices[0].text async for p in await client.completions.create(**how, stream=True)])

    assert asyncio.run(read()) == whole.choices[0].text


def test_a_chat_with_nano_is_its_prompt_and_answer(mola: Served) -> None:
    wanted = mola.client().completions.create(model="served", prompt=PROMPTS[0], max_tokens=8)
    message: Any = {"role": "user", "content": [{"type": "text", "text": PROMPTS[0]}]}
    found = mola.client().chat.completions.create(model="served", messages=[message], max_completion_tokens=8)
    bare = wanted.choices[0].text.lstrip()
    assert (found.choices[0].message.role, found.choices[0].message.content) == ("assistant", bare)
    parts = list(mola.client().chat.completions.create(messages=[message], model="", max_tokens=8, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == bare


def test_the_pages_example_runs_as_written(mola: Served, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("answers", "python")
    exec(code.replace("http://127.0.0.1:8000/v1", mola.url).replace('"composed"', '"served"'), {})
    answer, weights, pieces = capsys.readouterr().out.split("\n")
    assert pieces.replace("|", "").lstrip() == answer
    assert re.fullmatch(r"\{'0': 0\.\d+, '1': 0\.\d+, '2': 0\.\d+\}", weights)


@pytest.mark.parametrize(("prompt", "answer"), [("1 2 up =", " 1 2"), ("a b", "c d"), ("x ", "y"), (" Q:\n", "yes")])
def test_nanos_template_writes_a_chat_as_it_was_trained(prompt: str, answer: str) -> None:
    tokenizer = load_model("nano").tokenizer
    assert tokenizer.chat_template == CHAT
    row = Example("t", prompt, answer)
    (found,) = causal.tokenize([causal.as_chat(row)], tokenizer, ["t"], max_length=64)
    assert [found] == causal.tokenize([row], tokenizer, ["t"], max_length=64)
    assert not causal.writes_turns(tokenizer)
    turns = [("system", "S"), ("user", "u"), ("assistant", "a"), ("user", "v")]
    assert causal.prompt_text(of_messages(turns), tokenizer) == "S\nu a<eos>v"


def test_tokens_and_several_prompts_are_taken(mola: Served) -> None:
    ids = load_model("nano").tokenizer(PROMPTS[:2])["input_ids"]
    found = mola.client().completions.create(model="served", prompt=ids, max_tokens=5)
    texts = mola.client().completions.create(model="served", prompt=PROMPTS[:2], max_tokens=5)
    assert [choice.text for choice in found.choices] == [choice.text for choice in texts.choices]
    assert [choice.index for choice in found.choices] == [0, 1]
    one = mola.client().completions.create(model="served", prompt=ids[1], max_tokens=5)
    assert one.choices[0].text == found.choices[1].text


def test_routing_comes_with_the_answer_on_request(mola: Served, place: Path) -> None:
    how: Any = {"model": "served", "prompt": PROMPTS[3], "max_tokens": 6}
    plain = mola.client().completions.create(**how)
    assert "routing" not in plain.choices[0].model_dump()
    whole = mola.client().completions.create(**how, extra_body={"routing": "tokens"}).choices[0].model_dump()
    assert whole["text"] == plain.choices[0].text
    *_, last = mola.client().completions.create(**how, extra_body={"routing": True}, stream=True)
    found = whole["routing"]
    assert last.choices[0].model_dump()["routing"] == {k: found[k] for k in ("experts", "weights", "by_layer")}
    prepared = load_run(place / "mola")
    ids = torch.tensor([prepared.base.tokenizer.convert_tokens_to_ids(found["tokens"])])
    wanted = routed(prepared, ids, answered=plain.usage.completion_tokens)
    assert len(found["by_token"]) == ids.shape[1] == plain.usage.total_tokens
    torch.testing.assert_close(torch.tensor(found["by_token"]), torch.tensor(wanted["by_token"]))
    torch.testing.assert_close(torch.tensor(found["weights"]), torch.tensor(wanted["weights"]))


def test_answers_end_at_texts_and_lengths(mola: Served) -> None:
    how: Any = {"model": "served", "prompt": PROMPTS[5]}
    whole = mola.client().completions.create(**how, max_tokens=10).choices[0].text
    stop = whole[4:7]
    found = mola.client().completions.create(**how, max_tokens=10, stop=[stop]).choices[0]
    assert (found.text, found.finish_reason) == (whole[: whole.index(stop)], "stop")
    short = mola.client().completions.create(**how, max_tokens=2)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 2)


def test_drawn_tokens_differ_and_the_likeliest_do_not(mola: Served) -> None:
    how: Any = {"model": "served", "prompt": PROMPTS[:1] * 8, "max_tokens": 12}
    drawn = {choice.text for choice in mola.client().completions.create(**how, temperature=2).choices}
    sure = {choice.text for choice in mola.client().completions.create(**how, temperature=1, top_p=1e-6).choices}
    likeliest = {choice.text for choice in mola.client().completions.create(**how).choices}
    assert len(drawn) > 4
    assert len(likeliest) == 1
    assert sure == likeliest


# -- what is refused, and who leaves -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ({"n": 2}, 400, "n: "),
        ({"temperature": 3}, 400, "temperature: "),
        ({"top_p": 0}, 400, "top_p: "),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"max_tokens": "many"}, 400, "max_tokens: "),
        ({"max_tokens": 600}, 400, "the model takes 512 of both"),
        ({"prompt": None}, 400, "prompt: "),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": []}, 400, "holds 0 prompts"),
        ({"prompt": [1, 9999]}, 400, "tokens that the model does not know"),
        ({"prompt": ["a", "b"], "stream": True}, 400, "stream=true answers one prompt"),
        ({"model": "gpt"}, 404, "no model 'gpt': this server's is 'served'"),
        ({"logprobs": 3}, 400, "logprobs: "),
        ({"echo": True}, 400, "echo: "),
        ({"beam": 3}, 400, "beam: is not served"),
        ({"seed": 1, "temperature": 1}, 400, "seed: "),
        ({"task": "up"}, 400, "method mola is told none"),
        ({"routing": "layers"}, 400, "routing: "),
        ({"task": "\ud800"}, 400, "method mola is told none"),
        ({"temperature": 1e-300}, 400, "temperature=1e-300 must be 0 or lie between 0.001 and 2"),
        ({"stop": ["x" * 1000000]}, 400, "stop holds 16 texts of 500 characters at most"),
        ({"stop": ""}, 400, "stop holds an empty text"),
        ({"z\nz" * 300: 1}, 400, "is not served"),
        ({"prompt": "a\ud800"}, 400, "no text in UTF-8"),
        ({"max_tokens": True}, 400, "max_tokens: "),
        ({"temperature": "0.5"}, 400, "temperature: "),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options: only a streamed answer has any"),
    ],
)
def test_what_is_not_served_is_refused_in_one_line(mola: Served, given: dict[str, Any], status: int, said: str) -> None:
    found, error = post(mola, "/v1/completions", json.dumps({"model": "served", "prompt": "1 2 up =", **given}))
    assert found == status
    assert error["error"].keys() == {"message", "type", "param", "code"}
    assert said in error["error"]["message"]
    assert "\n" not in error["error"]["message"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user"}]}, "messages.0.content: "),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: "),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "nothing to answer"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools: is not served"),
        ({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}, "response_form"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "max_completion_tokens": 2}, "give one of"),
    ],
)
def test_chats_that_are_not_served_are_refused(mola: Served, given: dict[str, Any], said: str) -> None:
    found, error = post(mola, "/v1/chat/completions", json.dumps(given))
    assert (found, "\n" in error["error"]["message"]) == (400, False)
    assert said in error["error"]["message"]


def test_what_is_no_request_is_refused(mola: Served) -> None:
    assert post(mola, "/v1/completions", '{"prompt": ')[0] == 400
    assert post(mola, "/v1/completions", "[1]")[0] == 400
    assert post(mola, "/v1/completions", "x" * 5_000_000)[0] == 413
    assert post(mola, "/v1/nothing", "{}")[0] == 404
    assert post(mola, "/v1/models", "{}")[0] == 405
    assert post(mola, "/v1/completions", "{}", **{"content-type": "text/plain"})[0] == 415
    assert post(mola, "/v1/completions", iter([b"{}"]))[0] == 411
    assert mola.client().models.list().data[0].id == mola.client().models.retrieve("served").id == "served"


def test_a_server_on_loopback_is_called_by_its_own_names_alone(place: Path) -> None:
    running = serve(place / "mola", hosts=["localhost", "127.0.0.1", "[::1]"])
    server = next(running)
    ask = '{"prompt": "1 2 up =", "max_tokens": 1}'
    for name in ("localhost", "127.0.0.1:1", "[::1]:8000"):
        assert post(server, "/v1/completions", ask, host=name)[0] == 200
    status, said = post(server, "/v1/completions", ask, host="evil.example:80")
    assert (status, said["error"]["message"]) == (400, "this server is not called 'evil.example'")
    assert next(running, None) is None


def test_a_model_loaded_for_training_answers_at_once(place: Path) -> None:
    """Where bf16 pays, a CPU's model has plain attention, which is faster backwards."""
    prepared = load_run(place / "mola")
    prepared.model.get_base_model().set_attn_implementation("eager")

    async def both() -> tuple[bool, list[int], list[int]]:
        engine = await opened(prepared)
        wish = Asked(tuple(prepared.base.tokenizer("1 2 up =")["input_ids"]), max_tokens=4)
        try:
            found = [token async for token in engine.tokens(wish)]
            return engine.at_once, found, [token async for token in OneByOne(prepared).tokens(wish)]
        finally:
            engine.close()

    at_once, found, wanted = asyncio.run(both())
    assert at_once
    assert found == wanted


def post(server: Served, path: str, body: str | Iterator[bytes], **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port(), timeout=60)
    content = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    try:
        connection.request("POST", path, content, {"content-type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(mola: Served, stream: bool) -> None:
    manager = mola.engine._managers[False]
    begun = manager.current_batch
    connection = http.client.HTTPConnection("127.0.0.1", mola.port(), timeout=60)
    body = {"prompt": PROMPTS[0], "max_tokens": 500, "stream": stream, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    deadline = time.monotonic() + 30
    while manager.current_batch < begun + 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    connection.close()
    while (mola.engine.running() or manager.batch_processor.scheduler.active_requests) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert mola.engine.running() == 0
    assert not manager.batch_processor.scheduler.active_requests
    assert manager.current_batch - begun < 400
    assert mola.client().completions.create(model="served", prompt=PROMPTS[0], max_tokens=3).choices[0].text


def test_others_than_this_machine_bring_a_key(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"host=0\.0\.0\.0 lets others in: set MOESAIC_API_KEY"):
        check(ServeSettings(host="0.0.0.0"), "")
    check(ServeSettings(host="0.0.0.0"), "secret")
    for key in ("schlüssel", "sec\n", " sec", "k\udcff"):
        with pytest.raises(ConfigError, match="must be of printable ASCII"):
            check(ServeSettings(), key)
    with pytest.raises(ConfigError, match="must lie between 64 and"):
        check(ServeSettings(cache_tokens=10**12), "")
    with pytest.raises(ConfigError, match="is no name of a host"):
        listening("a" * 300, 0)
    check(ServeSettings(host="::1"), "")
    with pytest.raises(ConfigError, match="temperature=1e-300 must be 0 or lie between"):
        check(ServeSettings(temperature=1e-300), "")
    running = serve(place / "mola", key="secret")
    server = next(running)
    with pytest.raises(APIStatusError) as error:
        server.client().models.list()
    assert (error.value.status_code, error.value.code) == (401, "invalid_api_key")
    assert OpenAI(base_url=server.url, api_key="secret").models.list().data
    assert next(running, None) is None


def test_a_method_that_is_told_tasks_answers_in_turn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from moesaic.runs.recipe import load_recipe

    base, data = save_model(tmp_path / "base", "causal"), write_tasks(tmp_path / "data", "causal")
    train(load_recipe("moelora", [f"model={base}", f"data={data}", "steps=1", f"out={tmp_path / 'run'}"]))
    running = serve(tmp_path / "run")
    server = next(running)
    assert isinstance(server.engine, OneByOne)
    assert "answers come one after the other: moelora is told each request's task" in caplog.text
    tasks = server.engine.prepared.tasks
    found = server.client().completions.create(
        model="served", prompt="first 1 2 :", max_tokens=4, extra_body={"task": tasks[0], "routing": True}
    )
    assert found.choices[0].model_dump()["routing"]["weights"]
    for given, said in (({}, "task=NAME says it"), ({"task": "stranger"}, "'stranger'")):
        status, error = post(server, "/v1/completions", json.dumps({"prompt": "1", "max_tokens": 2, **given}))
        assert (status, said in error["error"]["message"]) == (400, True)
    assert next(running, None) is None


def test_a_full_cache_is_told_and_waited_for(place: Path) -> None:
    """Requests that do not fit together wait for each other, those that never fit are refused."""
    running = serve(place / "retrieval", opening={"cache_tokens": 64})
    server = next(running)
    status, error = post(server, "/v1/completions", json.dumps({"prompt": PROMPTS[0], "max_tokens": 60}))
    assert (status, "the cache has room for 64" in error["error"]["message"]) == (400, True)
    client = AsyncOpenAI(base_url=server.url, api_key="-", max_retries=0)

    async def ask(prompt: str) -> str:
        return (await client.completions.create(model="served", prompt=prompt, max_tokens=20)).choices[0].text

    async def both() -> tuple[list[str], list[str]]:
        return await asyncio.gather(*map(ask, PROMPTS[:6])), [await ask(prompt) for prompt in PROMPTS[:6]]

    at_once, in_turn = asyncio.run(both())
    assert at_once == in_turn
    assert next(running, None) is None


def test_an_answer_without_a_length_fits_the_cache(place: Path) -> None:
    running = serve(place / "mola", opening={"cache_tokens": 64})
    server = next(running)
    status, found = post(server, "/v1/completions", json.dumps({"prompt": PROMPTS[0]}))
    assert status == 200
    assert sum(found["usage"][key] for key in ("prompt_tokens", "completion_tokens")) <= 64
    status, found = post(server, "/v1/completions", json.dumps({"prompt": PROMPTS[0], "max_tokens": 65}))
    assert (status, "the cache has room for 64" in found["error"]["message"]) == (400, True)
    assert next(running, None) is None


@pytest.mark.parametrize("at_once", [True, False])
def test_answers_that_a_server_stops_amid_say_so(place: Path, at_once: bool) -> None:
    prepared = load_run(place / "mola")
    question = asked(prepared, Example("", PROMPTS[0]), max_tokens=400)

    async def answer(engine: Any, begun: asyncio.Event) -> None:
        async for _ in engine.tokens(question):
            begun.set()

    async def stopped() -> None:
        engine, begun = await opened(prepared, at_once=at_once), asyncio.Event()
        answers = [asyncio.create_task(answer(engine, begun)) for _ in range(2)]
        await begun.wait()
        engine.stop()
        for failed in await asyncio.gather(*answers, return_exceptions=True):
            assert isinstance(failed, TrainingError)
            assert str(failed) == "the server is stopping"
        engine.close()

    asyncio.run(stopped())


# -- the command line --------------------------------------------------------------------------------------------------


def test_serve_is_one_command_and_ends_with_ctrl_c(place: Path) -> None:
    command = [sys.executable, "-m", "moesaic", "serve", str(place / "mola"), "port=0", "name=mine"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as it:
        assert it.stderr is not None
        said = ""
        while "Ctrl-C stops" not in said:
            line = it.stderr.readline()
            assert line, said
            said = line
        url = said.split()[1]
        assert OpenAI(base_url=url, api_key="-").completions.create(model="mine", prompt="1 2 up =", max_tokens=2)
        with pytest.raises(ConfigError, match="in use; host=… and port=… name another"):
            listening("127.0.0.1", int(url.split(":")[2].split("/")[0]))
        half = http.client.HTTPConnection(url.split("/")[2], timeout=60)
        half.putrequest("POST", "/v1/completions")
        for name, value in {"content-type": "application/json", "content-length": "100"}.items():
            half.putheader(name, value)
        half.endheaders(b'{"prompt":')
        time.sleep(1)
        it.send_signal(signal.SIGINT)
        try:
            answer = half.getresponse()
            assert (answer.status, json.loads(answer.read())["error"]["message"]) == (503, "the server is stopping")
            assert it.wait(60) == 0
        finally:
            it.kill()
        told = it.stderr.read().splitlines()
        assert len(told) == 2
        assert "1 running task" in told[0]
        assert told[1] == "stopped"


def test_generate_writes_what_the_server_does(
    place: Path, tmp_path: Path, mola: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted = str(place / "mola"), mola.client().completions.create(model="", prompt=PROMPTS[2], max_tokens=7)
    assert main(["generate", folder, PROMPTS[2], "max_tokens=7"]) == 0
    assert capsys.readouterr().out == wanted.choices[0].text + "\n"
    file = tmp_path / "chat.json"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": PROMPTS[2]}]}))
    assert main(["--json", "generate", folder, f"messages={file}", "max_tokens=7", "routing=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["answer"]) == (PROMPTS[2], wanted.choices[0].text)
    assert found["usage"] == {key: wanted.usage.model_dump()[key] for key in ("prompt_tokens", "completion_tokens")}
    assert len(found["routing"]["by_token"]) == wanted.usage.total_tokens
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPTS[2]))
    assert main(["generate", folder, "prompt=-", "max_tokens=7", "routing=true"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(wanted.choices[0].text + "\n")
    assert "mola routes the prompt" in said


def test_the_routing_that_is_shown_is_the_one_that_answered(place: Path) -> None:
    """What the prompt says is read off its tokens, as `generate` reads it, and shown so."""
    prepared = load_run(place / "retrieval")
    question = asked(prepared, of_messages([("system", "S"), ("user", PROMPTS[0])]), max_tokens=2)
    ids = torch.tensor([question.ids])
    config = prepared.model.peft_config["default"]
    found, read = routed(prepared, ids), config.scores([f"S\n{PROMPTS[0]}"])
    assert found["global_scores"] == read[0].tolist()
    assert found["weights"] == routed(prepared, ids, scores=read)["weights"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([], "give one of them"),
        (["x", "messages=[]"], "give one of them"),
        (["messages=[1]"], "messages is no JSON like"),
        (["messages=gone.json"], "messages=gone.json: No such file"),
        (["x", "max_tokens=0"], "max_tokens=0 must be at least 1"),
        (["x", "temperature=-1"], "temperature=-1 must be 0 or lie between 0.001 and 2"),
        (["x", "top_p=2"], "top_p=2.0 must lie above 0"),
        (["messages=" + "[" * 100000], "messages is no JSON like"),
        (["x", "task=up"], "method mola is told none"),
        (["colour=snow"], "if that is the prompt, write prompt='colour=snow'"),
    ],
)
def test_what_cannot_be_answered_is_told(
    place: Path, line: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(place / "mola"), *line]) == 2
    assert said in capsys.readouterr().err


def test_an_encoder_and_plain_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: Path) -> None:
    from moesaic.runs.recipe import load_recipe

    base, data = save_model(tmp_path / "base", "encoder"), write_tasks(tmp_path / "data", "encoder")
    train(load_recipe("mola", [f"model={base}", f"data={data}", "steps=1", f"out={tmp_path / 'run'}"]))
    for verb in (["generate", str(tmp_path / "run"), "x"], ["serve", str(tmp_path / "run"), "port=0"]):
        assert main(verb) == 2
        assert "is an encoder, which writes no answers" in capsys.readouterr().err
    lora = str(place / "parts" / "up")
    assert main(["generate", lora, PROMPTS[0], "max_tokens=3"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["generate", lora, PROMPTS[0], "routing=true"]) == 2
    assert "method lora has no routers" in capsys.readouterr().err


# -- text as it comes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ünïcödé 😀 text", "1 2 3", " a  b\n\nc ", "漢字かな"])
def test_text_comes_in_whole_characters(text: str) -> None:
    tokenizer = load_model("nano").tokenizer
    made, pieces = Text(tokenizer), []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(made.push(token))
    assert "".join(pieces) + made.rest() == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("stops", "said", "stopped"),
    [((" 3",), "1 2", True), (("2 3 4",), "1 ", True), (("2 4",), "1 2 3 4 5", False), (("5 6", " 4"), "1 2 3", True)],
)
def test_a_stop_is_not_said_nor_what_may_begin_one(stops: tuple[str, ...], said: str, stopped: bool) -> None:
    tokenizer = load_model("nano").tokenizer
    made, pieces = Text(tokenizer, stops), []
    for token in tokenizer("1 2 3 4 5")["input_ids"]:
        pieces.append(made.push(token))
        if made.stopped:
            break
    assert ("".join(pieces) + made.rest(), made.stopped) == (said, stopped)


def test_questions_are_checked() -> None:
    with pytest.raises(DataError, match="messages is empty"):
        of_messages([])
    with pytest.raises(DataError, match="nothing to answer"):
        read_messages('[{"role": "assistant", "content": "x"}]')
    with pytest.raises(DataError, match="the prompt is empty"):
        Asked((), max_tokens=1)
    prepared = load_run_of_nano()
    assert asked(prepared, Example("", "1 2 up =")).max_tokens == 508
    with pytest.raises(ConfigError, match="the model takes 512 of both"):
        asked(prepared, Example("", "1 " * 600))


def load_run_of_nano() -> Any:
    from moesaic.runs.recipe import Recipe
    from moesaic.training.prepared import Prepared

    base = load_model("nano")
    return Prepared(base.model, base, (), None, Recipe(method="lora", model="nano"))
