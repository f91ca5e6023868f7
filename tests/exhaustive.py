"""Small mappings of categories to experts, and what trying every one of them finds."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np

from moesaic.llms.coe.problem import Budget, Problem

LIMITS = ("resident", "active", "cost", "experts")


def problem(seed: int, k: int | None = None, e: int | None = None) -> Problem:
    """Up to 4 categories and 4 models, names in no order; every other one coarse, so that much is equal."""
    rng = np.random.default_rng(seed)
    k, e = k or int(rng.integers(1, 5)), e or int(rng.integers(1, 5))
    coarse = seed % 2
    sizes = rng.integers(1, 4, e).astype(float) if coarse else rng.uniform(0.1, 70, e)
    return Problem(
        tuple(f"c{i}" for i in rng.permutation(k)), tuple(f"m{i}" for i in rng.permutation(e)),
        np.full(k, 1 / k) if coarse else rng.dirichlet(np.ones(k)) * (1 - 0.01 * k) + 0.01,
        rng.integers(0, 4, (k, e)) / 4 if coarse else rng.random((k, e)), sizes,
        rng.integers(1, 3, e).astype(float) if coarse else sizes * rng.uniform(0.1, 1, e),
        rng.integers(0, 3, (k, e)) * 1e-6, rng.uniform(0, 0.2, (k, e)),
    )  # fmt: skip


def budget(p: Problem, seed: int) -> Budget:
    """Each constraint in half of them, about as much as an average mapping takes."""
    rng = np.random.default_rng([seed, 1])
    at = takes(p, tuple(rng.integers(0, len(p.models), len(p.categories))))
    limits = {name: at[name] * rng.choice([0.7, 1.0, 1.2]) for name in LIMITS if rng.random() < 0.5}
    if "experts" in limits:
        limits["experts"] = int(limits["experts"])
    pins: dict[str, dict[str, bool]] = {}
    if rng.random() < 0.5:
        model = str(rng.choice(p.models))
        pins[str(rng.choice(p.categories))] = {model: bool(rng.random() < 0.5 or len(p.models) == 1)}
    return Budget(**limits, pins=pins)


def takes(p: Problem, choice: tuple[int, ...]) -> dict[str, float]:
    assert p.costs is not None
    used = sorted(set(choice))
    return {
        "resident": sum(p.sizes[e] for e in used),
        "active": sum(p.shares[k] * p.active[e] for k, e in enumerate(choice)),
        "cost": sum(p.shares[k] * p.costs[k, e] for k, e in enumerate(choice)),
        "experts": len(used),
    }


def fits(p: Problem, b: Budget, choice: tuple[int, ...], without: tuple[str, ...] = ()) -> bool:
    found = takes(p, choice)
    for name in LIMITS:
        limit = getattr(b, name)
        if limit is not None and name not in without and found[name] > limit * (1 + 1e-9):
            return False
    for category, pins in b.pins.items() if "pins" not in without else ():
        chosen = p.models[choice[p.categories.index(category)]]
        if any(yes != (chosen == model) for model, yes in pins.items() if yes or model == chosen):
            return False
    return True


def score(p: Problem, choice: tuple[int, ...], z: float = 0.0) -> float:
    assert p.errors is not None
    return sum(p.shares[k] * (p.scores[k, e] - z * p.errors[k, e]) for k, e in enumerate(choice))


def every(p: Problem) -> list[tuple[int, ...]]:
    return list(product(range(len(p.models)), repeat=len(p.categories)))


def exhaustive(
    p: Problem, b: Budget, z: float, ties: tuple[str, ...] = ("resident", "active")
) -> dict[str, str] | None:
    """Every mapping tried: the best score, then the least of `ties`, then the first by names."""
    left = [choice for choice in every(p) if fits(p, b, choice)]
    if not left:
        return None
    best = max(score(p, choice, z) for choice in left)
    left = [choice for choice in left if score(p, choice, z) > best - 1e-9]
    for name in ties:
        least = min(takes(p, choice)[name] for choice in left)
        left = [choice for choice in left if takes(p, choice)[name] < least * (1 + 1e-9) + 1e-15]
    named = [{k: p.models[e] for k, e in zip(p.categories, choice, strict=True)} for choice in left]
    return min(named, key=lambda of: [of[k] for k in sorted(of)])


def conflict(p: Problem, b: Budget) -> tuple[str, dict[str, float]]:
    """The fewest constraints without which a mapping fits, and the least that each of them could be."""
    names = [name for name in LIMITS if getattr(b, name) is not None] + ["pins"] * bool(b.pins)
    for count in range(1, len(names) + 1):
        for drop in combinations(names, count):
            left = [takes(p, choice) for choice in every(p) if fits(p, b, choice, drop)]
            if left:
                return " and ".join(drop), {name: min(t[name] for t in left) for name in drop if name != "pins"}
    raise AssertionError
