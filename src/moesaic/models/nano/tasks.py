"""Six tasks that want different answers for the same list of digits: ``LIST cue =`` -> `` ANSWER``.

    4 1 8 2 up =      1 2 4 8        ascending
    4 1 8 2 down =    8 4 2 1        descending
    4 1 8 2 back =    2 8 1 4        reversed
    4 1 8 2 turn =    1 8 2 4        rotated by one: the first goes last
    4 1 8 2 even =    4 8 2          only the even ones, or `` none``
    4 1 8 2 top =     8              the largest

The cue is all that tells the tasks apart; each belongs to one task, so the prompt determines the answer across the
mixture. nano knows the cues' words but has seen none of these questions in pre-training. The cue comes `"last"`, as
here; `"first"`, `` up 4 1 8 2 =``; or first and in `"pieces"`, ``up 4 1 8 2 =``: without the blank before it the
tokenizer breaks every cue but ``up`` into letters or syllables that mean nothing to nano, and what the task is has to
be put together from them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

from moesaic.errors import ConfigError

__all__ = ["CUES", "PROMPTS", "TASKS", "Cue", "list_of", "make_examples", "make_split"]

Digits = list[int]

TASKS: dict[str, Callable[[Digits], Digits]] = {
    "asc": sorted,
    "desc": lambda xs: sorted(xs, reverse=True),
    "reverse": lambda xs: xs[::-1],
    "rotate": lambda xs: xs[1:] + xs[:1],
    "evens": lambda xs: [x for x in xs if x % 2 == 0],
    "max": lambda xs: [max(xs)],
}

Cue = Literal["last", "first", "pieces"]
PROMPTS: dict[Cue, str] = {"last": "{list} {cue} =", "first": " {cue} {list} =", "pieces": "{cue} {list} ="}

CUES = {"asc": "up", "desc": "down", "reverse": "back", "rotate": "turn", "evens": "even", "max": "top"}

# There are 1,110,000 lists of 4 to 6 digits; up to here, drawing until one is new stays quick.
MOST = 200_000


def list_of(prompt: str) -> str:
    """The list in a prompt, as ``make_examples`` takes it in ``exclude``: ``"4 1 8 up ="`` -> ``"4 1 8"``."""
    return " ".join(word for word in prompt.split() if word.isdecimal())


def make_examples(
    task: str, n: int, seed: int, *, exclude: frozenset[str] = frozenset(), cue: Cue = "last"
) -> list[dict[str, str]]:
    """``n`` rows ``{"task", "prompt", "completion"}``, each with a list of its own, none of them in ``exclude``.

    The completion begins with its space, so its tokens are the same alone and after the prompt.
    The same task and seed give the same rows. Raises ConfigError for an unknown task or an impossible ``n``.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    if not 0 <= n <= MOST - len(exclude):
        raise ConfigError(f"cannot make {n} examples with {len(exclude)} lists excluded: both together, at most {MOST}")
    rng = random.Random(f"{task} {seed}")
    taken = set(exclude)
    rows: list[dict[str, str]] = []
    while len(rows) < n:
        xs = [rng.randrange(10) for _ in range(rng.randint(4, 6))]
        text = " ".join(map(str, xs))
        if text in taken:
            continue
        taken.add(text)
        answer = "".join(f" {x}" for x in TASKS[task](xs)) or " none"
        rows.append({"task": task, "prompt": PROMPTS[cue].format(list=text, cue=CUES[task]), "completion": answer})
    return rows


def make_split(
    train_per_task: int, test_per_task: int, seed: int, *, cue: Cue = "last"
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and test rows of all six tasks, the tasks taking turns.

    No list of the test rows occurs in the training rows, whatever the task.
    """
    test = [make_examples(task, test_per_task, 2 * seed, cue=cue) for task in TASKS]
    held_out = frozenset(list_of(row["prompt"]) for rows in test for row in rows)
    train = [make_examples(task, train_per_task, 2 * seed + 1, exclude=held_out, cue=cue) for task in TASKS]
    return _take_turns(train), _take_turns(test)


def _take_turns(per_task: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    return [row for rows in zip(*per_task, strict=True) for row in rows]
