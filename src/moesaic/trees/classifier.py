"""DriftMoE as a river classifier: rows are dicts, classes any labels, both may become more at any time."""

from __future__ import annotations

import inspect
import math
from collections.abc import Hashable, Iterable, Iterator
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from river import base

from moesaic.errors import DataError
from moesaic.trees.driftmoe import DriftMoE
from moesaic.trees.saving import read, write
from moesaic.trees.settings import settings

if TYPE_CHECKING:
    import pandas as pd


PLAIN = (float, int, bool)
ENCODE = ": compose.SelectType(str) | preprocessing.OneHotEncoder() does so"


class DriftMoEClassifier(base.MiniBatchClassifier):
    """A pool of incremental trees and a router that learns beside them which of them is right about what.

    What is left out (None) is as `fidelity` has it: `best` is ours, `paper` what the paper says, `code` what its
    released code does, whose task variant answers by its router alone.

    Args:
        variant: data (experts of all classes) or task (an expert for each class, which says yes or no).
        fidelity: best, paper or code.
        backend: arrays (compiled trees of our own), river (its Hoeffding trees), capymoa (MOA's, in a child process),
            or any river classifier, of which each expert is a copy.
        n_experts: K; 30 in `best`, 12 in the others. The task variant has one for each class.
        top_k: experts that learn a row with `train="topk"`, or answer it with `combine="topk"`; 3.
        combine: top1, topk or mixture.
        train: which experts learn a row: topk (of the router's scores), correct (those that were right) or all.
        share: of the features that a leaf (arrays), or an expert (river), looks at, drawn at random.
        max_leaves: of a tree (arrays), 100, which then learns on in those that it has: what a row costs in time and
            memory does not grow with the stream. Where much can be told apart for good, more may be better.
        poisson: each learns it as often as a Poisson distribution of this mean says; 0: once.
        router: whether there is one; without it experts count by their recent accuracy alone.
        hidden: widths of the router's layers; (64, 32) in `best`, (256, 128) in the others.
        lr, batch_size, dropout: of the router's training, by Adam.
        scale: whether the router reads features as standard deviations from their running means.
        trust: power of the router's probability that an expert is right, in its weight in a mixture.
        recency: power of its recent accuracy there.
        rate: how fast recent accuracies move.
        history: last labels that one expert in three sees as features; 0: none does.
        label_delay: rows by which labels come late, so that those experts see in learning what they see in answering.
        detect: whether an expert whose errors rise (ADWIN) is replaced by one that grows beside it.
        warning, drift: chance of a false alarm: of letting one grow, and of putting it in place.
        explore: chance that a row is also learned by an expert drawn at random.
        balance: how far an expert that learns less than its share is favoured after each row, in router scores.
        reset_after: rows after which an expert that learned none of them begins anew, and is taught for a while; 0:
            never.
        warmup: rows at the start that all experts learn.
        lazy: ask of each row only the experts that the router takes, and in learning so many others, drawn at random;
            None: all. The router then learns of those that were asked.
        seed: of all that is drawn.
    Raises:
        ConfigError: a value that cannot be.
        MissingDependency: what the backend needs is not installed.

    Example:
        >>> from river import datasets, evaluate, metrics
        >>> from moesaic.trees import DriftMoEClassifier
        >>> evaluate.progressive_val_score(datasets.Phishing(), DriftMoEClassifier(seed=1), metrics.Accuracy())
        Accuracy: ...

    Source: Aspis et al., arXiv 2507.18464; `docs/driftmoe.md` tells what is theirs and what is ours.
    """

    def __init__(
        self,
        variant: str = "data",
        fidelity: str = "best",
        backend: Any = None,
        n_experts: int | None = None,
        top_k: int | None = None,
        combine: str | None = None,
        train: str | None = None,
        share: float | None = None,
        max_leaves: int | None = None,
        poisson: float | None = None,
        router: bool = True,
        hidden: tuple[int, ...] | None = None,
        lr: float = 2e-3,
        batch_size: int = 256,
        dropout: float | None = None,
        scale: bool | None = None,
        trust: float = 1.0,
        recency: float | None = None,
        rate: float = 0.005,
        history: int | None = None,
        label_delay: int = 0,
        detect: bool | None = None,
        warning: float = 0.01,
        drift: float = 0.001,
        explore: float = 0.0,
        balance: float = 0.0,
        reset_after: int = 0,
        warmup: int = 0,
        lazy: int | None = None,
        seed: int = 0,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        for name, value in given.items():
            setattr(self, name, value)
        self.core = DriftMoE(settings(**given))
        self.known((), ())

    @classmethod
    def of(cls, core: DriftMoE, features: Iterable[Hashable], labels: Iterable[Hashable]) -> DriftMoEClassifier:
        """A classifier whose core has learned already, of features and classes by their places."""
        described = {name: getattr(core.settings, name) for name in cls._parameters()}
        if core.is_task:
            described["n_experts"] = None
        if core.settings.backend != "arrays":
            described["max_leaves"] = None
        if not core.settings.counts_top_k:
            described["top_k"] = None
        made = cls(**described)
        made.close()
        made.core = core
        made.known(features, labels)
        return made

    @classmethod
    def _parameters(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def known(self, features: Iterable[Hashable], labels: Iterable[Hashable]) -> None:
        """Name the features by their places in a row, and the classes by their numbers."""
        self.places: dict[Hashable, int] = {name: place for place, name in enumerate(features)}
        self.labels: list[Hashable] = list(labels)
        self._numbers = {label: number for number, label in enumerate(self.labels)}

    @property
    def _multiclass(self) -> bool:
        return True

    @classmethod
    def _unit_test_params(cls) -> Iterator[dict[str, Any]]:
        yield {"n_experts": 4}
        yield {"fidelity": "paper", "n_experts": 3}

    # -- one row -------------------------------------------------------------------------------------------------

    def learn_one(self, x: dict[Hashable, Any], y: Hashable) -> None:
        """Learn that a row is of class `y`; of a label that is missing (None, NaN) nothing is learned.

        Raises:
            DataError: a feature is no number.
        """
        if _is_missing(y):
            self.core.skip()
            return
        if not isinstance(y, Hashable):
            raise DataError(f"the label {y!r} cannot be told from others: give a text, a number or a tuple")
        row = self._row(x, grow=True)
        if y not in self._numbers:
            self._numbers[y] = len(self.labels)
            self.labels.append(y)
        self.core.learn(row, self._numbers[y])

    def predict_proba_one(self, x: dict[Hashable, Any], **kwargs: Any) -> dict[Any, float]:
        """Label -> probability; empty before any label is known. Features that were never learned are left out."""
        if not self.labels:
            return {}
        found = self.core.predict_proba(self._row(x, grow=False), len(self.labels))
        return dict(zip(self.labels, found.tolist(), strict=True))

    def _row(self, x: dict[Hashable, Any], *, grow: bool) -> NDArray[np.float64]:
        for name, value in x.items():
            if type(value) not in PLAIN and not isinstance(value, (Real, np.bool_)) and not _is_missing(value):
                how = ENCODE if isinstance(value, str) else ""
                raise DataError(f"feature {name!r} is {value!r}, no number: make it one{how}")
        if grow:
            new = (name for name in x if name not in self.places)
            for name in sorted(new, key=_order):  # in no order of the dict's
                self.places[name] = len(self.places)
        row = np.full(len(self.places), math.nan)
        for name, value in x.items():
            place = self.places.get(name)
            if place is not None and (type(value) in PLAIN or not _is_missing(value)):
                row[place] = value if type(value) is not int or abs(value) < 2**1000 else math.nan
        return row

    # -- many rows -----------------------------------------------------------------------------------------------

    def learn_many(self, X: pd.DataFrame, y: pd.Series) -> None:
        """Learn rows one after the other, as `learn_one` does. Raises DataError where there is not a label for each."""
        if len(X) != len(y):
            raise DataError(f"there are {len(X)} rows and {len(y)} labels: give each row its own")
        if hasattr(y, "index") and not X.index.equals(y.index):
            raise DataError("rows and labels have other indexes: bring them into one order, y = y.loc[X.index]")
        _check_columns(X)
        for x, label in zip(X.to_dict(orient="records"), y, strict=True):
            self.learn_one(x, label)

    def predict_proba_many(self, X: pd.DataFrame) -> pd.DataFrame:
        """A column for each label, a row for each of X's; none of it changes anything."""
        import pandas as pd

        _check_columns(X)
        rows = [self.predict_proba_one(x) for x in X.to_dict(orient="records")]
        return pd.DataFrame(rows, index=X.index, columns=self.labels)

    # -- what outlives it ----------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write it with all that it has learned; `load` reads it.

        Raises:
            ConfigError: the folder is there, and is not to be replaced; or it holds anything else.
            AdapterError: a label, a feature's name or an expert is of a kind that cannot be written.
        """
        given = {name: getattr(self, name) for name in self._get_params()}
        write([given, list(self.places), self.labels], self.core, folder, overwrite=overwrite)

    def close(self) -> None:
        """End what experts hold outside of this process."""
        self.core.close()


def _is_missing(label: Any) -> bool:
    """None, and what does not equal itself: NaN, and pandas' own signs."""
    if isinstance(label, float):
        return label != label
    return label is None or type(label).__name__ in ("NAType", "NaTType")


def _order(name: Hashable) -> tuple[str, str]:
    return type(name).__name__, str(name)


def _check_columns(X: Any) -> None:
    if not hasattr(X, "to_dict"):
        raise DataError(f"rows come as a pandas data frame, not as {type(X).__name__}: give its features names")
    if not X.columns.is_unique:
        raise DataError(f"two columns are called {X.columns[X.columns.duplicated()][0]!r}")


def load(folder: str | Path) -> DriftMoEClassifier:
    """The classifier that `DriftMoEClassifier.save` wrote; it goes on exactly, and nothing in the folder is run.

    Raises:
        AdapterError: there is none, it is damaged, or of another version.
    """

    def make(face: Any) -> tuple[DriftMoEClassifier, DriftMoE]:
        given, places, labels = face
        made = DriftMoEClassifier(**given)
        made.known(places, labels)
        return made, made.core

    found: DriftMoEClassifier = read(folder, make)
    return found
