"""What each expert would score on a prompt, expected.

    E_e(x) = a Σ_k p_k(x) s_ke  +  b Σ_i∈NN v_i s_ie  +  c (z W + w_0)_e          a, b, c >= 0, a + b + c = 1

    s_ke  mean of expert e on category k           v_i ∝ exp(t cos(y, y_i)), the nearest of a `Bank`
    W     ridge regression of scores on the prompt's embedding z

A prompt that was seen before, case and white space aside, tells more than its neighbours: half of E_e is then what e
scored on it.

Neighbours, t, penalty and a, b, c are those of least squared error on held-out folds. All ours: Composition of Experts
knows categories alone (a = 1). A score that was not recorded counts as the expert's mean on the prompt's category.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import MissingDependency
from moesaic.llms.coe.bank import Bank, nearest
from moesaic.llms.coe.bank import weights as by_nearness
from moesaic.llms.coe.category import CategoryRouter
from moesaic.llms.coe.encoders import Arrays, Rows
from moesaic.llms.coe.folds import FOLDS, Labels, held_out
from moesaic.llms.coe.observed import cells
from moesaic.llms.tables import Floats

NEIGHBOURS = tuple((count, sharpness) for count in (40, 80, 160) for sharpness in (3.0, 6.0, 10.0))
"""How many, and v_i ∝ exp(sharpness · cos): what is tried on held-out folds."""
PENALTIES = (1.0, 3.0, 10.0, 30.0)
REPEAT = 0.5
"""Share of what was recorded on the very prompt. Given, not fitted: prompts that are fitted to seldom repeat."""


class Estimates:
    """Attributes:
    means: (K, M) scores by category. mixture: (3,) a, b, c.
    bank: (B, M) scores of the router's bank of prompts, recorded: (B, M) which of them were, digests: (B,) of the
        prompts; slopes: (f, M), intercepts: (M,). Empty where only categories count.
    neighbours: how many are looked at, and the sharpness of their weights.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], neighbours: tuple[int, float]) -> None:
        self.means, self.mixture, self.neighbours = arrays["means"], arrays["mixture"], neighbours
        self.bank, self.slopes, self.intercepts = arrays["scores"], arrays["slopes"], arrays["intercepts"]
        self.recorded, self.digests = arrays["recorded"], arrays["digests"]
        if self.recorded.shape != self.bank.shape or self.digests.shape != self.bank.shape[:1]:
            raise ValueError("scores of the bank, which of them were recorded, and of what prompts")
        self._seen: dict[int, list[int]] = {}
        for i, code in enumerate(self.digests.tolist()):
            self._seen.setdefault(code, []).append(i)

    @classmethod
    def fit(
        cls, router: CategoryRouter, prompts: Sequence[str], labels: Labels, scores: Floats, *, blend: bool
    ) -> tuple[Estimates, Floats]:
        """Fit to N prompts that the router was just fitted to, and scores (N, M), NaN where none was recorded.

        Returns also what fits without its fold say of each prompt: (N, M).
        """
        rows, folds, keys = router.rows, router.folds, router.bank.of(router.rows)
        every, seen = np.arange(len(rows)), np.isfinite(scores)

        def by_category(at: Labels) -> Floats:
            return cells(np.eye(len(router.categories))[labels[at]], scores[at])[0]

        def filled(at: Labels) -> Floats:
            return np.where(seen[at], scores[at], by_category(at)[labels[at]])

        def loss(found: Floats) -> float:
            return float(np.square(found - scores)[seen].mean())

        known = np.empty_like(scores)
        for fold in range(FOLDS):
            known[folds == fold] = router.held_out[folds == fold] @ by_category(np.flatnonzero(folds != fold))
        means, none = by_category(every), np.empty((0, scores.shape[1]))
        arrays = {
            "means": means, "mixture": np.array([1.0, 0, 0]), "scores": none, "recorded": none, "slopes": none,
            "digests": np.empty(0, np.int64), "intercepts": np.zeros(scores.shape[1]),
        }  # fmt: skip
        if not blend:
            return cls(arrays, (0, 0.0)), known
        arrays["digests"] = np.array([digest(prompts[i]) for i in router.bank.drawn], np.int64)
        arrays["recorded"] = seen[router.bank.drawn]

        def near(at: Labels, z: Rows, how: tuple[int, float]) -> Floats:
            at = at[np.isin(at, router.bank.drawn)]
            return _neighbours(keys[at], filled(at), z, how)

        def line(at: Labels, z: Rows, penalty: float) -> Floats:
            slopes, intercepts = _ridge(rows[at], filled(at), penalty)
            return np.asarray(z @ slopes + intercepts, float)

        nears = {how: held_out(partial(near, how=how), keys, folds) for how in NEIGHBOURS}
        lines = {penalty: held_out(partial(line, penalty=penalty), rows, folds) for penalty in PENALTIES}
        how, penalty = min(nears, key=lambda how: loss(nears[how])), min(lines, key=lambda p: loss(lines[p]))
        parts = np.stack([known, nears[how], lines[penalty]], axis=-1)
        arrays["mixture"], arrays["scores"] = _mixture(parts[seen], scores[seen]), filled(every)[router.bank.drawn]
        arrays["slopes"], arrays["intercepts"] = _ridge(rows, filled(every), penalty)
        return cls(arrays, how), np.asarray(parts @ arrays["mixture"], float)

    def of(self, columns: list[int]) -> Estimates:
        """For some of the models, in that order."""
        arrays = {
            name: held if name in ("mixture", "digests") else held[..., columns]
            for name, held in self.state()[0].items()
        }
        return Estimates(arrays, self.neighbours)

    def __call__(self, bank: Bank, prompts: Sequence[str], rows: Rows, probabilities: Floats) -> Floats:
        """(N, M) of prompts, their rows (N, f) and category probabilities (N, K); `bank` is the router's."""
        a, b, c = self.mixture
        found = a * (probabilities @ self.means)
        if b:
            found = found + b * _neighbours(bank.keys, self.bank, bank.of(rows), self.neighbours)
        if c:
            found = found + c * (rows @ self.slopes + self.intercepts)
        for i, prompt in enumerate(prompts if self._seen else ()):
            at = self._seen.get(digest(prompt), [])
            count = self.recorded[at].sum(axis=0)
            before = (self.bank[at] * self.recorded[at]).sum(axis=0) / np.maximum(count, 1)
            found[i] += np.where(count, REPEAT * (before - found[i]), 0.0)
        return np.asarray(found, float)

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        return {
            "means": self.means, "mixture": self.mixture, "scores": self.bank, "slopes": self.slopes,
            "intercepts": self.intercepts, "recorded": self.recorded, "digests": self.digests,
        }, {"neighbours": list(self.neighbours)}  # fmt: skip


def digest(prompt: str) -> int:
    """Of its text without case and white space, 8 bytes."""
    text = " ".join(prompt.lower().split())
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True)


def _neighbours(bank: Rows, scores: Floats, keys: Rows, how: tuple[int, float]) -> Floats:
    """Means (N, M) of the scores of the nearest prompts."""
    at, cosines = nearest(bank, keys, how[0])
    weights = by_nearness(cosines, how[1])
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
