"""Tokens of many answers at once, by Transformers' continuous batching; one after the other where it cannot.

A request's tokens lie in pages of one KV cache, and each forward writes the next token of every answer that is begun.
It cannot tell routers a task, nor serve models that keep no pages (Mamba, some attention): those answer in turn.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from moesaic.errors import ConfigError, TrainingError, first_line
from moesaic.serving.asking import Asked, check_answers, context_length

if TYPE_CHECKING:
    from moesaic.training.prepared import Prepared

logger = logging.getLogger(__name__)

PAGE = 16
"""Tokens a page of the cache."""
STOPS = "the server is stopping"


class Engine(Protocol):
    """Answers questions. One event loop's."""

    prepared: Prepared
    at_once: bool

    @property
    def room(self) -> int | None:
        """Tokens of a prompt and its answer that it can hold; None where the model alone sets an end."""
        ...

    def tokens(self, asked: Asked) -> AsyncGenerator[int]:
        """An answer's tokens as they come, without the one that ends it. Closing the iterator ends the request.

        Raises:
            ConfigError: there is no room for it. TrainingError: the model failed, or the server stops.
        """
        ...

    def running(self) -> int:
        """How many requests are being answered, or wait."""
        ...

    def stop(self) -> None:
        """End what is being answered, with an error that says so."""
        ...

    def close(self) -> None: ...


async def opened(prepared: Prepared, *, cache_tokens: int = 8192, at_once: bool = True) -> Engine:
    """The engine that suits a model, which has answered one question by way of proof.

    Args:
        cache_tokens: how many tokens of all requests together the KV cache holds.
        at_once: False lets requests answer one after the other.

    Raises:
        ConfigError: the model writes no answers.
    """
    check_answers(prepared)
    _without_backward(prepared.model.get_base_model())
    if not at_once or (why := _unfit(prepared)):
        if at_once:
            logger.warning("answers come one after the other: %s", why)
        return OneByOne(prepared)
    engine = Batched(prepared, cache_tokens)
    asked = Asked((_first_token(prepared),), max_tokens=2)
    try:
        found = [token async for token in engine.tokens(asked)]
        wanted = [token async for token in OneByOne(prepared).tokens(asked)]
        if found == wanted:
            return engine
        why = "Transformers' continuous batching writes other tokens with this model"
    except TrainingError as error:
        why = f"Transformers' continuous batching does not run this model ({first_line(error)})"
    engine.close()
    logger.warning("answers come one after the other: %s", why)
    return OneByOne(prepared)


def _without_backward(model: Any) -> None:
    """Plain attention is there for training (`numerics`): what only answers takes the fused kernel."""
    if model.config._attn_implementation == "eager" and getattr(model, "_supports_sdpa", False):
        model.set_attn_implementation("sdpa")


def _unfit(prepared: Prepared) -> str:
    """Why requests cannot be answered at once; empty where they can."""
    from moesaic.host import find_host

    if not hasattr(prepared.model.get_base_model(), "init_continuous_batching"):
        return f"{type(prepared.model.get_base_model()).__name__} has no continuous batching"
    if prepared.routed and find_host(prepared.model).asks("by_task"):
        return f"{prepared.recipe.method} is told each request's task"
    if prepared.model.get_base_model().config._attn_implementation == "eager":
        return "its attention cannot go over requests of several lengths and over one alike"
    return ""


def _first_token(prepared: Prepared) -> int:
    tokenizer = prepared.base.tokenizer
    return next(int(i) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)


class Batched:
    """Requests share every forward. Greedy ones and those that draw tokens have a cache each, made when first asked."""

    at_once = True

    def __init__(self, prepared: Prepared, cache_tokens: int) -> None:
        from moesaic.host import find_host

        self.prepared = prepared
        self.room = self.cache_tokens = max(cache_tokens, 4 * PAGE) // PAGE * PAGE
        self._model = prepared.model.get_base_model()
        self._managers: dict[bool, Any] = {}
        self._running = 0
        self._waiting: set[asyncio.Queue[Any]] = set()
        host = find_host(prepared.model) if prepared.routed else None
        self._host = host if host is not None and host.asks("by_prompt") else None
        self._prompts: Counter[tuple[int, ...]] = Counter()

    async def tokens(self, asked: Asked) -> AsyncGenerator[int]:
        if len(asked.ids) + asked.max_tokens > self.cache_tokens:
            raise ConfigError(
                f"the prompt has {len(asked.ids)} tokens and max_tokens={asked.max_tokens} are to come: the cache has "
                f"room for {self.cache_tokens}; serve with cache_tokens=… for more"
            )
        drawn = asked.temperature > 0
        manager = self._manager(drawn)
        given = {"temperature": asked.temperature, "top_p": asked.top_p} if drawn else {}
        results: asyncio.Queue[Any] = asyncio.Queue()
        name, seen, finished = uuid.uuid4().hex, 0, False
        manager.register_result_handler(name, results.put_nowait)
        self._waiting.add(results)
        self._note(asked.ids, 1)
        try:
            taken = manager.add_request(
                list(asked.ids), request_id=name, max_new_tokens=asked.max_tokens, streaming=True,
                eos_token_id=sorted(asked.ends) or -1, **given,
            )  # fmt: skip
            if taken is None:
                raise TrainingError("the engine has ended and takes no more requests")
            while not finished:
                output = await results.get()
                if output is None:
                    raise TrainingError(STOPS)
                finished = output.is_finished()
                if output.error is not None:
                    raise TrainingError(f"the model failed: {first_line(RuntimeError(output.error))}")
                for token in output.generated_tokens[seen:]:
                    seen += 1
                    if token not in asked.ends:
                        yield token
        finally:
            self._waiting.discard(results)
            self._note(asked.ids, -1)
            if not finished:
                manager.cancel_request(name)
                with manager.output_router._lock:
                    manager.output_router.result_handlers.pop(name, None)

    def running(self) -> int:
        return self._running

    def stop(self) -> None:
        for results in self._waiting:
            results.put_nowait(None)

    def close(self) -> None:
        for manager in self._managers.values():
            manager.stop(block=True, timeout=10, hard_stop=True)
        self._managers = {}

    def _note(self, ids: tuple[int, ...], by: int) -> None:
        """Count a request; a mixture that routes by the prompt knows by these which tokens are prompts."""
        self._running += by
        if self._host is not None:
            self._prompts[ids] += by
            self._prompts += Counter()  # without those that fell to zero
            self._host.batched = frozenset(self._prompts)

    def _manager(self, drawn: bool) -> Any:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        there = self._managers.get(drawn)
        if there is not None and there.background_thread_status.fatal_error is None:
            return there
        by_prompt = self._host is not None
        room = min(self.cache_tokens, context_length(self.prepared) or self.cache_tokens)
        how = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=self.cache_tokens // PAGE,
            max_batch_tokens=max(512, room) if by_prompt else 512,
            allow_block_sharing=not by_prompt,
            use_cuda_graph=False if by_prompt else None,
            per_request_processors=drawn,
        )
        # values that are not the neutral ones, or there would be nothing for a request to set
        drawing = {"do_sample": True, "temperature": 0.5, "top_p": 0.5, "top_k": 0} if drawn else {"do_sample": False}
        plain = GenerationConfig(eos_token_id=-1, pad_token_id=0, use_cache=False, max_new_tokens=1, **drawing)
        manager = self._model.init_continuous_batching(generation_config=plain, continuous_batching_config=how)
        manager.start()
        self._managers[drawn] = manager
        return manager


class OneByOne:
    """Requests wait for each other; each is `generate` in a thread of its own."""

    at_once = False
    room = None

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self._turn = asyncio.Lock()
        self._running = 0
        self._stopped = asyncio.Event()

    async def tokens(self, asked: Asked) -> AsyncGenerator[int]:
        self._running += 1
        try:
            async with self._turn, aclosing(self._written(asked)) as written:
                async for token in written:
                    yield token
        finally:
            self._running -= 1

    def running(self) -> int:
        return self._running

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        pass

    async def _written(self, asked: Asked) -> AsyncGenerator[int]:
        loop, found = asyncio.get_running_loop(), asyncio.Queue[Any]()
        left = threading.Event()

        def say(token: int) -> bool:
            loop.call_soon_threadsafe(found.put_nowait, token)
            return not (left.is_set() or self._stopped.is_set())

        writing = loop.run_in_executor(None, write, self.prepared, asked, say)
        writing.add_done_callback(lambda _: found.put_nowait(None))
        try:
            while (token := await found.get()) is not None:
                yield token
            await writing
            if self._stopped.is_set():
                raise TrainingError(STOPS)
        finally:
            left.set()
            if not writing.done():
                await asyncio.wait([writing])


def write(prepared: Prepared, asked: Asked, say: Callable[[int], bool]) -> None:
    """Call `say` with each token of an answer but the one that ends it, until then or until `say` wants no more.

    Raises:
        ConfigError: no such task. TrainingError: the model failed.
    """
    import torch

    from moesaic.evaluation.routed import known

    class Streamer:
        """What `generate` tells of its tokens: the prompt's first."""

        begun = False
        wanted = True

        def put(self, value: Any) -> None:
            if self.begun:
                for token in value.flatten().tolist():
                    self.wanted = self.wanted and (token in asked.ends or say(token))
            self.begun = True

        def end(self) -> None:
            pass

    streamer = Streamer()
    ids = torch.tensor([asked.ids], device=prepared.device)
    drawn: dict[str, Any] = {"do_sample": False}
    if asked.temperature > 0:
        drawn = {"do_sample": True, "temperature": asked.temperature, "top_p": asked.top_p, "top_k": 0}

    def gone(input_ids: Any, scores: Any, **more: Any) -> Any:
        return torch.full((len(input_ids),), not streamer.wanted, device=input_ids.device)

    try:
        with known(prepared, asked.task):
            prepared.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=asked.max_tokens, num_beams=1,
                eos_token_id=sorted(asked.ends) or None, pad_token_id=prepared.base.tokenizer.pad_token_id,
                streamer=streamer, stopping_criteria=[gone], **drawn,
            )  # fmt: skip
    except RuntimeError as error:
        raise TrainingError(f"the model failed: {first_line(error)}") from None
