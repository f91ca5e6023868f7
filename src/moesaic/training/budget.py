"""Equal budgets: the rank at which a method has as many trainable parameters as wanted, routers and heads counted.

A whole rank is too coarse where each step of it costs every module E pairs of vectors, so some modules, evenly spread
over the depth, get one rank more (`rank_pattern`). The scale alpha/r stays what the recipe says, in those modules too;
with `use_rslora` alpha itself stays, as that rule is meant.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moesaic.errors import ConfigError
from moesaic.runs.method import adapter_settings, is_routed, methods
from moesaic.runs.recipe import Recipe, adapter_config, load_recipe
from moesaic.training.wrapping import Base, count, trainable, with_meant_size

logger = logging.getLogger(__name__)

TOLERANCE = 0.01
"""Largest relative distance from a budget that still counts as equal."""

COUNTS_TRIED = 16
"""How many numbers of raised modules are tried, the likeliest first."""


def matched(config: Any, model: Any, *, like: Any, **settings: Any) -> Any:
    """A mixture's config with as many trainable parameters on a model as another config has, routers counted.

        config = moesaic.matched(moesaic.MoLAConfig, model, like=LoraConfig(r=16, target_modules="all-linear"))

    Args:
        config: a config, or the class of one; its rank, and `lora_alpha` with it, are what is solved for.
        model: what it is for; it is not touched.
        like: what it should be as large as; its `target_modules` and `task_type` too, where `config` is a class.
        settings: of the class.

    Raises:
        ConfigError: no rank comes within 1 % of it.
    """
    if isinstance(config, type):
        config = config(**{"target_modules": like.target_modules, "task_type": like.task_type, **settings})
    elif settings:
        raise ConfigError(f"{min(settings)}={settings[min(settings)]} is given beside a config: put it into that")
    method = next(name for name, cls in methods().items() if type(config) is cls)
    plain = type(config)(**_of_adapters(config))
    given = {key: getattr(config, key) for key in adapter_settings(method)}
    recipe = Recipe(method=method, adapter={k: v for k, v in given.items() if v != getattr(plain, k)})
    wanted = trainable(model, like)
    solved = solve(
        recipe, Base(model, (), None, {"task_type": config.task_type}), wanted, f"like={type(like).__name__}"
    )
    return with_meant_size(adapter_config(solved, task_type=config.task_type))


def _of_adapters(config: Any) -> dict[str, Any]:
    """What a config cannot be made without."""
    return {"adapters": config.adapters} if getattr(config, "adapters", None) else {}


def recipe_matched(recipe: Recipe, base: Base) -> Recipe:
    """`recipe` with the rank at which it has the trainable parameters of the recipe that its `match` names.

    Raises:
        ConfigError: there is no such rank, or `adapter.rank_pattern` is set already to something else.
    """
    assert recipe.match
    other = load_recipe(recipe.match)
    adapter = dict(recipe.adapter)
    if "target_modules" in other.adapter:
        adapter.setdefault("target_modules", other.adapter["target_modules"])
    solved = solve(replace(recipe, adapter=adapter), base, count(base, other)[0], f"match={recipe.match}")
    for key in ("rank_pattern", "alpha_pattern"):
        if (recipe.adapter.get(key) or None) not in (None, solved.adapter.get(key)):
            raise ConfigError(f"match={recipe.match} solves the ranks, adapter.{key} sets them: leave one of them out")
    return solved


def solve(recipe: Recipe, base: Base, budget: int, asked: str) -> Recipe:
    """`recipe` with the rank at which its trainable parameters come closest to `budget`.

    Args:
        base: the model, which may be an outline; it is not touched.
        asked: the setting that asks for the budget, named in the message where it cannot be met.
    Raises:
        ConfigError: the closest is more than 1 % away.
    """
    config: Any = adapter_config(recipe, **base.defaults)
    first = config.r
    one, two = (count(base, _with_ranks(recipe, config, r, [])) for r in (first, 2 * first))
    per_rank = {name: (two[1][name] - n) // first for name, n in one[1].items()}
    modules = [name for name, cost in per_rank.items() if cost]
    costs = [per_rank[name] for name in modules]
    fixed = one[0] - first * sum(costs)
    rank = max(1, (budget - fixed) // sum(costs))
    raised = _spread(costs, budget - fixed - rank * sum(costs))
    if len(raised) == len(modules):
        rank, raised = rank + 1, []
    solved = _with_ranks(recipe, config, rank, [modules[i] for i in raised])
    found = count(base, solved)[0]
    if abs(found - budget) > TOLERANCE * budget:
        other = f"adapter.num_experts={config.num_experts}" if is_routed(recipe.method) else "adapter.target_modules"
        raise ConfigError(
            f"{asked} and {other} disagree: {budget:,} trainable parameters are wanted, and the nearest that "
            f"method={recipe.method} can have is {found:,}, at rank {rank}"
        )
    logger.info("rank %d, one more in %d of %d modules: %d trainable", rank, len(raised), len(modules), found)
    return solved


def check_rank(rank: int, base: Base, asked: str) -> None:
    """Raise ConfigError for a rank above the largest size of any of the model's matrices: it adds memory only."""
    widest = max(max(p.shape, default=0) for p in base.model.parameters())
    if rank > widest:
        raise ConfigError(
            f"{asked} takes rank {rank:,}, but the model's largest matrix has {widest:,} rows: ask for less"
        )


def at_rank(recipe: Recipe, config: Any, rank: int) -> Recipe:
    """`recipe`, whose config it is, at another rank of one expert, at the same scale."""
    return _with_ranks(recipe, config, rank, [])


def _with_ranks(recipe: Recipe, config: Any, rank: int, raised: Sequence[str]) -> Recipe:
    """`recipe` at another rank, one more in the modules `raised`, and the scale of `config`."""
    alpha = {r: config.lora_alpha if config.use_rslora else r * config.lora_alpha / config.r for r in (rank, rank + 1)}
    adapter = {k: v for k, v in recipe.adapter.items() if k not in ("rank_pattern", "alpha_pattern")}
    adapter |= {"r": rank, "lora_alpha": _whole(alpha[rank])}
    if raised:
        adapter["rank_pattern"] = dict.fromkeys(raised, rank + 1)
    if raised and not is_routed(recipe.method):  # a mixture's scale is one for all modules, PEFT's is each module's
        adapter["alpha_pattern"] = dict.fromkeys(raised, _whole(alpha[rank + 1]))
    return replace(recipe, adapter=adapter)


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _spread(costs: Sequence[int], wanted: int) -> list[int]:
    """Evenly spread indices whose costs sum up closest to `wanted`."""
    size, best, error = len(costs), list[int](), abs(wanted)
    likeliest = wanted * size / sum(costs)
    for number in sorted(range(1, size + 1), key=lambda k: abs(k - likeliest))[:COUNTS_TRIED]:
        for shift in range(size):
            chosen = sorted((i * size // number + shift) % size for i in range(number))
            distance = abs(wanted - sum(costs[i] for i in chosen))
            if distance < error:
                best, error = chosen, distance
    return best
