"""An engine for Read-ME models: continuous batches chosen by expert, experts on disk, loads ahead of time.

A token's experts are known in every layer before the model runs, so a batch can be made of tokens with few experts, and
the next layer's are read while this one computes. Decoding is greedy.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from moesaic.errors import AdapterError, ConfigError
from moesaic.ffn.places import expert_layers
from moesaic.ffn.pregate import PreGate
from moesaic.ffn.serving import attention
from moesaic.ffn.serving.batching import Item, Order, choose
from moesaic.ffn.serving.files import CHECKSUMS, ExpertFiles
from moesaic.ffn.serving.loading import without_experts
from moesaic.ffn.serving.streamed import Store, StreamedBank
from moesaic.routing.residency import Policy, Residency

logger = logging.getLogger(__name__)

HORIZON = 8
"""Batches that are looked ahead for what is needed next."""


@dataclass
class Request:
    """A prompt and what is written behind it."""

    name: Hashable
    prompt: list[int]
    max_new_tokens: int
    arrived: float = 0.0
    """Seconds after the engine's start."""
    written: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each token was written, in seconds of the engine's clock."""
    error: str | None = None
    waiting: list[int] = field(default_factory=list)
    """Tokens that have not run."""
    experts: tuple[int, ...] = ()
    """Of these."""
    since: int = 0
    past: attention.Past = field(default_factory=attention.Past)
    router_past: tuple[Tensor, Tensor] | None = None


@dataclass
class Batch:
    """What one batch was: its tokens, the experts of a layer that they took, and the seconds that it ran."""

    tokens: int
    experts: tuple[int, ...]
    seconds: float


class Engine:
    """Answers requests with a converted Read-ME model, out of its folder.

    Args:
        folder: of the model.
        budget: bytes of expert weights in memory; None holds all of them.
        policy: who leaves memory: belady (over the next batches, as far as tokens wait), lru, fifo or random.
        order: how batches are made: experts, fcfs, decode-first or prefill-first.
        batch_tokens: most tokens of a batch; a longer prompt takes several.
        max_wait: batches after which whoever waits goes first.
        prefetch: read the next layer's experts while this one computes.
        direct: read past the page cache.
        dtype: of the model that stays in memory, and of what is computed; that of the folder's where left out.
    Raises:
        ConfigError: settings that cannot be, or a model whose attention the engine does not have.
        AdapterError: the folder holds no Read-ME model, or one that is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        budget: int | None = None,
        policy: Policy = "belady",
        order: Order = "experts",
        batch_tokens: int = 16,
        max_wait: int = 64,
        prefetch: bool = True,
        direct: bool = True,
        dtype: Any = None,
    ) -> None:
        for key, value in (("budget", budget), ("batch_tokens", batch_tokens), ("max_wait", max_wait)):
            if type(value) is not int and not (key == "budget" and value is None):
                raise ConfigError(f"{key}={value!r} must be a whole number")
        if max_wait < 1:
            raise ConfigError(f"max_wait={max_wait} must be at least 1")
        choose([], batch_tokens, order)  # refuses settings that cannot be
        self.folder = Path(folder)
        self.order, self.batch_tokens, self.max_wait = order, batch_tokens, max_wait
        self.model = without_experts(self.folder, dtype)
        layers = expert_layers(self.model)
        banks = [cast(StreamedBank, layer.experts) for layer in layers.values()]
        files = ExpertFiles(self.folder, [f"{name}.experts" for name in layers], direct=direct)
        if not files.has_checksums:
            logger.warning("%s has no %s: damaged experts are not noticed; write_checksums makes it", folder, CHECKSUMS)
        whole = sum(files.size(*key) for key in files.keys)
        self.residency = Residency(whole if budget is None else budget, policy)
        self.store = Store(files, self.residency, prefetch=prefetch)
        for number, bank in enumerate(banks):
            bank.store, bank.layer = self.store, number
        self.num_layers, self.num_experts = len(banks), banks[0].num_experts
        for layer, expert in files.keys:
            files.check(layer, expert, banks[layer].num_experts, banks[layer].width)
        largest = max(files.size(*key) for key in files.keys)
        if self.residency.limit < largest:
            raise ConfigError(f"budget={self.residency.limit:,} bytes hold no expert: one takes {largest:,}")
        self.router = cast(PreGate, self.model.pre_gate)
        ends = self.model.generation_config.eos_token_id if self.model.generation_config else None
        self.ends = {*ends} if isinstance(ends, list) else {ends} - {None}
        self.vocabulary = self.router.embedding.num_embeddings
        self.closed = False
        self.longest = getattr(self.model.config, "max_position_embeddings", None)
        self.open: dict[Hashable, Request] = {}
        self.batches: list[Batch] = []
        self._numbers = itertools.count()
        self._start = time.perf_counter()

    # -- requests ------------------------------------------------------------------------------------------------

    def add(self, prompt: Sequence[int] | Tensor, *, max_new_tokens: int = 64, name: Hashable | None = None) -> Request:
        """Queue a request.

        Args:
            prompt: token ids, a list or a tensor (T,).
            name: to know it by; a number where left out.
        Raises:
            ConfigError: an empty prompt, or more tokens than the model has positions.
        """
        if self.closed:
            raise ConfigError("this engine is closed: make another")
        prompt = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        prompt = list(prompt) if isinstance(prompt, (list, tuple)) else []
        if not prompt or type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ConfigError("a request needs a prompt, a list of one token id at least, and room for one more")
        if bad := [token for token in prompt if type(token) is not int or not 0 <= token < self.vocabulary]:
            raise ConfigError(f"{bad[0]!r} is no token id of the model, which has 0 to {self.vocabulary - 1}")
        if self.longest is not None and len(prompt) + max_new_tokens > self.longest:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones are more than the model's "
                f"{self.longest} positions"
            )
        if not isinstance(name, Hashable):
            raise ConfigError(f"a request's name={name!r} must be a text or a number")
        name = next(n for n in self._numbers if n not in self.open) if name is None else name
        request = Request(name, prompt, max_new_tokens)
        if request.name in self.open:
            raise ConfigError(f"a request {request.name!r} is open already")
        request.arrived, request.since = self.now, len(self.batches)
        self._wait(request, request.prompt)
        self.open[request.name] = request
        return request

    @property
    def now(self) -> float:
        return time.perf_counter() - self._start

    @torch.no_grad()
    def _wait(self, request: Request, tokens: list[int]) -> None:
        """Tokens that have to run, and which expert each goes to."""
        logits, request.router_past = self.router(torch.tensor([tokens]), None, request.router_past)
        request.waiting, request.experts = tokens, tuple(logits[0].argmax(-1).tolist())

    # -- running -------------------------------------------------------------------------------------------------

    def run(self) -> Iterator[Request]:
        """Serve until nothing waits; yields each request as it ends, failed ones too."""
        while self.open:
            yield from self.step()

    def step(self) -> list[Request]:
        """One batch; returns the requests that ended with it."""
        if self.closed:
            raise ConfigError("this engine is closed: make another")
        begun = self.now
        if not self.open:
            return []
        items = [Item(r.name, r.experts, r.since, decodes=bool(r.written)) for r in self.open.values()]
        chosen = choose(items, self.batch_tokens, self.order, now=len(self.batches), max_wait=self.max_wait)
        self._foresee(items, chosen)
        done: list[Request] = []
        while chosen:
            try:
                written = self._forward(chosen)
            except AdapterError as error:
                lost = self._lost(chosen, str(error))
                done += lost
                chosen = [item for item in chosen if item.request in self.open]
                continue
            done += self._commit(chosen, written)
            break
        used = tuple(sorted({expert for item in chosen for expert in item.experts}))
        self.batches.append(Batch(sum(item.tokens for item in chosen), used, self.now - begun))
        return done

    def _forward(self, chosen: list[Item]) -> list[int]:
        """The token behind the last of each that is chosen."""
        parts = [(self.open[item.request], item.tokens) for item in chosen]
        experts = [expert for item in chosen for expert in item.experts]
        self.store.begin([sorted(set(experts))] * self.num_layers)
        model: Any = self.model
        model.known_routes = torch.nn.functional.one_hot(torch.tensor([experts]), self.num_experts).float()
        try:
            logits = attention.forward(model, [(r.past, r.waiting[:count]) for r, count in parts])
        finally:
            model.known_routes = None
        return [int(token) for token in logits.argmax(-1)]

    def _commit(self, chosen: list[Item], written: list[int]) -> list[Request]:
        done = []
        for item, token in zip(chosen, written, strict=True):
            request = self.open[item.request]
            request.past.length += item.tokens
            request.waiting, request.experts = request.waiting[item.tokens :], request.experts[item.tokens :]
            if request.waiting:
                continue
            request.written.append(token)
            request.times.append(self.now)
            if token in self.ends or len(request.written) == request.max_new_tokens:
                done.append(self.open.pop(request.name))
            else:
                self._wait(request, [token])
                request.since = len(self.batches) + 1
                self.open[request.name] = self.open.pop(request.name)
        return done

    def _lost(self, chosen: list[Item], error: str) -> list[Request]:
        """Requests whose expert cannot be read fail; the others' keys and values are as they were before the batch."""
        bad = {expert for _, expert in self.store.broken}
        lost = [self.open[item.request] for item in chosen if bad & {*item.experts}]
        self.store.broken.clear()
        for request in lost:
            request.error = error
            del self.open[request.name]
        return lost

    def _foresee(self, items: Sequence[Item], chosen: Sequence[Item]) -> None:
        """In how many batches each expert is needed next, as far as tokens wait.

        Batches are made of them as they will be. What a running request writes next is not known: its expert is taken
        to stay.
        """
        coming = self.store.coming = {}
        waiting, batch, now = list(items), list(chosen), len(self.batches)
        for ahead in range(1, HORIZON + 1):
            ran = {item.request: item.tokens for item in batch}
            left = [replace(i, experts=i.experts[ran.get(i.request, 0) :]) for i in waiting]
            ended = [Item(i.request, i.experts[-1:], now + ahead, decodes=True) for i in waiting]
            waiting = [rest for rest in left if rest.experts]
            waiting += [new for new, rest in zip(ended, left, strict=True) if not rest.experts]
            if len(coming) == self.num_experts or not waiting:
                return
            batch = choose(waiting, self.batch_tokens, self.order, now=now + ahead, max_wait=self.max_wait)
            for expert in {expert for item in batch for expert in item.experts}:
                coming.setdefault(expert, ahead)

    def close(self) -> None:
        """End the threads that read; requests that are open stay so."""
        self.closed = True
        self.store.close()
