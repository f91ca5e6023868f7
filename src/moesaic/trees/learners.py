"""Learners by name, as the command line and comparisons write them."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from moesaic.errors import ConfigError, MissingDependency, first_line, suggest
from moesaic.trees.driftmoe import DriftMoE
from moesaic.trees.prequential import Learner, Majority, NoChange, from_river
from moesaic.trees.prequential.rivals import RIVALS, rival
from moesaic.trees.settings import settings
from moesaic.trees.streams import Stream

OURS: dict[str, dict[str, Any]] = {
    "driftmoe": {},
    "driftmoe-paper": {"fidelity": "paper"},
    "driftmoe-code": {"fidelity": "code"},
    "driftmoe-task": {"variant": "task"},
    "driftmoe-task-paper": {"variant": "task", "fidelity": "paper"},
    "driftmoe-task-code": {"variant": "task", "fidelity": "code"},
    "driftmoe-trees": {"router": False},
}
"""Names, and the settings that they stand for. `task-code` is an MLP alone; `trees` has no router."""
PLAIN = {"nochange": NoChange, "majority": Majority}
RIVER = {
    "river-ht": "tree.HoeffdingTreeClassifier",
    "river-hat": "tree.HoeffdingAdaptiveTreeClassifier",
    "river-arf": "forest.ARFClassifier",
    "river-srp": "ensemble.SRPClassifier",
    "river-levbag": "ensemble.LeveragingBaggingClassifier",
}
"""Names, and river's classes; any other of its classifiers is `river:MODULE.CLASS`."""
logger = logging.getLogger(__name__)
PATIENCE = 3.0
"""Seconds in which compiled code is read, where it is there already."""
CAPYMOA = "capymoa-"
"""In front of a rival's name."""


def learner(name: str, stream: Stream, *, seed: int = 0, delay: int = 0, given: Mapping[str, Any] | None = None) -> Any:
    """A learner for a stream, by name. For CapyMOA's, a stream that does not declare its classes is read through once.

    Args:
        name: see `known`.
        delay: rows by which labels come late.
        given: settings of the learner's own.
    Raises:
        ConfigError: no such learner (naming the nearest), or no such setting.
        DataError: the stream had to be read, and cannot be.
        MissingDependency: its package is not installed.
    """
    given = dict(given or {})
    if name in OURS:
        wanted = settings(**{"seed": seed, "label_delay": delay, **OURS[name], **given})
        if wanted.backend == "arrays":
            compiled(len(wanted.hidden) if wanted.router else 0, wanted.history > 0)
        return DriftMoE(wanted)
    if name in PLAIN:
        if given:
            raise ConfigError(f"{name} has no setting {next(iter(given))}: it has none")
        return PLAIN[name]()
    if name in RIVER or name.startswith("river:"):
        return from_river(_of_river(RIVER.get(name, name.removeprefix("river:")), seed, given), stream.features)
    if name in known():  # MOA has to know all classes and features before the first row
        for _ in () if stream.classes and stream.features else stream.chunks():
            pass
        return rival(name.removeprefix(CAPYMOA), stream.classes, stream.features, **{"seed": seed, **given})
    raise ConfigError(f"no learner {name!r}; {suggest(name, known())}; or river:MODULE.CLASS")


@cache
def compiled(layers: int, sighted: bool) -> None:
    """Have numba compile, or read, what runs for every row, before anybody counts time.

    Args:
        layers: between the router's first and last; 0 where there is no router.
        sighted: whether some experts see the last labels.
    """
    said = threading.Timer(PATIENCE, logger.warning, ["compiling what runs for every row: once, for about a minute"])
    said.daemon = True
    said.start()
    widths = (1,) * max(layers, 1)
    model = DriftMoE(settings(n_experts=3, batch_size=1, hidden=widths, router=layers > 0, history=int(sighted)))
    x, y = np.arange(12, dtype=np.float64).reshape(6, 2), np.arange(6) % 2
    for row, label in zip(x, y, strict=True):
        model.predict_proba(row, 2)
        model.learn(row, int(label))
    model.test_then_train(x, y, 2)
    for bank in model.banks.banks:
        arrays: Any = bank
        arrays.prepare(0)
        arrays.reset(0)
    said.cancel()


def known() -> list[str]:
    """The names that `learner` takes, beside any of river's classifiers."""
    return [*OURS, *PLAIN, *RIVER, *(CAPYMOA + name for name in RIVALS)]


def is_kept(found: Learner) -> bool:
    """Whether a learner's state can be written."""
    try:
        found.state()
    except ConfigError:
        return False
    return True


def _of_river(path: str, seed: int, given: dict[str, Any]) -> Any:
    module, _, name = path.rpartition(".")
    try:
        importlib.import_module("river")
    except ImportError:
        raise MissingDependency("river", "trees") from None
    try:
        found = getattr(importlib.import_module(f"river.{module}"), name)
    except (ImportError, AttributeError):
        there = [other for other in dir(sys.modules.get(f"river.{module}")) if other[:1].isupper()]
        how = suggest(name, there) if there else "write it as river:tree.HoeffdingTreeClassifier"
        raise ConfigError(f"river has no {path}; {how}") from None
    if not inspect.isclass(found):
        raise ConfigError(f"river.{path} is no class")
    parameters = inspect.signature(found).parameters
    if unknown := given.keys() - parameters.keys():
        raise ConfigError(f"river.{path} has no setting {min(unknown)}; {suggest(min(unknown), parameters)}")
    own = {"seed": seed} if "seed" in parameters else {}
    if "model" in parameters and "model" not in given:
        own["model"] = _of_river(RIVER["river-ht"], seed, {})
    try:
        return found(**own | given)
    except Exception as error:  # whatever a class of river's makes of it
        raise ConfigError(f"river.{path} cannot be made so: {type(error).__name__} {first_line(error)}") from None
