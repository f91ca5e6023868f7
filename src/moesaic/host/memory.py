"""What a KV cache's tokens were to the routers: kept on the cache itself, so that copies of it take it along.

A router that goes by the prompt has read it when decoding begins. It keeps sums over the prompt's tokens: a cache may
grow by whole prompts, by chunks, by single tokens or by guesses that are taken back, and all come to the same, as long
as it is known which tokens were given and which are answers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moesaic.host.fitting import by_row
from moesaic.host.prompts import Prompt
from moesaic.routing.sums import TokenSums

_NAME = "_moesaic"

UNKNOWN = (
    "this KV cache holds tokens that the routers have not read, or lost some of the prompt that they have: routing by "
    "the prompt now goes by the rest of it. Fill caches with this model and its adapter, from their beginning"
)


class Memory(dict[Any, Any]):
    """By router, what it keeps; and how much of the cache's tokens that covers."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        """Tokens a row that were read."""
        self.given = 0
        """Of these the prompt's: the place behind the last of them."""
        self.known = True
        """Whether all of the cache's tokens went through the model with it."""
        self.past = 0
        """Tokens that lay in the cache when the running forward began."""
        self.read: dict[Any, int] = {}
        """By router, how many tokens it has read: none of those that another adapter, or none, was active for."""
        self.judged: Prompt | None = None
        self.prompt: Prompt | None = None
        """What is answered on this cache: the prompt of `generate` that was `judged`, or another that nobody told."""
        self.scores: Tensor | None = None
        self.ids: list[tuple[Tensor, Tensor | None]] = []
        """The prompt's token ids so far and which of them are real, where scores are read off them."""

    def open(self, past: int | None, tokens: int | None, prompt: int | None) -> int:
        """A forward of `tokens` behind `past` in the cache (None: some). Returns how many of its tokens are given.

        `prompt`: the prompt's length, where it is known; else a single token behind others is an answer.
        """
        if past == 0:
            self.forget()
        if past is None:
            past = self.length
        elif past != self.length and not self.given <= past < self.length:
            self.known = False
        tokens, self.past = tokens or 0, past
        given = tokens if prompt is None else min(max(prompt - past, 0), tokens)
        if prompt is None and past > 0 and tokens == 1:
            given = 0
        self.length = past + tokens
        self.given = past + given if given else self.given
        return given

    def forget(self) -> None:
        """All that was read; not whose prompt is answered."""
        self.clear()
        self.__dict__.update(Memory().__dict__, judged=self.judged, prompt=self.prompt)

    def ask(self, router: object) -> None:
        """Warn, once for a cache, if what a router asks for cannot be known. It reads the running forward."""
        if not self.known or self.read.get(router, 0) < self.past:
            self.known = True
            warnings.warn(UNKNOWN, stacklevel=2)
        self.read[router] = self.length

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        """Copies are of the same routers."""
        new = Memory()
        new.__dict__.update(self.__dict__, ids=list(self.ids), read=dict(self.read))
        new.update({key: value.clone() if isinstance(value, Tensor) else value for key, value in self.items()})
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, ()


def memory_of(cache: Any) -> Memory:
    """The memory on `cache`; a new one where it has none."""
    memory = getattr(cache, _NAME, None)
    return memory if isinstance(memory, Memory) else remember(cache, Memory())


def remember(cache: Any, memory: Memory) -> Memory:
    """Keep `memory` on a cache that can hold it: tuples cannot. Whoever reorders the cache's rows reorders its own."""
    if hasattr(cache, "__dict__"):
        setattr(cache, _NAME, memory)
        for name in _ROWS:
            if callable(getattr(type(cache), name, None)) and name not in vars(cache):
                setattr(cache, name, partial(_of_rows, cache, name))
    return memory


_ROWS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda rows, index: (
        rows.index_select(0, index.to(rows.device)) if len(rows) == len(index) else rows
    ),
    "batch_select_indices": lambda rows, index: rows[index.to(rows.device)] if len(rows) > int(index.max()) else rows,
    "batch_repeat_interleave": lambda rows, times: rows.repeat_interleave(times, dim=0),
}
"""What can be done to the rows of a cache, done to what was kept of them; beams may share what is kept of their row."""


def _of_rows(cache: Any, name: str, asked: Any) -> Any:
    memory, change = memory_of(cache), _ROWS[name]
    for key, value in memory.items():
        if isinstance(value, Tensor) and value.dim() > 1:
            memory[key] = change(value, asked)
    if memory.scores is not None and len(memory.scores) > 1:
        memory.scores = change(memory.scores, asked)
    memory.ids = [tuple(None if t is None else change(t, asked) for t in part) for part in memory.ids]  # type: ignore[misc]
    return getattr(type(cache), name)(cache, asked)


class CachedSums(TokenSums):
    """Sums that go on from those of the tokens that are in the cache already."""

    def __init__(self, memory: Memory, *, answering: bool = False) -> None:
        self.memory, self.answering = memory, answering

    def kept(self, router: object, read: Tensor) -> Tensor | None:
        if not self.answering or torch.compiler.is_compiling():
            return None
        self.memory.ask(router)
        return by_row(self.memory.get(router), read, None, "the cache's routing")

    def __call__(self, router: object, values: Tensor, sequences: Tensor | None = None) -> Tensor:
        sums = super().__call__(router, values, sequences)
        if sequences is not None or torch.compiler.is_compiling():
            return sums
        self.memory.ask(router)
        before = by_row(self.memory.get(router), values, None, "the cache's routing")
        if before is not None:
            sums = sums + before
        self.memory[router] = sums[..., -1:, :].detach().clone()
        return sums
