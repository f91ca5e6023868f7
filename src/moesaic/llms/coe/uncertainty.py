"""When a prompt goes to `general`: by entropy, by distance from all that was fitted to, or by a conformal set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, suggest
from moesaic.llms.coe.calibration import conformal_level, entropy, threshold
from moesaic.llms.coe.category import CategoryRouter
from moesaic.llms.coe.encoders import Rows
from moesaic.llms.coe.folds import Labels
from moesaic.llms.tables import Floats

KINDS = ("none", "entropy", "novelty", "conformal")


@dataclass(frozen=True)
class Rule:
    """A prompt is uncertain where u > τ.

    none        u = 0, never uncertain
    entropy     u = H(p) / log K
    novelty     u = 1 less the mean cosine of the ten nearest prompts (`Bank.novelty`)
    conformal   u = |n - 1|, τ = 0, of the n categories with p >= level, a split-conformal set

    Attributes:
        kind: one of these. tau: τ. level: the least probability of a category in a conformal set.
    """

    kind: str = "none"
    tau: float = 1.0
    level: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"uncertainty={self.kind}: {suggest(self.kind, KINDS)}")
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in (self.tau, self.level)):
            raise ConfigError("tau and level must be numbers")

    @classmethod
    def fit(cls, kind: str, router: CategoryRouter, labels: Labels, accuracy: float) -> Rule:
        """The rule that keeps most prompts of those with which what is kept is of its category `accuracy` of the time.

        Chosen on the router's held-out predictions. Where all of them are right often enough, τ is the largest u among
        them, and what is more uncertain than anything before is not kept. Conformal sets hold the true category
        that often.

        Raises:
            ConfigError: no such kind; an accuracy that is no share, or that no τ reaches.
        """
        cls.check(kind, accuracy)
        if kind in ("none", "conformal"):
            level = conformal_level(router.held_out, labels, 1 - accuracy) if kind == "conformal" else 0.0
            return cls(kind, 0.0 if kind == "conformal" else 1.0, level)
        u = cls(kind).held_out(router)
        tau = threshold(u, router.held_out.argmax(axis=1) == labels, accuracy)
        if tau < 0:
            raise ConfigError(f"accuracy={accuracy} is reached by no share of the prompts: less, or uncertainty=none")
        return cls(kind, tau)

    @classmethod
    def check(cls, kind: str, accuracy: float) -> None:
        """Raise ConfigError for a kind or an accuracy that `fit` refuses."""
        cls(kind)
        if not 0 < accuracy < 1:
            raise ConfigError(f"accuracy={accuracy} must be above 0 and below 1")

    def held_out(self, router: CategoryRouter) -> Floats:
        """u of each prompt the router was just fitted to, by what does not have its fold: (N,)."""
        if self.kind != "novelty":
            return self.of(router, router.rows, router.held_out)
        found = np.empty(len(router.rows))
        for fold in np.unique(router.folds):
            here = router.folds == fold
            others = router.bank.keys[~here[router.bank.drawn]]
            found[here] = router.bank.novelty(router.rows[here], others)
        return found

    def of(self, router: CategoryRouter, rows: Rows, probabilities: Floats) -> Floats:
        """u of prompts' rows and category probabilities: (N,)."""
        if self.kind == "entropy":
            return entropy(probabilities)
        if self.kind == "novelty":
            return router.bank.novelty(rows)
        if self.kind == "conformal":
            return np.asarray(np.abs((probabilities >= self.level).sum(axis=1) - 1.0), float)
        return np.zeros(len(rows))

    def uncertain(self, u: Floats) -> NDArray[np.bool_]:
        """Which of them go to `general`: (N,)."""
        return np.asarray(u > self.tau) if self.kind != "none" else np.zeros(len(u), bool)
