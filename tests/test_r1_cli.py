"""`moesaic llm r1`: train, go on, eval, chat and export, over models that answer by HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesaic.cli.main import main
from moesaic.llms.catalog import Catalog
from moesaic.llms.router_r1 import folder, warm
from moesaic.llms.router_r1.asking import HttpPool
from moesaic.llms.router_r1.engine import plainly, roll
from moesaic.llms.router_r1.questions import read_questions
from moesaic.llms.router_r1.rewards import Rewards
from moesaic.llms.router_r1.settings import DIALECTS
from moesaic.models.nano.tasks import CUES, TASKS

SMALL = [
    "model=nano", "tags=true", "warm=2", "warm_lr=0.001", "warm_batch=2", "steps=3", "questions=1", "group=2",
    "lr=0.001", "max_new_tokens=6", "turns=1", "reply_tokens=8", "bare=true", "save_every=1", "tell=prose",
    "max_tokens=8",
]  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """A model that knows two tasks: `up` for those named so; anything else is no answer."""

    protocol_version = "HTTP/1.1"
    dead = threading.Event()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = body["messages"][0]["content"].split()
        digits, task = [int(w) for w in words if w.isdecimal()], {"order": "asc", "move": "reverse"}[body["model"]]
        text = " ".join(map(str, TASKS[task](digits))) if CUES[task] in words else "no idea"
        failed = self.dead.is_set() and body["model"] == "order"
        answer = {"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": len(text.split())}}
        content = json.dumps(answer).encode()
        self.send_response(503 if failed else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def pool() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()


@pytest.fixture
def here(tmp_path: Path, pool: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a catalog and questions."""
    monkeypatch.chdir(tmp_path)
    Handler.dead.clear()
    models = [
        {
            "name": name,
            "endpoint": pool,
            "input_price": 0.0,
            "output_price": price,
            "parameters": 0.003,
            "description": cue,
        }
        for name, price, cue in (("order", 1.0, CUES["asc"]), ("move", 2.0, CUES["reverse"]))
    ]
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"models": models}))
    for file, start, many in (("train.jsonl", 0, 60), ("test.jsonl", 100, 6)):
        lines = []
        for n in range(start, start + many):
            digits, task = [n % 10, (7 * n) % 10, n // 10], ("asc", "reverse")[n % 2]
            answer = " ".join(map(str, TASKS[task](digits)))
            lines.append({"question": f"{' '.join(map(str, digits))} {CUES[task]} =", "answers": [answer]})
        (tmp_path / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def run(*arguments: str) -> int:
    return main(["llm", "r1", *arguments])


def train(*more: str) -> int:
    return run("train", "data=train.jsonl", "catalog=models.yaml", "out=r1", *SMALL, *more)


def test_a_policy_is_trained_tried_asked_and_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("eval_data=test.jsonl", "eval_every=2", "alphas=0.1,0.9") == 0
    out, said = capsys.readouterr()
    assert "after step" in out
    assert "step 3 of 3" in said
    results = json.loads((here / "r1/results.json").read_text())
    assert [of["step"] for of in results["tried"]] == [0, 2, 3]
    assert {len(values) for values in results["figures"].values()} == {3}
    lines = [json.loads(line) for line in (here / "r1/metrics.jsonl").read_text().splitlines()]
    assert [line.get("step", line.get("tried")) for line in lines] == [0, 1, 2, 2, 3, 3]
    page = (here / "r1/report.html").read_text()
    assert "Cost of a question" in page
    assert {entry.name for entry in (here / "r1").iterdir()} >= {"policy", "settings.json", "report.html"}
    assert not (here / "r1/checkpoints").exists()
    batch = [json.loads(line) for line in (here / "r1/transcripts.jsonl").read_text().splitlines()]
    known = {question.text for question in read_questions("train.jsonl", Catalog.read("models.yaml"))}
    assert len(batch) == 2
    assert {of["question"] for of in batch} <= known
    policy, asking = folder.load(here / "r1")
    assert (asking.models, asking.tell, asking.turns, asking.bare) == (("order", "move"), ("prose",), 1, True)
    assert "<search>" in policy.tokenizer.get_vocab()

    assert run("eval", "r1", "data=test.jsonl", "catalog=models.yaml", "every=true", "train=train.jsonl", "beside=nano",
               "out=transcripts.jsonl", "alpha=0.5", "--json") == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert rows["order, once"]["em"] == rows["move, once"]["em"] == 0.5
    assert rows["oracle, once"]["em"] == rows["k-NN, once"]["em"] == 1.0
    assert rows["oracle, once"]["named"] == {"order": 3, "move": 3}
    assert rows["oracle, once"]["cost"] == pytest.approx((3 * 1 + 3 * 2) / 2)
    assert rows["nano, untrained"]["broken"] == 1.0
    transcripts = [json.loads(line) for line in (here / "transcripts.jsonl").read_text().splitlines()]
    assert len(transcripts) == found["questions"] == 6

    assert run("chat", "r1", "catalog=models.yaml", "prompt=3 1 up =", "--json") == 0
    assert json.loads(capsys.readouterr().out)["question"] == "3 1 up ="
    assert train() == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_a_run_that_is_killed_goes_on_as_the_same_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "moesaic", "llm", "r1", "train", "data=train.jsonl", "catalog=models.yaml", *SMALL,
               "warm=0", "steps=4"]  # fmt: skip
    for kind, name in ((signal.SIGKILL, "killed"), (signal.SIGINT, "stopped")):
        longer = ["steps=9"] if kind == signal.SIGINT else []
        with subprocess.Popen([*command, *longer, f"out={name}"], stderr=subprocess.PIPE, text=True) as process:
            while not [*(here / name).glob("checkpoints/checkpoint-*/whole.json")] and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(kind)
            assert process.stderr is not None
            said = process.stderr.read()
        assert process.returncode in ((-9,) if kind == signal.SIGKILL else (130,))
        assert kind == signal.SIGKILL or "the same command goes on" in said
    (here / "killed/checkpoints/checkpoint-99").mkdir()  # as a kill in the middle of a save leaves it
    shutil.copytree(here / "stopped", here / "damaged")
    for optimizer in (here / "damaged").glob("checkpoints/*/optimizer.pt"):
        optimizer.write_bytes(optimizer.read_bytes()[:1000])
    assert run("train", "data=train.jsonl", "catalog=models.yaml", *SMALL, "warm=0", "steps=4", "out=damaged") == 2
    assert "is damaged" in capsys.readouterr().err
    shutil.copytree(here / "stopped", here / "further")
    further = max((here / "further").glob("checkpoints/checkpoint-*"))
    further.rename(further.with_name("checkpoint-7"))
    assert run("train", "data=train.jsonl", "catalog=models.yaml", *SMALL, "warm=0", "steps=4", "out=further") == 2
    assert "steps=4: " in (said := capsys.readouterr().err)
    assert "is at step 7; ask for more" in said
    for name in ("whole", "killed", "stopped"):
        assert run("train", "data=train.jsonl", "catalog=models.yaml", *SMALL, "warm=0", "steps=4", f"out={name}") == 0
    said = capsys.readouterr().err
    assert said.count("goes on from step") == 2
    assert "checkpoint-99 was not written whole" in said
    whole, *others = (
        json.loads((here / n / "results.json").read_text())["figures"] for n in ("whole", "killed", "stopped")
    )
    assert others == [whole, whole]
    weights = [(here / n / "policy/model.safetensors").read_bytes() for n in ("whole", "killed", "stopped")]
    assert weights[0] == weights[1] == weights[2]


def test_a_model_that_dies_while_it_trains_is_told_of_and_paid_for(here: Path) -> None:
    Handler.dead.set()
    begun = time.monotonic()
    assert train("retries=1", "failure=0.5") == 0
    assert time.monotonic() - begun < 60
    worth = Rewards(failure=0.5)
    assert worth("", "1", ["1"], 1.0, failed=True).total == 0.5
    assert worth("", "2", ["1"], 1.0, failed=True).total == -0.5
    assert worth("broken", "1", ["1"], 1.0, failed=True).total == -1.0


def test_a_lora_is_merged_into_the_policy(here: Path) -> None:
    assert train("tags=false", "r=4") == 0
    policy, _ = folder.load(here / "r1")
    assert not hasattr(policy.model, "peft_config")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_a_warm_start_imitates_is_sound_in_every_dialect(here: Path, dialect: str) -> None:
    asked = read_questions("train.jsonl", Catalog.read("models.yaml"), [0.5])
    spoken = DIALECTS[dialect]
    pool = HttpPool(bare=True)
    found = roll(warm.Showing(asked, 0, spoken), pool, asked, dialect=spoken)
    pool.close()
    assert not any(r.fault(strict=True) for r in found)
    assert all(r.answer == r.question.truths[0] and len(r.calls) == 1 for r in found)
    assert {r.calls[0].model for r in found} == {"order", "move"}
    assert {r.failed for r in found} == {False}
    assert "counts 0.5" in plainly(asked[0], spoken)


def test_a_policy_may_write_function_calls(here: Path) -> None:
    assert train("dialect=calls", "tags=false") == 0
    policy, asking = folder.load(here / "r1")
    assert asking.dialect == "calls"
    assert policy.dialect is DIALECTS["calls"]


def test_the_published_recipe_is_written_for_verl(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "data=train.jsonl", "catalog=models.yaml", "alpha=0.6") == 0
    assert "has not been run" in capsys.readouterr().out
    config = yaml.safe_load((here / "verl/router_r1.yaml").read_text())
    assert config["algorithm"]["kl_ctrl"]["kl_coef"] == 0.001
    assert config["router_r1"]["alpha"] == 0.6
    rows = [json.loads(line) for line in (here / "verl/train.jsonl").read_text().splitlines()]
    assert rows[0]["reward_model"]["ground_truth"] == ["0 0 0"]
    assert "order" in rows[0]["prompt"][0]["content"]


@pytest.mark.parametrize(("arguments", "said"), [
    ((), "llm r1 wants an action: train, eval"),
    (("tune",), "no such action"),
    (("train", "catalog=models.yaml", "model=nano"), "data is missing"),
    (("train", "data=none.jsonl", "catalog=models.yaml", "model=nano"), "cannot read none.jsonl"),
    (("train", "data=train.jsonl", "catalog=none.yaml", "model=nano"), "none.yaml cannot be read"),
    (("train", "data=train.jsonl", "catalog=models.yaml", "model=minilm"), "writes no text"),
    (("train", "data=train.jsonl", "catalog=models.yaml", "model=nano", "alpha=2"), "alpha=2"),
    (("train", "data=train.jsonl", "catalog=models.yaml", "model=nano", "alphas=0.5,2"), "alphas=2"),
    (("train", "data=train.jsonl", "catalog=models.yaml", "model=nano", "group=1"), "group=1"),
    (("train", "data=train.jsonl", "catalog=models.yaml", "model=nano", "tell=colour"), "tell=colour"),
    (("train", "data=train.jsonl", "catalog=models.yaml", "model=nano", "tags=true", "r=2"), "leave r out"),
    (("train", "data=train.jsonl", "catalog=models.yaml", "model=nano", "out=train.jsonl"), "is a file"),
    (("train", "data=train.jsonl", "catalog=models.yaml", "model=nano", "out=."), "holds files that are not"),
    (("eval", "data=test.jsonl", "catalog=models.yaml"), "takes one folder"),
    (("eval", "nowhere", "data=test.jsonl", "catalog=models.yaml"), "nowhere"),
    (("eval", "nano", "data=test.jsonl", "catalog=models.yaml", "out=x.txt"), "must end in .jsonl"),
    (("eval", "nano", "data=test.jsonl", "catalog=models.yaml", "budget=-1"), "budget=-1"),
    (("chat", "nano", "catalog=models.yaml"), "prompt is missing"),
    (("eval", "nano", "data=test.jsonl", "catalog=models.yaml", "out=test.jsonl"), "is what is read here"),
    (("eval", "nano", "data=test.jsonl", "catalog=models.yaml", "out=train.jsonl"), "is already there"),
    (("eval", "nano", "data=test.jsonl", "catalog=models.yaml", "limit=-1"), "limit=-1"),
    (("eval", "nano", "data=test.jsonl", "catalog=models.yaml", "turns=-1"), "turns=-1"),
    (("export", "data=train.jsonl"), "catalog is missing"),
    (("export", "data=train.jsonl", "catalog=models.yaml", "out=."), "holds files that are not an export's"),
    (("export", "data=train.jsonl", "catalog=models.yaml", "out=test.jsonl"), "is a file"),
    (("export", "data=train.jsonl", "catalog=models.yaml", "alpha=nan"), "alpha=nan"),
])  # fmt: skip
def test_what_cannot_be_is_told_in_a_line(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    before = sorted(os.listdir(here))
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(os.listdir(here)) == before


@pytest.mark.parametrize(("line", "said"), [
    ("{}", 'a line is {"question"'),
    ('{"question": "q"}', "answers are texts"),
    ('{"question": "q", "answers": []}', "answers are texts"),
    ('{"question": "q", "answers": ["a"], "models": ["ordr"]}', "no model 'ordr'"),
    ('{"question": "q", "answers": ["a"], "models": []}', "models are names"),
    ('{"question": "q", "answers": ["a"]}\n{"question": "q", "answer": "a"}', "stands in train.jsonl:1 already"),
    ("", "is empty"),
])  # fmt: skip
def test_questions_that_are_none_name_their_line(
    here: Path, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    (here / "train.jsonl").write_text(line)
    assert train() == 2
    assert said in capsys.readouterr().err
    assert not (here / "r1").exists()
