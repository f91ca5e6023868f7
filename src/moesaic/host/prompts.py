"""What is being answered, as `generate` was told it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Prompt:
    """Its length in tokens, padding included; its ids and which are real (rows, length)."""

    length: int
    ids: Tensor | None = None
    mask: Tensor | None = None
    parts: Tensor | None = None
    """How many of each row's ids stand for images or sound (rows,): they may be encoded before the model is called."""
    scores: Tensor | None = None
    """What it says of the experts (rows, E), once that was read."""

    def begins(self, ids: Tensor | None, past: int) -> bool:
        """Whether ids (rows, tokens) behind `past` others are this prompt's, or those of its rows several times.

        `generate` may run another sequence as well: a negative prompt, or one of its own in a stopping criterion.
        """
        if self.ids is None or ids is None or past >= self.length:
            return True
        wanted = self.ids[:, past : past + ids.shape[1]].to(ids.device)
        times, left = divmod(len(ids), max(len(wanted), 1))
        if left or not times:
            return False
        return torch.equal(ids[:, : wanted.shape[1]], wanted.repeat_interleave(times, dim=0))
