"""Figures of predictions against labels: plain functions on lists."""

import math
import re
import statistics
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def accuracy(predicted: Sequence[int], gold: Sequence[int]) -> float:
    """Share of equal pairs."""
    return sum(p == g for p, g in zip(predicted, gold, strict=True)) / len(gold)


def standard_error(share: float, n: int) -> float:
    """Of a share of n independent answers."""
    return math.sqrt(share * (1 - share) / n)


def majority_rate(gold: Sequence[int]) -> float:
    """What always giving the commonest label scores."""
    return max(Counter(gold).values()) / len(gold)


def matthews(predicted: Sequence[int], gold: Sequence[int]) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004); 0 where either side is constant."""
    n = len(gold)
    correct = sum(p == g for p, g in zip(predicted, gold, strict=True))
    p_count, g_count = Counter(predicted), Counter(gold)
    covariance = correct * n - sum(p_count[k] * g_count[k] for k in g_count)
    spread = (n * n - sum(v * v for v in p_count.values())) * (n * n - sum(v * v for v in g_count.values()))
    return covariance / math.sqrt(spread) if spread else 0.0


def last_number(text: str) -> Decimal | None:
    """The last number in a text, thousands separators ignored; None where there is none."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def normalise(text: str) -> str:
    """Lower case, punctuation at the words' ends dropped, white space collapsed."""
    return " ".join(word.strip(string.punctuation) or word for word in text.lower().split())


def answers_match(generated: str, completion: str, answer: str | None) -> bool:
    """Exact match of a generated answer.

    Where `answer` is a number, last numbers are compared; another one is looked for, normalised, as the whole text; a
    row without compares the whole normalised completion.
    """
    if answer is not None and _NUMBER.fullmatch(answer.strip()):
        return last_number(generated) == last_number(answer)
    return normalise(generated) == normalise(completion if answer is None else answer)


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1), which is None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def mean_relative_difference(scores: Mapping[str, float], baseline: Mapping[str, float]) -> float | None:
    """Mean over tasks of (score - baseline) / baseline, in percent; None where the baseline is 0 on a task.

    Both map task -> score, over the same tasks.
    """
    if scores.keys() != baseline.keys():
        raise ValueError("scores and baseline must be of the same tasks")
    if not all(baseline.values()):
        return None
    return 100 * statistics.fmean((scores[task] - baseline[task]) / baseline[task] for task in scores)


def paired_bootstrap(
    differences: Sequence[Sequence[float]], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a mean over tasks of mean differences, examples redrawn within each task.

    Args:
        differences: one sequence a task: each example's score in one arm minus its score in the other, seeds averaged.
    Returns:
        Lower and upper end. They say how much another draw of test rows would change the difference, not how much
        another training would.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for task in differences:
        # Redrawing n of n rows is a multinomial draw over the few distinct values.
        values, counts = np.unique(np.asarray(task, dtype=float), return_counts=True)
        drawn = generator.multinomial(len(task), counts / len(task), size=resamples)
        means += drawn @ values / len(task) / len(differences)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
