"""What each expert would score on a prompt, expected.

    E_e(x) = a Σ_k p_k(x) s_ke  +  b Σ_i∈NN v_i s_ie  +  c (z W + w_0)_e          a, b, c >= 0, a + b + c = 1

    s_ke  mean of expert e on category k           v_i ∝ exp(10 cos(z, z_i)) over the nearest prompts that were seen
    W     ridge regression of scores on the prompt's embedding z

Neighbours, penalty and a, b, c are those of least squared error on held-out folds. All ours: Composition of Experts
knows categories alone (a = 1). A score that was not recorded counts as the expert's mean on the prompt's category.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import MissingDependency
from moesaic.llms.coe.calibration import Labels
from moesaic.llms.coe.category import SHARPNESS, CategoryRouter, held_out, nearest
from moesaic.llms.coe.encoders import Arrays, Rows
from moesaic.llms.coe.observed import cells
from moesaic.llms.tables import Floats

NEIGHBOURS = (20, 40, 80, 160)
PENALTIES = (1.0, 3.0, 10.0, 30.0)


class Estimates:
    """Attributes:
    means: (K, M) scores by category. mixture: (3,) a, b, c.
    bank: (B, M) scores of the router's bank of prompts, slopes: (f, M), intercepts: (M,); empty where a is 1.
    neighbours: how many are looked at.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], neighbours: int) -> None:
        self.means, self.mixture, self.neighbours = arrays["means"], arrays["mixture"], neighbours
        self.bank, self.slopes, self.intercepts = arrays["scores"], arrays["slopes"], arrays["intercepts"]

    @classmethod
    def of_categories(cls, means: Floats) -> Estimates:
        """By category alone."""
        none = np.empty((0, means.shape[1]))
        return cls({"means": means, "mixture": np.array([1.0, 0, 0]), "scores": none, "slopes": none,
                    "intercepts": np.zeros(means.shape[1])}, 0)  # fmt: skip

    @classmethod
    def fit(cls, router: CategoryRouter, labels: Labels, scores: Floats, *, blend: bool) -> tuple[Estimates, Floats]:
        """Fit to scores (N, M) of what the router was just fitted to; and what a fit without its fold says of each."""
        rows, folds, posterior = router.rows, router.folds, router.held_out
        count = len(router.categories)

        def by_category(at: Labels) -> Floats:
            return cells(np.eye(count)[labels[at]], scores[at])[0]

        means = by_category(np.arange(len(labels)))
        known = np.empty_like(scores)
        for fold in np.unique(folds):
            known[folds == fold] = posterior[folds == fold] @ by_category(np.flatnonzero(folds != fold))
        if not blend:
            return cls.of_categories(means), known

        def filled(at: Labels) -> Floats:
            return np.where(np.isfinite(scores[at]), scores[at], by_category(at)[labels[at]])

        banked = np.zeros(len(rows), bool)
        banked[router.drawn] = True

        def by_neighbours(at: Labels, z: Rows, k: int) -> Floats:
            return _neighbours(rows[at][banked[at]], filled(at)[banked[at]], z, k)

        def by_ridge(at: Labels, z: Rows, penalty: float) -> Floats:
            slopes, intercepts = _ridge(rows[at], filled(at), penalty)
            return np.asarray(z @ slopes + intercepts, float)

        seen = np.isfinite(scores)

        def loss(found: Floats) -> float:
            return float(np.square(found - scores)[seen].mean())

        near = {k: held_out(lambda at, z, k=k: by_neighbours(at, z, k), rows, folds) for k in NEIGHBOURS}  # type: ignore[misc]
        line = {p: held_out(lambda at, z, p=p: by_ridge(at, z, p), rows, folds) for p in PENALTIES}  # type: ignore[misc]
        k, penalty = min(near, key=lambda k: loss(near[k])), min(line, key=lambda p: loss(line[p]))
        parts = np.stack([known, near[k], line[penalty]], axis=-1)
        mixture = _mixture(parts[seen], scores[seen])
        every = filled(np.arange(len(labels)))
        slopes, intercepts = _ridge(rows, every, penalty)
        arrays = {"means": means, "mixture": mixture, "scores": every[router.drawn], "slopes": slopes,
                  "intercepts": intercepts}  # fmt: skip
        return cls(arrays, k), parts @ mixture

    def of(self, columns: list[int]) -> Estimates:
        """For some of the models, in that order."""
        arrays = {name: held if name == "mixture" else held[..., columns] for name, held in self.state()[0].items()}
        return Estimates(arrays, self.neighbours)

    def __call__(self, bank: Rows, rows: Rows, probabilities: Floats) -> Floats:
        """(N, M) of prompts' rows (N, f) and category probabilities (N, K); `bank` is the router's."""
        a, b, c = self.mixture
        found = a * (probabilities @ self.means)
        if b:
            found = found + b * _neighbours(bank, self.bank, rows, self.neighbours)
        if c:
            found = found + c * (rows @ self.slopes + self.intercepts)
        return np.asarray(found, float)

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        return {
            "means": self.means, "mixture": self.mixture, "scores": self.bank, "slopes": self.slopes,
            "intercepts": self.intercepts,
        }, {"neighbours": self.neighbours}  # fmt: skip


def _neighbours(bank: Rows, scores: Floats, rows: Rows, count: int) -> Floats:
    """Means (N, M) of the scores of the nearest prompts."""
    at, cosines = nearest(bank, rows, count)
    weights = np.exp(SHARPNESS * (cosines - cosines.max(axis=1, keepdims=True)))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.asarray(np.matmul(weights[:, None], scores[at])[:, 0], float)


def _ridge(rows: Rows, scores: Floats, penalty: float) -> tuple[Floats, Floats]:
    """Slopes (f, M) and intercepts (M,), of which the latter are not penalised."""
    z = rows.astype(float)
    middle, mean = z.mean(axis=0), scores.mean(axis=0)
    z -= middle
    slopes = np.linalg.solve(z.T @ z + penalty * np.eye(z.shape[1]), z.T @ (scores - mean))
    return slopes, mean - middle @ slopes


def _mixture(parts: Floats, scores: Floats) -> Floats:
    """Non-negative weights of sum 1: (3,), by least squares."""
    try:
        from scipy.optimize import nnls
    except ImportError:
        raise MissingDependency("scipy", "llms") from None
    strong = 1e3 * np.sqrt(len(scores))  # the sum is held to 1 by a row that outweighs all others
    found, _ = nnls(np.vstack([parts, np.full((1, parts.shape[1]), strong)]), np.append(scores, strong))
    return np.asarray(found / found.sum(), float)
