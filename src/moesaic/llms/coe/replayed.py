"""How well a composition would have done on recorded outcomes, beside who else could have answered: *replayed*."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, suggest
from moesaic.llms.catalog import Catalog
from moesaic.llms.coe.composition import Composition
from moesaic.llms.tables import Floats, Table

DRAWS = 2000
"""Of the bootstrap over prompts."""


def replayed(made: Composition, table: Table, catalog: Catalog, *, seed: int = 0) -> dict[str, Any]:
    """Figures of a composition and of others on the same prompts.

    Returns:
        `arms`: by name {"score", "low", "high": 95 % of the bootstrap over prompts, "ahead": of the best single model,
        with its own "ahead_low", "ahead_high", "average_active" (billions), "average_cost" (USD; None where costs are
        not recorded)}; `experts`: each one's share of prompts; `general`: the share that was uncertain;
        `category_accuracy`: None where the table has no categories.

    Raises:
        ConfigError: an expert that the table has no scores of.
    """
    for expert in made.experts:
        if expert not in table.models:
            raise ConfigError(
                f"{table.source or 'the table'} has no scores of {expert}; {suggest(expert, table.models)}"
            )
    decisions = made.decide_many(table.prompts)
    chosen = np.array([table.models.index(decision.expert) for decision in decisions])
    active = np.array([catalog.resolve(model).active_size for model in table.models])
    chance, n = np.random.default_rng(seed), len(table)
    best = int(table.scores.mean(axis=0).argmax())
    arms: dict[str, NDArray[np.int64]] = {
        "composition": chosen,
        f"best single, known afterwards ({table.models[best]})": np.full(n, best),
        f"largest ({table.models[int(active.argmax())]})": np.full(n, int(active.argmax())),
        "random expert": chance.choice([table.models.index(expert) for expert in made.experts], n),
        "oracle": _oracle(table.scores, active),
    }
    drawn = chance.integers(0, n, (DRAWS, n))
    single = table.scores[:, best]
    found = {}
    for name, picks in arms.items():
        scores = table.scores[np.arange(n), picks]
        low, high = np.quantile(scores[drawn].mean(axis=1), (0.025, 0.975))
        ahead_low, ahead_high = np.quantile((scores - single)[drawn].mean(axis=1), (0.025, 0.975))
        found[name] = {
            "score": float(scores.mean()), "low": float(low), "high": float(high),
            "ahead": float((scores - single).mean()), "ahead_low": float(ahead_low), "ahead_high": float(ahead_high),
            "average_active": float(active[picks].mean()),
            "average_cost": None if table.costs is None else float(table.costs[np.arange(n), picks].mean()),
        }  # fmt: skip
    known = [decision for decision, category in zip(decisions, table.categories, strict=True) if category]
    right = [max(d.probabilities, key=d.probabilities.__getitem__) for d in known]
    labels = [category for category in table.categories if category]
    return {
        "source": table.source, "prompts": n, "replayed": True, "arms": found,
        "experts": {expert: float((chosen == table.models.index(expert)).mean()) for expert in made.experts},
        "general": float(np.mean([decision.uncertain for decision in decisions])),
        "category_accuracy": float(np.mean([a == b for a, b in zip(right, labels, strict=True)])) if labels else None,
    }  # fmt: skip


def timed(made: Composition, prompts: Sequence[str], rounds: int) -> dict[str, float]:
    """Milliseconds of a decision, each prompt by itself: its median and its 95th percentile."""
    taken = []
    for number in range(max(rounds, 1) + 3):
        began = time.perf_counter()
        made.decide(prompts[number % len(prompts)])
        taken.append(1e3 * (time.perf_counter() - began))
    median, late = np.quantile(taken[3:], (0.5, 0.95))
    return {"median": float(median), "p95": float(late)}


def _oracle(scores: Floats, active: Floats) -> NDArray[np.int64]:
    """The best model of each prompt, (N,); of several the smallest."""
    order = np.argsort(active, kind="stable")
    return np.asarray(order[scores[:, order].argmax(axis=1)], np.int64)
