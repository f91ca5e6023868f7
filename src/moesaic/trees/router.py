"""A small network that scores experts, in numpy: one row costs a quarter of what a tensor library takes for it.

    z = W3 relu(W2 relu(W1 x))  (K,),    L = mean over rows and experts of BCE(sigmoid(z_ti), m_ti)

m_ti says whether expert i was right about row t (DriftMoE, arXiv 2507.18464).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from moesaic.trees.ledger import same_kind, whole
from moesaic.trees.rows import layer

Floats = NDArray[np.float32]
_THREADS = ThreadpoolController()


class Scores:
    """An MLP with ReLU between its layers, trained by Adam. Weights begin as Glorot's uniform ones, biases as 0.

    Args:
        d_in, d_out: features and experts; both may grow.
        hidden: widths between.
        lr: Adam's.
        batch_size: rows that `take` lets it learn at once.
        dropout: of the first hidden units, in learning.
        random: what dropout is drawn from.
        seed: of the weights.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        hidden: tuple[int, ...] = (256, 128),
        lr: float = 2e-3,
        batch_size: int = 256,
        dropout: float = 0.0,
        random: np.random.Generator | None = None,
        seed: int = 0,
    ) -> None:
        self.lr, self.steps, self.batch_size, self.dropout = lr, 0, batch_size, dropout
        self.buffer: list[tuple[Floats, Floats]] = []
        """Rows (d,) and targets (K,) that wait until they are a batch."""
        self._draw = np.random.default_rng(seed) if random is None else random
        self._random = np.random.default_rng(seed)
        widths = [d_in, *hidden, d_out]
        self.parameters: list[Floats] = []
        for a, b in pairwise(widths):
            self.parameters += [self._drawn(a, b), np.zeros(b, np.float32)]
        self.moments: list[list[Floats]] = [[np.zeros_like(p) for p in self.parameters] for _ in range(2)]

    def _drawn(self, d_in: int, d_out: int) -> Floats:
        bound = math.sqrt(6 / max(d_in + d_out, 1))
        return self._random.uniform(-bound, bound, (d_in, d_out)).astype(np.float32)

    @property
    def d_in(self) -> int:
        return len(self.parameters[0])

    @property
    def d_out(self) -> int:
        return len(self.parameters[-1])

    def __call__(self, x: Floats, kept: Floats | None = None) -> Floats:
        """Scores (K,) of x (d,).

        Args:
            kept: factors (h,) of the first hidden units, where some are left out.
        """
        h = x
        for i in range(0, len(self.parameters), 2):
            made = np.empty(self.parameters[i].shape[1], np.float32)
            layer(h, self.parameters[i], self.parameters[i + 1], i < len(self.parameters) - 2, made)
            h = made if i or kept is None else made * kept
        return h

    def take(self, x: Floats, targets: Floats, kept: Floats | None = None) -> None:
        """Learn a row (d,) and its targets (K,) with the others of its batch, once that is full."""
        self.buffer.append((x, targets))
        if len(self.buffer) < self.batch_size:
            return
        rows, wanted = (np.stack(part) for part in zip(*self.buffer, strict=True))
        if kept is None and self.dropout:
            drawn = self._draw.random((len(rows), self.parameters[0].shape[1]))
            kept = ((drawn >= self.dropout) / (1 - self.dropout)).astype(np.float32)
        self.step(rows, wanted, kept)
        self.buffer.clear()

    def step(self, x: Floats, targets: Floats, kept: Floats | None = None) -> float:
        """One step of Adam on rows x (B, d) and targets (B, K) of 0 and 1; returns the loss before it.

        A target that is NaN is not known, and counts for nothing.
        """
        with _THREADS.limit(limits=1, user_api="blas"):  # two wait for each other longer than they compute
            return self._step(x, targets, kept)

    def _step(self, x: Floats, targets: Floats, kept: Floats | None) -> float:
        held, h = [x], x
        for i in range(0, len(self.parameters) - 2, 2):
            h = np.maximum(h @ self.parameters[i] + self.parameters[i + 1], 0)
            if i == 0 and kept is not None:
                h = h * kept
            held.append(h)
        z = h @ self.parameters[-2] + self.parameters[-1]
        known = ~np.isnan(targets)
        targets = np.where(known, targets, 0)
        count = max(int(known.sum()), 1)
        loss = float(((np.maximum(z, 0) - z * targets + np.log1p(np.exp(-np.abs(z)))) * known).sum()) / count
        back = (sigmoid(z) - targets) * known / np.float32(count)
        gradients: list[Floats] = []
        for i in range(len(held) - 1, -1, -1):
            own: list[Any] = [held[i].T @ back, back.sum(axis=0)]
            gradients = own + gradients
            if i:
                back = (back @ self.parameters[2 * i].T) * (held[i] > 0)
                if i == 1 and kept is not None:
                    back = back * kept
        self._adam(gradients)
        return loss

    def _adam(self, gradients: list[Floats]) -> None:
        self.steps += 1
        right = math.sqrt(1 - 0.999**self.steps)
        rate, least = np.float32(self.lr * right / (1 - 0.9**self.steps)), np.float32(1e-8 * right)
        for p, g, first, second in zip(self.parameters, gradients, *self.moments, strict=True):
            first *= np.float32(0.9)
            first += np.float32(0.1) * g
            second *= np.float32(0.999)
            second += np.float32(0.001) * g * g
            p -= rate * first / (np.sqrt(second) + least)

    def grow(self, d_in: int, d_out: int) -> None:
        """Room for more features and experts; what is there stays as it is."""
        more, wider = d_in - self.d_in, d_out - self.d_out
        first, last, bias = self.parameters[0], self.parameters[-2], self.parameters[-1]
        if more > 0:
            self.parameters[0] = np.concatenate([first, self._drawn(d_in, first.shape[1])[-more:]])
        if wider > 0:
            drawn = self._drawn(len(last), d_out)[:, -wider:]
            self.parameters[-2:] = [np.concatenate([last, drawn], 1), np.append(bias, np.zeros(wider, np.float32))]
        for held in self.moments:
            for i, p in enumerate(self.parameters):
                held[i] = np.pad(held[i], [(0, a - b) for a, b in zip(p.shape, held[i].shape, strict=True)])
        self.buffer = [(np.pad(x, (0, d_in - len(x))), np.pad(m, (0, d_out - len(m)))) for x, m in self.buffer]

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        named = {"weights": self.parameters, "first": self.moments[0], "second": self.moments[1]}
        arrays = {f"{name}.{i}": p.copy() for name, held in named.items() for i, p in enumerate(held)}
        arrays |= {f"buffer.{i}": np.stack(part) for i, part in enumerate(zip(*self.buffer, strict=True))}
        return arrays, {"steps": self.steps, "random": self._random.bit_generator.state}

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        named = {"weights": self.parameters, "first": self.moments[0], "second": self.moments[1]}
        for name, own in named.items():
            for i, p in enumerate(own):
                own[i] = same_kind(f"{name}.{i}", arrays[f"{name}.{i}"], p)
                if np.isnan(own[i]).any():
                    raise ValueError(f"{name}.{i} is not a number")
        if any((p < 0).any() for p in self.moments[1]):
            raise ValueError("a mean of squares is below 0")
        self.buffer = []
        if "buffer.0" in arrays or "buffer.1" in arrays:
            own_row, own_targets = np.zeros(self.d_in, np.float32), np.zeros(self.d_out, np.float32)
            for x, m in zip(arrays["buffer.0"], arrays["buffer.1"], strict=True):
                self.buffer.append((same_kind("buffer.0", x, own_row), same_kind("buffer.1", m, own_targets)))
        if len(self.buffer) >= self.batch_size:
            raise ValueError(f"{len(self.buffer)} rows wait for a batch of {self.batch_size}")
        self.steps = whole("steps", values["steps"], 2**63)
        self._random.bit_generator.state = values["random"]


def sigmoid(z: Floats) -> Floats:
    """Without overflow."""
    out: Floats = 0.5 * (1 + np.tanh(0.5 * z))
    return out
