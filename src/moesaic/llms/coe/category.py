"""The category of a prompt, by its text alone: embedding, classifier, calibrated probabilities.

    z = encoder(prompt)                        unit row                                  (f,)
    logistic   p = softmax(W z + b)            ridge-penalised multinomial regression
    knn        p_k ∝ Σ_i∈NN exp(10 cos(z, z_i)) [y_i = k] + smoothing
    p = calibration(p)                         fitted to held-out p

Composition of Experts (arXiv 2412.01868) routes by category; encoder, classifier and calibration are our choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, DataError, suggest
from moesaic.llms.coe import calibration as calibrations
from moesaic.llms.coe import encoders
from moesaic.llms.coe.calibration import Calibration, Labels, log_loss, softmax
from moesaic.llms.coe.encoders import Arrays, Encoder, Rows, part
from moesaic.llms.tables import Floats

logger = logging.getLogger(__name__)

CLASSIFIERS = ("logistic", "knn")
FOLDS = 5
PENALTIES = (3.0, 10.0, 30.0)
"""C of the logistic regression that are tried on held-out folds."""
NEIGHBOURS = (10, 20, 40)
"""Numbers of neighbours that are tried on held-out folds."""
NOVELTY = 10
"""Neighbours that tell how far off a prompt is."""
SHARPNESS = 10.0
"""Of weights of neighbours: exp(SHARPNESS · cosine)."""
BANK = 20_000
"""Prompts at most that neighbours are looked for among."""
_CHUNK = 512


class CategoryRouter:
    """Attributes:
    categories: K names, sorted. encoder, classifier, calibration: as they were fitted.
    bank: (B, f) rows of prompts that were fitted to, and labels: (B,) their categories' numbers.
    held_out: (N, K) calibrated probabilities of the prompts that were fitted to, each by a fit without its fold;
        rows: (N, f) their embeddings; folds: (N,) their folds; drawn: (B,) which of them the bank has. All of these
        are empty in a router that was loaded.
    """

    held_out: Floats = np.empty((0, 0))
    rows: Rows = np.empty((0, 0), np.float32)
    folds: Labels = np.empty(0, np.int64)
    drawn: Labels = np.empty(0, np.int64)

    def __init__(
        self,
        categories: Sequence[str],
        encoder: Encoder,
        classifier: str,
        calibration: Calibration,
        arrays: Mapping[str, NDArray[Any]],
        neighbours: int = 0,
    ) -> None:
        self.categories, self.encoder, self.classifier = tuple(categories), encoder, classifier
        self.calibration, self.neighbours = calibration, neighbours
        self.bank: Rows = arrays["bank"]
        self.labels: Labels = arrays["labels"]
        self._weights, self._bias = arrays.get("weights"), arrays.get("bias")
        count, width = len(self.categories), self.bank.shape[1]
        if self.labels.shape != self.bank.shape[:1] or not ((self.labels >= 0) & (self.labels < count)).all():
            raise ValueError("a category for each prompt of the bank")
        if classifier == "logistic" and (self._weights is None or self._weights.shape != (width, count)):
            raise ValueError("weights that fit encoder and categories")

    @classmethod
    def fit(
        cls,
        prompts: Sequence[str],
        categories: Sequence[str],
        *,
        encoder: str = "tfidf",
        classifier: str = "logistic",
        calibration: str | None = "temperature",
        seed: int = 0,
    ) -> CategoryRouter:
        """Fit to N prompts and their categories.

        The penalty, or the number of neighbours, is the one of least log loss on five held-out folds; calibration is
        fitted to the same held-out predictions. The encoder sees all prompts, no categories.

        Raises:
            ConfigError: a choice that is none. DataError: a category of fewer prompts than folds.
            MissingDependency: scikit-learn, or the encoder's package, is not installed.
        """
        if classifier not in CLASSIFIERS:
            raise ConfigError(f"classifier={classifier}: {suggest(classifier, CLASSIFIERS)}")
        if len(prompts) != len(categories) or not prompts:
            raise DataError("a category router is fitted to prompts, and a category for each")
        encoders.needed()
        names, labels, counts = np.unique(np.array(categories, str), return_inverse=True, return_counts=True)
        if counts.min() < FOLDS:
            raise DataError(f"category {names[counts.argmin()]!r} has {counts.min()} prompts, and {FOLDS} are needed")
        made = encoders.fitted(encoder, prompts, seed)
        rows = made(prompts)
        folds = folds_of(labels, seed)
        settings: Sequence[float] = PENALTIES if classifier == "logistic" else NEIGHBOURS
        tried = {}
        for setting in settings if len(names) > 1 else settings[:1]:
            guess = _guesser(classifier, len(names), setting)
            tried[setting] = held_out(lambda at, z, g=guess: g(rows[at], labels[at])(z), rows, folds)  # type: ignore[misc]
        best = min(tried, key=lambda setting: log_loss(tried[setting], labels))
        logger.info("%s: %g of %s", classifier, best, ", ".join(f"{s:g}" for s in tried))
        drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:BANK])
        arrays: Arrays = {"bank": rows[drawn], "labels": labels[drawn]}
        if classifier == "logistic":
            arrays["weights"], arrays["bias"] = _logistic(rows, labels, len(names), best)
        found = calibrations.fit(calibration, tried[best], labels)
        router = cls(names.tolist(), made, classifier, found, arrays, int(best) if classifier == "knn" else 0)
        router.rows, router.drawn, router.folds = rows, drawn, folds
        router.held_out = np.empty_like(tried[best])
        for fold in range(FOLDS):
            here = folds == fold
            each = calibrations.fit(calibration, tried[best][~here], labels[~here])
            router.held_out[here] = each(tried[best][here])
        return router

    def embed(self, prompts: Sequence[str]) -> Rows:
        """Unit rows (N, f)."""
        return self.encoder(prompts)

    def probabilities(self, prompts: Sequence[str]) -> Floats:
        """(N, K), calibrated; rows sum to 1."""
        return self.of_rows(self.embed(prompts))

    def of_rows(self, rows: Rows) -> Floats:
        """As `probabilities`, of what `embed` gave."""
        if self._weights is not None and self._bias is not None:
            bare = softmax(rows.astype(float) @ self._weights + self._bias)
        else:
            bare = _votes(self.bank, self.labels, rows, len(self.categories), self.neighbours)
        return self.calibration(bare)

    def novelty(self, prompts: Sequence[str]) -> Floats:
        """(N,) 1 less the mean cosine of the ten nearest prompts that were fitted to: 0 among them, 1 far from all."""
        return self.novelty_of_rows(self.embed(prompts))

    def novelty_of_rows(self, rows: Rows) -> Floats:
        """As `novelty`, of what `embed` gave."""
        _, cosines = nearest(self.bank, rows, NOVELTY)
        return np.asarray(np.clip(1 - cosines.mean(axis=1), 0.0, 1.0), float)

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        """What `restored` makes it again of: arrays, and what JSON can hold."""
        own: dict[str, NDArray[Any] | None] = {
            "bank": self.bank,
            "labels": self.labels,
            "weights": self._weights,
            "bias": self._bias,
        }
        encoder, about = self.encoder.state()
        curves, how = self.calibration.state()
        arrays: Arrays = {name: held for name, held in own.items() if held is not None}
        arrays |= {f"encoder.{n}": a for n, a in encoder.items()} | {f"calibration.{n}": a for n, a in curves.items()}
        return arrays, {
            "categories": list(self.categories), "classifier": self.classifier, "neighbours": self.neighbours,
            "encoder": about, "calibration": how,
        }  # fmt: skip

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> CategoryRouter:
        """Of what `state` gave."""
        encoder = encoders.restored(part(arrays, "encoder."), values["encoder"])
        calibration = calibrations.restored(part(arrays, "calibration."), values["calibration"])
        kept = values["categories"], encoder, values["classifier"], calibration, arrays, values["neighbours"]
        return cls(*kept)


def folds_of(labels: Labels, seed: int) -> Labels:
    """(N,) a fold of `FOLDS` for each row, evenly within each label."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(len(labels), np.int64)
    folds[order] = np.arange(len(labels)) % FOLDS
    return folds


def held_out(predict: Callable[[Labels, Rows], Floats], rows: Rows, folds: Labels) -> Floats:
    """What `predict` says of each row (numbers of the rows to fit to, rows to predict) without having seen its fold."""
    parts = [(np.flatnonzero(folds == f), predict(np.flatnonzero(folds != f), rows[folds == f])) for f in range(FOLDS)]
    found = np.empty((len(rows), parts[0][1].shape[1]))
    for at, predicted in parts:
        found[at] = predicted
    return found


def nearest(bank: Rows, rows: Rows, count: int) -> tuple[Labels, Floats]:
    """Numbers and cosines of the nearest rows of a bank, (N, count) each, in no order."""
    count = min(count, len(bank))
    at, cosines = np.empty((len(rows), count), np.int64), np.empty((len(rows), count))
    for start in range(0, len(rows), _CHUNK):
        near = rows[start : start + _CHUNK] @ bank.T
        chosen = np.argpartition(near, len(bank) - count, axis=1)[:, len(bank) - count :]
        at[start : start + _CHUNK] = chosen
        cosines[start : start + _CHUNK] = np.take_along_axis(near, chosen, axis=1)
    return at, cosines


def _guesser(classifier: str, count: int, setting: float) -> Callable[[Rows, Labels], Callable[[Rows], Floats]]:
    """Rows and labels to what tells probabilities of other rows."""

    def logistic(rows: Rows, labels: Labels) -> Callable[[Rows], Floats]:
        weights, bias = _logistic(rows, labels, count, setting)
        return lambda z: softmax(z.astype(float) @ weights + bias)

    def knn(rows: Rows, labels: Labels) -> Callable[[Rows], Floats]:
        return lambda z: _votes(rows, labels, z, count, int(setting))

    return logistic if classifier == "logistic" else knn


def _logistic(rows: Rows, labels: Labels, count: int, penalty: float) -> tuple[Floats, Floats]:
    """Weights (f, K) and bias (K,)."""
    if count < 2:
        return np.zeros((rows.shape[1], count)), np.zeros(count)
    from sklearn.linear_model import LogisticRegression

    found = LogisticRegression(C=penalty, max_iter=1000, tol=1e-3).fit(rows, labels)
    weights, bias = found.coef_.T.astype(float), found.intercept_.astype(float)
    if count == 2:  # one column that tells the second category from the first
        weights, bias = np.hstack([-weights, weights]) / 2, np.array([-bias[0], bias[0]]) / 2
    return np.ascontiguousarray(weights), np.asarray(bias)


def _votes(bank: Rows, labels: Labels, rows: Rows, count: int, neighbours: int) -> Floats:
    """(N, K) shares of the neighbours' votes; each category has a hundredth of the nearest one's beforehand."""
    at, cosines = nearest(bank, rows, neighbours)
    votes = np.exp(SHARPNESS * (cosines - cosines.max(axis=1, keepdims=True)))
    found = np.full((len(rows), count), 0.01)
    np.add.at(found, (np.arange(len(rows))[:, None], labels[at]), votes)
    return np.asarray(found / found.sum(axis=1, keepdims=True), float)
