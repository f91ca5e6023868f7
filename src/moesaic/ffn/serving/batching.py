"""What runs together: tokens whose experts are known, in batches of few experts (Read-ME's Algorithm 1, mended).

    while |S| < budget and something waits:
        e = argmax_e |Q[e]|;   S += as many of Q[e], oldest first, as fit

The printed algorithm indexes by the wrong letter and does not end on empty queues. Longest-queue-first alone may let a
token of a rare expert wait for ever: whatever has waited `max_wait` batches goes first. A prompt cannot be parted by
expert, for its tokens attend to each other: it waits in the queue of each of its experts and goes as a whole.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from moesaic.errors import ConfigError

Order = Literal["experts", "fcfs", "decode-first", "prefill-first"]


@dataclass(frozen=True)
class Item:
    """What one request has to run next: a prompt, or one token."""

    request: Hashable
    experts: tuple[int, ...]
    """Of each token."""
    since: int
    """The batch before which it arrived; it decides who is older, and within one batch the order of arrival does."""

    @property
    def tokens(self) -> int:
        return len(self.experts)

    @property
    def decodes(self) -> bool:
        return len(self.experts) == 1


def choose(
    items: Sequence[Item], budget: int, order: Order = "experts", *, now: int = 0, max_wait: int = 64
) -> list[Item]:
    """The next batch: of at most `budget` tokens, but of one item at least.

    Args:
        items: all that wait, in the order of their arrival.
        order: "experts" (Read-ME's), "fcfs", "decode-first" or "prefill-first" (what engines do that know no experts).
        now: the number of this batch.
        max_wait: batches after which an item goes before all others, with "experts".
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
    """Items in their order while they fit; the first goes however long it is, and none overtakes one that waits."""
    taken: list[Item] = []
    left = budget
    for item in items:
        if taken and item.tokens > left:
            break
        taken.append(item)
        left -= item.tokens
    return taken


def _by_expert(items: Sequence[Item], budget: int, now: int, max_wait: int) -> list[Item]:
    taken = _fill([item for item in items if now - item.since >= max_wait], budget)
    left = budget - sum(item.tokens for item in taken)
    chosen = {item.request for item in taken}
    queues: dict[int, list[Item]] = defaultdict(list)
    size: Counter[int] = Counter()
    for item in items:
        if item.request not in chosen:
            for expert in set(item.experts):
                queues[expert].append(item)
                size[expert] += item.experts.count(expert)
    have = {expert for item in taken for expert in item.experts}
    while left > 0 and size:
        expert = max(size, key=lambda e: (e in have, size[e], -e))
        del size[expert]
        for item in queues[expert]:
            if item.request in chosen or (item.tokens > left and taken):
                continue
            taken.append(item)
            chosen.add(item.request)
            left -= item.tokens
            have |= {*item.experts}
            for other in set(item.experts) & size.keys():
                size[other] -= item.experts.count(other)
            if left <= 0:
                break
        size = +size
    return taken
