"""The arms of a comparison: which methods, with which settings, at which rank.

An arm's adapter settings are its method's packaged recipe, then those `adapter.*` of the comparison that the method
knows, then `arms.<arm>.*`. All else (model, data, steps, batch, order of the rows) is the same for all arms.

Controls stand beside a mixture and take its settings and scale. `uniform`: the same experts, weighted 1/E. `oracle`:
one expert a task, chosen by the task's id. `bound`: the same with a whole matched LoRA for each task, which is what
training each task by itself gives; it alone is not matched.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from moesaic.compare.matching import budget_of, match_arm, mixtures
from moesaic.compare.settings import CompareSettings
from moesaic.compare.verdicts import Kind, kind_of
from moesaic.errors import ConfigError, path_of, suggest
from moesaic.runs.method import adapter_settings, is_routed, methods
from moesaic.runs.recipe import Recipe, adapter_config, load_recipe, packaged
from moesaic.runs.settings import names

_RANKS = ("r", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Arm:
    """One line of a comparison: its recipe has the final ranks; seed, lr and out are each cell's."""

    name: str
    recipe: Recipe
    trainable: int
    experts: int
    rank: int
    raised: int
    """Modules with one rank more."""
    kind: Kind
    modules: str
    """Those adapted: how often each name."""
    read: dict[str, str]
    """Digest of each file that its method reads, by its name."""


@dataclass(frozen=True)
class Plan:
    """A comparison that can be run; `budget` is the arms' common count, None where they have none."""

    settings: CompareSettings
    shared: Recipe
    arms: dict[str, Arm]
    tasks: tuple[str, ...]
    data_sha256: str
    budget: int | None
    budget_of: str | None
    """The arm whose count that is; None where it was given as a number."""
    scored: dict[str, dict[str, int]]
    """Of trials and of runs: how many rows of each task they are scored on."""
    scored_sha256: dict[str, str]
    """Digests of all rows of the splits they are from."""
    rows_sha256: dict[tuple[str, int | None], str]
    """Digests of the scored rows themselves, by split and rows a task."""

    @property
    def trials(self) -> int:
        return len(self.arms) * len(self.settings.lrs) if self.settings.tuned else 0

    @property
    def runs(self) -> int:
        return len(self.arms) * len(self.settings.seeds)


def plan(settings: CompareSettings, shared: Recipe) -> Plan:
    """Read the data and the model's configuration, solve every rank, and refuse what cannot be run.

    Args:
        shared: the recipe of all arms, but for method and adapter.
    Raises:
        ConfigError, DataError: of the kind that fits; no weights were loaded and nothing was written.
    """
    named = _named(settings)
    recipes = {arm: _recipe(settings, shared, method, own) for arm, (method, own) in named.items()}
    configs = {}
    for arm, recipe in recipes.items():
        with _of(arm):
            configs[arm] = adapter_config(recipe)
    routed = mixtures(recipes, configs)

    from moesaic.data import examples as data
    from moesaic.evaluation.answers import by_task
    from moesaic.training.prepared import load_examples, require_extras
    from moesaic.training.wrapping import check_teacher, config_for, count, outline

    require_extras()
    examples = load_examples(shared)
    by_task(examples)
    for arm, recipe in recipes.items():
        with _of(arm):
            check_teacher(config_for(recipe, sorted({e.task for e in examples})))
    base = outline(shared, examples, None)
    scored, digests, rows_digests = _scored(settings, shared, base)
    budget, measure = budget_of(settings, recipes, base, routed)
    _check_ranks(settings, measure)

    def match(arm: str, recipe: Recipe) -> Recipe:
        return recipe if arm == measure or budget is None else match_arm(settings, arm, recipe, budget, base)

    solved = {arm: match(arm, recipe) for arm, recipe in recipes.items()}
    controls = _controls(settings, shared, solved, base, routed)
    solved |= {arm: match(arm, recipe) for arm, recipe in controls.items()}
    if settings.controls and routed and len(base.tasks) > 1 and "bound" not in solved:
        solved["bound"] = _bound(settings, shared, solved, budget, base)
    arms = {}
    for name, recipe in solved.items():
        config: Any = adapter_config(recipe, **base.defaults)
        if is_routed(recipe.method) and config.kind.needs_tasks:
            _check_trained(name, base.tasks, scored, control=name not in recipes)
        raised = len(recipe.adapter.get("rank_pattern") or ())
        experts = config.num_experts if is_routed(recipe.method) else 1
        trainable, modules = count(base, recipe)
        kind, adapted = kind_of(recipe.method, config), _tally(modules)
        read = {file: hashlib.sha256(path_of(file).read_bytes()).hexdigest() for file in getattr(config, "files", ())}
        arms[name] = Arm(name, recipe, trainable, experts, config.r, raised, kind, adapted, read)
    return Plan(
        settings, shared, arms, base.tasks, data.digest(examples), budget, measure, scored, digests, rows_digests
    )


def _tally(modules: Iterable[str]) -> str:
    """`down_proj x 6, up_proj x 6`: how many modules end in each name."""
    found = Counter(name.rpartition(".")[2] for name in modules)
    return ", ".join(f"{name} x {number}" for name, number in sorted(found.items()))


@contextmanager
def _of(arm: str) -> Iterator[None]:
    """Say which arm's settings are refused."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"arm {arm}: {error}") from None


def _named(settings: CompareSettings) -> dict[str, tuple[str, dict[str, Any]]]:
    """Arm -> (method, settings of its own): the baseline, what `methods` names, what `arms` adds."""
    entries = {name: _entry(name, value) for name, value in settings.arms.items()}
    order = dict.fromkeys([*settings.methods, *entries])
    if settings.baseline not in order and settings.baseline in methods():
        order = dict.fromkeys([settings.baseline, *order])
    named = {name: entries.get(name, (name, {})) for name in order}
    if settings.baseline not in named:
        raise ConfigError(f"baseline={settings.baseline} is no arm; {suggest(settings.baseline, named)}")
    known: set[str] = set()
    for name, (method, _) in named.items():
        if method not in methods():
            where = "" if name in settings.methods else f"arms.{name}: "
            raise ConfigError(f"{where}no method '{method}'; {suggest(method, methods())}")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(f"arms.{name}: it names folders, so letters, digits and . _ - only")
        known |= set(adapter_settings(method))
    for key in settings.adapter:
        if key not in known:
            raise ConfigError(f"no arm has a setting adapter.{key}; {suggest(key, known)}")
    return named


def _entry(name: str, value: Any) -> tuple[str, dict[str, Any]]:
    """(method, settings) of an entry of `arms`: the settings themselves, or `method` and `adapter`."""
    if not isinstance(value, dict) or not isinstance(value.get("adapter") or {}, dict):
        raise ConfigError(f"arms.{name} must hold settings, such as arms.{name}.num_experts=4")
    settings = {k: v for k, v in value.items() if k not in ("method", "adapter")}
    for key in settings.keys() & set(names(Recipe)):
        more = "; lrs=3e-4,1e-3 has each arm try both and take its best" if key == "lr" else ""
        raise ConfigError(f"arms.{name}.{key}: {key} is the same for all arms{more}")
    inner = value.get("adapter") or {}
    for key in settings.keys() & inner.keys():
        raise ConfigError(f"arms.{name}.{key} and arms.{name}.adapter.{key} are one setting: leave one out")
    return str(value.get("method", name)), {**settings, **inner}


def _recipe(settings: CompareSettings, shared: Recipe, method: str, own: dict[str, Any]) -> Recipe:
    """An arm's recipe before its rank is solved."""
    start = load_recipe(method).adapter if method in packaged() else {}
    common = _known(method, settings.adapter)
    if method == "oracle":
        common.pop("num_experts", None)  # it has as many as there are tasks
    return replace(shared, method=method, adapter={**start, **common, **own})


def _known(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Those settings that a method has."""
    known = adapter_settings(method)
    return {key: value for key, value in settings.items() if key in known}


def _scored(
    settings: CompareSettings, shared: Recipe, base: Any
) -> tuple[dict[str, dict[str, int]], dict[str, str], dict[tuple[str, int | None], str]]:
    """How many rows of each task trials and runs are scored on; digests of each split, and of the rows themselves.

    Raises:
        DataError, ConfigError: rows are not there, or are not as those trained on.
    """
    from moesaic.data import examples as data
    from moesaic.evaluation.answers import by_task

    if path_of(shared.data).is_file():
        raise ConfigError(f"data={shared.data} is one file: name a folder with train.jsonl and {settings.split}.jsonl")
    wanted = {f"runs ({settings.split})": (settings.split, settings.eval_limit)}
    if settings.tuned:
        wanted = {"trials (validation)": ("validation", settings.limit)} | wanted
    found, digests, rows_digests = {}, {}, {}
    for what, (split, limit) in wanted.items():
        rows = data.load(shared.data, split, tasks=shared.tasks, on_bad_lines=shared.on_bad_lines)  # type: ignore[arg-type]
        for example in rows if base.layout else ():
            base.layout.task_id(example.task)
            base.layout.head(example)
        kept = {task: own[:limit] for task, own in by_task(rows).items()}
        found[what] = {task: len(kept[task]) for task in sorted(kept)}
        digests[split] = data.digest(rows)
        rows_digests[split, limit] = data.digest([example for own in kept.values() for example in own])
    return found, digests, rows_digests


def _check_trained(arm: str, tasks: Sequence[str], scored: dict[str, dict[str, int]], *, control: bool) -> None:
    """Raise ConfigError where an arm that gates by task id would be scored on a task that has none."""
    for what, rows in scored.items():
        for task in sorted(rows.keys() - set(tasks)):
            raise ConfigError(
                f"arm {arm} gates by task id, and {what} are scored on task '{task}', which is not trained: "
                f"tasks={','.join(tasks)} leaves it out" + (", controls=false the arm" if control else "")
            )


def _controls(
    settings: CompareSettings, shared: Recipe, recipes: dict[str, Recipe], base: Any, routed: Sequence[str]
) -> dict[str, Recipe]:
    """`uniform` and `oracle` after the first mixture, where there is one, at its scale; without those named already."""
    if not routed or not settings.controls:
        return {}
    first = recipes[routed[0]]
    config: Any = adapter_config(first, **base.defaults)
    alike = {"r": config.r, "lora_alpha": config.scaling * config.r}
    made = {}
    for method in ("uniform", *(["oracle"] if len(base.tasks) > 1 else [])):
        if method not in recipes:
            taken = _known(method, {k: v for k, v in first.adapter.items() if k not in ("use_rslora", "rank_pattern")})
            number = len(base.tasks) if method == "oracle" else config.num_experts
            made[method] = replace(shared, method=method, adapter={**taken, **alike, "num_experts": number})
    return made


def _check_ranks(settings: CompareSettings, measure: str | None) -> None:
    """Raise ConfigError where a rank is set that would be solved."""
    if settings.match == "none":
        return
    given = {f"adapter.{key}" for key in settings.adapter if key in _RANKS}
    for arm, value in settings.arms.items():
        given |= {f"arms.{arm}.{key}" for key in _entry(arm, value)[1] if key in _RANKS and arm != measure}
    if given:
        raise ConfigError(
            f"{min(given)} and match={settings.match} disagree: ranks are solved; match=none takes them as they are, "
            f"budget=ARM arms.ARM.r=… sets that arm's and matches the others to it"
        )


def _bound(
    settings: CompareSettings, shared: Recipe, solved: dict[str, Recipe], budget: int | None, base: Any
) -> Recipe:
    """The oracle gate over experts that are each the plain LoRA arm, or what that would be."""
    plain = next((recipe for recipe in solved.values() if recipe.method == "lora"), None)
    if plain is None:
        plain = _recipe(settings, shared, "lora", {})
        plain = plain if budget is None else match_arm(settings, "lora", plain, budget, base)
    return replace(shared, method="oracle", adapter=_known("oracle", plain.adapter))
