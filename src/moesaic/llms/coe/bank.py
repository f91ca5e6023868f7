"""Prompts that were seen, and which of them a new one is near to.

    y = V (z - m),   nearness of two prompts = cos(y, y')

m is the mean of the prompts' rows and V their first 64 principal directions: what they have in common counts for
nothing, and looking through thousands takes a tenth of a millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.llms.coe.encoders import Arrays, Rows
from moesaic.llms.coe.folds import Labels
from moesaic.llms.tables import Floats

WIDTH = 64
MOST = 20_000
"""Prompts at most; of more, as many are drawn."""
NOVELTY = 10
"""Neighbours that tell how far off a prompt is."""
_CHUNK = 512


class Bank:
    """Attributes:
    keys: (B, w) unit rows y of the prompts. middle: (f,) m. directions: (f, w) V.
    drawn: (B,) their numbers among the prompts that it was fitted to; empty in one that was loaded.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], drawn: Labels | None = None) -> None:
        self.keys, self.middle, self.directions = arrays["keys"], arrays["middle"], arrays["directions"]
        self.drawn = np.empty(0, np.int64) if drawn is None else drawn
        if self.directions.shape != (len(self.middle), self.keys.shape[1]):
            raise ValueError("keys and directions do not fit")

    @classmethod
    def fit(cls, rows: Rows, seed: int) -> Bank:
        """Of prompts' rows (N, f)."""
        middle = rows.mean(axis=0)
        centred = (rows - middle).astype(float)
        _, found = np.linalg.eigh(centred.T @ centred)
        directions = np.ascontiguousarray(found[:, ::-1][:, :WIDTH], np.float32)
        drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:MOST])
        bare = cls({"keys": directions[:0], "middle": middle, "directions": directions})
        return cls({"keys": bare.of(rows[drawn]), "middle": middle, "directions": directions}, drawn)

    def of(self, rows: Rows) -> Rows:
        """Keys (N, w) of prompts' rows: unit, or zeros."""
        return _unit((rows - self.middle) @ self.directions)

    def nearest(self, keys: Rows, count: int) -> tuple[Labels, Floats]:
        """As `nearest`, among all."""
        return nearest(self.keys, keys, count)

    def novelty(self, rows: Rows, keys: Rows | None = None) -> Floats:
        """(N,) 1 less the mean cosine of the ten nearest; what of a row lies in none of the directions is far off.

        Args:
            keys: to look among; all where None.
        """
        centred = rows - self.middle
        projected = centred @ self.directions
        _, cosines = nearest(self.keys if keys is None else keys, _unit(projected), NOVELTY)
        inside = np.linalg.norm(projected, axis=1) / np.maximum(np.linalg.norm(centred, axis=1), 1e-9)
        return np.asarray(np.clip(1 - inside * cosines.mean(axis=1), 0.0, 1.0), float)

    def state(self) -> Arrays:
        return {"keys": self.keys, "middle": self.middle, "directions": self.directions}


def nearest(bank: Rows, keys: Rows, count: int) -> tuple[Labels, Floats]:
    """Numbers and cosines of the nearest of a bank, (N, count) each, in no order; of all where it has no more."""
    count = min(count, len(bank))
    at, cosines = np.empty((len(keys), count), np.int64), np.empty((len(keys), count))
    for start in range(0, len(keys), _CHUNK):
        near = keys[start : start + _CHUNK] @ bank.T
        chosen = np.argpartition(near, len(bank) - count, axis=1)[:, len(bank) - count :]
        at[start : start + _CHUNK] = chosen
        cosines[start : start + _CHUNK] = np.take_along_axis(near, chosen, axis=1)
    return at, cosines


def weights(cosines: Floats, sharpness: float) -> Floats:
    """Of neighbours, e^(sharpness · cosine) with that of the nearest as 1: (N, count)."""
    return np.asarray(np.exp(sharpness * (cosines - cosines.max(axis=1, keepdims=True))), float)


def _unit(rows: Rows) -> Rows:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9), np.float32)
