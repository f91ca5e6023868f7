"""A world in which routing can be learned on two cores: questions about lists, and small models that know some tasks.

    single hop    4 1 8 2 up                one task of `models.nano.tasks`, by its cue
    two hops      4 1 8 2 up then turn      the second task on what the first one gives, and another specialist's

Specialists know two tasks each, a generalist all six at a higher price. Whom a question may be put to, by what name
and at what price, is drawn for each question and stands in its prompt, a line a model: task, name and price of each of
its tasks. So nobody can be asked by heart.

    up eve 2 , down eve 2
    up gus 7 , down gus 7 , back gus 7 , turn gus 7 , even gus 7 , top gus 7
    4 1 8 2 up then turn
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moesaic.errors import ConfigError
from moesaic.llms.catalog import Catalog, Model
from moesaic.llms.router_r1.engine import Question
from moesaic.models.nano.corpus import NAMES
from moesaic.models.nano.tasks import CUES, TASKS

Digits = Sequence[int]

KNOWS = {
    "order": ("asc", "desc"), "move": ("reverse", "rotate"), "pick": ("evens", "max"), "lists": tuple(TASKS),
}  # fmt: skip
GENERALIST, NEWCOMER = "lists", "newcomer"
"""The newcomer knows two tasks that no specialist knows together; it is the generalist, at a specialist's price."""
CHEAP, DEAR = (1, 3), (6, 9)
"""USD a million tokens, of specialists and of the generalist: whole numbers between these."""
WORDS, HELD = NAMES[:-2], NAMES[-2:]
"""Words that models go by; words that none goes by in training."""
FIRST = ("asc", "desc", "reverse", "rotate")
"""Tasks that leave a list for a second one."""


def applied(task: str, digits: Digits) -> list[int]:
    return TASKS[task](list(digits))


def written(digits: Digits) -> str:
    return " ".join(map(str, digits)) or "none"


def query(task: str, digits: Digits) -> str:
    """As a specialist is asked."""
    return f"{written(digits)} {CUES[task]} ="


def specialist(task: str) -> str:
    """The cheapest that knows a task."""
    return next(name for name, tasks in KNOWS.items() if task in tasks)


def told(question: Question) -> str:
    """The prompt: a line a model, and the question."""
    lines = [
        " , ".join(f"{cue} {model.name} {model.output_price:g}" for cue in model.description.split())
        for model in question.catalog.values()
    ]
    return "\n".join([*lines, question.text, ""])


def called(question: Question, name: str) -> str:
    """What one of `KNOWS`, or the newcomer, goes by in a question; empty where it is not offered."""
    return str(question.about["named"].get(name, ""))


def questions(
    models: Mapping[str, Model],
    n: int,
    hops: int,
    seed: int | str,
    *,
    fewest: int = 3,
    renamed: Mapping[str, str] | None = None,
    prices: Mapping[str, float] | None = None,
    exclude: frozenset[str] = frozenset(),
    newcomer: Collection[str] = (),
) -> list[Question]:
    """Questions of so many hops, each with a list of its own.

    Args:
        models: of `KNOWS`, by name, as they are served. fewest: of them a question offers as many at least; those that
            its tasks need, or the generalist, are among them.
        renamed: words that some go by here, in place of drawn ones. prices: in place of drawn ones.
        exclude: lists that are not asked about. newcomer: tasks of one that is offered too; each question has one.
    Raises:
        ConfigError: models are missing, or more hops are asked for than there are.
    """
    if hops not in (1, 2) or not KNOWS.keys() <= models.keys() or not 1 <= fewest <= len(KNOWS):
        raise ConfigError(f"one or two hops, and models {', '.join(KNOWS)}")
    draw, found, taken = random.Random(f"{seed} {hops}"), list[Question](), {*exclude}
    while len(found) < n:
        digits = [draw.randrange(10) for _ in range(draw.randint(4, 6))]
        tasks = [draw.choice(FIRST if hops == 2 else list(TASKS))]
        if hops == 2:
            tasks.append(draw.choice([t for t in TASKS if specialist(t) != specialist(tasks[0])]))
        if written(digits) in taken or (newcomer and not {*tasks} & {*newcomer}):
            continue
        taken.add(written(digits))
        found.append(_question(models, digits, tasks, draw, fewest, renamed or {}, prices, newcomer))
    return found


def _question(
    models: Mapping[str, Model],
    digits: Digits,
    tasks: Sequence[str],
    draw: random.Random,
    fewest: int,
    renamed: Mapping[str, str],
    prices: Mapping[str, float] | None,
    newcomer: Collection[str],
) -> Question:
    offered = draw.sample(list(KNOWS), draw.randint(fewest, len(KNOWS)))
    if any(not any(task in KNOWS[name] for name in offered) for task in tasks):
        offered.append(GENERALIST)
    knows = {**KNOWS, NEWCOMER: newcomer}
    offered += [NEWCOMER] if newcomer else []
    offered = draw.sample(offered, len(offered))
    words = {
        name: renamed.get(name, word) for name, word in zip(offered, draw.sample(WORDS, len(offered)), strict=True)
    }
    catalog = []
    for name in offered:
        price = draw.randint(*(DEAR if name == GENERALIST else CHEAP)) if prices is None else prices[name]
        cues = " ".join(CUES[task] for task in knows[name])
        model = models[GENERALIST if name == NEWCOMER else name]
        catalog.append(
            replace(
                model, name=words[name], served_as=model.served_as or model.name, aliases=[],
                output_price=float(price), description=cues,
            )
        )  # fmt: skip
    result: Digits = digits
    for task in tasks:
        result = applied(task, result)
    text = f"{written(digits)} {' then '.join(CUES[task] for task in tasks)}"
    about: dict[str, Any] = {"tasks": tuple(tasks), "digits": tuple(digits), "named": words}
    return Question(text, Catalog(catalog, "the world"), (written(result),), about=about)
