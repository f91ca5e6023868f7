"""MOA's trees in a child process: they learn as CapyMOA's do, and nothing is lost when the child ends."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moesaic.errors import AdapterError, ConfigError, DataError, MissingDependency, TrainingError
from moesaic.trees import capymoa_trees, jvm
from moesaic.trees.bulk import sent, way
from moesaic.trees.capymoa_trees import CapyMOATrees, shares
from moesaic.trees.driftmoe import DriftMoE
from moesaic.trees.experts import Experts
from moesaic.trees.settings import settings
from moesaic.trees.streams import synthetic

HAS_JAVA = importlib.util.find_spec("capymoa") is not None and (shutil.which("java") or os.environ.get("JAVA_HOME"))
needs_java = pytest.mark.skipif(not HAS_JAVA, reason="needs capymoa and Java")
K, CLASSES, ROWS = 3, 3, 1800
SETTINGS = {"grace_period": 50, "confidence": 1e-7}

THEIRS = """
import sys
import numpy as np
from capymoa.classifier import HoeffdingTree
from capymoa.core import LabeledInstance
from capymoa.stream import Schema

data = np.load(sys.argv[1])
x, y, weights = data["x"], data["y"], data["weights"]
names = [f"x{i}" for i in range(x.shape[1])] + ["class"]
schema = Schema.from_custom(names, "class", categories={"class": [str(c) for c in range(3)]}, name="rows")
settings = dict(grace_period=50, confidence=1e-7, binary_split=False, stop_mem_management=False)
trees = [HoeffdingTree(schema, **settings) for _ in range(weights.shape[1])]
told = np.full((len(y), len(trees), 3), 1 / 3)
for t in range(len(y)):
    instance = LabeledInstance.from_array(schema, x[t], int(y[t]))
    for k, tree in enumerate(trees):
        votes = tree.predict_proba(instance)
        if votes is not None:
            told[t, k] = votes
        instance.java_instance.getData().setWeight(weights[t, k])
        tree.train(instance)
np.save(sys.argv[2], told)
"""


def rows(count: int = ROWS, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Features (count, 4) of which some are missing, classes that two of them decide, and weights (count, K)."""
    generator = np.random.default_rng(seed)
    x = generator.random((count, 4))
    y = (x[:, 0] > 0.5).astype(int) + ((x[:, 0] > 0.5) & (x[:, 1] > 0.3))
    x[generator.random(x.shape) < 0.05] = np.nan
    weights = generator.random((count, K)) * 2
    weights[:, 0] = 1
    weights[::3, 1] = 0
    return x, y, weights


def run(bank: Experts, begin: int = 0, end: int = ROWS) -> NDArray[Any]:
    x, y, weights = rows()
    told = []
    for t in range(begin, end):
        told.append(bank.predict(x[t], CLASSES))
        bank.learn(x[t], int(y[t]), weights[t])
    return np.array(told)


def child(bank: CapyMOATrees) -> int:
    assert bank._worker is not None
    return bank._worker.pid


def ended(pid: int, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """CapyMOA itself on the same rows, in a process of its own, and where it writes."""
    folder = tmp_path_factory.mktemp("capymoa")
    x, y, weights = rows()
    np.savez(folder / "rows.npz", x=x, y=y, weights=weights)
    command = [sys.executable, "-c", THEIRS, str(folder / "rows.npz"), str(folder / "told.npy")]
    process = subprocess.Popen(command, cwd=folder)
    yield process, folder / "told.npy"
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def theirs(running: tuple[subprocess.Popen[bytes], Path]) -> NDArray[Any]:
    """CapyMOA's own probabilities (rows, K, classes)."""
    process, told = running
    assert process.wait(120) == 0
    return np.load(told)


@pytest.fixture(scope="module")
def shared(running: tuple[subprocess.Popen[bytes], Path]) -> Iterator[CapyMOATrees]:
    bank = CapyMOATrees(K, heap=512)
    yield bank
    bank.close()


@pytest.fixture
def bank(shared: CapyMOATrees) -> CapyMOATrees:
    """One that knows nothing; all tests share its child."""
    nothing = {f"tree_{k}": np.zeros(0, np.uint8) for k in range(K)}
    shared.restore(nothing, {"bank": "capymoa", "size": K, "seed": 0, "features": 0} | SETTINGS)
    return shared


@needs_java
def test_they_learn_as_capymoas_own_trees(bank: CapyMOATrees, theirs: NDArray[Any]) -> None:
    assert np.array_equal(run(bank), theirs)
    arrays, _ = bank.state()
    assert all(b"SplitNode" in arrays[f"tree_{k}"].tobytes() for k in range(K)), "the rows should make trees split"


@needs_java
def test_an_interrupt_amid_an_answer_and_a_child_that_is_killed_lose_nothing(
    bank: CapyMOATrees, theirs: NDArray[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank, "every", 200)

    class Interrupted:
        def read(self, size: int) -> bytes:
            raise KeyboardInterrupt

    with caplog.at_level(logging.WARNING, "moesaic"):
        told = [run(bank, 0, 700)]
        assert bank._worker is not None
        bank._worker._out = Interrupted()  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            bank.predict(rows()[0][0], CLASSES)
        told.append(run(bank, 700, 1300))
        pid = child(bank)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid)
        told.append(run(bank, 1300, ROWS))
    assert np.array_equal(np.concatenate(told), theirs)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "SIGKILL" in said
    assert len(bank._kept.done) <= 200


@needs_java
def test_many_rows_in_one_go_are_one_after_the_other_though_the_child_ends(
    bank: CapyMOATrees, theirs: NDArray[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank, "every", 200)
    x, y, weights = rows()
    told = []
    for begin in range(0, 1000, 125):
        if begin in (250, 750):
            os.kill(child(bank), signal.SIGKILL)  # it is found to be dead while it is asked
            assert ended(child(bank))
        part = slice(begin, begin + 125)
        told.append(bank.course(x[part], y[part], weights[part], CLASSES))
        assert len(bank._kept.done) <= 200 + 125
    told.append(run(bank, 1000, 1100))
    assert np.array_equal(np.concatenate(told), theirs[:1100])


@needs_java
@pytest.mark.parametrize(
    "given",
    [pytest.param({}, marks=pytest.mark.slow), {"explore": 0.2, "combine": "mixture"},
     pytest.param({"router": False, "combine": "topk"}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_drift_moe_over_them_learns_many_rows_as_one_after_the_other(given: dict[str, Any]) -> None:
    wanted = settings("paper", backend="capymoa", n_experts=4, hidden=(16,), batch_size=32, **given)
    one, many = DriftMoE(wanted), DriftMoE(wanted)
    try:
        assert way(wanted) is sent
        for x, y in synthetic("led_a", length=400, seed=0).chunks(150):
            said = []
            for row, label in zip(x, y.tolist(), strict=True):
                said.append(int(one.predict_proba(row, 10).argmax()))
                one.learn(row, label)
            assert many.test_then_train(x, y, 10).tolist() == said
        (arrays, values), (others, told) = one.state(), many.state()
        assert values == told
        assert all(np.array_equal(arrays[name], others[name]) for name in arrays | others)
    finally:
        one.close()
        many.close()


@needs_java
def test_what_is_unknown_is_uniform_and_predicting_changes_nothing(bank: CapyMOATrees) -> None:
    x, _, _ = rows(1)
    assert np.array_equal(bank.predict(x[0], 4), np.full((K, 4), 0.25))
    run(bank, 0, 200)
    saved, _ = bank.state()
    first = bank.predict(x[0], CLASSES)
    assert np.array_equal(bank.predict(x[0], CLASSES), first)
    assert np.array_equal(bank.predict(x[0], CLASSES, [2, 0]), first[[2, 0]])
    assert bank.predict(x[0], CLASSES, []).shape == (0, CLASSES)
    np.testing.assert_allclose(first.sum(axis=1), 1)
    bank._kept.changed.update(range(K))
    again, _ = bank.state()
    assert all(np.array_equal(saved[name], again[name]) for name in saved)


@needs_java
def test_a_weight_of_nothing_leaves_a_tree_as_it_is(bank: CapyMOATrees) -> None:
    x, y, _ = rows(100)
    for t in range(100):
        bank.learn(x[t], int(y[t]), np.array([1.0, 0.0, 1.0]))
    bank.learn(x[0], 2, np.zeros(K))
    votes = bank.predict(x[0], CLASSES)
    assert np.array_equal(votes[1], np.full(CLASSES, 1 / CLASSES))
    assert np.array_equal(votes[0], votes[2])
    assert len(bank.state()[0]["tree_1"]) == 0


@needs_java
def test_features_and_classes_grow_and_a_reset_holds_when_the_child_ends(
    bank: CapyMOATrees, caplog: pytest.LogCaptureFixture
) -> None:
    x, y, _ = rows(1500, seed=5)
    hints = np.random.default_rng(1).random((1500, 2))
    late = np.where((np.arange(1500) >= 700) & (hints[:, 0] > 0.5), 4, y)  # a new class that a new feature tells
    told = []
    for killed in (False, True):
        bank.restore({f"tree_{k}": np.zeros(0, np.uint8) for k in range(K)}, bank.state()[1] | {"features": 0})
        found = []
        for t in range(1500):
            row, classes = (x[t], 3) if t < 700 else (np.append(x[t], hints[t]), 5)
            if t == 600 and not killed:
                bank.predict(np.zeros(9), 7)  # of no consequence for what is learned
            if t == 740:
                bank.reset(1)
            if t == 750 and killed:
                os.kill(child(bank), signal.SIGTERM)
            found.append(np.pad(bank.predict(row, classes), ((0, 0), (0, 5 - classes))))
            bank.learn(row, int(late[t]), np.ones(K))
        told.append(np.array(found))
    assert np.array_equal(told[0], told[1])
    assert "SIGTERM" in caplog.text
    assert np.mean(told[0][1000:, 0].argmax(axis=1) == late[1000:]) > 0.7
    assert np.array_equal(told[0][740, 1], np.full(5, 0.2)), "it begins anew"
    np.testing.assert_allclose(bank.predict(row, 2).sum(axis=1), 1)
    missing = np.append(x[0, :3], [np.nan] * 3)
    assert np.array_equal(bank.predict(x[0, :3], 5), bank.predict(missing, 5))


@needs_java
def test_trees_are_added_and_prepared_and_take_their_places_though_the_child_ends(bank: CapyMOATrees) -> None:
    x, y, weights = rows(700, seed=3)
    weights[200:, 2] = weights[200:, 0]  # the third begins when one begins beside the first, and learns the same
    weights[:200, 2] = 0
    grown = CapyMOATrees(0, heap=512)
    assert grown.predict(x[0], CLASSES).shape == (0, CLASSES)
    grown.add(2)
    told: list[Any] = [[], []]
    for one, found in zip((bank, grown), told, strict=True):
        for t in range(700):
            if t == 200:
                one.prepare(0)
                one.add(1 if one is grown else 0)
            if t == 300 and one is grown:
                used = one.cpu_seconds()
                os.kill(child(one), signal.SIGKILL)
                assert ended(child(one))
                assert one.cpu_seconds() >= used - 0.05, "the system tells it by hundredths"
            if t == 350:
                arrays, values = one.state()
                assert set(arrays) == {"tree_0", "tree_1", "tree_2", "beside_0"}
                one.reset(0)
                one.restore(arrays, values)
            if t == 400:
                one.reset(0)
            found.append(one.predict(x[t], CLASSES)[: 2 if t < 200 else K])
            one.learn(x[t], int(y[t]), weights[t, : one.size])
        one.reset(0)
        assert np.array_equal(one.predict(x[0], CLASSES)[0], np.full(CLASSES, 1 / CLASSES)), "none is beside it"
    for t in range(700):
        assert np.array_equal(told[0][t][: len(told[1][t])], told[1][t])
    same = [np.array_equal(votes[0], votes[2]) for votes in told[1][200:]]
    assert all(same[200:]), "it has learned what the one that began with it has"
    assert not all(same[:200]), "it was not in its place before"
    assert grown.cpu_seconds() > used
    assert set(grown.state()[0]) == {"tree_0", "tree_1", "tree_2"}
    grown.close()
    assert grown.cpu_seconds() > used, "of the one that was closed"


@needs_java
def test_a_state_comes_back(bank: CapyMOATrees, theirs: NDArray[Any]) -> None:
    run(bank, 0, 1200)
    arrays, values = bank.state()
    run(bank, 100, 200)
    for array in arrays.values():
        assert array.dtype == np.uint8
    bank.restore(arrays, values)
    assert np.array_equal(run(bank, 1200, ROWS), theirs[1200:])


@needs_java
@pytest.mark.parametrize(
    "copied", [pytest.param(copy.deepcopy, marks=pytest.mark.slow), lambda made: pickle.loads(pickle.dumps(made))]
)
def test_a_classifier_over_them_is_copied_and_pickled_and_goes_on_exactly(copied: Callable[[Any], Any]) -> None:
    from moesaic.trees import DriftMoEClassifier

    given: dict[str, Any] = {"n_experts": 3, "hidden": (8,), "batch_size": 32, "detect": True, "warning": 0.5}
    x, y, _ = rows(900)
    lines = [dict(enumerate(row)) for row in x.tolist()]
    whole, model = (DriftMoEClassifier(backend="capymoa", **given) for _ in range(2))
    told = []
    for row, label in zip(lines, y.tolist(), strict=True):
        told.append(whole.predict_proba_one(row))
        whole.learn_one(row, label)
    for row, label in zip(lines[:450], y.tolist(), strict=False):
        model.learn_one(row, label)
    again = copied(model)
    for row, label in zip(lines[450:500], 1 - y[450:500] % 2, strict=True):
        model.learn_one(row, int(label))  # the copy knows nothing of it
    pid = child(model.core.banks.banks[0])
    model.close()
    assert ended(pid)
    with pytest.raises(ConfigError, match="are closed"):
        copied(model)
    for t in range(450, 900):
        assert again.predict_proba_one(lines[t]) == told[t], t
        again.learn_one(lines[t], int(y[t]))
    assert again.core.cpu_seconds() > 0
    again.close()
    whole.close()


@needs_java
def test_copies_share_nothing(bank: CapyMOATrees, theirs: NDArray[Any]) -> None:
    run(bank, 0, 500)
    other = copy.copy(bank)
    run(other, 100, 200)
    assert np.array_equal(run(bank, 500, 600), theirs[500:600])
    os.kill(child(bank), signal.SIGKILL)
    assert np.array_equal(run(bank, 600, 700), theirs[600:700])
    other.close()


@needs_java
def test_a_foreign_state_is_refused(bank: CapyMOATrees) -> None:
    run(bank, 0, 300)
    arrays, values = bank.state()
    before = bank.predict(rows()[0][0], CLASSES)
    # java.io.ObjectOutputStream's bytes of new java.util.concurrent.atomic.AtomicLong(): harmless, and no tree's part
    name = b"java.lang.StringBuilder"
    foreign = b"\xac\xed\x00\x05\x73\x72" + len(name).to_bytes(2, "big") + name + bytes(8) + b"\x02\0\0\x78\x70"
    text = b"\xac\xed\x00\x05\x74\x00\x04tree"
    cut = arrays["tree_1"].tobytes()[:-100]
    for data, reason in ((foreign, "REJECTED"), (text, "no Hoeffding tree"), (cut, "cannot be read"), (b"MZ", "read")):
        with pytest.raises(AdapterError, match=reason):
            bank.restore(arrays | {"tree_1": np.frombuffer(data, np.uint8)}, values)
        assert np.array_equal(bank.predict(rows()[0][0], CLASSES), before), "nothing has changed"
    broken: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({k: v for k, v in arrays.items() if k != "tree_0"}, values, "instead of 3 trees"),
        (arrays | {"beside_3": arrays["tree_0"]}, values, "instead of 3 trees"),
        (arrays | {"tree_0": np.zeros(3)}, values, "row of bytes"),
        (arrays, values | {"grace_period": 7}, "grace_period"),
        (arrays, values | {"bank": "river"}, "bank"),
        (arrays, values | {"features": 10**12}, "whole number"),
        (arrays, values | {"features": True}, "whole number"),
        (arrays | {"tree_0": np.zeros(513 << 20, np.uint8)}, values, "larger than the heap"),
    ]
    for found, said, reason in broken:
        with pytest.raises(AdapterError, match=reason):
            bank.restore(found, said)


@needs_java
def test_a_tree_of_other_settings_is_refused(bank: CapyMOATrees) -> None:
    arrays, values = bank.state()
    bank.learn(np.zeros(4), 0, np.ones(K))
    grown, _ = bank.state()
    data = grown["tree_0"].tobytes()
    at = data.index(b"gracePeriod")
    place = data.index((50).to_bytes(4, "big"), at)
    other = data[:place] + (51).to_bytes(4, "big") + data[place + 4 :]
    with pytest.raises(AdapterError, match="other settings"):
        bank.restore(arrays | {"tree_0": np.frombuffer(other, np.uint8)}, values)


@needs_java
def test_bad_rows_are_refused(bank: CapyMOATrees) -> None:
    with pytest.raises(DataError, match="give each its own"):
        bank.learn(np.zeros(4), 0, np.ones(K + 1))
    with pytest.raises(DataError, match="whole number from 0"):
        bank.learn(np.zeros(4), -1, np.ones(K))
    for which in (-1, K):
        for change in (bank.reset, bank.prepare):
            with pytest.raises(DataError, match="there is no tree"):
                change(which)
    with pytest.raises(DataError, match="0 or more"):
        bank.add(-1)


@needs_java
def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, numpy as np\nfrom moesaic.trees.jvm import Worker\n"
        "worker = Worker({'size': 1, 'seed': 0, 'options': ''}, heap=256)\n"
        "print(worker.pid, os.getsid(worker.pid) != os.getsid(0), flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    pid, apart = found.stdout.split()
    assert found.returncode == -signal.SIGKILL
    assert apart == "True", "a Ctrl-C in the terminal should not reach it"
    assert ended(int(pid))


def test_votes_become_shares() -> None:
    votes = np.array([[1.0, 3.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0], [1e-320, 0.0]])
    assert shares(votes).tolist() == [[0.25, 0.75], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]


def test_without_java_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no java on the PATH: install OpenJDK .* default-jre-headless"):
        CapyMOATrees(2)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no such folder: install OpenJDK"):
        CapyMOATrees(2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"moesaic\[capymoa\]"):
        CapyMOATrees(2)


@needs_java
def test_a_broken_java_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho no JVM here >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=r"Java does not start .*no JVM here.*: install OpenJDK"):
        CapyMOATrees(2)


def test_a_child_that_cannot_live_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import sys\nprint('Terminating due to nothing', file=sys.stderr)\nsys.exit(3)\n")
    monkeypatch.setattr(jvm, "WORKER", worker)
    monkeypatch.setattr(jvm, "check_java", lambda: None)
    with pytest.raises(TrainingError, match=r"ended 3 times in a row .exit code 3; Terminating due to nothing"):
        CapyMOATrees(2)


def test_a_child_that_does_not_listen_is_killed_and_closing_twice_is_fine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"sys.stdout.buffer.write({jvm.HEADER.pack(0, 0, 0, 2) + b'{}'!r})\nsys.stdout.flush()\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(jvm, "WORKER", worker)
    monkeypatch.setattr(jvm, "PATIENCE", 0.1)
    monkeypatch.setattr(jvm, "check_java", lambda: None)
    found = jvm.Worker({})
    found.close()
    found.close()
    assert ended(found.pid)
    with pytest.raises(jvm.WorkerDied, match="SIGKILL"):
        found.ask(0)


def test_a_closed_bank_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CapyMOATrees, "_do", lambda *args: None)
    bank = CapyMOATrees(2)
    bank.close()
    bank.close()
    with pytest.raises(ConfigError, match="are closed"):
        bank.learn(np.zeros(2), 0, np.ones(2))
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(ConfigError, match=r"^the trees are closed: .* save or copy these before close\(\)$"):
            copied(bank)


def test_impossible_settings_are_refused() -> None:
    wrong: dict[str, Any]
    for wrong in (
        {"size": -1},
        {"grace_period": 1.5},
        {"every": True},
        {"heap": -1},
        {"confidence": 0.0},
        {"seed": "a"},
    ):
        with pytest.raises(ConfigError, match="must be"):
            CapyMOATrees(**{"size": 2} | wrong)


def test_the_heap_fits_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAPYMOA_JVM_ARGS", raising=False)
    monkeypatch.setattr(jvm, "available_memory", lambda: 4 << 30)
    assert jvm.jvm_arguments(8192).endswith("-Xmx3072m")
    assert jvm.jvm_arguments(512).endswith("-Xmx512m")
    monkeypatch.setattr(jvm, "available_memory", lambda: None)
    monkeypatch.setenv("CAPYMOA_JVM_ARGS", "-Xss20M")
    assert jvm.jvm_arguments(8192).startswith("-Xss20M ")
    assert jvm.jvm_arguments(8192).endswith("-Xmx8192m")


@needs_java
def test_the_journal_is_bounded_in_bytes(bank: CapyMOATrees, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capymoa_trees, "JOURNAL", 10_000)
    most = 0
    for t in range(300):
        bank.learn(np.zeros(20), t % 2, np.ones(K))
        most = max(most, sum(len(payload) for *_, payload in bank._kept.done))
    assert 9_000 < most < 11_000
