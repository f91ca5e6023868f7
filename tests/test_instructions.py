"""Instructions that a language model writes of tasks, and the threshold that tells a prompt which is known."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.adapters import instructions
from moesaic.adapters.glider import THRESHOLD, GliderConfig, calibrated
from moesaic.adapters.instructions import Instructor
from moesaic.cli.main import main
from moesaic.errors import ConfigError
from moesaic.evaluation.opening import load_run
from tests.composing import TASKS, asked, make


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("adapters"))


class _Endpoint(BaseHTTPRequestHandler):
    """Answers chat completions with a sentence that names the example's task; or fails, as told."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012
    fails = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        if type(self).fails > 0:
            type(self).fails -= 1
            self.send_error(503)
            return
        text = body["messages"][0]["content"]
        task = next((task for task in TASKS if f" {task} =" in text), "nothing")
        answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": f"Do {task}.\n"}}]}
        content = json.dumps({"id": "1", "created": 0, "model": "m", "object": "x", "usage": None, **answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    _Endpoint.asked, _Endpoint.fails = [], 0
    server = HTTPServer(("127.0.0.1", 0), _Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_an_endpoint_writes_instructions_and_is_not_saved(place: Path, tmp_path: Path, endpoint: str) -> None:
    settings = ("method=glider", f"data={place / 'data'}", "adapter.encoder=hashing")
    told = (f"adapter.instruct_url={endpoint}", "adapter.instruct_model=m")
    assert main(asked(place, tmp_path / "out", *settings, *told)) == 0
    assert all(request["temperature"] == 0 and request["max_tokens"] == 64 for request in _Endpoint.asked)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["instructions"] == {task: f"Do {task}." for task in TASKS}
    assert config["instruct_url"] is None
    assert not any(endpoint in file.read_text(errors="ignore") for file in (tmp_path / "out").rglob("*.*"))


def test_a_loaded_adapter_asks_only_the_endpoint_that_it_is_told_of(place: Path, tmp_path: Path, endpoint: str) -> None:
    told = (f"adapter.instruct_url={endpoint}", "adapter.instruct_model=m", "adapter.encoder=hashing")
    assert main(asked(place, tmp_path / "out", "method=glider", f"data={place / 'data'}", *told)) == 0
    config = load_run(tmp_path / "out").model.peft_config["default"]
    _Endpoint.asked.clear()
    plain = config.scores(["9 9 down ="])
    assert _Endpoint.asked == []
    config.instruct_url, config.instruct_model = endpoint, "m"
    rewritten = config.scores(["9 9 down ="])
    assert len(_Endpoint.asked) == 1
    assert rewritten[0].argmax() == TASKS.index("down")
    assert rewritten[0, 1] == pytest.approx(1.0, abs=1e-5), "the same sentence as the adapter's own"
    assert plain[0, 1] < 0.9


def test_tries_are_bounded_answers_are_kept_and_the_fallback_is_told(
    tmp_path: Path, endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    writer = Instructor(endpoint, "m", tmp_path / "cache", retries=2, wait=0.0)
    _Endpoint.fails = 2
    assert writer([["3 up ="]]) == ["Do up."]
    assert len(_Endpoint.asked) == 3
    assert writer([["3 up ="]]) == ["Do up."]
    assert len(_Endpoint.asked) == 3, "the second answer is the kept one"
    _Endpoint.fails = 100
    with caplog.at_level("WARNING"):
        assert writer([["3 down =", "x"], ["4 max ="]]) == ["3 down =", "4 max ="]
    assert len(_Endpoint.asked) == 6, "after the tries for one, none is made for the rest"
    assert "stands in for instructions" in caplog.text


def test_an_answer_that_trickles_in_is_given_up(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trickle(self: Any) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            for _ in range(100):
                self.wfile.write(b" ")
                time.sleep(0.05)

    monkeypatch.setattr(_Endpoint, "do_POST", trickle)
    begun = time.monotonic()
    assert Instructor(endpoint, "m", retries=0, timeout=0.3)([["3 up ="]]) == ["3 up ="]
    assert time.monotonic() - begun < 3


def test_an_endless_answer_is_given_up(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "LONGEST", 10)
    assert Instructor(endpoint, "m", retries=0)([["3 up ="]]) == ["3 up ="]


def test_a_redirect_is_not_followed(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def redirect(self: Any) -> None:
        self.send_response(302)
        self.send_header("Location", endpoint)
        self.end_headers()

    monkeypatch.setattr(_Endpoint, "do_POST", redirect)
    monkeypatch.setattr(_Endpoint, "do_GET", lambda self: _Endpoint.asked.append({}), raising=False)
    assert Instructor(endpoint, "m", retries=0)([["3 up ="]]) == ["3 up ="]
    assert _Endpoint.asked == []


def test_an_endpoint_that_is_not_there_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = Instructor("http://127.0.0.1:9/v1", "m", retries=1, wait=0.0, timeout=1.0)
    with caplog.at_level("WARNING"):
        assert writer([["3 up ="]]) == ["3 up ="]
    assert "http://127.0.0.1:9 did not answer" in caplog.text


def test_a_key_is_sent_and_never_shown(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hidden")
    _Endpoint.fails = 1
    with caplog.at_level("DEBUG", logger="moesaic"):
        Instructor(endpoint, "m", tmp_path, retries=0)([["3 up ="]])
    assert "sk-hidden" not in caplog.text
    assert not any("sk-hidden" in p.read_text() for p in tmp_path.rglob("*") if p.is_file())


def test_the_threshold_parts_known_prompts_from_others() -> None:
    owners = torch.tensor([0, 0, 1, 1])
    scores = torch.tensor([[0.9, 0.3], [0.8, 0.4], [0.2, 0.95], [0.5, 0.7]])
    assert 0.5 < calibrated(scores, owners) < 0.7
    assert calibrated(scores[:, :1], owners * 0) == THRESHOLD, "one expert leaves no other to compare with"


def test_a_threshold_is_calibrated_unless_it_is_given(place: Path) -> None:
    texts = {task: [f"{i} 4 {task} =" for i in range(5)] for task in TASKS}
    given: dict[str, Any] = {"adapters": {t: str(place / t) for t in TASKS}, "encoder": "hashing"}
    found = GliderConfig(**given, texts=texts).threshold
    assert found is not None
    assert found != THRESHOLD
    assert 0 < found < 1
    assert GliderConfig(**given, texts=texts, threshold=0.3).threshold == 0.3
    assert GliderConfig(**given, instructions=dict.fromkeys(TASKS, "x")).threshold == THRESHOLD


def test_a_new_experts_instruction_is_written_beside_those_that_are_there(
    place: Path, tmp_path: Path, endpoint: str
) -> None:
    told = (f"adapter.instruct_url={endpoint}", "adapter.instruct_model=m", f"data={place / 'data'}")
    given = ["adapter.encoder=hashing", "adapter.instructions={up: Sort, down: Turn}", *told]
    assert main(asked(place, tmp_path / "out", "method=glider", *given)) == 0
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["instructions"] == {"up": "Sort", "down": "Turn", "max": "Do max."}
    assert len(_Endpoint.asked) == 1


@pytest.mark.parametrize("url", ["http://", "http://[::1/v1", "http://a b/v1", "127.0.0.1:8000", "file:///etc/passwd"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="must be an address"):
        Instructor(url, "m")


@pytest.mark.parametrize("content", ["x" * 2000, "", None, ["a"], {"text": "a"}, 5])
def test_what_is_no_sentence_is_not_taken(content: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"choices": [{"message": {"content": content}}]}
    monkeypatch.setattr(instructions.json, "loads", lambda _: answer)
    monkeypatch.setattr(_Endpoint, "do_POST", _plain)
    assert Instructor(endpoint, "m", retries=0)([["3 up ="]]) == ["3 up ="]


def _plain(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, endpoint: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        Instructor(endpoint, "m", tmp_path / "file" / "cache")([["9 up ="]])


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is no folder"):
        Instructor("http://127.0.0.1:9/v1", "m", tmp_path / "file")
