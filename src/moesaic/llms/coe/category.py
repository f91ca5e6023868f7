"""The category of a prompt, by its text alone: embedding, classifier, calibrated probabilities.

    z = encoder(prompt)                        unit row                                  (f,)
    logistic   p = softmax(W z + b)            ridge-penalised multinomial regression
    knn        p_k ∝ Σ_i∈NN exp(10 cos(y, y_i)) [k_i = k] + smoothing                    y: see `Bank`
    p = calibration(p)                         fitted to held-out p

Composition of Experts (arXiv 2412.01868) routes by category; encoder, classifier and calibration are our choice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, DataError, suggest
from moesaic.llms.coe import calibration as calibrations
from moesaic.llms.coe import encoders
from moesaic.llms.coe.bank import Bank, nearest, weights
from moesaic.llms.coe.calibration import Calibration, log_loss, softmax
from moesaic.llms.coe.encoders import Arrays, Encoder, Rows, part
from moesaic.llms.coe.folds import FOLDS, Labels, folds_of, held_out
from moesaic.llms.tables import Floats

logger = logging.getLogger(__name__)

SETTINGS: dict[str, tuple[float, ...]] = {"logistic": (3, 10, 30), "knn": (10, 20, 40)}
"""Inverse penalties C, and numbers of neighbours, that are tried on held-out folds, by classifier."""

SHARPNESS = 10.0
"""Of neighbours' votes."""


class CategoryRouter:
    """Attributes:
    categories: K names, sorted. encoder, classifier, calibration: as they were fitted.
    bank: of prompts that were fitted to, and labels: (B,) their categories' numbers.
    held_out: (N, K) calibrated probabilities of the prompts that were fitted to, each by a fit without its fold;
        rows: (N, f) their embeddings; folds: (N,) their folds. Empty in a router that was loaded.
    """

    held_out: Floats = np.empty((0, 0))
    rows: Rows = np.empty((0, 0), np.float32)
    folds: Labels = np.empty(0, np.int64)

    def __init__(
        self,
        categories: Sequence[str],
        encoder: Encoder,
        classifier: str,
        calibration: Calibration,
        bank: Bank,
        arrays: Mapping[str, NDArray[Any]],
        neighbours: int = 0,
    ) -> None:
        self.categories, self.encoder, self.classifier = tuple(categories), encoder, classifier
        self.calibration, self.bank, self.neighbours = calibration, bank, neighbours
        self.labels: Labels = arrays["labels"]
        self._slopes, self._bias = arrays["slopes"], arrays["bias"]
        count = len(self.categories)
        if classifier not in SETTINGS or self._bias.shape != (count if classifier == "logistic" else 0,):
            raise ValueError("a classifier that is known, and a bias for each category")
        if len({*self.categories}) < count or not np.issubdtype(self.labels.dtype, np.integer):
            raise ValueError("categories that differ, and their numbers")
        if self.labels.shape != bank.keys.shape[:1] or not ((self.labels >= 0) & (self.labels < count)).all():
            raise ValueError("a category for each prompt of the bank")
        if classifier == "logistic" and self._slopes.shape != (len(bank.middle), count):
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
        fitted to the same held-out predictions. The encoder and the bank see all prompts, no categories.

        Raises:
            ConfigError: a choice that is none. DataError: a category of fewer prompts than folds.
            MissingDependency: scikit-learn, or the encoder's package, is not installed.
        """
        if classifier not in SETTINGS:
            raise ConfigError(f"classifier={classifier}: {suggest(classifier, SETTINGS)}")
        if len(prompts) != len(categories) or not prompts:
            raise DataError("a category router is fitted to prompts, and a category for each")
        encoders.needed()
        names, labels, counts = np.unique(np.array(categories, str), return_inverse=True, return_counts=True)
        if counts.min() < FOLDS:
            raise DataError(
                f"category {str(names[counts.argmin()])[:80]!r} has {counts.min()} prompts, and {FOLDS} are needed"
            )
        made = encoders.fitted(encoder, prompts, seed)
        rows = made(prompts)
        bank, folds = Bank.fit(rows, seed), folds_of(labels, seed)
        inputs = rows if classifier == "logistic" else bank.of(rows)

        def guess(at: Labels, z: Rows, setting: float) -> Floats:
            if classifier == "knn":
                return _votes(inputs[at], labels[at], z, len(names), int(setting))
            slopes, bias = _logistic(inputs[at], labels[at], len(names), setting)
            return softmax(z.astype(float) @ slopes + bias)

        tried = {
            setting: held_out(partial(guess, setting=setting), inputs, folds)
            for setting in SETTINGS[classifier][: None if len(names) > 1 else 1]
        }
        best = min(tried, key=lambda setting: log_loss(tried[setting], labels))
        logger.info("%s: %g of %s", classifier, best, ", ".join(f"{setting:g}" for setting in tried))
        arrays: Arrays = {"labels": labels[bank.drawn], "slopes": np.empty(0), "bias": np.empty(0)}
        if classifier == "logistic":
            arrays["slopes"], arrays["bias"] = _logistic(rows, labels, len(names), best)
        last = calibrations.fit(calibration, tried[best], labels)
        router = cls(names.tolist(), made, classifier, last, bank, arrays, int(best) if classifier == "knn" else 0)
        router.rows, router.folds, router.held_out = rows, folds, np.empty_like(tried[best])
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
        if self.classifier == "logistic":
            bare = softmax(rows.astype(float) @ self._slopes + self._bias)
        else:
            bare = _votes(self.bank.keys, self.labels, self.bank.of(rows), len(self.categories), self.neighbours)
        return self.calibration(bare)

    def novelty(self, prompts: Sequence[str]) -> Floats:
        """(N,) how far off prompts are from those that were fitted to: 0 among them, 1 far from all."""
        return self.bank.novelty(self.embed(prompts))

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        """What `restored` makes it again of: arrays, and what JSON can hold."""
        encoder, about = self.encoder.state()
        curves, how = self.calibration.state()
        arrays: Arrays = {"labels": self.labels, "slopes": self._slopes, "bias": self._bias}
        for name, held in (("encoder", encoder), ("calibration", curves), ("bank", self.bank.state())):
            arrays |= {f"{name}.{key}": array for key, array in held.items()}
        return arrays, {
            "categories": list(self.categories), "classifier": self.classifier, "neighbours": self.neighbours,
            "encoder": about, "calibration": how,
        }  # fmt: skip

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> CategoryRouter:
        """Of what `state` gave."""
        encoder = encoders.restored(part(arrays, "encoder."), values["encoder"])
        calibration = calibrations.restored(part(arrays, "calibration."), values["calibration"])
        bank, neighbours = Bank(part(arrays, "bank.")), values["neighbours"]
        "".join(values["categories"]).encode()  # half a surrogate pair can be written nowhere
        return cls(values["categories"], encoder, values["classifier"], calibration, bank, arrays, neighbours)


def _logistic(rows: Rows, labels: Labels, count: int, penalty: float) -> tuple[Floats, Floats]:
    """Weights (f, K) and bias (K,)."""
    if count < 2:
        return np.zeros((rows.shape[1], count)), np.zeros(count)
    from sklearn.linear_model import LogisticRegression

    found = LogisticRegression(C=penalty, max_iter=1000, tol=1e-3).fit(rows, labels)
    slopes, bias = found.coef_.T.astype(float), found.intercept_.astype(float)
    if count == 2:  # one column that tells the second category from the first
        slopes, bias = np.hstack([-slopes, slopes]) / 2, np.array([-bias[0], bias[0]]) / 2
    return np.ascontiguousarray(slopes), np.asarray(bias)


def _votes(bank: Rows, labels: Labels, keys: Rows, count: int, neighbours: int) -> Floats:
    """(N, K) shares of the neighbours' votes; each category has a hundredth of the nearest one's beforehand."""
    at, cosines = nearest(bank, keys, neighbours)
    found = np.full((len(keys), count), 0.01)
    np.add.at(found, (np.arange(len(keys))[:, None], labels[at]), weights(cosines, SHARPNESS))
    return np.asarray(found / found.sum(axis=1, keepdims=True), float)
