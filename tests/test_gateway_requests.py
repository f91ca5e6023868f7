"""What the gateway reads in a request, and whom it lets in: malformed bodies, sizes, hosts, keys and guesses."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.llms.gateway.config import read_config
from moesaic.llms.gateway.keys import BLOCKED, GUESSES, Guesses, Key, Keys, hash_of, new_key
from moesaic.llms.gateway.refusals import Refused
from moesaic.llms.gateway.requests import CHAT, EMBEDDINGS, _members, parse
from tests.gateways import KEY, SECRET, Got, Mock, Served, completion, mocking, model, serving, whole, write

USER = [{"role": "user", "content": "hi"}]
GOOD = json.dumps({"model": "a", "messages": USER})


@pytest.fixture(scope="module")
def mock() -> Iterator[Mock]:
    with mocking() as found:
        yield found


@pytest.fixture(scope="module")
def server(mock: Mock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    patch = pytest.MonkeyPatch()
    patch.setenv("BACKEND_KEY", SECRET)
    keys = [{"id": "k", "hash": hash_of(KEY)}]
    more = {"keys": keys, "largest_body": 10_000, "body_seconds": 0.5, "trace": {"file": "trace.jsonl"}}
    models = [model("a", mock, key_env="BACKEND_KEY")]
    with serving(write(tmp_path_factory.mktemp("requests"), models, **more)) as found:
        yield found
    patch.undo()


def send(server: Served, raw: bytes) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the answer to bytes."""
    with socket.create_connection(("127.0.0.1", server.port()), timeout=10) as line:
        line.sendall(raw)
        got = b""
        while b"\r\n\r\n" not in got:
            if not (part := line.recv(65536)):
                break
            got += part
        head, _, body = got.partition(b"\r\n\r\n")
        size = next((int(h.split(b":")[1]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length")), 0)
        while len(body) < size:
            body += line.recv(65536)
    return int(head.split()[1]), json.loads(body) if body.startswith(b"{") else {}


def post(server: Served, body: str | bytes, path: str = CHAT, **headers: str) -> tuple[int, dict[str, Any]]:
    raw = body.encode() if isinstance(body, str) else body
    given_ = {"Host": "localhost", "Content-Type": "application/json", "Authorization": f"Bearer {KEY}",
              "Content-Length": str(len(raw)), **{k.replace("_", "-"): v for k, v in headers.items()}}  # fmt: skip
    lines = "".join(f"{name}: {value}\r\n" for name, value in given_.items() if value)
    return send(server, f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + raw)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "no JSON object"),
        ("[]", "no JSON object"),
        ('"x"', "no JSON object"),
        ("{", "no JSON object"),
        (GOOD[:-1], "no JSON object"),
        (GOOD + "{}", "there is more after it"),
        (GOOD[:-1] + ",}", "a name in quotes is wanted"),
        ('{"model": "a", "model": "b"}', "'model' stands there twice"),
        ('{"model": "a", "x": NaN}', "NaN is no number of JSON"),
        ('{"model": "a", "x": ' + "9" * 5000 + "}", "no JSON object"),
        ('{"model": "a", "x": ' + "[" * 4000 + "]" * 4000 + "}", "nested too deep"),
        ('{"model": "a", "x": \x01}', "a value is wanted"),
        (b'{"model": "a", "x": "\xff"}', "no text in UTF-8"),
        (b"\xef\xbb\xbf{}", "no JSON object"),
        ("{}", "the name of a model is wanted"),
        ('{"model": 3}', "the name of a model is wanted"),
        ('{"model": ""}', "the name of a model is wanted"),
        ('{"model": "a"}', "messages: a list of messages"),
        ('{"model": "a", "messages": []}', "messages: a list of messages"),
        ('{"model": "a", "messages": ["hi"]}', "messages.0: a message is an object with a role"),
        ('{"model": "a", "messages": [{"role": "user", "content": 3}]}', "messages.0.content"),
        ('{"model": "a", "messages": [{"role": "user", "content": ["x"]}]}', "messages.0.content"),
        (GOOD[:-1] + ', "stream": 1}', "stream: true or false"),
        (GOOD[:-1] + ', "max_tokens": -5}', "max_tokens: a whole number from 1"),
        (GOOD[:-1] + ', "max_completion_tokens": 1.5}', "max_completion_tokens: a whole number"),
        (GOOD[:-1] + ', "n": true}', "n: a whole number from 1 to 128"),
    ],
)
def test_a_malformed_body_is_a_400_of_one_line(server: Served, mock: Mock, body: str | bytes, said: str) -> None:
    before = len(mock.got)
    status, told = post(server, body)
    assert (status, told["error"]["type"]) == (400, "invalid_request_error")
    assert said in told["error"]["message"]
    assert "\n" not in told["error"]["message"]
    assert len(mock.got) == before


def test_other_requests_that_cannot_be_are_4xx_too(server: Served) -> None:
    assert post(server, "x" * 10_001)[0] == 413
    assert post(server, "", Content_Length="99999999999999999999")[0] in (400, 413)
    assert post(server, GOOD, Content_Type="text/plain")[0] == 415
    assert post(server, GOOD, Content_Encoding="gzip")[0] == 415
    assert post(server, "", Content_Length="5")[0] == 408  # it never comes
    chunked = {"Content_Length": "", "Transfer_Encoding": "chunked"}
    assert post(server, b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD.encode()), **chunked)[0] == 200
    assert post(server, (b"1000\r\n" + b" " * 4096 + b"\r\n") * 3 + b"0\r\n\r\n", **chunked)[0] == 413
    assert post(server, GOOD, path="/v1/chat")[0] == 404
    assert send(server, b"GET /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 405
    assert post(server, '{"model": "a", "input": "x", "stream": true}', path=EMBEDDINGS)[0] == 400
    assert post(server, '{"model": "a", "input": [[1, 2], [-1]]}', path=EMBEDDINGS)[0] == 400
    assert post(server, '{"model": "a", "input": [[1, 2], [3]]}', path=EMBEDDINGS)[0] == 200


def test_a_server_on_loopback_answers_to_its_own_names(server: Served) -> None:
    for name in ("localhost", "127.0.0.1:99", "[::1]:8080", "LOCALHOST"):
        assert post(server, GOOD, Host=name)[0] == 200
    for name in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", ""):
        assert post(server, GOOD, Host=name)[0] == 400


def test_a_request_has_one_host(server: Served) -> None:
    twice = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert send(server, twice)[0] == 400
    assert send(server, twice.replace(b"evil.example", b"localhost"))[0] == 400
    assert send(server, twice.replace(b"Host: evil.example\r\n", b"X: 1\r\nX: 2\r\n"))[0] == 200


@pytest.mark.parametrize("base", ["httptools", "h11"])
@pytest.mark.parametrize("sent", [
    b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HT",
])  # fmt: skip
def test_a_head_that_does_not_come_is_not_waited_for(
    mock: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes, base: str
) -> None:
    if base == "h11":
        monkeypatch.setitem(sys.modules, "uvicorn.protocols.http.httptools_impl", None)
    with serving(write(tmp_path, [model("a", mock)], body_seconds=0.5)) as server:
        with socket.create_connection(("127.0.0.1", server.port()), timeout=8) as line:
            line.sendall(sent)
            while line.recv(65536):
                pass
        with socket.create_connection(("127.0.0.1", server.port()), timeout=4) as line:
            line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
            with pytest.raises(ConnectionError):
                line.sendall((b"X: " + b"y" * 10_000 + b"\r\n") * 1000)


def test_a_call_may_take_longer_than_a_head(mock: Mock, tmp_path: Path) -> None:
    async def slow(got: Got, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.6)
        out.write(whole(completion()))

    mock.behaviours["slow"] = slow
    with serving(write(tmp_path, [model("slow", mock)], body_seconds=0.2)) as server:
        assert post(server, GOOD.replace('"a"', '"slow"'))[0] == 200


def test_keys_are_asked_of_all_but_health_and_the_document(server: Served) -> None:
    get = "GET {} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for path, status in (("/health", 200), ("/openapi.json", 200), ("/metrics", 401), ("/v1/models", 401)):
        assert send(server, get.format(path).encode())[0] == status
    assert post(server, GOOD, Authorization="")[0] == 401
    assert post(server, GOOD, Authorization="", x_api_key=KEY)[0] == 200
    assert post(server, GOOD, Authorization=f"bearer  {KEY}")[0] == 200
    assert post(server, GOOD, Authorization=f"Basic {KEY}")[0] == 401


def test_secrets_are_in_no_log_trace_metric_or_answer(
    server: Served, mock: Mock, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hidden = "what nobody else is to read"
    caplog.set_level(0)
    body = json.dumps({"model": "a", "messages": [{"role": "user", "content": hidden}], "user": "the-user"})
    assert post(server, body)[0] == 200
    assert mock.got[-1].headers["authorization"] == f"Bearer {SECRET}"
    metrics = (
        server.client()
        .with_options()
        ._client.get(server.url.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {KEY}"})
    )
    assert 'moesaic_requests_total{model="a"' in metrics.text
    wrong = "a-wrong-key-that-somebody-tried"
    told = post(server, body, Authorization=f"Bearer {wrong}")
    rows = server.rows()
    kept = (server.folder / "trace.jsonl").read_text() + (server.folder / "gateway.yaml").read_text()
    books = b"".join(file.read_bytes() for file in server.folder.glob("ledger.sqlite*"))
    everything = f"{kept}{metrics.text}{rows}{told}{caplog.text}{capfd.readouterr()}{books!r}"
    for secret in (KEY, SECRET, wrong, hidden, "the-user"):
        assert secret not in everything


def test_who_guesses_is_shut_out_for_a_while(mock: Mock, tmp_path: Path) -> None:
    with serving(write(tmp_path, [model("a", mock)], keys=[{"id": "k", "hash": hash_of(KEY)}])) as server:
        for i in range(GUESSES):
            assert post(server, GOOD, Authorization=f"Bearer {i}")[0] == 401
        assert post(server, GOOD, Authorization="Bearer x")[0] == 429
        assert post(server, GOOD)[0] == 429
        assert send(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200


def test_guesses_are_counted_by_network_and_forgotten() -> None:
    now = [0.0]
    guesses = Guesses(clock=lambda: now[0])
    for i in range(GUESSES):
        guesses.wrong(f"2001:db8::{i:x}")
    assert guesses.blocked("2001:db8::ffff") == BLOCKED
    assert guesses.blocked("2001:db8:0:1::1") == guesses.blocked("10.0.0.1") == 0
    now[0] = BLOCKED
    assert guesses.blocked("2001:db8::1") == 0
    now[0] = 10 * BLOCKED
    guesses.wrong("2001:db8::1")
    assert guesses.blocked("2001:db8::1") == 0


def test_keys_are_found_by_what_they_are() -> None:
    key, held = new_key()
    keys = Keys([Key(id="a", hash=held), Key(id="b", hash=hash_of("other"))])
    assert held == "sha256:" + sha256(key.encode()).hexdigest()
    found = keys.find(key.encode())
    assert found is not None
    assert found.id == "a"
    assert keys.find(key.encode() + b" ") is keys.find(held.encode()) is None


VALUES = (
    st.none() | st.integers() | st.text(max_size=8) | st.booleans() | st.floats(allow_nan=False, allow_infinity=False)
)


@settings(max_examples=60)
@given(
    st.dictionaries(st.text(max_size=8), VALUES | st.lists(VALUES, max_size=3), max_size=6),
    st.sampled_from(["", " ", "\n\t "]),
)
def test_members_are_those_that_json_reads(content: dict[str, Any], blank: str) -> None:
    content |= {"model": "ä"}
    text = blank + json.dumps(content, separators=("," + blank, blank + ":" + blank)) + blank
    found = _members(text)
    assert {name: value for name, (value, _, _) in found.items()} == content
    for value, begin, end in found.values():
        assert json.loads(text[begin:end]) == value
    asked = {**content, "messages": USER}
    for field in ("stream", "max_tokens", "max_completion_tokens", "n", "best_of", "tools", "functions"):
        asked.pop(field, None)
    assert json.loads(parse(CHAT, json.dumps(asked).encode()).named("ö")) == {**asked, "model": "ö"}


@given(st.text(alphabet='{}[]",:0123456789eE+-. \\utrfalsn\nmodel', max_size=40) | st.binary(max_size=40))
def test_anything_else_is_refused(text: str | bytes) -> None:
    raw = text.encode() if isinstance(text, str) else text
    with pytest.raises(Refused) as raised:
        parse(CHAT, raw)
    assert raised.value.status == 400


# -- the file ----------------------------------------------------------------------------------------------------------

SMALL = {"name": "a", "endpoint": "http://127.0.0.1:1/v1", "input_price": 1, "output_price": 1, "parameters": 1}


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"model": []}, "unknown key 'model'"),
        ({"models": None}, "models"),
        ({"catalog": "x.yaml"}, "one of them"),
        ({"port": 70_000}, "port=70000 must be"),
        ({"port": "many"}, "port=many must be a whole number"),
        ({"on_disconnect": "wait"}, "on_disconnect=wait: "),
        ({"switching_penalty": 2}, "switching_penalty=2"),
        ({"host": "0.0.0.0"}, "lets others in: give keys"),
        ({"keys": [{"id": "a", "key": "secret"}]}, "unknown key 'key'"),
        ({"keys": [{"id": "a"}]}, "give hash: sha256:"),
        ({"keys": [{"id": "a", "hash": "md5:12"}]}, "64 hexadecimal digits"),
        ({"keys": [{"id": "a b", "hash": hash_of("x")}]}, "a key's id is"),
        ({"keys": [{"id": "a", "env": "NOT_SET_ANYWHERE"}]}, "NOT_SET_ANYWHERE must hold a key of 16"),
        ({"keys": [{"id": "a", "hash": hash_of("x")}, {"id": "b", "hash": hash_of("x")}]}, "are one"),
        ({"keys": [{"id": "a", "hash": hash_of("x")}, {"id": "a", "hash": hash_of("y")}]}, "two keys have one id"),
        ({"keys": [{"id": "a", "hash": hash_of("x"), "budget": -1}]}, "budget=-1"),
        ({"keys": [{"id": "a", "hash": hash_of("x"), "budget": float("nan")}]}, "budget"),
        ({"keys": [{"id": "a", "hash": hash_of("x"), "period": "week"}]}, "period=week"),
        ({"fallbacks": {"a": ["b"]}}, "no model 'b'"),
        ({"fallbacks": {"a": ["a"]}}, "each other model once"),
        ({"policy": {"retries": -1}}, "retries=-1"),
        ({"policies": {"a": {"tries": 1}}}, "unknown key 'tries'"),
        ({"policies": {"a": 5}}, "policies: a must hold name: value lines"),
        ({"policies": {"a": [1]}}, "policies: a must hold name: value lines"),
        ({"trace": {"bytes": 1}}, "bytes=1"),
        ({"ledger": "a\0b"}, "ledger='a.x00b' is no name of a file"),
        ({"trace": {"file": "a\0b"}}, "is no name of a file"),
        ({"catalog": "a\0b", "models": None}, "one of them"),
        ({"ledger": "gateway.yaml"}, "ledger=gateway.yaml is a file that has another use"),
        ({"trace": {"file": "gateway.yaml"}}, "trace.file=gateway.yaml is a file that has another use"),
        ({"trace": {"file": "./ledger.sqlite"}}, "trace.file=./ledger.sqlite is a file that has another use"),
        ({"trace": {"file": "ledger.sqlite-wal"}}, "has another use"),
        ({"routers": {"r": "made"}, "trace": {"file": "made/state.json"}}, "has another use"),
        ({"models": [{**SMALL, "key_env": "NOT_SET_ANYWHERE"}]}, "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_a_file_is_checked_whole(tmp_path: Path, given_: dict[str, Any], said: str) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(json.dumps({"models": [SMALL], **given_}))
    with pytest.raises(ConfigError, match=said) as raised:
        read_config(file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("gateway.yaml", "models.yaml", "t.jsonl"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/gateway\.yaml is no file"):
        read_config(tmp_path / "gateway.yaml")
    file = tmp_path / "g.yaml"
    for given_, said in (
        ({"catalog": "models.yaml"}, r"models\.yaml is no file"),
        ({"catalog": "a\0b"}, "null byte"),
        ({"models": [SMALL], "trace": {"file": "t.jsonl"}}, r"t\.jsonl is a pipe"),
    ):
        file.write_text(json.dumps(given_))
        with pytest.raises(ConfigError, match=said):
            read_config(file)


def test_many_models_and_keys_are_read(tmp_path: Path) -> None:
    keys = [{"id": f"k{i}", "hash": hash_of(f"key-{i}"), "budget": 1.0, "period": "month"} for i in range(1200)]
    file = tmp_path / "gateway.yaml"
    file.write_text(json.dumps({"models": [SMALL], "keys": keys}))
    assert len(read_config(file).keys) == 1200


def test_what_a_file_says_is_what_is_held(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(json.dumps({"models": [SMALL, {**SMALL, "name": "b"}]}))
    file = tmp_path / "gateway.yaml"
    file.write_text(
        "catalog: models.yaml\nport: 0\nfallbacks: {a: [b]}\npolicy: {retries: 1, rest: 5}\n"
        "policies: {b: {retries: 0}}\nrouters: {coe: fits/coe}\n"
    )
    config = read_config(file)
    assert (config.policies["a"].retries, config.policies["b"].retries, config.policies["b"].rest) == (1, 0, 5)
    assert config.after("a", routed=False) == config.after("a", routed=True) == ("b",)
    assert (config.after("b", routed=False), config.after("b", routed=True)) == ((), ("a",))
    assert config.routers["coe"] == tmp_path / "fits" / "coe"
