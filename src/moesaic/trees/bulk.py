"""Rows one after the other in compiled code, for a DriftMoE all of whose parts can be: bit for bit what its own calls
for one row do."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.trees.settings import Settings


def covers(s: Settings) -> bool:
    """Whether the compiled loop does all that these settings ask for."""
    special = s.warmup or s.explore or s.balance or s.reset_after or s.label_delay or s.lazy is not None
    return (s.backend, s.variant, s.combine, s.train) == ("arrays", "data", "mixture", "all") and not special


def test_then_train(model: Any, x: NDArray[np.float64], y: NDArray[np.int64], predicted: NDArray[np.int64]) -> int:
    """Predict and learn rows x (n, d) of classes y (n,), as far as the router's next step; how many they were.

    `model` is a DriftMoE whose settings are covered.

    0 where the first is of features or a class that are not known yet, and so has to be learned by itself.
    """
    from moesaic.trees.arrays.course import Kept, Rule, course

    s, d, experts = model.settings, model.features, model.experts
    banks: list[Any] = model.banks.banks
    wide = [d + number * s.history for number in range(len(banks))]
    fits = all(
        bank.features == width and bank.classes == model.classes for bank, width in zip(banks, wide, strict=True)
    )
    new = np.flatnonzero(y >= model.classes)
    size = min(int(new[0]) if len(new) else len(y), s.batch_size - len(model.buffer))
    if x.shape[1] != d or not fits or not size:
        return 0
    lessons = np.ones((size, experts))
    if s.poisson:
        lessons *= model.random.poisson(s.poisson, lessons.shape)
    ledger, router = model.ledger, model.router
    layers = (
        [np.zeros((d, experts), np.float32), np.zeros(experts, np.float32)] if router is None else router.parameters
    )
    weights, biases = tuple(layers[0::2]), tuple(layers[1::2])
    kept = Kept(
        ledger.accuracy, ledger.trained, ledger.last, ledger.resets, ledger.chosen, model.labels, model.mean,
        model.square, model.seen_in,
    )  # fmt: skip
    trust = s.trust if s.router else 0.0
    rule = Rule(float(trust), float(s.recency), float(s.rate), s.scale, s.detect)
    units = tuple(np.empty(len(bias), np.float32) for bias in biases)
    reads, targets = np.empty((size, d), np.float32), np.empty((size, experts), np.float32)
    done = 0
    while done < size:
        for bank in banks:
            bank.make_room()
        done += course(
            x[done:size], y[done:size], lessons[done:], model.rows + done, tuple(bank.lent() for bank in banks), kept,
            model.banks.windows(), weights, biases, units, rule, reads[done:], targets[done:], predicted[done:size],
        )  # fmt: skip
    model.learned(size, reads, targets)
    return size
