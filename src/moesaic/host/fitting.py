"""What belongs to a batch, in the shape of one layer's input."""

from __future__ import annotations

from torch import Tensor

from moesaic.errors import ConfigError


def by_token(values: Tensor | None, h: Tensor) -> Tensor | None:
    """(B, T) values in the leading shape of `h`: as they are, flattened for (B*T, d), or None if they cannot belong."""
    if values is None or values.shape == h.shape[:-1]:
        return values
    if h.dim() == 2 and h.shape[0] == values.numel():
        return values.flatten()
    return None


def by_row(values: Tensor | None, h: Tensor, tokens: int | None, key: str) -> Tensor | None:
    """One entry a row of `h`; a batch that was expanded for beams or several answers repeats its own.

    A 2-D `h` is a batch laid flat if it has whole sequences of `tokens` rows; else it may be anything, such as the
    tokens that a model's own experts were dealt, and nothing can be said of its rows.

    Raises:
        ConfigError: the entries do not divide the batch; `key` names them.
    """
    if values is None:
        return None
    rows = h.shape[0]
    if h.dim() == 2 and (not tokens or rows % max(len(values) * tokens, 1)):
        return None
    if len(values) == 0 or rows % len(values):
        raise ConfigError(f"{key} has {len(values)} entries for a batch of {rows} rows: give one a row")
    return values if len(values) == rows else values.repeat_interleave(rows // len(values), dim=0)
