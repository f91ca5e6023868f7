"""From recorded outcomes to a composition: categories, their router, the mapping, estimates, prices. Takes seconds."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from moesaic.errors import ConfigError, DataError, suggest
from moesaic.llms.catalog import Catalog
from moesaic.llms.coe import encoders
from moesaic.llms.coe.calibration import CALIBRATIONS, calibration_error
from moesaic.llms.coe.category import SETTINGS, CategoryRouter
from moesaic.llms.coe.composition import MAPS, Composition, check_free
from moesaic.llms.coe.estimates import Estimates
from moesaic.llms.coe.fitting import Fitting
from moesaic.llms.coe.folds import FOLDS, Labels
from moesaic.llms.coe.mapping import solve
from moesaic.llms.coe.observed import Observed, cells
from moesaic.llms.coe.problem import GENERAL, Budget, Problem
from moesaic.llms.coe.taxonomy import OURS, Taxonomy
from moesaic.llms.coe.uncertainty import Rule
from moesaic.llms.tables import Floats, Table
from moesaic.runs.settings import check_within

logger = logging.getLogger(__name__)

_HALVINGS = 50
_NEVER = -1e3
"""The score of an expert that may not answer."""


def fit(
    data: Table | Observed,
    catalog: Catalog,
    budget: Budget | None = None,
    settings: Fitting | None = None,
    *,
    out: str | Path = "",
    overwrite: bool = False,
    router: CategoryRouter | None = None,
    progress: Callable[[str], None] = logger.info,
) -> Composition:
    """Fit a composition of experts, and write it to a folder where `out` names one.

    Its `about` holds its figures on held-out prompts: each is routed by fits without its fold, among experts that were
    chosen with all in sight.

    Args:
        data: a table, or logs in which not every model saw every prompt.
        router: one that was just fitted to the same data and seed, to be used again.
        progress: is told each step.
    Raises:
        DataError: the table is for evaluation only, or there is too little in it. ConfigError: a setting that cannot
            be; a model the catalog lacks; a folder that is taken. InfeasibleBudget: no mapping fits.
    """
    settings, budget = settings or Fitting(), budget or Budget()
    _check(settings)
    if out:
        check_free(out, overwrite=overwrite)
    observed = data if isinstance(data, Observed) else Observed.of_table(data)
    catalog.scored(observed.models, observed.source)
    categories, labelled = _categories(observed, settings, progress)
    if 0 < (few := categories.count(GENERAL)) < FOLDS < len(observed):
        progress(f"left out: {few} prompt{'s' * (few > 1)} of no category, which are too few for one of their own")
        observed = observed.rows([i for i, category in enumerate(categories) if category != GENERAL])
        categories = [category for category in categories if category != GENERAL]
    if len(observed) < FOLDS:
        count = f"{len(observed)} prompt{'s' * (len(observed) > 1)}"
        raise DataError(f"{observed.source or 'the table'} has {count}, and {FOLDS} of a category are needed")
    names, labels = np.unique(np.array(categories, str), return_inverse=True)
    _check_budget(observed, catalog, budget, settings, names.tolist(), labels)
    if router is None:
        progress(f"fitting the category router: {len(observed)} prompts, {len({*categories})} categories")
        router = CategoryRouter.fit(
            observed.prompts, categories, encoder=settings.encoder, classifier=settings.classifier,
            calibration=settings.calibration, seed=settings.seed,
        )  # fmt: skip
    progress("solving the mapping, estimating scores")
    made, figures = _composed(observed, catalog, budget, settings, router, labels)
    used = {**asdict(settings), "encoder": router.encoder.name, "classifier": router.classifier}
    made.about = {
        "source": observed.source, "prompts": len(observed), "labelled_by": labelled, "settings": used,
        "budget": {**asdict(budget), "pins": {k: dict(v) for k, v in budget.pins.items()}}, "held_out": figures,
    }  # fmt: skip
    if out:
        made.save(out, overwrite=overwrite)
    return made


def _check(settings: Fitting) -> None:
    """Raise ConfigError for a setting that cannot be, before anything takes time."""
    for name, known in (("map", MAPS), ("classifier", SETTINGS), ("calibration", CALIBRATIONS)):
        value = getattr(settings, name)
        if value not in known and not (name == "calibration" and value is None):
            raise ConfigError(f"{name}={value}: {suggest(value, known)}")
    Rule.check(settings.uncertainty, settings.accuracy)
    check_within(settings, {"seed": (0, 2**32 - 1)})


def _check_budget(
    observed: Observed, catalog: Catalog, budget: Budget, settings: Fitting, names: list[str], labels: Labels
) -> None:
    """Raise ConfigError for pins or limits that no router can make possible."""
    general = 0.0 if settings.uncertainty == "none" else 1 / len(observed)
    observed.problem(catalog, _one_hot(labels), names, general).allowed(budget)
    one = observed.problem(catalog, np.ones((len(observed), 1)), [GENERAL])
    solve(
        one,
        replace(budget, active=None, cost=None if observed.costs is not None else budget.cost, pins={}),
        z=settings.z,
    )


def _composed(
    observed: Observed, catalog: Catalog, budget: Budget, settings: Fitting, router: CategoryRouter, labels: Labels
) -> tuple[Composition, dict[str, float | None]]:
    """Rule, mapping, estimates and prices; and their figures on held-out prompts."""
    posterior, hard = router.held_out, settings.map == "hard"
    rule = Rule.fit(settings.uncertainty, router, labels, settings.accuracy)
    uncertain = rule.uncertain(rule.held_out(router))
    general = 0.0 if rule.kind == "none" else min(max(float(uncertain.mean()), 1 / len(observed)), 0.99)
    problem = observed.problem(catalog, _one_hot(labels) if hard else posterior, router.categories, general)
    solution = solve(problem, budget, z=settings.z)
    estimates, known = Estimates.fit(router, observed.prompts, labels, observed.scores, blend=settings.map == "blend")
    columns = sorted((problem.models.index(name) for name in solution.resident), key=lambda e: _rank(problem, e))
    names, active, known = [problem.models[e] for e in columns], problem.active[columns], known[:, columns]
    allowed = problem.allowed(budget)[: len(router.categories), columns]
    price, mine = np.zeros(allowed.shape), estimates.of(columns)
    if not hard and {"active", "cost"} & budget.limits().keys():
        p = router.of_rows(router.rows)
        sure = rule.uncertain(rule.of(router, router.rows, p))
        samples = []
        for scores, shares, unsure in (
            (known, posterior, uncertain), (mine(router.bank, observed.prompts, router.rows, p), p, sure)
        ):  # fmt: skip
            may = allowed[shares.argmax(axis=1)]
            if rule.kind != "none":
                may[unsure] = np.array(names) == solution.expert[GENERAL]
            samples.append((np.where(may, scores, _NEVER), shares))
        costs = None if observed.costs is None else cells(_one_hot(labels), observed.costs)[0].clip(0)[:, columns]
        price = _price(samples, active, costs, budget)
    arrays = {"active": active, "allowed": allowed, "price": price}
    made = Composition(router, solution, rule, settings.map, names, mine, arrays)
    chosen = made.choose(known, posterior, uncertain)
    return made, {
        **_figures(observed, chosen, columns, active), "general": float(uncertain.mean()),
        "category_accuracy": float((posterior.argmax(axis=1) == labels).mean()),
        "calibration_error": calibration_error(posterior, labels),
    }  # fmt: skip


def prices(samples: Sequence[tuple[Floats, Sequence[Floats]]], limits: Sequence[float]) -> list[float]:
    """The least λ with which the mean of each take, where score less Σ λ · take is best, is within its limit.

    By bisection, the last constraint outermost; within a constraint the mean falls as its λ rises.

    Args:
        samples: scores (N, R) of some prompts, and a take (N, R) for each limit; the limits hold in each of them.
    """
    if not limits:
        return []

    def mean(price: float) -> tuple[float, list[float]]:
        inner = prices([(scores - price * takes[-1], takes[:-1]) for scores, takes in samples], limits[:-1])
        means = []
        for scores, takes in samples:
            worth = scores - sum(p * take for p, take in zip([*inner, price], takes, strict=True))
            best = worth.round(9).argmax(axis=1)
            means.append(float(takes[-1][np.arange(len(best)), best].mean()))
        return max(means), [*inner, price]

    limit = limits[-1] * (1 + 1e-9)
    taken, found = mean(0.0)
    if taken <= limit:
        return found
    low, high = 0.0, 1e-3 / max(*(float(takes[-1].max()) for _, takes in samples), 1e-12)
    taken, found = mean(high)
    for _ in range(_HALVINGS):
        if taken <= limit:
            break
        low, high = high, 4 * high
        taken, found = mean(high)
    for _ in range(_HALVINGS):
        if high - low <= 1e-6 * high:
            break
        middle = (low + high) / 2
        taken, tried = mean(middle)
        low, high, found = (low, middle, tried) if taken <= limit else (middle, high, found)
    return found


def _price(samples: Sequence[tuple[Floats, Floats]], active: Floats, costs: Floats | None, budget: Budget) -> Floats:
    """(K, R) what is taken off scores so that the caps on averages hold: for held-out prompts, whose shares of
    categories are as unsure as those of new ones, and for the prompts themselves, which are decided as here.
    """
    shape = samples[0][1].shape[1], len(active)
    each = {"active": np.tile(active, (shape[0], 1)), "cost": costs}
    capped = [(each[name], limit) for name, limit in budget.limits().items() if name in each]
    takes = [held for held, _ in capped if held is not None]
    known = [(scores, [shares @ held for held in takes]) for scores, shares in samples]
    found = prices(known, [limit for held, limit in capped if held is not None])
    price = np.zeros(shape)
    for value, held in zip(found, takes, strict=True):
        price += value * held
    return price


def _categories(observed: Observed, settings: Fitting, progress: Callable[[str], None]) -> tuple[list[str], str]:
    """A category for each prompt, and where they come from."""
    if not any(observed.categories):
        taxonomy = Taxonomy.read(settings.taxonomy or OURS)
        progress(
            f"labelling {len(observed)} prompts by the nearest description: weak, categories of one's own are better"
        )
        encoder = encoders.fitted(settings.encoder, [*observed.prompts, *taxonomy.texts], settings.seed)
        found, _ = taxonomy.label(observed.prompts, encoder)
        source = str(settings.taxonomy or "our taxonomy")
    else:
        if settings.taxonomy:
            raise ConfigError("taxonomy= is for data without categories, and this has some")
        found, source = [category or GENERAL for category in observed.categories], "the data"
    rare = {name for name, count in Counter(found).items() if count < FOLDS and name != GENERAL}
    if rare:
        progress(f"of fewer than {FOLDS} prompts, and now {GENERAL}: {', '.join(sorted(rare))[:200]}")
    return [GENERAL if name in rare else name for name in found], source


def _figures(observed: Observed, chosen: Labels, columns: Sequence[int], active: Floats) -> dict[str, float | None]:
    """Of what was recorded where the chosen expert saw the prompt: replayed."""
    at = np.arange(len(chosen)), np.array(columns)[chosen]
    scores = observed.scores[at]
    seen = np.isfinite(scores)
    costs = np.empty(0) if observed.costs is None else observed.costs[at]
    costs = costs[np.isfinite(costs)]
    return {
        "score": float(scores[seen].mean()) if seen.any() else None, "seen": float(seen.mean()),
        "average_active": float(active[chosen].mean()), "average_cost": float(costs.mean()) if len(costs) else None,
    }  # fmt: skip


def _one_hot(labels: Labels) -> Floats:
    return np.eye(int(labels.max()) + 1)[labels]


def _rank(problem: Problem, e: int) -> tuple[float, float, str]:
    """Among experts of the same expected score, the first answers."""
    return float(problem.active[e]), float(problem.sizes[e]), problem.models[e]
