"""Probabilities that mean what they say, and when to say that one does not know.

Temperature scaling and the expected calibration error as in Guo et al. 2017; isotonic regression of each category's
probability against all others, normalised, as in Zadrozny and Elkan 2002; split-conformal sets of the least ambiguous
kind (Sadinle, Lei and Wasserman 2019). All of them are fitted to held-out predictions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, suggest
from moesaic.llms.coe.folds import Labels
from moesaic.llms.tables import Floats

CALIBRATIONS = ("temperature", "isotonic")
_LEAST = 1e-12


class Calibration(Protocol):
    """Probabilities (N, K) to better ones."""

    def __call__(self, probabilities: Floats) -> Floats: ...

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]: ...


@dataclass(frozen=True)
class Temperature:
    """softmax(log p / t): the order of categories stays; t above 1 is less sure."""

    t: float

    @classmethod
    def fit(cls, probabilities: Floats, labels: Labels) -> Temperature:
        """The t of the least negative log likelihood; 1 where no other is better."""
        from scipy.optimize import minimize_scalar

        def loss(log_t: float) -> float:
            return log_loss(cls(math.exp(log_t))(probabilities), labels)

        found = minimize_scalar(loss, bounds=(-3, 3), method="bounded")
        return cls(math.exp(found.x)) if found.fun < loss(0.0) else cls(1.0)

    def __call__(self, probabilities: Floats) -> Floats:
        return softmax(np.log(np.maximum(probabilities, _LEAST)) / self.t)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        return {}, {"kind": "temperature", "t": self.t}


@dataclass(frozen=True)
class Isotonic:
    """A rising step curve for each category, (x, y) of its corners, read by linear interpolation."""

    curves: tuple[tuple[Floats, Floats], ...]

    @classmethod
    def fit(cls, probabilities: Floats, labels: Labels) -> Isotonic:
        from sklearn.isotonic import IsotonicRegression

        curves = []
        for k, column in enumerate(probabilities.T):
            found = IsotonicRegression(y_min=0, y_max=1).fit(column, labels == k)
            curves.append((np.asarray(found.X_thresholds_, float), np.asarray(found.y_thresholds_, float)))
        return cls(tuple(curves))

    def __call__(self, probabilities: Floats) -> Floats:
        columns = [np.interp(column, x, y) for column, (x, y) in zip(probabilities.T, self.curves, strict=True)]
        found = np.column_stack(columns) + 1e-6 * probabilities  # what all curves call 0 keeps its order
        return np.asarray(found / np.maximum(found.sum(axis=1, keepdims=True), _LEAST), float)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        corners = [np.stack(curve) for curve in self.curves]
        return {"corners": np.hstack(corners)}, {"kind": "isotonic", "ends": [c.shape[1] for c in corners]}


def fit(kind: str | None, probabilities: Floats, labels: Labels) -> Calibration:
    """A calibration by name; one that changes nothing for None. Raises ConfigError for any other."""
    if kind not in (None, *CALIBRATIONS):
        raise ConfigError(f"calibration={kind}: {suggest(str(kind), CALIBRATIONS)}")
    if kind is None or probabilities.shape[1] < 2:
        return Temperature(1.0)
    return (Temperature if kind == "temperature" else Isotonic).fit(probabilities, labels)


def restored(arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> Calibration:
    """Of what `state` gave."""
    if values["kind"] == "temperature":
        if not 0 < float(values["t"]) < math.inf:
            raise ValueError("a temperature must be above 0")
        return Temperature(float(values["t"]))
    parts = np.split(arrays["corners"], np.cumsum(values["ends"])[:-1], axis=1)
    return Isotonic(tuple((part[0], part[1]) for part in parts))


def softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True), float)


def log_loss(probabilities: Floats, labels: Labels) -> float:
    """Mean negative log likelihood, nats."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], _LEAST)).mean())


def calibration_error(probabilities: Floats, labels: Labels, bins: int = 15) -> float:
    """Expected calibration error of the likeliest category: mean gap of confidence and accuracy over equal bins."""
    confidence = probabilities.max(axis=1)
    gaps = confidence - (probabilities.argmax(axis=1) == labels)
    at = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(at, gaps, bins)).sum() / len(labels))


# -- when not to know ----------------------------------------------------------------------------------------------


def entropy(probabilities: Floats) -> Floats:
    """H(p) / log K, 0 to 1: (N,). 0 for a single category."""
    count = probabilities.shape[1]
    if count < 2:
        return np.zeros(len(probabilities))
    nats = -(probabilities * np.log(np.maximum(probabilities, _LEAST))).sum(axis=1)
    return np.asarray(np.clip(nats / math.log(count), 0.0, 1.0), float)


def conformal_level(probabilities: Floats, labels: Labels, miss: float = 0.1) -> float:
    """The least probability a category of the set has: sets hold the true one on at least 1 - miss of new prompts."""
    n = len(labels)
    rank = math.ceil((n + 1) * (1 - miss))
    strange = np.sort(1 - probabilities[np.arange(n), labels])
    return float(1 - strange[rank - 1]) if rank <= n else 0.0


def threshold(uncertainty: Floats, right: NDArray[np.bool_], accuracy: float) -> float:
    """The largest τ with which those of u <= τ are right that often; -1, all are uncertain, where none will do."""
    tau, _, risk = risk_coverage(uncertainty, right)
    good = np.flatnonzero(1 - risk >= accuracy)
    return float(tau[good[-1]]) if len(good) else -1.0


def risk_coverage(uncertainty: Floats, right: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
    """By each τ there is, upwards: share of prompts kept (u <= τ), and share of those that are wrong."""
    order = np.argsort(uncertainty, kind="stable")
    values, wrong = uncertainty[order], np.cumsum(~right[order])
    last = np.append(values[1:] != values[:-1], True)  # of equals, all or none are kept
    kept = np.arange(1, len(values) + 1)[last]
    return values[last], kept / len(values), wrong[last] / kept
