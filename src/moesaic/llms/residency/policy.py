"""Which language models stay in a memory of limited bytes, and which is loaded before it is asked for.

| policy | who leaves | who is loaded ahead |
| --- | --- | --- |
| `lru` | whoever was used longest ago | nobody |
| `prefetch` | whoever is needed last: by the requests that wait, then by the router's shares | whoever is needed next |

Models that are pinned never leave. `prefetch` is Belady's policy over what is known; of those that nobody is known to
need, the one used longest ago leaves. A model's share p stands for a request in 1/p requests from the last that waits
(ours: the mean of a geometric distribution).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, get_args

from moesaic.errors import ConfigError, suggest
from moesaic.routing.residency import Residency

Policy = Literal["lru", "prefetch"]


class Resident:
    """Models of known sizes within `limit` bytes. It decides and counts; whoever asks holds the models.

    Args:
        sizes: bytes by model.
        limit: bytes.
        pinned: models that stay once they are in.
        shares: of requests, by model, as far as they are known.

    Attributes:
        waiting: models of the requests that wait, in their order; whoever asks sets it.
        cache: what is in, with its hits, misses and bytes. A use that follows a load ahead counts as a miss.

    Raises:
        ConfigError: an unknown name or policy, or a model that does not fit beside the pinned ones.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        limit: int,
        *,
        policy: Policy = "lru",
        pinned: Collection[str] = (),
        shares: Mapping[str, float] | None = None,
    ) -> None:
        if policy not in get_args(Policy):
            raise ConfigError(f"policy={policy}; {suggest(policy, get_args(Policy))}")
        self.sizes, self.policy, self.pinned, self.shares = dict(sizes), policy, frozenset(pinned), dict(shares or {})
        for name in (*self.pinned, *self.shares):
            if name not in sizes:
                raise ConfigError(f"no model {name!r} to pin or to expect; {suggest(name, sizes)}")
        check_fit(self.sizes, limit, self.pinned)
        self.cache = Residency(limit, "lru" if policy == "lru" else "belady", self.next_use)
        self.waiting: Sequence[str] = ()

    def next_use(self, name: str) -> float:
        """In how many requests a model is needed, as far as that is known; infinity where it is not."""
        if name in self.waiting:
            return self.waiting.index(name)
        share = self.shares.get(name, 0.0)
        return len(self.waiting) + 1 / share if share > 0 else math.inf

    def use(self, name: str, busy: Iterable[str] = ()) -> list[str]:
        """Have a model in for a request; returns who left for it, none of them pinned or in `busy`.

        Raises:
            ConfigError: those that must stay leave no room; nothing has changed.
        """
        return self._admit(name, busy, count=True)

    def ahead(self, among: Iterable[str], busy: Iterable[str] = ()) -> tuple[str, list[str]] | None:
        """Have in who of some is needed next, if only those needed later must leave; its name, and who left."""
        if self.policy == "lru":
            return None
        missing = [name for name in among if name not in self.cache.sizes]
        name = min(missing, key=self.next_use, default=None)
        if name is None or self.next_use(name) == math.inf:
            return None
        sooner = [other for other in map(str, self.cache.sizes) if self.next_use(other) <= self.next_use(name)]
        try:
            return name, self._admit(name, [*busy, *sooner], count=False)
        except ConfigError:
            return None

    def drop(self, name: str) -> None:
        """Forget that a model is in."""
        self.cache.drop(name)

    def _admit(self, name: str, staying: Iterable[str], *, count: bool) -> list[str]:
        left = self.cache.use(name, self.sizes[name], pinned={*staying, *self.pinned}, count=count)
        return [str(other) for other in left]


def check_fit(sizes: Mapping[str, int], limit: int, pinned: Collection[str] = ()) -> None:
    """Raise ConfigError where a model does not fit into so many bytes beside those that are pinned."""
    held = sum(sizes[name] for name in pinned)
    if held > limit:
        raise ConfigError(f"the pinned models take {held:,} bytes of {limit:,}: pin fewer, or raise the limit")
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} takes {size} bytes: a model's size must be above 0")
        if name not in pinned and size > limit - held:
            beside = f" beside {held:,} of pinned ones" if held else ""
            raise ConfigError(f"{name} takes {size:,} bytes of {limit:,}{beside}: raise the limit, or leave it out")
