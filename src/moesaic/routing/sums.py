"""Sums over the tokens of a sequence, up to each: what a causal router may know of all that it has read."""

from __future__ import annotations

import torch
from torch import Tensor


class TokenSums:
    """Running sums within one forward. A host's go on where a KV cache left off."""

    def kept(self, router: object, read: Tensor) -> Tensor | None:
        """The sums (..., 1, n) for all tokens of `read` (..., T, d), where none of them adds to what is kept."""
        return None

    def __call__(self, router: object, values: Tensor, sequences: Tensor | None = None) -> Tensor:
        """Sums over each token and those before it in its sequence, of values (..., T, n).

        Args:
            router: whose sums they are, where they are kept: its `identity`.
            sequences: which sequence a token belongs to (..., T), in a packed batch.
        """
        return running(values, sequences)


def running(values: Tensor, sequences: Tensor | None) -> Tensor:
    """Sums over each token and those before it in its sequence, of values (..., T, n)."""
    sums = values.cumsum(dim=-2)
    if sequences is None:
        return sums
    places = torch.arange(sequences.shape[-1], device=sequences.device).expand_as(sequences)
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[..., 1:] = sequences[..., 1:] != sequences[..., :-1]
    begin = torch.where(begins, places, 0).cummax(dim=-1).values.unsqueeze(-1)
    before = torch.nn.functional.pad(sums, (0, 0, 1, 0)).gather(-2, begin.expand_as(sums))
    return sums - before
