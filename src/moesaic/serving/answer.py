"""One answer: its text as it comes, why it ended, what it took, and where its tokens went."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from moesaic.evaluation.routed import routed
from moesaic.serving.asking import Asked
from moesaic.serving.engine import Engine
from moesaic.serving.text import Text

if TYPE_CHECKING:
    from moesaic.training.prepared import Prepared


@dataclass(frozen=True)
class Part:
    """What one token added. `finish` is the last part's alone, as is what `extra` says of its routing."""

    text: str
    first: bool = False
    finish: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Written:
    """An answer token by token.

    Attributes:
        text: what it reads so far.
        finish: "stop" where a token or a text ended it, "length" where `max_tokens` did; None before.
    """

    def __init__(self, prepared: Prepared, asked: Asked) -> None:
        self.prepared, self.asked = prepared, asked
        self.text = Text(prepared.base.tokenizer, asked.stops)
        self.finish: str | None = None

    def end(self) -> str:
        """What was held back, now that no more tokens come."""
        whole = len(self.text.ids) >= self.asked.max_tokens and not self.text.stopped
        self.finish = "length" if whole else "stop"
        return self.text.rest()

    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": len(self.asked.ids), "completion_tokens": len(self.text.ids)}

    def routed(self) -> dict[str, Any]:
        """Where the tokens of prompt and answer went (see `evaluation.routed`)."""
        ids = torch.tensor([[*self.asked.ids, *self.text.ids]], device=self.prepared.device)
        return routed(self.prepared, ids, answered=len(self.text.ids), task=self.asked.task)


class Answer:
    """An answer to one question of an engine.

    Args:
        routing: whether its routing is asked for; "tokens" for that of each token as well.
        bare: without the blanks that it may begin with.

    Attributes:
        routing: what a response says of where its tokens went, where that was asked for, once it has ended.
    """

    def __init__(
        self, engine: Engine, asked: Asked, *, routing: bool | Literal["tokens"] = False, bare: bool = False
    ) -> None:
        self._engine, self._wanted, self._bare = engine, routing, bare
        self._written = Written(engine.prepared, asked)
        self.routing: dict[str, Any] | None = None

    @property
    def finish(self) -> str | None:
        return self._written.finish

    async def parts(self) -> AsyncGenerator[Part]:
        """The text as it comes, then the reason of its end."""
        first, text = True, self._written.text
        async with aclosing(self._engine.tokens(self._written.asked)) as tokens:
            async for token in tokens:
                piece = text.push(token)
                if first and self._bare:
                    piece = piece.lstrip()
                if piece:
                    yield Part(piece, first)
                    first = False
                if text.stopped:
                    break
        rest = self._written.end()
        rest = rest.lstrip() if first and self._bare else rest
        if self._wanted:
            self.routing = self._told(await asyncio.to_thread(self._written.routed))
        yield Part(rest, first, self.finish, self.extra())

    async def whole(self) -> str:
        return "".join([part.text async for part in self.parts()])

    def usage(self) -> dict[str, int]:
        counts = self._written.usage()
        return {**counts, "total_tokens": sum(counts.values())}

    def extra(self) -> dict[str, Any]:
        """What a response says beside OpenAI's fields."""
        return {} if self.routing is None else {"routing": self.routing}

    def _told(self, found: dict[str, Any]) -> dict[str, Any]:
        kept = ("experts", "weights", "by_layer", *(("tokens", "by_token") if self._wanted == "tokens" else ()))
        nobody = {"none_of_them": max(0.0, 1 - sum(found["weights"]))} if found["floors"] else {}
        return {key: found[key] for key in kept} | nobody
