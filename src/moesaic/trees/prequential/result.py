"""What an evaluation came to, for tables, pages and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.trees.prequential.metrics import METRICS, ClassFigures, Figures
from moesaic.trees.prequential.recovery import Recovery


@dataclass(frozen=True)
class Result:
    """A learner's figures on a stream.

    Attributes:
        stream, learner: their names.
        classes: labels by their index, as texts.
        overall: over all rows.
        by_class: the same of each class.
        baselines: accuracy over all rows of `nochange` and `majority`, 0 to 1, as kappa_t and kappa_m count it.
        windows: window by window, of `window` rows each; the last may have fewer.
        drifts: what each known drift did.
        activity: by window, what was done how often by each expert (K,); empty where the learner counts nothing.
        delay: rows between a prediction and its label.
        cpu_seconds: what the learner used, its processes included; not what reading and counting took.
        peak_memory_mib: the most memory that this process held at once, in MiB.
    """

    stream: str
    learner: str
    classes: list[str]
    window: int
    delay: int
    overall: Figures
    by_class: list[ClassFigures]
    baselines: dict[str, float | None]
    windows: list[Figures]
    drifts: list[Recovery]
    activity: list[dict[str, NDArray[Any]]]
    cpu_seconds: float
    peak_memory_mib: float

    @property
    def rows(self) -> int:
        return self.overall.rows

    @property
    def unlabelled(self) -> int:
        """Rows without a label: predicted, neither scored nor learned."""
        return self.overall.rows - self.overall.scored

    @property
    def accuracy(self) -> float | None:
        return self.overall.accuracy

    @property
    def rows_per_second(self) -> float | None:
        """Rows in a second of CPU time."""
        return self.rows / self.cpu_seconds if self.cpu_seconds > 0 else None

    def curve(self, metric: str = "accuracy") -> list[tuple[int, float]]:
        """A metric over the stream: a window's last row, counted from 1, and its figure; undefined ones left out."""
        values = [(window.end, getattr(window, metric)) for window in self.windows]
        return [(end, value) for end, value in values if value is not None]

    def used(self, what: str) -> NDArray[Any]:
        """What was done how often by each expert over the whole stream, (K,)."""
        counts = [window[what] for window in self.activity if what in window]
        size = max((c.size for c in counts), default=0)
        return sum((np.pad(c, (0, size - c.size)) for c in counts), np.zeros(size, np.int64))

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it; what is not defined is null."""
        return {
            "stream": self.stream,
            "learner": self.learner,
            "classes": self.classes,
            "rows": self.rows,
            "scored": self.overall.scored,
            "unlabelled": self.unlabelled,
            **{metric: getattr(self.overall, metric) for metric in METRICS},
            "baselines": self.baselines,
            "by_class": [
                {"class": name, **asdict(of), "recall": of.recall, "precision": of.precision}
                for name, of in zip(self.classes, self.by_class, strict=True)
            ],
            "window": self.window,
            "delay": self.delay,
            "windows": [asdict(window) for window in self.windows],
            "drifts": [asdict(drift) for drift in self.drifts],
            "activity": [_listed(window) for window in self.activity],
            "cpu_seconds": self.cpu_seconds,
            "rows_per_second": self.rows_per_second,
            "peak_memory_mib": self.peak_memory_mib,
        }


def _listed(window: Mapping[str, NDArray[Any]]) -> dict[str, list[Any]]:
    return {name: counts.tolist() for name, counts in window.items()}
