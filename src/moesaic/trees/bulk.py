"""Many rows at once, up to the router's next step: bit for bit what a DriftMoE's own calls for one row do.

| experts | | |
| --- | --- | --- |
| in arrays, a mixture that all learn | one compiled loop | `compiled` |
| in another process | which experts learn a row is known before any is asked: one way there and back | `sent` |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.trees.settings import Settings

Way = Callable[[Any, NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]], int]
"""Of a DriftMoE, rows x (n, d), classes y (n,) and predictions (n,), which are written: predicts and learns rows as far
as the router's next step, and tells how many; 0 where the first has features or a class that are not known yet."""


def way(s: Settings) -> Way | None:
    """The one that does all that settings ask for, None where there is none."""
    if s.variant == "task" or s.warmup or s.balance or s.reset_after or s.label_delay or s.lazy is not None:
        return None
    if (s.backend, s.combine, s.train) == ("arrays", "mixture", "all") and not s.explore:
        return compiled
    if s.backend == "capymoa" and s.train != "correct" and not (s.history or s.detect or s.scale):
        return sent
    return None


def _size(model: Any, x: NDArray[np.float64], y: NDArray[np.int64]) -> int:
    """Rows that can be done at once."""
    if not model.features or x.shape[1] != model.features:
        return 0
    new = np.flatnonzero(y >= model.classes)
    waiting = 0 if model.router is None else len(model.router.buffer)
    return min(int(new[0]) if len(new) else len(y), model.settings.batch_size - waiting)


def sent(model: Any, x: NDArray[np.float64], y: NDArray[np.int64], predicted: NDArray[np.int64]) -> int:
    """A `Way` for a bank that has a `course`."""
    size = _size(model, x, y)
    if not size:
        return 0
    asked = [model.scored(row) for row in x[:size]]
    lessons = np.stack([model.lessons(scores, np.zeros(model.experts, np.bool_)) for _, scores in asked])
    votes = model.banks.banks[0].course(x[:size], y[:size], lessons, model.classes)
    for t, (read, scores) in enumerate(asked):
        look = model.looked(votes[t], read, scores)
        predicted[t] = model.combined(look).argmax()
        right, targets = model.judged(look, y[t])
        model.noted(x[t], y[t], look, right, targets, lessons[t])
    return size


def compiled(model: Any, x: NDArray[np.float64], y: NDArray[np.int64], predicted: NDArray[np.int64]) -> int:
    """A `Way` for trees in arrays."""
    from moesaic.trees.arrays.course import Kept, Rule, course

    s, d, experts = model.settings, model.features, model.experts
    banks: list[Any] = model.banks.banks
    wide = [d + number * s.history for number in range(len(banks))]
    fits = all(
        bank.features == width and bank.classes == model.classes for bank, width in zip(banks, wide, strict=True)
    )
    size = _size(model, x, y)
    if not fits or not size:
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
        ledger.accuracy, ledger.trained, ledger.last, ledger.resets, ledger.chosen, model.labels,
        model.reading.mean, model.reading.square, model.reading.seen,
    )  # fmt: skip
    rule = Rule(s.trust if s.router else 0.0, s.recency, s.rate, s.scale, s.detect)
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
