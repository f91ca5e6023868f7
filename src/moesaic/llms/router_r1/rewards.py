"""What a transcript is worth: format, outcome, and cost among those before it.

    R = -1                         where the format is broken
    R = 0                          where the answer is wrong: cost does not count then
    R = (1 - α) m + α c - φ f      else;  m: exact match (or F1),  c: 1 for the cheapest of the window, 0 the dearest

    f: 1 where a model that was asked did not answer (ours; φ is 0 unless asked for)

    c = 1 - clip((u - q5) / (q95 - q5), 0, 1),   u = sqrt(raw cost),   q: quantiles of the last 1,000 u's, u's own too

As the released code of arXiv 2506.09033 does it; the window is an object that is saved, of training and of evaluation
apart. The raw cost of a transcript is in micro-dollars: completion tokens of each reply times the price of a million.
"""

from __future__ import annotations

import re
import string
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesaic.errors import ConfigError, suggest

BROKEN = -1.0
METRICS = ("em", "f1")
WINDOW = 1000
_EXACT = {"yes", "no", "noanswer"}
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and surplus white space (SQuAD's)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truths: Iterable[str]) -> float:
    """1.0 where it is one of them."""
    return float(any(normalised(answer) == normalised(truth) for truth in truths))


def f1(answer: str, truths: Iterable[str]) -> float:
    """Of the words that it shares with the best of them; yes and no must be said as such."""
    return max((_f1(normalised(answer), normalised(truth)) for truth in truths), default=0.0)


def _f1(answer: str, truth: str) -> float:
    if answer != truth and {answer, truth} & _EXACT:
        return 0.0
    said, known = answer.split(), truth.split()
    shared = sum((Counter(said) & Counter(known)).values())
    return 2 * shared / (len(said) + len(known)) if shared else 0.0


class CostWindow:
    """The costs that a cost is ranked among, the latest last."""

    def __init__(self, values: Sequence[float] = (), size: int = WINDOW) -> None:
        if size < 1 or not all(value >= 0 for value in values):
            raise ConfigError("a window of costs holds numbers from 0 on, one at least")
        self._values: deque[float] = deque(values, maxlen=size)

    def add(self, cost: float) -> float:
        """Take a raw cost in, and rank it: c."""
        self._values.append(float(np.sqrt(cost)))
        return self.rank(cost)

    def rank(self, cost: float) -> float:
        """c of a raw cost among those that are there; 0.5 where they are all alike."""
        low, high = np.quantile(self._values, (0.05, 0.95)) if self._values else (0.0, 0.0)
        if high - low < 1e-8:
            return 0.5
        return float(1 - np.clip((np.sqrt(cost) - low) / (high - low), 0, 1))

    def __len__(self) -> int:
        return len(self._values)

    def state(self) -> dict[str, Any]:
        """Plain values, of which `CostWindow(**state)` is the same."""
        return {"values": list(self._values), "size": self._values.maxlen}


@dataclass(frozen=True)
class Reward:
    """What one transcript got: `total`, and its parts as they were before α."""

    total: float
    outcome: float
    cost_rank: float
    fault: str = ""


@dataclass
class Rewards:
    """How transcripts are rewarded.

    Attributes:
        alpha: the weight of cost, 0 to 1. metric: em or f1. failure: φ, what a model that does not answer costs.
        window: of what costs are ranked among.
    """

    alpha: float = 0.0
    metric: str = "em"
    failure: float = 0.0
    window: CostWindow = field(default_factory=CostWindow)

    def __post_init__(self) -> None:
        for name in ("alpha", "failure"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ConfigError(f"{name}={value} must be from 0 to 1")
        if self.metric not in METRICS:
            raise ConfigError(f"metric={self.metric}: {suggest(self.metric, METRICS)}")

    def __call__(
        self,
        fault: str,
        answer: str,
        truths: Sequence[str],
        cost: float,
        *,
        alpha: float | None = None,
        failed: bool = False,
    ) -> Reward:
        """Of a transcript's fault (empty for none), its answer, and its raw cost, which enters the window.

        Args:
            alpha: in place of the one for all. failed: a model that was asked did not answer.
        """
        rank, weight = self.window.add(cost), self.alpha if alpha is None else alpha
        if fault:
            return Reward(BROKEN, 0.0, rank, fault)
        outcome = (exact_match if self.metric == "em" else f1)(answer, truths)
        worth = (1 - weight) * outcome + weight * rank if outcome else 0.0
        return Reward(worth - self.failure * failed, outcome, rank)
