"""An answer's text as its tokens come, up to the first of some texts that stop it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are no character yet."""


class Text:
    """Grows by tokens; bytes that are no character yet, and what may be the beginning of a stop, are held back.

    A token's text is what it adds to that of a few tokens before it, which are enough for a tokenizer to know whether
    it begins a word.

    Attributes:
        ids: the tokens so far.
        stopped: whether one of `stops` came; what was said then is all that is said.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._from = self._until = 0
        self._held = ""
        self.ids: list[int] = []
        self.stopped = False

    def push(self, token: int) -> str:
        """What a token adds to the text, as far as that is settled."""
        self.ids.append(token)
        self._read(finished=False)
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._say(min(ends))
        return self._say(len(self._held) - max(map(self._begun, self._stops), default=0))

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        self._read(finished=True)
        return self._say(len(self._held))

    def _begun(self, stop: str) -> int:
        """How much of a stop the text held back ends in."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)

    def _read(self, *, finished: bool) -> None:
        before, now = self._decoded(self._until), self._decoded(len(self.ids))
        if finished or not now.endswith(_UNFINISHED):
            self._held += now[len(before) :]
            self._from, self._until = self._until, len(self.ids)

    def _decoded(self, until: int) -> str:
        return str(
            self._tokenizer.decode(
                self.ids[self._from : until], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _say(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        return piece
