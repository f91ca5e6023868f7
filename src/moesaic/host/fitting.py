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
