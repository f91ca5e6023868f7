"""Router-R1 among endpoints and files that are not as they should be."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesaic.cli.main import main
from moesaic.errors import AdapterError, ConfigError, DataError
from moesaic.llms.catalog import Catalog, Model
from moesaic.llms.router_r1 import folder
from moesaic.llms.router_r1.asking import LARGEST, LONGEST_WAIT, HttpPool
from moesaic.llms.router_r1.engine import Reply
from moesaic.llms.router_r1.local import LocalPolicy
from moesaic.llms.router_r1.questions import check_askable, check_named, read_questions
from moesaic.llms.router_r1.transcript import fault
from moesaic.models.embedded import load_model

SAID: dict[str, Any] = {
    "plain": {"content": "Paris", "tokens": 3}, "surrogate": {"content": "Paris \ud800", "tokens": 3},
    "parts": {"content": [{"type": "text", "text": "Pa"}, {"type": "text", "text": "ris"}], "tokens": 3},
    "number": {"content": 42, "tokens": 3}, "nothing": {"content": None, "tokens": 0},
    "negative": {"content": "Paris", "tokens": -1_000_000}, "absurd": {"content": "Paris", "tokens": 10**400},
    "truth": {"content": "Paris", "tokens": True}, "huge": {"content": "x" * (LARGEST + 1), "tokens": 3},
    "echo": {"content": "your key is sk-secret-1", "tokens": 3},
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"]
        if name == "hangs":
            time.sleep(60)
        status, words = {"busy": (429, ""), "refuses": (400, f"bad {self.headers['Authorization']}")}.get(
            name, (200, "")
        )
        said = SAID.get(name, SAID["plain"])
        body = {"choices": [{"message": {"content": said["content"]}}], "usage": {"completion_tokens": said["tokens"]}}
        content = words.encode() if words else json.dumps(body).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "100000")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(OSError):  # who asked is gone
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def model(url: str, name: str, **more: Any) -> Model:
    return Model(name=name, endpoint=url, input_price=0.0, output_price=1.0, parameters=1.0, **more)


def reply(url: str, name: str, **more: Any) -> Reply:
    pool = HttpPool(retries=1, sleep=lambda seconds: None)
    (found,) = pool.ask([(model(url, name, **more), "q")])
    pool.close()
    return found


@pytest.mark.parametrize(("name", "text", "tokens"), [
    ("plain", "Paris", 3), ("surrogate", "Paris ?", 3), ("parts", "Paris", 3), ("nothing", "", 0),
    ("negative", "Paris", 2), ("absurd", "Paris", 2), ("truth", "Paris", 2),
])  # fmt: skip
def test_a_reply_is_a_text_and_a_count_that_can_be(url: str, name: str, text: str, tokens: int) -> None:
    found = reply(url, name)
    assert (found.text, found.tokens, found.failure) == (text, tokens, "")


@pytest.mark.parametrize(
    ("name", "said"), [("number", "its answer is no text"), ("huge", "more than"), ("busy", "429")]
)
def test_a_reply_that_is_none_is_a_failure_in_words(url: str, name: str, said: str) -> None:
    found = reply(url, name)
    assert said in found.failure
    assert (found.text, found.tokens) == ("", 0)


def test_a_count_beyond_the_context_is_estimated(url: str) -> None:
    assert reply(url, "plain", context=2).tokens == 2


def test_a_key_that_an_endpoint_repeats_is_not_kept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "sk-secret-1")
    assert reply(url, "echo", key_env="THE_KEY").text == "your key is ***"
    refused = reply(url, "refuses", key_env="THE_KEY").failure
    assert "bad Bearer ***" in refused
    assert "sk-secret" not in refused


def test_an_endpoint_is_not_waited_for_as_long_as_it_likes(url: str) -> None:
    waited: list[float] = []
    pool = HttpPool(retries=2, sleep=waited.append)
    pool.ask([(model(url, "busy"), "q")])
    assert waited == [LONGEST_WAIT] * 2
    assert pool.failed == {"busy: HTTP 429": 1}


def test_an_endpoint_that_hangs_does_not_keep_a_process(url: str, tmp_path: Path) -> None:
    program = f"""if True:
        from moesaic.llms.catalog import Model
        from moesaic.llms.router_r1.asking import HttpPool
        pool = HttpPool()
        print("asks", flush=True)
        try:
            pool.ask([(Model(name="hangs", endpoint={url!r}, input_price=0, output_price=0, parameters=1), "q")])
        finally:
            pool.close()"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) != 0


def test_names_that_the_tags_cannot_write_are_refused_and_functions_take_them(url: str) -> None:
    for name in ("llama3:8b", "</search>"):
        catalog = Catalog([model(url, name)], "models.yaml")
        with pytest.raises(ConfigError, match="the tags cannot name it"):
            check_named(catalog, "tags")
        check_named(catalog, "calls")


def test_a_name_breaks_a_query_as_a_word_alone(url: str) -> None:
    catalog = Catalog([model(url, "sum")], "models.yaml")
    text = (
        "<think> t </think><search> sum: {} </search><information>4</information><think> t </think><answer> 4 </answer>"
    )
    assert fault(text.format("a summary"), catalog) == ""
    assert fault(text.format("the sum of two"), catalog) == "the name stands in the query"


def test_a_key_that_is_not_set_is_told_before_anything_is_asked(url: str) -> None:
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"):
        check_askable(Catalog([model(url, "plain", key_env="NO_SUCH_KEY")], "models.yaml"))


def test_questions_that_stand_twice_are_counted(url: str, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "q", "answers": ["a"]}\n' * 4)
    with pytest.raises(DataError, match=r"q\.jsonl:2: this question stands in .*:1 already: keep one; so do 2 others"):
        read_questions(str(file), Catalog([model(url, "plain")], "models.yaml"))
    file.write_text('{"question": "q", "answers": ["\\ud800"]}\n')
    with pytest.raises(DataError, match="half of a surrogate pair"):
        read_questions(str(file), Catalog([model(url, "plain")], "models.yaml"))


@pytest.mark.parametrize("changed", [
    {"turns": "x"}, {"max_new_tokens": None}, {"dialect": "zzz"}, {"tell": 5}, {"reply_tokens": -1}, {"more": 1},
    {"bare": 1}, {"models": [1]}, {"tell": ["colour"]},
])  # fmt: skip
def test_a_policy_whose_file_is_damaged_is_told_by_name(tmp_path: Path, changed: dict[str, Any]) -> None:
    loaded = load_model("nano")
    folder.save(LocalPolicy(loaded.model, loaded.tokenizer), folder.Asking(models=("plain",)), tmp_path)
    assert folder.load(tmp_path)[1] == folder.Asking(models=("plain",))
    file = tmp_path / folder.FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(AdapterError, match=r"router_r1\.json is not as it was written"):
        folder.load(tmp_path)


def test_a_run_says_why_calls_fail_what_it_cannot_imitate_and_writes_json_alone(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    entries = [
        {"name": name, "endpoint": url, "input_price": 0.0, "output_price": 1.0, "parameters": 1.0, "total": 5.0}
        for name in ("number", "plain")
    ]
    Path("models.yaml").write_text(yaml.safe_dump({"models": entries}))
    words = ["red", "blue", "number", "green", "pink", "grey"]
    Path("train.jsonl").write_text(
        "".join(json.dumps({"question": f"is {w} it?", "answers": ["a"]}) + "\n" for w in words)
    )
    given = ["data=train.jsonl", "catalog=models.yaml", "model=nano", "tags=true", "warm=1", "warm_batch=1", "steps=0"]
    assert main(["llm", "r1", "train", *given, "tell=price", "out=r", "--json"]) == 0
    out, said = capsys.readouterr()
    assert json.loads(out)["steps"] == 0
    assert "calls had no answer: number: its answer is no text" in said
    assert "warm start: step 1 of 1" in said
    Path("train.jsonl").write_text('{"question": "number or plain?", "answers": ["a"]}\n')
    assert main(["llm", "r1", "train", *given, "out=s"]) == 2
    said = capsys.readouterr().err
    assert "1 of 1 transcripts cannot be imitated: the name stands in the query" in said
    assert "there is no transcript to imitate" in said
