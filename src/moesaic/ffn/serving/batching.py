"""What runs together: tokens whose experts are known, in batches of few experts (Read-ME's Algorithm 1, mended).

    while |S| < budget and something waits:
        e = argmax_e |Q[e]|;   S += as many of Q[e], oldest first, as fit

The printed algorithm indexes by the wrong letter and does not end on empty queues. Longest-queue-first alone may let a
token of a rare expert wait for ever: whatever has waited `max_wait` batches goes first. A prompt's tokens attend to
those before them and run in their order, but not all at once: it waits in the queue of its next token's expert, and as
much of it goes as needs no other expert, or as the budget takes. Tokens that were written go first, prompts where room
is left: that lowers latency, as what runs ends sooner. So written tokens, each free to run, take as few experts as can
be, and never more than first come, first served; a batch with prompts in it may.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal, get_args

from moesaic.errors import ConfigError

Order = Literal["experts", "fcfs", "decode-first", "prefill-first"]


@dataclass(frozen=True)
class Item:
    """What one request has to run next: the rest of a prompt, or one token."""

    request: Hashable
    experts: tuple[int, ...]
    """Of each token."""
    since: int
    """The batch before which it arrived; it decides who is older, and within one batch the order of arrival does."""
    decodes: bool = False
    """Whether it is a token that was written, and no prompt."""

    @property
    def tokens(self) -> int:
        return len(self.experts)

    def first(self, count: int) -> Item:
        """Its first tokens."""
        return replace(self, experts=self.experts[:count])


def choose(
    items: Sequence[Item], budget: int, order: Order = "experts", *, now: int = 0, max_wait: int = 64
) -> list[Item]:
    """The next batch, of at most `budget` tokens: of each item that is in it, the first tokens.

    Args:
        items: all that wait, in the order of their arrival.
        order: "experts" (Read-ME's), "fcfs", "decode-first" or "prefill-first" (what engines do that know no experts).
        now: the number of this batch.
        max_wait: batches after which an item goes before all others, with "experts".
    Raises:
        ConfigError: for an order that is none, or a budget below 1.
    """
    if order not in get_args(Order):
        raise ConfigError(f"unknown order {order!r}: choose one of {', '.join(get_args(Order))}")
    if budget < 1:
        raise ConfigError(f"a batch of {budget} tokens holds nothing: at least 1")
    if order == "experts":
        return _by_expert(items, budget, now, max_wait)
    first = {"fcfs": _same, "decode-first": lambda i: not i.decodes, "prefill-first": lambda i: i.decodes}[order]
    return _fill(sorted(items, key=first), budget)


def _same(item: Item) -> bool:
    return False


def _fill(items: Iterable[Item], budget: int) -> list[Item]:
    """Items in their order until the budget is spent."""
    taken: list[Item] = []
    for item in items:
        if budget <= 0:
            break
        taken.append(item.first(budget))
        budget -= taken[-1].tokens
    return taken


def _by_expert(items: Sequence[Item], budget: int, now: int, max_wait: int) -> list[Item]:
    taken = {item.request: item.tokens for item in _fill((i for i in items if now - i.since >= max_wait), budget)}
    left = budget - sum(taken.values())
    have = {expert for item in items for expert in item.experts[: taken.get(item.request, 0)]}
    for group in ([item for item in items if item.decodes], items):
        while left > 0:
            queues: Counter[int] = Counter()
            for item in group:
                rest = item.experts[taken.get(item.request, 0) :]
                run = len([*takewhile(have.__contains__, rest)])
                if run and left:
                    run = min(run, left)
                    taken[item.request] = taken.get(item.request, 0) + run
                    left -= run
                    rest = rest[run:]
                if rest:
                    queues[rest[0]] += len([*takewhile(rest[0].__eq__, rest)])
            if not queues:
                break
            have.add(max(queues, key=lambda expert: (queues[expert], -expert)))
    return [item.first(taken[item.request]) for item in items if item.request in taken]
