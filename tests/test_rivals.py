"""CapyMOA's classifiers as learners: they predict as in CapyMOA's own evaluation, and end cleanly."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moesaic.errors import ConfigError, DataError, TrainingError
from moesaic.trees import jvm
from moesaic.trees.prequential import Forked, Quick, prequential, rivals
from moesaic.trees.prequential.rivals import RIVALS, Rival, rival
from moesaic.trees.running import load_run, run
from moesaic.trees.streams.stream import Chunk, Stream

HAS_JAVA = importlib.util.find_spec("capymoa") is not None and (shutil.which("java") or os.environ.get("JAVA_HOME"))
needs_java = pytest.mark.skipif(not HAS_JAVA, reason="needs capymoa and Java")

ROWS, FEATURES, CLASSES, SEED = 2500, 5, 3, 7
COMPARED = ("ht", "arf", "dems")
THEIRS = """
import json, sys
import numpy as np
from capymoa import classifier
from capymoa.evaluation import prequential_evaluation
from capymoa.stream import ARFFStream
from moesaic.trees.prequential.rivals_worker import Rival

told, names = {}, json.loads(sys.argv[2])
for name, (kind, size) in names.items():
    stream = ARFFStream(sys.argv[1])
    given = {size: 10} if size else {}
    learner = getattr(classifier, kind)(stream.get_schema(), random_seed=int(sys.argv[3]), **given)
    found = prequential_evaluation(stream, learner, store_predictions=True)  # in Java
    told[name] = [np.asarray(found["predictions"]).tolist(), found.cumulative["accuracy"]]
errors = []
for kind, given in (("NoSuchTree", {}), ("OzaBoost", {"iterations": 3}), ("HoeffdingTree", {"leaf_prediction": 9})):
    try:
        Rival(kind, 2, 2, given)
    except ValueError as error:
        errors.append(str(error))
print(json.dumps([told, errors]))
"""


def rows() -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows of which some values are missing, and whose concept changes in their midst."""
    random = np.random.default_rng(0)
    x = np.round(random.random((ROWS, FEATURES)), 3)
    a, b = np.where(np.arange(ROWS)[:, None] < ROWS // 2, x[:, :2], x[:, 2:4]).T
    y = (a > 0.5).astype(np.int64) + (b > 0.3)
    x[random.random(x.shape) < 0.05] = np.nan
    return x, y


class Known(Stream):
    def __init__(self) -> None:
        self.x, self.y = rows()
        self.name, self.classes, self.length = "rows", [*range(CLASSES)], ROWS
        self.features = [f"x{i}" for i in range(FEATURES)]

    def _read(self, size: int, start: int, stop: int | None) -> Iterator[Chunk]:
        end = ROWS if stop is None else min(stop, ROWS)
        for i in range(start, end, size):
            here = slice(i, min(i + size, end))
            yield Chunk(self.x[here], self.y[here])


def made(name: str = "ht", **settings: Any) -> Rival:
    stream = Known()
    return rival(name, stream.classes, stream.features, seed=SEED, heap=512, **settings)


def ended(pid: int) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """CapyMOA's own evaluation of the same rows, in a process of its own."""
    folder = tmp_path_factory.mktemp("rivals")
    x, y = rows()
    lines = ["@relation rows", *(f"@attribute x{i} numeric" for i in range(FEATURES))]
    lines += ["@attribute class {0,1,2}", "@data"]
    for row, label in zip(x.tolist(), y.tolist(), strict=True):
        lines.append(",".join(["?" if v != v else repr(v) for v in row] + [str(label)]))
    (folder / "rows.arff").write_text("\n".join(lines) + "\n")
    names = json.dumps({name: RIVALS[name] for name in COMPARED})
    command = [sys.executable, "-c", THEIRS, str(folder / "rows.arff"), names, str(SEED)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def tree(running: subprocess.Popen[str]) -> Iterator[Rival]:
    found = made()
    yield found
    found.close()


@pytest.fixture(scope="module")
def theirs(running: subprocess.Popen[str]) -> tuple[dict[str, Any], list[str]]:
    told, errors = json.loads(running.communicate(timeout=120)[0].splitlines()[-1])
    return told, errors


@needs_java
@pytest.mark.parametrize("name", COMPARED)
def test_predictions_by_chunks_are_those_of_their_own_evaluation(
    tree: Rival, theirs: tuple[dict[str, Any], list[str]], name: str
) -> None:
    learner = tree if name == "ht" else made(name)
    assert isinstance(learner, Quick)
    assert isinstance(learner, Forked)
    predicted: list[int] = []
    whole = learner.test_then_train

    def noting(x: NDArray[Any], y: NDArray[Any], classes: int) -> NDArray[Any]:
        predicted.extend(found := whole(x, y, classes))
        return found

    learner.test_then_train = noting  # type: ignore[method-assign]
    result = prequential(Known(), learner, chunk=500, window=500)
    learner.test_then_train = whole  # type: ignore[method-assign]
    expected, accuracy = theirs[0][name]
    assert predicted == expected
    assert result.accuracy == pytest.approx(accuracy / 100)
    assert 0 < learner.cpu_seconds() < 60
    assert result.cpu_seconds > 0
    assert result.peak_memory_mib > learner.peak_memory() > 50, "a JVM is no smaller"
    if name != "ht":
        learner.close()


@needs_java
def test_rows_one_by_one_are_the_same(tree: Rival) -> None:
    x, y = rows()
    before = tree.cpu_seconds()
    for t in range(50):
        found = tree.predict_proba(x[t], CLASSES)
        assert np.array_equal(tree.predict_proba(x[t], CLASSES), found)
        np.testing.assert_allclose(found.sum(), 1)
        assert tree.test_then_train(x[t : t + 1], y[t : t + 1], CLASSES) == found.argmax()
        tree.learn(x[t], int(y[t]))
    assert tree.cpu_seconds() > before
    assert tree.test_then_train(x[:0], y[:0], CLASSES).shape == (0,)
    missing = np.append(x[0, :3], [np.nan] * 2)
    assert np.array_equal(tree.predict_proba(x[0, :3], CLASSES), tree.predict_proba(missing, CLASSES))
    assert tree.predict_proba(x[0], 5).shape == (5,)


@needs_java
def test_what_it_was_not_made_for_is_refused(tree: Rival) -> None:
    with pytest.raises(DataError, match="has 6 features, and ht was made for 5"):
        tree.predict_proba(np.zeros(6), CLASSES)
    for label in (-1, 3):
        with pytest.raises(DataError, match="none of the 3"):
            tree.learn(np.zeros(5), label)
        with pytest.raises(DataError, match="none of the 3"):
            tree.test_then_train(np.zeros((1, 5)), np.array([label]), CLASSES)
    for ask in (tree.state, lambda: tree.restore({}, {})):
        with pytest.raises(ConfigError, match="without folder="):
            ask()


@needs_java
def test_a_file_whose_classes_appear_late_is_a_stream_for_them(tmp_path: Path) -> None:
    text = "".join(f"{i % 40 + i // 300},{'abc'[i // 300]}\n" for i in range(900))
    (tmp_path / "late.csv").write_text(f"x,label\n{text}")
    settings = [f"stream={tmp_path / 'late.csv'}", "learner=capymoa-ht", "model.heap=512", f"out={tmp_path / 'run'}"]
    found = run(load_run(settings), progress=False)
    assert (found["rows"], found["classes"]) == (900, ["a", "b", "c"])
    assert [of["came"] for of in found["by_class"]] == [300, 300, 300]


@needs_java
def test_settings_that_capymoa_does_not_know_are_told(theirs: tuple[dict[str, Any], list[str]]) -> None:
    lacking, unknown, impossible = theirs[1]
    assert lacking.endswith("has no classifier NoSuchTree: pip install -U capymoa")
    assert "OzaBoost has no setting iterations; did you mean boosting_iterations? known: " in unknown
    assert impossible.startswith("CapyMOA's HoeffdingTree cannot be made so: ")


@needs_java
def test_an_interrupt_ends_the_child_and_so_does_a_signal(tree: Rival) -> None:
    """The last that uses this child."""
    x, y = rows()
    before, pid = tree.cpu_seconds(), tree._worker.pid

    class Interrupted:
        def read(self, size: int) -> bytes:
            raise KeyboardInterrupt

    tree._worker._out = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        tree.test_then_train(x, y, CLASSES)
    assert ended(pid)
    with pytest.raises(TrainingError, match="ht has ended"):
        tree.learn(x[0], 0)
    assert tree.cpu_seconds() >= before - 0.05, "the system tells it by hundredths"
    tree.close()


FAKE = """
import os, sys, time
def say(text, status):
    sys.stdout.buffer.write({header}.pack(status, 0, 0, len(text)) + text)
    sys.stdout.buffer.flush()
{body}
"""


@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        ("print('no room left', file=sys.stderr); sys.exit(3)", TrainingError, "ended .exit code 3; no room left"),
        ("say(b'NoSuchTree is unknown', 2); time.sleep(9)", ConfigError, "^NoSuchTree is unknown$"),
        ("say(b'no JVM', 1); time.sleep(9)", ConfigError, "Java does not start .no JVM.: install OpenJDK"),
    ],
)
def test_a_child_that_cannot_start_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, kind: type[Exception], reason: str
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE.format(header="__import__('struct').Struct('<iiqq')", body=body))
    monkeypatch.setattr(rivals, "WORKER", worker)
    monkeypatch.setattr(jvm, "PATIENCE", 0.1)
    monkeypatch.setattr(jvm, "check_java", lambda: None)
    with pytest.raises(kind, match=reason):
        made("arf")


def test_a_child_that_dies_tells_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = "import struct; say(b'{}', 0); sys.stdin.buffer.read(24); say(struct.pack('<d', 1.5), 0)\n"
    body += "sys.stdin.buffer.read(24); print('java.lang.OutOfMemoryError', file=sys.stderr); sys.stderr.flush()\n"
    body += "os.kill(os.getpid(), 9)"
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE.format(header="__import__('struct').Struct('<iiqq')", body=body))
    monkeypatch.setattr(rivals, "WORKER", worker)
    monkeypatch.setattr(jvm, "check_java", lambda: None)
    found = made("arf")
    with pytest.raises(TrainingError, match=r"ended .SIGKILL; java.lang.OutOfMemoryError.: give more heap"):
        found.predict_proba(np.zeros(FEATURES), CLASSES)
    assert found.cpu_seconds() == 0
    assert found._worker._process.returncode == -signal.SIGKILL


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'arf'"):
        made("arff")
    with pytest.raises(ConfigError, match="ht has no members"):
        made("ht", members=3)
    for members in (0, 1.5, True):
        with pytest.raises(ConfigError, match="members must be"):
            made("arf", members=members)
    with pytest.raises(ConfigError, match="seed must be"):
        rival("arf", [0, 1], ["a"], seed=2**40)
    with pytest.raises(ConfigError, match="all classes before the first row"):
        rival("arf", [], ["a"])
