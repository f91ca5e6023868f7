"""The text that nano is pre-trained on: one-line documents from seven small domains, all generated here.

A document is a prompt and its answer (``Line``), so the same generators give held-out questions with exact answers.
Two rules shape what is in it:

* every word that a fine-tuning task may use as a cue is in the ``say`` domain, so that its embedding is trained;
* the fine-tuning tasks are not given away: no line has the form ``LIST cue =``, and descending order, reversal,
  rotation and keeping some digits are absent, so that the base scores next to nothing on them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Line(NamedTuple):
    """One document: ``prompt + answer`` is its text."""

    domain: str
    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Words that tasks may put after a list. Each is one token, and each is trained by the ``say`` domain only.
CUE_WORDS = _words(
    "up down back turn even top less more flip rise fall spin keep drop pick swap near far deep high "
    "odd low mix fold lift push pull roll code lock key mask"
)

COLOURS = _words("red blue green black white brown pink grey gold silver")
NAMES = _words("ann bob cat dan eve fay gus hal ida jim kim leo")
THINGS = _words("book cup box hat pen lamp coat shoe map ring ball bag")
DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
MONTHS = _words("january february march april may june july august september october november december")
LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ORDINALS = _words("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")
GOOD = _words("lovely great bright warm kind fine happy fresh clean sweet")
BAD = _words("awful cold dull rude sad stale dirty slow bitter broken")
LIKED = _words("liked loved enjoyed praised")
LOATHED = _words("hated feared left cursed")
PLACES = _words("house garden street school shop train park river hotel town")
FOODS = _words("soup bread cake tea rice fish apple cheese")


def _digits(rng: random.Random, low: int = 3, high: int = 7) -> list[int]:
    return [rng.randrange(10) for _ in range(rng.randint(low, high))]


def _row(values: list[int]) -> str:
    return "".join(f" {value}" for value in values)


# Looking up by place and by neighbour is what reordering a list is made of, as lookup in a table is.
LIST_KINDS = {
    "sort": 20,
    "copy": 14,
    "nth": 12,
    "neighbour": 12,
    "remove": 10,
    "max": 8,
    "plus": 6,
    "last": 5,
    "length": 4,
    "first": 4,
    "order": 3,
    "next": 2,
}


def _lists(rng: random.Random) -> tuple[str, str]:
    xs = _digits(rng)
    # Half of the questions put the list first: a line's first digit has no space before it, a token of its own.
    ahead, bare = rng.random() < 0.5, _row(xs).lstrip()
    kind = rng.choices(list(LIST_KINDS), list(LIST_KINDS.values()))[0]
    match kind:
        case "sort":
            return f"sort{_row(xs)} :", _row(sorted(xs))
        case "copy":
            return f"copy{_row(xs)} :", _row(xs)
        case "max":
            return (f"the largest of{_row(xs)} is" if ahead else f"{bare} has largest"), f" {max(xs)}"
        case "first":
            return (f"the first of{_row(xs)} is" if ahead else f"{bare} starts with"), f" {xs[0]}"
        case "last":
            return (f"the last of{_row(xs)} is" if ahead else f"{bare} ends with"), f" {xs[-1]}"
        case "length":
            return (f"the length of{_row(xs)} is" if ahead else f"{bare} has length"), f" {len(xs)}"
        case "remove":
            gone = rng.choice(xs)
            xs = [gone] * len(xs) if rng.random() < 0.1 else xs
            return f"remove {gone} from{_row(xs)} :", _row([x for x in xs if x != gone]) or " none"
        case "plus":
            xs = [x % 9 for x in xs]
            return f"add one to{_row(xs)} :", _row([x + 1 for x in xs])
        case "nth":
            i = rng.randrange(len(xs))
            return f"the {ORDINALS[i]} of{_row(xs)} is", f" {xs[i]}"
        case "neighbour":
            xs = rng.sample(range(10), len(xs))  # all different, so that there is one answer
            i = rng.randrange(len(xs) - 1)
            if rng.random() < 0.5:
                return f"in{_row(xs)} before {xs[i + 1]} comes", f" {xs[i]}"
            return f"in{_row(xs)} after {xs[i]} comes", f" {xs[i + 1]}"
        case "order":
            a, b = rng.sample(range(10), 2)
            return f"compare {a} and {b} :", " smaller" if a < b else " larger"
        case _:
            a = rng.randrange(9)
            return f"after {a} comes", f" {a + 1}"


def _arithmetic(rng: random.Random) -> tuple[str, str]:
    op = rng.choices(["+", "-", "*"], [5, 4, 2])[0]
    if op == "*":
        a, b = rng.randrange(10), rng.randrange(10)
        return f"{a} * {b} =", f" {a * b}"
    a, b = (rng.randrange(rng.choice([10, 100])) for _ in range(2))
    if op == "-":
        a, b = max(a, b), min(a, b)
        return f"{a} - {b} =", f" {a - b}"
    return f"{a} + {b} =", f" {a + b}"


def _table(rng: random.Random) -> tuple[str, str]:
    """A small table and up to three queries about it, by key or (the values being distinct) by value."""
    size = rng.randint(2, 5)
    keys = rng.sample(rng.choice([COLOURS, NAMES, THINGS]), size)
    values = rng.sample(range(10), size)
    rows = " , ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    asked = []
    for i in rng.sample(range(size), min(size, rng.randint(1, 3))):
        by_key = rng.random() < 0.7
        asked.append((f"{keys[i]} ?", f" {values[i]}") if by_key else (f"who has {values[i]} ?", f" {keys[i]}"))
    *before, (query, answer) = asked
    return f"{rows} ; {''.join(f'{q}{a} , ' for q, a in before)}{query}", answer


def _prose(rng: random.Random) -> tuple[str, str]:
    good = rng.random() < 0.5
    word = rng.choice(GOOD if good else BAD)
    verb = rng.choice(LIKED if good else LOATHED)
    name, place, food, thing = (rng.choice(pool) for pool in (NAMES, PLACES, FOODS, THINGS))
    text = rng.choice(
        [
            f"the {food} at the {place} was {word} and {name} {verb} it .",
            f"{name} {verb} the {word} {place} .",
            f"it was a {word} day and {name} {verb} the {food} .",
            f"in the {place} {name} found a {word} {thing} .",
            f"{name} said that the {food} was {word} .",
            f"they {verb} the {place} because the people were {word} .",
        ]
    )
    return f"{text} mood :", " good" if good else " bad"


def _dates(rng: random.Random) -> tuple[str, str]:
    kind = rng.randrange(5)
    d, m = rng.randrange(7), rng.randrange(12)
    if kind == 0:
        step = rng.choice([1, -1])
        return f"the day {'after' if step > 0 else 'before'} {DAYS[d]} is", f" {DAYS[(d + step) % 7]}"
    if kind == 1:
        step = rng.choice([1, -1])
        return f"the month {'after' if step > 0 else 'before'} {MONTHS[m]} is", f" {MONTHS[(m + step) % 12]}"
    if kind == 2:
        return f"{MONTHS[m]} has", f" {LENGTHS[m]} days"
    if kind == 3:
        return f"the {ORDINALS[m]} month is", f" {MONTHS[m]}"
    n = rng.randint(2, 6)
    return f"{n} days after {DAYS[d]} is", f" {DAYS[(d + n) % 7]}"


def _logic(rng: random.Random) -> tuple[str, str]:
    def term() -> tuple[str, bool]:
        value, negated = rng.random() < 0.5, rng.random() < 0.3
        return f"{'not ' if negated else ''}{'true' if value else 'false'}", value != negated

    text, value = term()
    for _ in range(rng.randint(0 if text.startswith("not") else 1, 2)):
        op = rng.choice(["and", "or"])
        more, other = term()
        # Read from left to right, without precedence.
        text, value = f"{text} {op} {more}", (value and other) if op == "and" else (value or other)
    return f"{text} is", " true" if value else " false"


_SAYABLE = (*COLOURS, *NAMES, *THINGS, *DAYS, *MONTHS, *GOOD, *BAD, *PLACES, *FOODS, "none")


def _say(rng: random.Random) -> tuple[str, str]:
    words = [rng.choice(CUE_WORDS) if rng.random() < 0.7 else rng.choice(_SAYABLE) for _ in range(rng.randint(2, 5))]
    row = "".join(f" {word}" for word in words)
    return f"say{row} :", row


DOMAINS: dict[str, tuple[float, Callable[[random.Random], tuple[str, str]]]] = {
    "lists": (40, _lists),
    "arithmetic": (15, _arithmetic),
    "table": (15, _table),
    "prose": (12, _prose),
    "dates": (8, _dates),
    "logic": (8, _logic),
    "say": (7, _say),
}


def lines(seed: int, *, domain: str | None = None) -> Iterator[Line]:
    """Documents without end, the same for the same seed; from one domain, or from all in their shares."""
    rng = random.Random(seed)
    names = list(DOMAINS)
    weights = [DOMAINS[name][0] for name in names]
    while True:
        name = domain or rng.choices(names, weights)[0]
        yield Line(name, *DOMAINS[name][1](rng))
