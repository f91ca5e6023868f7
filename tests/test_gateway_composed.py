"""From recorded outcomes to an endpoint: `moesaic llm fit`, then `serve`, asked by the OpenAI client and by curl."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from moesaic.cli.main import main
from moesaic.llms.coe.composition import Composition
from tests.gateways import KEY, Mock, mocking, model, read_rows
from tests.toy_prompts import MODELS, prompts, table

NEW, KINDS = prompts(12, seed=1)


@pytest.fixture(scope="module")
def mock() -> Iterator[Mock]:
    with mocking() as made:
        yield made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, mock: Mock) -> Path:
    """A table, a catalog, and a gateway's file, as somebody writes them."""
    folder, t = tmp_path_factory.mktemp("composed"), table()
    rows = [
        {"prompt": p, "category": k, "scores": dict(zip(MODELS, s.tolist(), strict=True))}
        for p, k, s in zip(t.prompts, t.categories, t.scores, strict=True)
    ]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [model(name, mock, parameters=size) for name, size in zip(MODELS, (9, 1, 2, 3), strict=True)]
    (folder / "models.yaml").write_text(json.dumps({"models": models}))
    given = {"catalog": "models.yaml", "routers": {"coe": "coe"}, "port": 0, "keys": [{"id": "me", "env": "MY_KEY"}]}
    (folder / "gateway.yaml").write_text(json.dumps({**given, "trace": {"file": "trace.jsonl"}}))
    return folder


def test_outcomes_become_an_endpoint(place: Path, mock: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    given = [f"data={place / 'scores.jsonl'}", f"catalog={place / 'models.yaml'}", f"out={place / 'coe'}"]
    assert main(["llm", "fit", *given, "resident=6", "encoder=tfidf", "uncertainty=none"]) == 0
    made = Composition.load(place / "coe")
    wanted = [made.decide(prompt) for prompt in NEW]
    assert len({decision.expert for decision in wanted}) == 3
    command = [sys.executable, "-m", "moesaic", "llm", "serve", str(place / "gateway.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = re.search(r"http://\S+/v1", process.stderr.readline())
            assert found is not None
            client = OpenAI(base_url=found[0], api_key=KEY, max_retries=0)
            for prompt, decision in zip(NEW, wanted, strict=True):
                raw = client.chat.completions.with_raw_response.create(
                    model="moesaic/coe", messages=[{"role": "user", "content": prompt}]
                )
                assert raw.headers["x-moesaic-expert"] == raw.parse().model == decision.expert
                assert raw.headers["x-moesaic-category"] == decision.category
                assert float(raw.headers["x-moesaic-confidence"]) == pytest.approx(decision.confidence, abs=1e-4)
            assert mock.names()[-len(NEW) :] == [decision.expert for decision in wanted]
            streamed = client.chat.completions.create(
                model="moesaic/coe", messages=[{"role": "user", "content": NEW[0]}], stream=True
            )
            assert "".join(c.choices[0].delta.content or "" for c in streamed if c.choices) == "Hello wörld!"
            by_curl(found[0], wanted[0].expert)
        finally:
            process.send_signal(signal.SIGTERM)
            said = process.stderr.read()
    assert (process.returncode, said) == (0, "stopped\n")
    rows = read_rows(place)
    assert [row["served"] for row in rows[: len(NEW)]] == [decision.expert for decision in wanted]
    lines = [json.loads(line) for line in (place / "trace.jsonl").read_text().splitlines()]
    for line, decision in zip(lines, wanted, strict=False):
        assert line["scores"] == pytest.approx(decision.scores, abs=1e-4)
        assert line["price"] == {"input": 1.0, "output": 2.0}
    assert KEY not in (place / "trace.jsonl").read_text()


def by_curl(url: str, expert: str) -> None:
    """As a page says it."""
    curl = shutil.which("curl")
    if curl is None:
        return
    body = json.dumps({"model": "moesaic/coe", "messages": [{"role": "user", "content": NEW[0]}]})
    given = ["-sS", "-i", f"{url}/chat/completions", "-H", f"Authorization: Bearer {KEY}",
             "-H", "Content-Type: application/json", "-d", body]  # fmt: skip
    said = subprocess.run([curl, *given], capture_output=True, text=True, check=True).stdout
    assert f"x-moesaic-expert: {expert}" in said
    assert json.loads(said.partition("\n\n")[2])["choices"][0]["message"]["content"] == "Hello wörld!"
