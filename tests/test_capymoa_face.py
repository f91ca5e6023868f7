"""DriftMoE among CapyMOA's classifiers. A JVM starts once in a process, so that CapyMOA runs in one of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moesaic.trees.driftmoe import DriftMoE
from moesaic.trees.prequential import METRICS, prequential
from moesaic.trees.settings import settings
from moesaic.trees.streams.stream import Chunk, Stream

HAS_JAVA = importlib.util.find_spec("capymoa") is not None and (shutil.which("java") or os.environ.get("JAVA_HOME"))
needs_java = pytest.mark.skipif(not HAS_JAVA, reason="needs capymoa and Java")

ROWS = 1200
MADE: dict[str, dict[str, Any]] = {
    "ours": {"n_experts": 6},
    "paper": {"fidelity": "paper", "n_experts": 4, "top_k": 2},
    "task": {"variant": "task", "hidden": [16]},
    "child": {"backend": "capymoa", "n_experts": 3},
}
THEIRS = """
import json, sys
import numpy as np
from capymoa.base import Classifier, learner_from_params
from capymoa.classifier import NaiveBayes
from capymoa.core import Instance, LabeledInstance
from capymoa.evaluation import prequential_evaluation, prequential_evaluation_multiple_learners
from capymoa.stream import NumpyStream, Schema
from capymoa.stream.drift import AbruptDrift, DriftStream
from capymoa.stream.generator import SEA
from moesaic.errors import ConfigError
from moesaic.trees.for_capymoa import DriftMoEClassifier

data, made, told = np.load(sys.argv[1]), json.loads(sys.argv[2]), {}
x, y = data["x"], data["y"]
stream = NumpyStream(x, y)
schema = stream.get_schema()
metrics = ("accuracy", "kappa", "kappa_m", "kappa_t")

def figures(results):
    windows = results.windowed.metrics_per_window()
    return [[results.cumulative[m] for m in metrics], *windows[list(metrics)].values.tolist()]

learners = {name: DriftMoEClassifier(schema, random_seed=3, **given) for name, given in made.items()}
for name in ("ours", "paper", "child"):
    most = None if name == "ours" else 400
    found = prequential_evaluation(stream, learners[name], most, window_size=200, store_predictions=True)
    told[name] = {"figures": figures(found), "none": sum(p is None for p in found["predictions"])}
several = {"task": learners["task"], "nb": NaiveBayes(schema)}
found = prequential_evaluation_multiple_learners(stream, several, window_size=200)
told["task"] = {"figures": figures(found["task"])}
told["names"] = [str(learners["ours"]), str(learners["task"])]

drifting = DriftStream(stream=[SEA(function=1), AbruptDrift(position=1000), SEA(function=3)])
found = prequential_evaluation(drifting, DriftMoEClassifier(drifting.get_schema(), n_experts=5), max_instances=2000)
told["drift"] = found.cumulative["accuracy"]

ours = learners["ours"]
row = LabeledInstance.from_array(schema, x[0], 1)
first, seen = ours.predict_proba(row), ours.core.rows
told["again"] = [bool((ours.predict_proba(row) == first).all()), first.shape[0], float(first.sum())]
ours.train(LabeledInstance.from_array(schema, x[0], float("nan")))
bare = Instance.from_array(schema, np.full(4, np.nan))
told["unlabelled"] = [ours.core.rows - seen, bool(np.isfinite(ours.predict_proba(bare)).all())]

nominal = Schema.from_custom(["colour", "size", "class"], "class",
    {"colour": ["red", "green", "blue"], "class": ["no", "yes"]}, "nominal")
learner, right = DriftMoEClassifier(nominal, n_experts=4), 0
random = np.random.default_rng(0)
for t in range(600):
    colour = int(random.integers(3))
    size = "?" if t % 9 == 0 else str(random.random())
    csv = [("red", "green", "blue")[colour], size, "yes" if colour == 1 else "no"]
    instance = LabeledInstance.from_csv_row(nominal, csv)
    right += t >= 300 and learner.predict(instance) == instance.y_index
    learner.train(instance)
told["nominal"] = right / 300

made_again = learner_from_params(
    {"learner": "moesaic.trees.for_capymoa.DriftMoEClassifier", "params": learners["paper"].get_params()}, schema, 3)
told["params"] = made_again.core.settings == learners["paper"].core.settings
errors = []
for wrong in ({"seed": 1}, {"n_expert": 4}, {"schema": Schema.from_custom(["a", "b"], "b")}):
    try:
        DriftMoEClassifier(**{"schema": schema} | wrong)
    except ConfigError as error:
        errors.append(str(error))
told["errors"] = errors
for learner in learners.values():
    learner.close()
print(json.dumps(told))
"""


def rows() -> tuple[NDArray[Any], NDArray[Any]]:
    random = np.random.default_rng(0)
    x = random.random((ROWS, 4))
    y = (x[:, 0] > 0.5).astype(int) + ((x[:, 0] > 0.5) & (x[:, 1] > 0.3))
    x[random.random(x.shape) < 0.03] = np.nan
    return x, y


class Known(Stream):
    """The same rows as a stream of ours."""

    def __init__(self) -> None:
        self.x, self.y = rows()
        self.name, self.features, self.classes, self.length = "rows", list("abcd"), [0, 1, 2], ROWS

    def _read(self, size: int, start: int, stop: int | None) -> Iterator[Chunk]:
        end = ROWS if stop is None else min(stop, ROWS)
        for i in range(start, end, size):
            here = slice(i, min(i + size, end))
            yield Chunk(self.x[here], self.y[here])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What CapyMOA says."""
    folder = tmp_path_factory.mktemp("face")
    x, y = rows()
    np.savez(folder / "rows.npz", x=x, y=y)
    command = [sys.executable, "-c", THEIRS, str(folder / "rows.npz"), json.dumps(MADE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_java
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "task" else ()) for n in MADE])
def test_figures_are_those_of_our_own_evaluation(theirs: dict[str, Any], name: str) -> None:
    learner = DriftMoE(settings(**MADE[name], seed=3))
    result = prequential(Known(), learner, window=200, rows=400 if name in ("paper", "child") else None)
    learner.close()
    ours = [[100 * getattr(found, m) for m in METRICS] for found in (result.overall, *result.windows)]
    assert theirs[name]["figures"] == [pytest.approx(figures, abs=1e-9) for figures in ours]
    assert theirs[name].get("none", 1) == 1, "it abstains before the first row, and only there"


@needs_java
def test_it_plugs_into_streams_of_theirs(theirs: dict[str, Any]) -> None:
    assert theirs["drift"] > 75
    assert theirs["nominal"] > 0.95
    assert theirs["names"] == ["DriftMoE (data, best)", "DriftMoE (task, best)"]


@needs_java
def test_predicting_changes_nothing_and_what_is_missing_is_no_matter(theirs: dict[str, Any]) -> None:
    assert theirs["again"] == [True, 3, pytest.approx(1)]
    assert theirs["unlabelled"] == [0, True]


@needs_java
def test_it_is_made_of_its_parameters_and_says_what_is_wrong(theirs: dict[str, Any]) -> None:
    assert theirs["params"] is True
    seed, unknown, regression = theirs["errors"]
    assert "random_seed" in seed
    assert "n_experts" in unknown
    assert "target is a number" in regression


def test_without_capymoa_it_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['capymoa'] = None; import moesaic.trees.for_capymoa"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stderr.splitlines()[-1] == (
        "moesaic.errors.MissingDependency: this needs capymoa: pip install 'moesaic[capymoa]'"
    )
