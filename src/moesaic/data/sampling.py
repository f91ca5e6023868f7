"""Task-interleaved order: every stretch of a run, down to one batch, holds the tasks in the same proportions.

Losses across sequences (HotMoE's similarity term) need unlike tasks side by side, and a gradient step that sees all
tasks is steadier than one that sees whichever a shuffle brought. The order is a function of the seed alone, so a
resumed run continues where it stopped.
"""

import heapq
import math
import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from moesaic.errors import ConfigError, DataError


def quotas(sizes: Sequence[int], temperature: float) -> list[float]:
    """The share of each task: n_t^(1/temperature), normalised. 1 is proportional to size, inf is equal shares."""
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; it must be above 0 (1: proportional to size, inf: equal)")
    if any(n < 1 for n in sizes):
        raise DataError("a task without examples cannot be sampled")
    logs = [math.log(n) / temperature for n in sizes]
    raw = [math.exp(x - max(logs)) for x in logs]
    return [w / sum(raw) for w in raw]


def interleave(
    groups: Sequence[Sequence[int]], length: int, *, seed: int, temperature: float = math.inf
) -> Iterator[int]:
    """Yield `length` row indices from `groups` (one list of rows a task).

    Tasks follow each other by smallest lag (the one furthest behind its quota is next), so after n draws a task's count
    is within a constant of n times its share; at equal shares this is a round robin. Within a task the rows are
    shuffled, and shuffled anew each time all of them were drawn.
    """
    shares = quotas([len(rows) for rows in groups], temperature)
    order = list(range(len(groups)))
    random.Random(f"{seed}/tasks").shuffle(order)
    # due: when the task's next draw is due, with the middle of each interval as its date; rank breaks ties
    due = [(0.5 / shares[t], rank, t) for rank, t in enumerate(order)]
    heapq.heapify(due)
    rows = [_cycle(group, f"{seed}/{t}") for t, group in enumerate(groups)]
    for _ in range(length):
        date, rank, task = due[0]
        yield next(rows[task])
        heapq.heapreplace(due, (date + 1 / shares[task], rank, task))


def _cycle(rows: Sequence[int], seed: str) -> Iterator[int]:
    epoch = 0
    while True:
        order = list(rows)
        random.Random(f"{seed}/{epoch}").shuffle(order)
        yield from order
        epoch += 1


class InterleavedSampler(Sampler[int]):
    """`interleave` as a sampler: one pass is the whole run, so skipping n batches is all that resuming takes.

    Args:
        tasks: the task of each row of the data set.
        length: how many rows the run draws (steps x batch x accumulation x processes).
    """

    def __init__(self, tasks: Sequence[str], length: int, *, seed: int, temperature: float = math.inf) -> None:
        groups: dict[str, list[int]] = {}
        for row, task in enumerate(tasks):
            groups.setdefault(task, []).append(row)
        self.groups = [groups[task] for task in sorted(groups)]
        self.length = length
        self.seed = seed
        self.temperature = temperature
        quotas([len(g) for g in self.groups], temperature)

    def __iter__(self) -> Iterator[int]:
        return interleave(self.groups, self.length, seed=self.seed, temperature=self.temperature)

    def drawn(self) -> list[int]:
        """The rows that the run draws at all, ascending; a long run is followed until it has drawn every one."""
        there, found = sum(map(len, self.groups)), set[int]()
        for row in self:
            found.add(row)
            if len(found) == there:
                break
        return sorted(found)

    def __len__(self) -> int:
        return self.length
