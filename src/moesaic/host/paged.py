"""Continuous batching (`generate_batch`, `transformers serve`): prompts and answers of many requests in one flat row.

A request's tokens lie in pages of the cache. What was kept for the last token of a page is found again by the page, so
requests whose beginnings share pages share it too. A token is an answer when the logits of the one before it were asked
for; it comes alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.host.memory import UNKNOWN, memory_of
from moesaic.routing.sums import TokenSums

PARTS = (
    "continuous batching shows a prompt in parts, or shares the beginnings of prompts: what goes by the prompt's text "
    "goes by its first part. Give a ContinuousBatchingConfig with allow_block_sharing=False and max_batch_tokens above "
    "the longest prompt"
)


class Paged:
    """One forward's requests: where each begins, what lies before it, and which page each of its tokens is written to.

    Attributes:
        sequences: the request of each token (1, T), counted over the forward.
        prompt: True on tokens that were given (1, T).
        sums: running sums that go on within each request.
    """

    def __init__(self, arguments: Mapping[str, Any], prompts: frozenset[tuple[int, ...]] = frozenset()) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ConfigError(
                "a mixture that routes by the prompt cannot run in CUDA graphs: give generate_batch a "
                "ContinuousBatchingConfig with use_cuda_graph=False"
            )
        cache, positions = arguments["cache"], arguments["position_ids"][0].long()
        kinds = list(cache.cache_allocators)
        kind = "full_attention" if "full_attention" in kinds else kinds[0]
        group, allocator = kinds.index(kind), cache.cache_allocators[kind]
        lengths = arguments["cu_seq_lens_q"].long().diff()
        used = lengths > 0
        self.lengths = lengths[used]
        self.ends = self.lengths.cumsum(0)
        self.starts = self.ends - self.lengths
        tokens = int(self.ends[-1])
        request = torch.repeat_interleave(self.lengths)
        padding = len(positions) - tokens
        self.sequences = torch.nn.functional.pad(request, (0, padding), value=len(self.lengths) - 1)[None]
        past = positions[self.starts]
        behind = past > 0
        table, page, stride = arguments.get("block_table"), allocator.tokens_per_page, allocator.block_physical_stride
        if table is not None:
            rows = torch.arange(len(past), device=past.device)
            pages, before = (table[group, rows, at.clamp(min=0) // page].long() for at in (past, past - 1))
            pages, before = pages // (stride // page), before // (stride // page)
        else:
            pages = arguments["write_index"][group][:tokens] // stride
            read, ends = arguments["read_index"][group], arguments["cu_seq_lens_k"][kind].long()[1:][used]
            if read.numel():
                before = torch.where(behind, read[(ends - self.lengths - 1).clamp(min=0)] // stride, 0)
            else:
                before = torch.zeros_like(past)
        self.memory = memory_of(cache)
        self._size = int(torch.cat([pages, before]).max()) + 1
        last_of = self._table((Paged, "last"), past.new_full((1,), -1))
        answers = self._table((Paged, "answers"), past.new_zeros(1, dtype=torch.bool))
        self.found = behind & (last_of[before] == past - 1)
        if bool((behind & ~self.found).any()):
            warnings.warn(UNKNOWN, stacklevel=2)
        answering = self.found & answers[before] & (self.lengths == 1)
        self.prompt = ~answering[self.sequences]
        self._leave_answers_out(arguments["input_ids"][0], past, prompts)
        self.before = before
        closes = torch.ones(tokens, dtype=torch.bool, device=past.device)
        closes[:-1] = (pages[1:] != pages[:-1]) | (request[1:] != request[:-1])
        self.closes = closes.nonzero().squeeze(-1)
        self.pages = pages[self.closes]
        asked = torch.zeros(len(positions), dtype=torch.bool, device=past.device)
        asked[arguments["logits_indices"].long()] = True
        self.whole = ~behind & asked[self.ends - 1]
        self.part = ~answering & ~self.whole
        last_of[self.pages] = positions[self.closes]
        answers[self.pages] = asked[self.closes] | answering[request[self.closes]]
        self.sums = PagedSums(self)

    def _leave_answers_out(self, ids: Tensor, past: Tensor, prompts: frozenset[tuple[int, ...]]) -> None:
        """A request that lost its pages is read again, its answer with it: known by its prompt."""
        lengths = sorted({len(prompt) for prompt in prompts if prompt}, reverse=True)
        begun = ((past == 0) & (self.lengths > 1)).nonzero().flatten().tolist() if prompts else []
        for begin, end in ((int(self.starts[i]), int(self.ends[i])) for i in begun):
            row = tuple(ids[begin:end].tolist())
            length = next((n for n in lengths if n <= len(row) and row[:n] in prompts), len(row))
            self.prompt[0, begin + length : end] = False

    def _table(self, key: object, empty: Tensor) -> Tensor:
        """What is kept under `key` of each page, long enough for this forward's; a new page has the row `empty`."""
        table: Tensor = self.memory.get(key, empty)
        if key not in self.memory or len(table) < self._size:
            table = torch.cat([table, empty.expand(2 * self._size - len(table), *empty.shape[1:])])
            self.memory[key] = table
        return table

    def carried(self, key: object, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The table kept under `key` (pages, width), and what it holds of each request so far: 0 of a new one."""
        table = self._table(key, like.new_zeros(1, width))
        return table, table[self.before] * self.found.unsqueeze(-1)

    def scores(self, ids: Tensor, read: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """What each token's prompt says of the experts (1, T, E), `read` off the tokens of the requests that begin."""
        if bool(self.part.any()):
            warnings.warn(PARTS, stacklevel=2)
        begin = [(int(a), int(b)) for a, b, found in zip(self.starts, self.ends, self.found, strict=True) if not found]
        texts = [read(ids[:, a:b][self.prompt[:, a:b]][None], None) for a, b in begin]
        width = texts[0].shape[-1] if texts else self.memory["width"]
        self.memory["width"] = width
        table, rows = self.carried("scores", width, texts[0] if texts else torch.zeros((), device=ids.device))
        if texts:
            rows = rows.masked_scatter(~self.found.unsqueeze(-1), torch.cat(texts).to(rows))
        by_token = rows[self.sequences]
        table[self.pages] = by_token[0, self.closes]
        return by_token


class PagedSums(TokenSums):
    def __init__(self, paged: Paged) -> None:
        self.paged = paged

    def __call__(self, router: object, values: Tensor, sequences: Tensor | None = None) -> Tensor:
        paged = self.paged
        table, before = paged.carried(router, values.shape[-1], values.detach())
        sums = super().__call__(router, values, paged.sequences) + before[paged.sequences]
        table[paged.pages] = sums[0, paged.closes].detach()
        return sums


def is_paged(arguments: Mapping[str, Any]) -> bool:
    return hasattr(arguments.get("cache"), "cache_allocators") and "cu_seq_lens_q" in arguments
