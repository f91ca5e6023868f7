"""Predictions of rows by fits that have not seen them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moesaic.llms.coe.encoders import Rows
from moesaic.llms.tables import Floats

Labels = NDArray[np.int64]

FOLDS = 5


def folds_of(labels: Labels, seed: int) -> Labels:
    """(N,) a fold of `FOLDS` for each row, evenly within each label."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(len(labels), np.int64)
    folds[order] = np.arange(len(labels)) % FOLDS
    return folds


def held_out(predict: Callable[[Labels, Rows], Floats], rows: Rows, folds: Labels) -> Floats:
    """What `predict` says of each row (numbers of the rows to fit to, rows to predict) without having seen its fold."""
    parts = [(np.flatnonzero(folds == f), predict(np.flatnonzero(folds != f), rows[folds == f])) for f in range(FOLDS)]
    found = np.empty((len(rows), parts[0][1].shape[1]))
    for at, predicted in parts:
        found[at] = predicted
    return found
