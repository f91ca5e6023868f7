"""What belongs to a batch, in the shape of one layer's input."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from moesaic.errors import ConfigError


def checked_ids(ids: Any, key: str, *, rows: int | None = None) -> Tensor:
    """Task ids as they must be, whole numbers (rows,). Raises ConfigError; `rows` where every row must have its own."""
    whole = isinstance(ids, Tensor) and ids.dim() == 1 and not ids.is_floating_point() and ids.dtype != torch.bool
    if not whole:
        what = f"a {ids.dtype} tensor of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"{ids!r}"
        raise ConfigError(f"{key} must be whole numbers, one a row, not {what}")
    _require_rows(ids, key, rows)
    return cast(Tensor, ids)


def checked_targets(targets: Any, key: str, *, rows: int | None = None) -> Tensor:
    """Routing targets as they must be: shares (rows, E), not negative, adding up to 1. Raises ConfigError."""
    if not isinstance(targets, Tensor) or targets.dim() != 2 or not targets.is_floating_point():
        what = f"a {targets.dtype} tensor of shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else "that"
        raise ConfigError(f"{key} must be shares of the experts, a float tensor (rows, E), not {what}")
    _require_rows(targets, key, rows)
    if not torch.compiler.is_compiling():
        shares = bool(((targets >= 0).all(dim=-1) & ((targets.sum(dim=-1) - 1).abs() < 1e-2)).all())
        if not shares:
            raise ConfigError(f"{key} must be shares of the experts: not negative, and each row adding up to 1")
    return targets


def checked_scores(scores: Any, key: str) -> Tensor:
    """Routing scores as they must be: finite numbers (rows, E). Raises ConfigError."""
    if not isinstance(scores, Tensor) or scores.dim() != 2 or not scores.is_floating_point():
        what = f"a {scores.dtype} tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else "that"
        raise ConfigError(f"{key} must be a score for each expert, a float tensor (rows, E), not {what}")
    if not torch.compiler.is_compiling() and not bool(scores.isfinite().all()):
        raise ConfigError(f"{key} holds numbers that are not finite")
    return scores


def _require_rows(values: Tensor, key: str, rows: int | None) -> None:
    if rows is not None and len(values) != rows:
        raise ConfigError(f"{key} has {len(values)} entries for a batch of {rows} rows: give one a row")


def in_three(h: Tensor, tokens: int | None) -> Tensor:
    """An input with more axes than (rows, tokens, d) laid out as that: latent attention reads (rows, 1, tokens, d).

    Axes before that of the tokens count as rows, those behind it as tokens.
    """
    return h.flatten(0, -3) if h.shape[-2] == tokens else h.flatten(1, -2)


def by_token(values: Tensor | None, h: Tensor) -> Tensor | None:
    """(B, T) values in the leading shape of `h`: as they are, repeated for `in_three`, flattened for (B*T, d), or None.

    None is for what cannot belong.
    """
    if values is None or values.shape == h.shape[:-1]:
        return values
    if h.dim() == 2:
        return values.flatten() if h.shape[0] == values.numel() else None
    rows, tokens = h.shape[0] // len(values), h.shape[1] // max(values.shape[1], 1)
    if h.shape[:-1] == (rows * len(values), values.shape[1]):
        return values.repeat_interleave(rows, dim=0)
    if h.shape[:-1] == (len(values), tokens * values.shape[1]):
        return values.repeat_interleave(tokens, dim=1)
    return None


def by_row(
    values: Tensor | None,
    h: Tensor,
    tokens: int | None,
    key: str,
    *,
    parts: Tensor | None = None,
    dealt: bool = False,
) -> Tensor | None:
    """One entry a row of `h`; a batch that was expanded for beams or several answers repeats its own.

    A 2-D `h` is a batch laid flat if it has whole sequences of `tokens` rows, or one row a sequence (a pooler); else
    nothing can be said of its rows.

    Args:
        parts: how much of what is not text each sequence has (B,), where rows may be images: they are shared out so.
        dealt: rows may be tokens that a model's own experts were dealt, any number of them.
    Raises:
        ConfigError: the entries do not divide the batch; `key` names them.
    """
    if values is None:
        return None
    rows, number = h.shape[0], len(values)
    flat = h.dim() == 2
    whole = flat and bool(tokens) and number > 0 and rows % (number * (tokens or 1)) == 0
    if parts is not None and not whole and (flat or h.shape[-2] != tokens):
        return shared_out(values, parts, rows, key)
    if flat and not whole:
        return values if rows == number and not dealt else None
    if number == 0 or rows % number:
        raise ConfigError(f"{key} has {number} entries for a batch of {rows} rows: give one a row")
    return values if number == rows else values.repeat_interleave(rows // number, dim=0)


def shared_out(values: Tensor, parts: Tensor, rows: int, key: str) -> Tensor:
    """Entries for `rows` images, or patches, of sequences with `parts` (B,) of them each, in their order."""
    total = int(parts.sum())
    if total == 0 or len(parts) % len(values) or bool((parts * rows % total).any()):
        raise ConfigError(
            f"{key} cannot be told for {rows} rows of images (or audio) of a batch with {parts.tolist()} tokens of "
            "them a sequence: leave that tower out of target_modules"
        )
    return values.repeat_interleave(len(parts) // len(values), dim=0).repeat_interleave(parts * rows // total, dim=0)
