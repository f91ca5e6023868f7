"""One answer: its text as it comes, why it ended, what it took, and where its tokens went."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from moesaic.evaluation.routed import routed
from moesaic.serving.asking import Asked
from moesaic.serving.engine import Engine
from moesaic.serving.text import Text


@dataclass(frozen=True)
class Part:
    """What one token added. `finish` is the last part's alone, as is what `extra` says of its routing."""

    text: str
    first: bool = False
    finish: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Answer:
    """An answer to one question.

    Args:
        routing: whether its routing is asked for; "tokens" for that of each token as well.
        bare: without the blanks that it may begin with.

    Attributes:
        finish: "stop" where a token or a text ended it, "length" where `max_tokens` did; None before.
        routing: `routed` of prompt and answer, where it was asked for, once it has ended.
    """

    def __init__(
        self, engine: Engine, asked: Asked, *, routing: bool | Literal["tokens"] = False, bare: bool = False
    ) -> None:
        self._engine, self._asked, self._wanted, self._bare = engine, asked, routing, bare
        self._text = Text(engine.prepared.base.tokenizer, asked.stops)
        self.finish: str | None = None
        self.routing: dict[str, Any] | None = None

    async def parts(self) -> AsyncGenerator[Part]:
        """The text as it comes, then the reason of its end."""
        first = True
        async with aclosing(self._engine.tokens(self._asked)) as tokens:
            async for token in tokens:
                piece = self._text.push(token)
                if first and self._bare:
                    piece = piece.lstrip()
                if piece:
                    yield Part(piece, first)
                    first = False
                if self._text.stopped:
                    break
        rest = self._text.rest()
        rest = rest.lstrip() if first and self._bare else rest
        whole = len(self._text.ids) >= self._asked.max_tokens and not self._text.stopped
        self.finish = "length" if whole else "stop"
        if self._wanted:
            self.routing = await asyncio.to_thread(self._routed)
        yield Part(rest, first, self.finish, self.extra())

    async def whole(self) -> str:
        return "".join([part.text async for part in self.parts()])

    def usage(self) -> dict[str, int]:
        given, written = len(self._asked.ids), len(self._text.ids)
        return {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}

    def extra(self) -> dict[str, Any]:
        """What a response says beside OpenAI's fields."""
        return {} if self.routing is None else {"routing": self.routing}

    def _routed(self) -> dict[str, Any]:
        ids = [*self._asked.ids, *self._text.ids]
        found = routed(
            self._engine.prepared, torch.tensor([ids], device=self._engine.prepared.device),
            answered=len(self._text.ids), task=self._asked.task,
        )  # fmt: skip
        kept = ("experts", "weights", "by_layer", *(("tokens", "by_token") if self._wanted == "tokens" else ()))
        said = {key: found[key] for key in kept}
        nobody = {"none_of_them": max(0.0, 1 - sum(found["weights"]))} if found["floors"] else {}
        return said | nobody
