"""The common budget of a comparison's arms, and each arm at the rank that has it."""

from collections.abc import Sequence
from typing import Any

from moesaic.compare.settings import CompareSettings
from moesaic.compare.verdicts import kind_of
from moesaic.errors import ConfigError, suggest
from moesaic.runs.method import is_routed
from moesaic.runs.recipe import Recipe, adapter_config

MOST = 10
"""How many times its base's parameters an adapter may have."""


def mixtures(recipes: dict[str, Recipe], configs: dict[str, Any]) -> list[str]:
    """The arms with routers: those that learn their routing, if any does."""
    routed = [arm for arm, recipe in recipes.items() if is_routed(recipe.method)]
    learned = [arm for arm in routed if kind_of(recipes[arm].method, configs[arm]) in ("learned", "told")]
    return learned or routed


def budget_of(
    settings: CompareSettings, recipes: dict[str, Recipe], base: Any, routed: Sequence[str]
) -> tuple[int | None, str | None]:
    """The count that arms are matched to, and the arm it is of: the largest mixture where none is named.

    The others can be raised to the largest; a mixture cannot be had at less than its routers.
    """
    wanted = settings.budget
    if settings.match == "none":
        if wanted is not None:
            raise ConfigError(f"budget={wanted} and match=none disagree: leave budget out, or match=trainable_params")
        return None, None
    number = _whole(wanted)
    if number is not None:
        size = sum(p.numel() for p in base.model.parameters())
        if settings.match == "trainable_params" and number > MOST * size:
            raise ConfigError(f"budget={wanted} is over {MOST} times the model's {size:,} parameters: ask for less")
        return number, None
    if wanted is not None and wanted not in recipes:
        raise ConfigError(f"budget={wanted} is neither an arm nor a number; {suggest(wanted, recipes)}")
    sizes = {arm: _size(settings, recipes[arm], base) for arm in ([wanted] if wanted else routed or recipes)}
    largest = max(sizes, key=sizes.__getitem__)
    return sizes[largest], largest


def match_arm(settings: CompareSettings, arm: str, recipe: Recipe, budget: int, base: Any) -> Recipe:
    """The arm at the rank that has the budget."""
    from moesaic.training.budget import at_rank, check_rank, solve

    if settings.match == "rank":
        config: Any = adapter_config(recipe, **base.defaults)
        solved = at_rank(recipe, config, max(1, round(budget / _experts(config))))
    else:
        try:
            solved = solve(recipe, base, budget, f"match={settings.match}")
        except ConfigError as error:
            raise ConfigError(f"arm {arm}: {error}; budget={arm} would match the others to it") from None
    if _whole(settings.budget):
        check_rank(solved.adapter["r"], base, f"arm {arm}: budget={settings.budget}")
    return solved


def _whole(text: str | None) -> int | None:
    """A whole number above 0, which may be written 1e6; None for anything else."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return int(number) if number > 0 and number.is_integer() else None


def _size(settings: CompareSettings, recipe: Recipe, base: Any) -> int:
    """What `match` compares: trainable parameters, or the rank of all experts together."""
    from moesaic.training.wrapping import count

    if settings.match == "trainable_params":
        return count(base, recipe)[0]
    config: Any = adapter_config(recipe, **base.defaults)
    return int(config.r) * _experts(config)


def _experts(config: Any) -> int:
    return int(getattr(config, "num_experts", 1))
