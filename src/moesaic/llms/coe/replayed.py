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
        `arms`: composition, best_single (known afterwards only), best_within (likewise, of those that fit the budget of
        resident parameters, where there was one), largest, random_expert (of the composition's), oracle; each
        {"model": where it is one, "score", "low", "high": 95 % of the bootstrap over prompts, "ahead": of the best
        single model, with its own "ahead_low", "ahead_high", "average_active" (billions), "average_cost" (USD; None
        where costs are not recorded)}; `experts`: each one's share of prompts; `general`: the share that was uncertain;
        `category_accuracy`: of prompts whose category the router knows; None where there are none.

    Raises:
        ConfigError: an expert that the table has no scores of, or a model of its that the catalog lacks.
    """
    models = catalog.scored(table.models, table.source)
    names, active = [model.name for model in models], np.array([model.active_size for model in models])
    if missing := [expert for expert in made.experts if expert not in names]:
        raise ConfigError(f"{table.source or 'the table'} has no scores of {missing[0]}; {suggest(missing[0], names)}")
    decisions = made.decide_many(table.prompts)
    chosen = np.array([names.index(decision.expert) for decision in decisions])
    chance, every = np.random.default_rng(seed), np.arange(len(table))
    best, largest = int(table.scores.mean(axis=0).argmax()), int(active.argmax())
    limit = made.about.get("budget", {}).get("resident")
    fits = np.array([limit is None or model.size <= limit for model in models])
    within = int(np.where(fits, table.scores.mean(axis=0), -1).argmax())
    arms: dict[str, NDArray[np.int64]] = {
        "composition": chosen, "best_single": np.full(len(table), best),
        **({"best_within": np.full(len(table), within)} if limit else {}), "largest": np.full(len(table), largest),
        "random_expert": chance.choice([names.index(expert) for expert in made.experts], len(table)),
        "oracle": _oracle(table.scores, active),
    }  # fmt: skip
    scores = np.column_stack([table.scores[every, picks] for picks in arms.values()])
    ahead = scores - table.scores[:, [best]]
    spans, of_ahead = np.split(_intervals(np.hstack([scores, ahead]), chance), 2, axis=1)
    one = {"best_single": names[best], "largest": names[largest], **({"best_within": names[within]} if limit else {})}
    found = {
        name: {
            "model": one.get(name), "score": float(scores[:, i].mean()), **_span(spans[:, i], "low", "high"),
            "ahead": float(ahead[:, i].mean()), **_span(of_ahead[:, i], "ahead_low", "ahead_high"),
            "average_active": float(active[picks].mean()),
            "average_cost": None if table.costs is None else float(table.costs[every, picks].mean()),
        }
        for i, (name, picks) in enumerate(arms.items())
    }  # fmt: skip
    right = [
        max(decision.probabilities, key=decision.probabilities.__getitem__) == category
        for decision, category in zip(decisions, table.categories, strict=True)
        if category in made.router.categories
    ]
    return {
        "source": table.source, "prompts": len(table), "replayed": True, "arms": found,
        "experts": {expert: float((chosen == names.index(expert)).mean()) for expert in made.experts},
        "general": float(np.mean([decision.uncertain for decision in decisions])),
        "category_accuracy": float(np.mean(right)) if right else None,
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


def _intervals(values: Floats, chance: np.random.Generator) -> Floats:
    """95 % of the means of columns of (N, C) by the bootstrap over rows, the same rows for all columns: (2, C)."""
    n = len(values)
    means = [values[chance.integers(0, n, n)].mean(axis=0) for _ in range(DRAWS)]
    return np.asarray(np.quantile(means, (0.025, 0.975), axis=0), float)


def _span(found: Floats, *names: str) -> dict[str, float]:
    return dict(zip(names, found.tolist(), strict=True))


def _oracle(scores: Floats, active: Floats) -> NDArray[np.int64]:
    """The best model of each prompt, (N,); of several the smallest."""
    order = np.argsort(active, kind="stable")
    return np.asarray(order[scores[:, order].argmax(axis=1)], np.int64)
