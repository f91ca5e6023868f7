"""Prequential evaluation: figures as others count them, the order of test and train, runs that go on exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from moesaic.errors import AdapterError, ConfigError, DataError
from moesaic.runs.states import read_state, write_state
from moesaic.trees.prequential import (
    METRICS,
    Evaluator,
    Figures,
    Majority,
    NoChange,
    Result,
    checkpoint,
    from_river,
    prequential,
    recoveries,
)
from moesaic.trees.streams.stream import Chunk, Drift, Stream

Labels = NDArray[np.int64]


class Rows(Stream):
    """Arrays as a stream. Without `classes` it finds them as it reads."""

    def __init__(self, x: Any, y: Any, classes: int | None = None, drifts: tuple[Drift, ...] = ()) -> None:
        self.x, self.y = np.asarray(x, np.float64), np.asarray(y, np.int64)
        self.name, self.features, self.drifts = "rows", [f"x{i}" for i in range(self.x.shape[1])], drifts
        self.classes, self.length = [*range(classes or 0)], len(self.y)

    def _read(self, size: int, start: int, stop: int | None) -> Iterator[Chunk]:
        stop = len(self.y) if stop is None else min(stop, len(self.y))
        for i in range(start, stop, size):
            here = slice(i, min(i + size, stop))
            self.classes += range(len(self.classes), int(self.y[: here.stop].max()) + 1)
            yield Chunk(self.x[here], self.y[here])


class Guessing:
    """A learner whose state depends on chance and on every row's place in the order: means of rows, shaken."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.means = np.zeros((0, 3))
        self.trained = np.zeros(2, np.int64)

    def predict_proba(self, x: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
        scores = np.zeros(classes)
        scores[: len(self.means)] = -((self.means - x) ** 2).sum(axis=1)
        return np.exp(scores) / np.exp(scores).sum()

    def learn(self, x: NDArray[np.float64], y: int) -> None:
        self.means = np.pad(self.means, ((0, max(0, y + 1 - len(self.means))), (0, 0)))
        self.means[y] += self.random.uniform(0, 0.2) * (x - self.means[y])
        self.trained[self.random.integers(2)] += 1

    def activity(self) -> dict[str, Labels]:
        return {"trained": self.trained}

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"means": self.means.copy(), "trained": self.trained.copy()}, {"random": self.random.bit_generator.state}

    def restore(self, arrays: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        self.means, self.trained = arrays["means"], arrays["trained"]
        self.random.bit_generator.state = values["random"]

    def close(self) -> None:
        pass


class Quickly(Guessing):
    """The same, over many rows at once."""

    def test_then_train(self, x: NDArray[np.float64], y: Labels, classes: int) -> Labels:
        assert (y >= 0).all()
        assert (y[:-1] < classes).all()
        found = []
        for row, label in zip(x, y.tolist(), strict=True):
            found.append(int(self.predict_proba(row, classes).argmax()))
            self.learn(row, label)
        return np.array(found, np.int64)


class Diary(NoChange):
    """Writes down what it is asked, by the number that a row holds."""

    def __init__(self, at: Callable[[int], None] = lambda row: None) -> None:
        super().__init__()
        self.lines: list[tuple[Any, ...]] = []
        self.at = at

    def predict_proba(self, x: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
        self.lines.append(("test", int(x[0]), classes))
        self.at(int(x[0]))
        return super().predict_proba(x, classes)

    def learn(self, x: NDArray[np.float64], y: int) -> None:
        self.lines.append(("train", int(x[0]), y))
        super().learn(x, y)


def noisy(rows: int = 3000, *, seed: int = 1, missing: float = 0.0, classes: int | None = None) -> Rows:
    random = np.random.default_rng(seed)
    y = np.minimum(random.geometric(0.4, rows) - 1, 3)
    x = random.normal(size=(rows, 3)) + np.eye(4)[y, :3]
    return Rows(x, np.where(random.random(rows) < missing, -1, y), classes, (Drift(rows // 2),))


def facts(result: Result) -> dict[str, Any]:
    """All that two runs of one thing have in common."""
    found = result.as_json()
    return {k: v for k, v in found.items() if k not in ("cpu_seconds", "rows_per_second", "peak_memory_mib")}


labels = hnp.arrays(np.int64, st.integers(1, 60), elements=st.integers(-1, 3))


def naive(y: Any, predicted: Any, seen: int, window: int | None = None) -> dict[str, float | None]:
    """Figures of the rows from `seen` on, by the definitions, one row after the other."""
    right = chance = majority = unchanged = 0
    own = [i for i in range(seen, len(y)) if y[i] >= 0]
    for i in own:
        since = 0 if window is None else max(0, i + 1 - window)
        counts = np.bincount([label for label in y[since : i + 1] if label >= 0])
        before = [label for label in y[:i] if label >= 0] or [0]
        right += y[i] == predicted[i]
        majority += counts.argmax() == y[i]
        unchanged += before[-1] == y[i]
    n = len(own)
    chance = sum(sum(y[i] == c for i in own) * sum(predicted[i] == c for i in own) for c in range(4))
    parts = {
        "accuracy": (right, n),
        "kappa": (right * n - chance, n * n - chance),
        "kappa_m": (right - majority, n - majority),
        "kappa_t": (right - unchanged, n - unchanged),
    }
    return {name: float(a / b) if b else None for name, (a, b) in parts.items()}


@given(labels, st.integers(1, 20), st.randoms(use_true_random=False), st.integers(1, 30))
def test_figures_are_those_of_the_definitions_however_rows_are_cut(
    y: Labels, window: int, chance: Any, cut: int
) -> None:
    predicted = np.array([chance.choice([abs(int(label)), chance.randrange(4)]) for label in y], np.int64)
    evaluator = Evaluator(window)
    for i in range(0, len(y), cut):
        evaluator.update(y[i : i + cut], predicted[i : i + cut])
        copy = Evaluator(window)
        copy.restore(*evaluator.state())
        evaluator = copy
    overall, windows = evaluator.overall(), evaluator.windows()
    assert {m: getattr(overall, m) for m in METRICS} == pytest.approx(naive(y, predicted, 0), abs=1e-12)
    for w in windows:
        known = naive(y[: w.end], predicted[: w.end], w.start, window)
        assert {m: getattr(w, m) for m in METRICS} == pytest.approx(known, abs=1e-12)
    assert [w.start for w in windows] == [*range(0, len(y), window)]
    assert (sum(w.rows for w in windows), sum(w.scored for w in windows)) == (overall.rows, overall.scored)
    assert sum((w.accuracy or 0) * w.scored for w in windows) == pytest.approx((overall.accuracy or 0) * overall.scored)
    for figures in (overall, *windows):
        assert figures.kappa is None or -1 <= figures.kappa <= 1
        assert all(value is None or value <= 1 for value in (figures.kappa_m, figures.kappa_t))


@given(labels, st.randoms(use_true_random=False), st.integers(1, 30))
def test_classes_and_baselines_are_counted_exactly(y: Labels, chance: Any, cut: int) -> None:
    predicted = np.array([chance.randrange(4) for _ in y], np.int64)
    evaluator = Evaluator(7)
    for i in range(0, len(y), cut):
        evaluator.update(y[i : i + cut], predicted[i : i + cut])
    known = y >= 0
    for label, found in enumerate(evaluator.by_class(5)):
        came, named = y == label, (predicted == label) & known
        right = int((came & named).sum())
        assert (found.came, found.predicted, found.right) == (came.sum(), named.sum(), right)
        assert found.recall == (right / came.sum() if came.any() else None)
        assert found.precision == (right / named.sum() if named.any() else None)
    overall, own = evaluator.overall(), y[known]
    before, counts = np.append(0, own)[:-1], np.cumsum(own[:, None] == np.arange(4), axis=0)
    for name, right in (("nochange", before == own), ("majority", counts.argmax(axis=1) == own)):
        assert evaluator.baselines()[name] == (right.sum() / len(own) if len(own) else None)
    assert sum(found.right for found in evaluator.by_class(4)) == round((overall.accuracy or 0) * overall.scored)


def test_figures_that_are_not_defined_are_none() -> None:
    evaluator = Evaluator(2)
    evaluator.update(np.array([-1, -1, 0, 0]), np.array([0, 1, 0, 0]))
    nothing, alike = evaluator.windows()
    assert nothing == Figures(0, 2, 0, None, None, None, None)
    assert alike == Figures(2, 2, 2, 1.0, None, None, None)


_CAPYMOA = """
import json, sys
import numpy as np
from capymoa.evaluation import ClassificationEvaluator, ClassificationWindowedEvaluator
from capymoa.stream import Schema

y, predicted = np.load(sys.argv[1])
schema = Schema.from_custom(["x", "y"], "y", {"y": ["0", "1", "2", "3"]})
overall = ClassificationEvaluator(schema=schema)
windowed = ClassificationWindowedEvaluator(schema=schema, window_size=50)
for label, named in zip(y.tolist(), predicted.tolist()):
    overall.update(label, named)
    windowed.update(label, named)
names = ["accuracy", "kappa", "kappa_m", "kappa_t"]
print(json.dumps([[overall.metrics_dict()[n] for n in names], windowed.metrics_per_window()[names].values.tolist()]))
"""


def test_figures_are_those_of_capymoa(tmp_path: Path) -> None:
    pytest.importorskip("capymoa")
    if not (shutil.which("java") or os.environ.get("JAVA_HOME")):
        pytest.skip("CapyMOA needs Java")
    random = np.random.default_rng(0)
    y = np.minimum(random.geometric(0.4, 1000) - 1, 3)
    y[:500] = 3 - y[:500]
    predicted = np.where(random.random(1000) < 0.6, y, random.integers(0, 4, 1000))
    np.save(tmp_path / "labels.npy", np.stack([y, predicted]))
    command = [sys.executable, "-c", _CAPYMOA, str(tmp_path / "labels.npy")]  # a JVM of its own: it starts only once
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    overall, windows = json.loads(done.stdout.splitlines()[-1])
    evaluator = Evaluator(50)
    evaluator.update(y, predicted)
    ours = [evaluator.overall(), *evaluator.windows()]
    for figures, theirs in zip(ours, [overall, *windows], strict=True):
        assert [100 * getattr(figures, m) for m in METRICS] == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("made", ["tree", "pipeline"])
def test_a_river_model_has_the_accuracy_that_river_tells(made: str) -> None:
    pytest.importorskip("river")
    from river import datasets, evaluate, linear_model, metrics, preprocessing, tree

    def model() -> Any:
        if made == "tree":
            return tree.HoeffdingTreeClassifier(grace_period=50)
        return preprocessing.StandardScaler() | linear_model.LogisticRegression()

    rows = [*datasets.Phishing()] * 2
    features = [*rows[0][0]]
    theirs = evaluate.progressive_val_score(iter(rows), model(), metrics.Accuracy()).get()
    stream = Rows([[x[name] for name in features] for x, _ in rows], [int(y) for _, y in rows], 2)
    ours = prequential(stream, from_river(model(), features)).accuracy
    assert ours is not None
    if made == "tree":  # it names nothing before the first row: river leaves that out, and class 0 is named for it here
        ours = (ours * len(rows) - (not rows[0][1])) / (len(rows) - 1)
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_river_rows_leave_out_what_is_missing_and_only_classifiers_are_taken() -> None:
    pytest.importorskip("river")
    from river import dummy, linear_model

    learner = from_river(dummy.NoChangeClassifier())
    assert learner._named(np.array([1.0, np.nan, 2.0])) == {"x0": 1.0, "x2": 2.0}
    assert learner.predict_proba(np.zeros(2), 4).tolist() == [0.25] * 4
    learner.learn(np.zeros(2), 2)
    assert learner.predict_proba(np.zeros(2), 4).tolist() == [0, 0, 1, 0]
    with pytest.raises(ConfigError, match="is no classifier of river's"):
        from_river(linear_model.LinearRegression())


def test_baselines_are_worth_nothing_above_themselves() -> None:
    stream = noisy()
    assert prequential(stream, NoChange()).overall.kappa_t == 0
    majority = prequential(stream, Majority()).overall
    assert majority.kappa == pytest.approx(0, abs=0.01)
    assert majority.kappa_m is not None
    assert -0.01 < majority.kappa_m <= 0, "it has not seen the row's own label"


def test_each_row_is_predicted_before_it_is_learned() -> None:
    diary = Diary()
    prequential(Rows([[0], [1], [2], [3]], [1, 0, -1, 2]), diary)
    assert diary.lines == [
        ("test", 0, 1), ("train", 0, 1), ("test", 1, 2), ("train", 1, 0), ("test", 2, 2), ("test", 3, 2),
        ("train", 3, 2),
    ]  # fmt: skip


def test_labels_that_are_late_are_learned_with_their_own_rows() -> None:
    diary = Diary()
    result = prequential(Rows([[i] for i in range(9)], [0, 1, 2, -1, 1, 0, 0, 0, 0]), diary, delay=2, rows=6)
    assert diary.lines == [
        ("test", 0, 1), ("test", 1, 1), ("test", 2, 1), ("train", 0, 0), ("test", 3, 1), ("train", 1, 1),
        ("test", 4, 2), ("train", 2, 2), ("test", 5, 3), ("train", 4, 1), ("train", 5, 0),
    ]  # fmt: skip
    assert (result.rows, result.overall.scored, result.unlabelled) == (6, 5, 1)
    assert prequential(noisy(9), Diary(), delay=100).rows == 9


@given(labels, st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_neither_chunks_nor_the_faster_way_make_a_difference(
    y: Labels, chunk: int, window: int, every: int, delay: int, known: bool
) -> None:
    x = np.random.default_rng(len(y)).normal(size=(len(y), 3))
    made: list[Any] = []
    for learner, size in ((Guessing(), 1), (Guessing(), chunk), (Quickly(), 1), (Quickly(), chunk)):
        stream = Rows(x, y, 4 if known else None)
        result = prequential(stream, learner, window=window, chunk=size, delay=delay, every=every)
        made.append((facts(replace(result, learner="")), learner.means.tolist(), learner.random.bit_generator.state))
    assert made[1:] == made[:1] * 3


class Widening(Rows):
    """Finds a second column in its second half."""

    def _read(self, size: int, start: int, stop: int | None) -> Iterator[Chunk]:
        for number, (x, y) in enumerate(super()._read(1, start, stop), start):
            yield Chunk(x[:, :1] if number < len(self.y) // 2 else x, y)


def test_outstanding_rows_of_a_checkpoint_may_differ_in_width(tmp_path: Path) -> None:
    class Wide(NoChange):
        seen: ClassVar[list[Any]] = []

        def learn(self, x: NDArray[np.float64], y: int) -> None:
            self.seen.append(x.tolist())
            if len(self.seen) == 2:
                signal.raise_signal(signal.SIGINT)

    stream = Widening([[0, 9], [1, 9], [2, 9], [3, 9], [4, 9], [5, 9]], [0] * 6)
    with pytest.raises(KeyboardInterrupt):
        prequential(stream, Wide(), delay=2, folder=tmp_path)
    prequential(stream, Wide(), delay=2, folder=tmp_path)
    assert str(Wide.seen) == "[[0.0], [1.0], [2.0, nan], [3.0, 9.0], [4.0, 9.0], [5.0, 9.0]]"


class Stopped(Quickly):
    """Is interrupted as it learns its so many-th row."""

    number = signal.SIGINT
    left = 0

    def learn(self, x: NDArray[np.float64], y: int) -> None:
        super().learn(x, y)
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("delay", [0, 7])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_exactly(tmp_path: Path, delay: int, number: signal.Signals) -> None:
    settings: dict[str, Any] = {"window": 100, "delay": delay, "chunk": 64, "every": 150}
    whole = Stopped()
    expected = prequential(noisy(missing=0.1), whole, **settings)
    for left in (1, 333, 1111):
        learner = Stopped()
        learner.left, learner.number = left, number
        with pytest.raises(KeyboardInterrupt, match=r"of 3,000, saved; the same command goes on from there"):
            prequential(noisy(missing=0.1), learner, folder=tmp_path, **settings)
        assert len([*tmp_path.glob("row-*")]) == 1
    last = Stopped(seed=99)
    result = prequential(noisy(missing=0.1), last, folder=tmp_path, **settings | {"chunk": 1000})
    assert facts(result) == facts(expected)
    assert last.means.tolist() == whole.means.tolist()
    assert result.cpu_seconds > 0
    again = Stopped()
    read = prequential(noisy(missing=0.1), again, folder=tmp_path, **settings)
    assert (facts(read), read.cpu_seconds) == (facts(expected), result.cpu_seconds), "the finished run is read back"
    assert again.means.tolist() == whole.means.tolist()


def test_ctrl_c_without_a_folder_says_that_nothing_is_kept_and_a_second_one_stops_at_once() -> None:
    learner = Stopped()
    learner.left = 10
    with pytest.raises(KeyboardInterrupt, match=r"stopped at row 1,000 of 3,000, and nothing is kept"):
        prequential(noisy(), learner)
    assert learner.left == 10 - 1000

    def twice(row: int) -> None:
        signal.raise_signal(signal.SIGINT)

    diary = Diary(twice)
    with pytest.raises(KeyboardInterrupt, match="at once"):
        prequential(Rows(np.arange(9)[:, None], np.zeros(9)), diary)
    assert [line[0] for line in diary.lines] == ["test", "train", "test"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupted(folder: Path, **settings: Any) -> Path:
    """A checkpoint of a run that was stopped."""
    learner = Stopped()
    learner.left = 250
    with pytest.raises(KeyboardInterrupt):
        prequential(noisy(), learner, folder=folder, window=100, delay=3, **settings)
    (place,) = folder.glob("row-*")
    return place


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    place = interrupted(tmp_path)
    tensors, values = place / "state.safetensors", place / "state.json"
    sound = tensors.read_bytes(), values.read_bytes()
    stored = json.loads(sound[1])
    broken: list[tuple[bytes | None, bytes | None]] = [
        (sound[0][:-20], sound[1]),
        (b"", sound[1]),
        (None, sound[1]),
        (sound[0], sound[1][:-20]),
        (sound[0], b"[]"),
        (sound[0], None),
        (sound[0], json.dumps(stored | {"format": 0}).encode()),
        (sound[0], json.dumps(stored | {"values": {}}).encode()),
        (sound[0], json.dumps({**stored, "values": {**stored["values"], "course": {"row": 1}}}).encode()),
    ]
    for arrays, text in broken:
        for file, content in ((tensors, arrays), (values, text)):
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_bytes(content)
        with pytest.raises(AdapterError, match=r"row-\d+ is damaged \(.+\): remove it to begin anew$") as caught:
            prequential(noisy(), Stopped(), folder=tmp_path, window=100, delay=3)
        assert "\n" not in str(caught.value)
    shutil.rmtree(place)
    assert prequential(noisy(), Stopped(), folder=tmp_path, window=100, delay=3).rows == 3000


def without(held: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in held.items() if key != name}


NAMES = {"features": ["x0", "x1", "x2"], "classes": ["0", "1", "2", "3"]}


@pytest.mark.parametrize(
    ("part", "name", "value", "why"),
    [("course", "known", None, "known is 'None'"), ("course", "known", -1, "known is '-1'"),
     ("course", "known", "2", "must be a whole number"), ("course", "known", True, "must be a whole number"),
     ("course", "known", 3.0, "must be a whole number"), ("course", "known", 5, "a whole number from 0 to 4"),
     ("course", "known", 1, "known is 1, and it has learned 4 classes"), ("course", "known", ..., "known is 'None'"),
     ("course", "row", 10**30, "row is '1000"), ("course", "row", 1, "of other rows than 1"),
     ("course", "row", "a\nb", r"row is 'a\nb'"), ("course", "cpu_seconds", "long", "cpu_seconds is 'long'"),
     ("course", "cpu_seconds", float("nan"), "cpu_seconds is 'nan'"),
     ("course", "peak_memory_mib", -1.0, "peak_memory_mib is '-1.0'"), ("course", "names", None, "two lists of texts"),
     ("course", "names", NAMES | {"classes": "0123"}, "two lists of texts"),
     ("course", "names", NAMES | {"features": ["x0", None, "x2"]}, "two lists of texts"),
     ("course", "names", NAMES | {"classes": ["0"]}, "lacks names of classes"),
     ("course", "names", NAMES | {"features": ["x0"]}, "wider than there are features"),
     ("evaluator", "last", None, "last is 'None'"), ("evaluator", "last", 4, "last is '4'"),
     ("evaluator", "last", -1, "last is '-1'"), ("activity", "windows", None, "windows is 'None'"),
     ("activity", "windows", 10**15, "counts of what experts did"), ("activity", "windows", -1, "windows is '-1'")],
)  # fmt: skip
def test_a_checkpoint_with_a_wrong_value_is_refused_and_the_learner_is_as_it_was(
    part: str, name: str, value: Any, why: str, tmp_path: Path
) -> None:
    place = interrupted(tmp_path)
    arrays, stored = read_state(place, version=checkpoint.FORMAT)
    held = stored["values"][part]
    stored["values"][part] = without(held, name) if value is ... else held | {name: value}
    write_state(place, arrays, stored, version=checkpoint.FORMAT)
    refused(tmp_path, why)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_checkpoint_that_is_not_as_it_was_written_is_refused(name: str, tmp_path: Path) -> None:
    file = interrupted(tmp_path) / name
    data = bytearray(file.read_bytes())
    at = data.rindex(b'"known": ') + 9 if name == "state.json" else len(data) - 3
    data[at] ^= 1
    file.write_bytes(data)
    refused(tmp_path, "not as they were written")


def counted(arrays: dict[str, Any], row: int, column: int, by: int) -> dict[str, Any]:
    found = arrays["evaluator/counted"].copy()
    found[row, column] += by
    return {"evaluator/counted": found}


@pytest.mark.parametrize(
    ("changed", "why"),
    [(lambda a: {"course/x": a["course/x"][:, :0].astype(np.float32)}, "outstanding rows are float32"),
     (lambda a: {"course/x": np.pad(a["course/x"], ((0, 0), (0, 1)))}, "wider than there are features"),
     (lambda a: {"course/x": a["course/x"][:2]}, "outstanding rows are float64"),
     (lambda a: {"course/x": a["course/x"][:2], "course/y": a["course/y"][:2]}, "outstanding rows are float64"),
     (lambda a: {"course/y": a["course/y"][:2]}, "outstanding labels are int64"),
     (lambda a: {"course/y": a["course/y"] * 0 + 4}, "labels are out of range"),
     (lambda a: {"course/y": a["course/y"] * 0 - 2}, "labels are out of range"),
     (lambda a: {"course/y": a["course/y"].astype(float)}, "outstanding labels are float64"),
     (lambda a: {"evaluator/recent": a["evaluator/recent"][1:]}, "recent labels"),
     (lambda a: {"evaluator/recent": a["evaluator/recent"] * 0 - 5}, "recent labels"),
     (lambda a: {"evaluator/recent": a["evaluator/recent"] * 0 + 3}, "recent labels"),
     (lambda a: {"evaluator/counted": a["evaluator/counted"][:, :-1]}, "counts are int64"),
     (lambda a: {"evaluator/counted": a["evaluator/counted"][1:]}, "do not add up"),
     (lambda a: {"evaluator/counted": a["evaluator/counted"][-1:]}, "counts are int64"),
     (lambda a: {"evaluator/counted": a["evaluator/counted"] * 1.0}, "counts are float64"),
     (lambda a: {"evaluator/counted": -a["evaluator/counted"]}, "out of range"),
     (lambda a: {"evaluator/counted": a["evaluator/counted"] << 50}, "out of range"),
     (lambda a: counted(a, 0, 1, 1), "contradict"), (lambda a: counted(a, 0, 2, 1000), "contradict"),
     (lambda a: counted(a, -1, 0, 1), "do not add up"), (lambda a: counted(a, 0, 0, 1), "do not add up"),
     (lambda a: {"activity/before.trained": a["activity/before.trained"] - 500}, "counts of trained are damaged"),
     (lambda a: {"activity/0.trained": a["activity/0.trained"] * 1.0}, "counts of trained are damaged"),
     (lambda a: {"activity/0.trained": a["activity/0.trained"][None]}, "counts of trained are damaged"),
     (lambda a: {"activity/0.trained": np.zeros(9, np.int64)}, "counts of trained are damaged"),
     (lambda a: {"activity/0.other": a["activity/0.trained"]}, "counts of what experts did")],
)  # fmt: skip
def test_a_checkpoint_with_wrong_numbers_is_refused_and_the_learner_is_as_it_was(
    changed: Callable[[Any], dict[str, Any]], why: str, tmp_path: Path
) -> None:
    place = interrupted(tmp_path)
    arrays, stored = read_state(place, version=checkpoint.FORMAT)
    write_state(place, arrays | changed(arrays), stored, version=checkpoint.FORMAT)
    refused(tmp_path, why)


def refused(folder: Path, why: str) -> None:
    learner = Stopped(seed=5)
    with pytest.raises(AdapterError, match=r"row-\d+ is damaged \(.+\): remove it to begin anew$") as caught:
        prequential(noisy(), learner, folder=folder, window=100, delay=3)
    assert why in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert learner.means.size == 0
    assert learner.random.bit_generator.state == np.random.default_rng(5).bit_generator.state


def test_a_checkpoint_of_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    interrupted(tmp_path).rename(tmp_path / "end")
    with pytest.raises(AdapterError, match="outstanding rows are"):
        prequential(noisy(), Stopped(), folder=tmp_path, window=100, delay=3)


def test_a_checkpoint_of_another_run_is_refused_and_says_why(tmp_path: Path) -> None:
    interrupted(tmp_path, settings={"seed": 1, "sizes": (1, 2)})
    same: dict[str, Any] = {"folder": tmp_path, "window": 100, "delay": 3, "settings": {"seed": 1, "sizes": [1, 2]}}
    with pytest.raises(ConfigError, match=r"holds a run with delay=3, now 0; seed=1, now 2: set it back"):
        prequential(noisy(), Stopped(), **same | {"delay": 0, "settings": {"seed": 2, "sizes": [1, 2]}})
    with pytest.raises(ConfigError, match="learner=Stopped, now Quickly"):
        prequential(noisy(), Quickly(), **same)
    other = noisy()
    other.features = ["a", "x1", "x2"]
    with pytest.raises(ConfigError, match="features of rows are no longer those of the checkpoint, such as x0"):
        prequential(other, Stopped(), **same)
    prequential(noisy(classes=4), Stopped(), **same)


def test_what_cannot_be_kept_or_asked_is_refused_at_once(tmp_path: Path) -> None:
    pytest.importorskip("river")
    from river import neighbors

    with pytest.raises(ConfigError, match="this classifier's state cannot be written"):
        prequential(noisy(), from_river(neighbors.KNNClassifier()), folder=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        prequential(noisy(), NoChange(), folder=tmp_path / "file")
    for wrong in ({"rows": 0}, {"window": 0}, {"delay": -1}, {"chunk": 0}, {"every": 0}):
        with pytest.raises(ConfigError, match="or more"):
            prequential(noisy(), NoChange(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has no rows"):
        prequential(Rows(np.zeros((0, 1)), []), NoChange())


@pytest.mark.parametrize("delay", [0, 150])
@pytest.mark.parametrize("rows", [950, 1000])
def test_windows_tell_what_each_expert_did(rows: int, delay: int) -> None:
    learner = Quickly()
    learner.trained += 5
    result = prequential(noisy(rows), learner, window=100, delay=delay)
    assert [len(w["trained"]) for w in result.activity] == [2] * 10
    assert result.used("trained").tolist() == (learner.trained - 5).tolist()
    assert result.activity[0]["trained"].sum() == (100 if delay == 0 else 0)
    assert result.activity[-1]["trained"].sum() == (rows - 900 + delay)
    assert prequential(noisy(rows), NoChange()).activity == []


def curve(*accuracies: float | None, size: int = 100, last: int = 100) -> list[Figures]:
    sizes = [size] * (len(accuracies) - 1) + [last]
    return [Figures(size * i, n, n, a, a, a, a) for i, (a, n) in enumerate(zip(accuracies, sizes, strict=True))]


def test_recovery_is_counted_until_a_window_is_within_a_point_of_those_before() -> None:
    windows = curve(0.7, 0.9, 0.5, 0.6, 0.79, 0.3, 0.2, 0.5, 1.0, last=20)
    first, second = recoveries(windows, [Drift(500), Drift(200)])
    assert (first.position, first.before, first.lowest, first.rows) == (200, 0.8, 0.5, 300)
    assert first.drop == pytest.approx(0.3)
    assert second.before == pytest.approx((0.5 + 0.6 + 0.79) / 3)
    assert (second.lowest, second.rows) == (0.2, None), "a shorter last window does not count"


def test_recovery_of_a_gradual_drift_waits_until_the_change_is_over() -> None:
    (found,) = recoveries(curve(0.8, 0.8, 0.8, 0.5, 0.8, 0.8), [Drift(300, 200)])
    assert (found.before, found.lowest, found.rows) == (0.8, 0.5, 200), "the window that the change begins in is in"
    (found,) = recoveries(curve(0.8, 0.8, 0.9), [Drift(150, 50)])
    assert (found.before, found.rows) == (0.8, 150)
    assert found.drop == pytest.approx(0.0)


def test_recovery_that_cannot_be_told_is_none() -> None:
    for windows, drift in ((curve(0.8, 0.8), Drift(50)), (curve(0.8), Drift(500)), ([], Drift(1))):
        (found,) = recoveries(windows, [drift])
        assert (found.lowest, found.drop, found.rows) == (None, None, None)
    first, _ = recoveries(curve(0.8, 0.9, 0.9, 0.9), [Drift(150), Drift(240)])
    assert (first.before, first.lowest, first.rows) == (0.8, None, None), "no whole window lies between the two"
    (found,) = recoveries(curve(0.8, None, 0.8, None, 0.8), [Drift(200)])
    assert (found.before, found.drop, found.rows) == (0.8, 0.0, 100)


def test_results_are_json_and_have_curves() -> None:
    stream = noisy(missing=0.2)
    stream.y[:100] = -1
    result = prequential(stream, Quickly(), window=100)
    stored = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert stored["windows"][0]["accuracy"] is None
    assert len(stored["windows"]) == len(stored["activity"]) == 30
    assert (stored["rows"], stored["scored"] + stored["unlabelled"], len(stored["drifts"])) == (3000, 3000, 1)
    assert stored["classes"] == ["0", "1", "2", "3"]
    assert [end for end, _ in result.curve("kappa_m")] == [*range(200, 3001, 100)]
    assert result.rows_per_second == pytest.approx(3000 / result.cpu_seconds)
    assert result.peak_memory_mib > 10


class Served(NoChange):
    """Has a process of its own, which takes its time."""

    used = 100.0

    def learn(self, x: NDArray[np.float64], y: int) -> None:
        self.used += 1.0

    def cpu_seconds(self) -> float:
        return self.used

    def peak_memory(self) -> float:
        return 1000.0


def test_time_of_a_learners_processes_counts() -> None:
    assert 20 < prequential(noisy(20), Served(), delay=5).cpu_seconds < 25


def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesaic.runs.pace import Pace

    prequential(noisy(), NoChange())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Pace, "due", lambda self, done: True)
    prequential(noisy(), NoChange())
    assert "rows: row 2,000 of 3,000, accuracy " in capsys.readouterr().err
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    prequential(noisy(), NoChange(), progress=True)
    said = capsys.readouterr().err
    assert "row/s" in said
    assert "of 3,000" not in said


class Broken(Rows):
    """It ends in the middle, as a source does whose reader is interrupted."""

    def _read(self, size: int, start: int, stop: int | None) -> Iterator[Chunk]:
        for number, chunk in enumerate(super()._read(size, start, stop)):
            if number == 5:
                raise KeyboardInterrupt
            yield chunk


def test_rivers_classifiers_and_ours_are_taken_as_they_are_and_go_on_exactly(tmp_path: Path) -> None:
    pytest.importorskip("river")
    from river import tree

    from moesaic.trees import DriftMoEClassifier

    def ours() -> Any:
        return DriftMoEClassifier(n_experts=3, hidden=(8,), batch_size=16)

    for number, make in enumerate((tree.HoeffdingTreeClassifier, ours)):
        stream = noisy(900)
        stream.drifts = ()
        whole = prequential(stream, make(), window=100)
        place = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            prequential(Broken(stream.x, stream.y), make(), window=100, folder=place, every=100, chunk=100)
        model = make()
        again = prequential(noisy(900), model, window=100, folder=place, every=100, chunk=100)
        assert again.windows == whole.windows
        if number:
            assert len(model.predict_proba_one(dict.fromkeys(stream.features, 0.5))) == len(stream.classes)
            with pytest.raises(ConfigError, match="has learned rows of its own"):
                prequential(noisy(50), model)
