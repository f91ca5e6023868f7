"""Streams out of river's generators, with concept drift at known places.

| name | stream | concepts, over its length N |
| --- | --- | --- |
| `led_a` `led_g` | LED digits, 24 attributes of which 7 tell | 1, 3, 5, 7 attributes change places with others |
| `sea_a` `sea_g` | SEA: two attributes against a threshold | functions 1, 2, 4, 1 |
| `rbf_m` `rbf_f` | 50 clouds of points in 5 classes | all of them move, 1e-4 or 1e-3 a row |
| `agrawal` | loans | functions 1, 2, 3, 4 |
| `stagger` | size, colour and shape | functions 1, 2, 3, 1 |
| `hyperplane` | points on either side of a plane | the plane turns, 1e-3 a row |
| `sea_recurring` | SEA | functions 3, 4, 3, 4, … |
| `stagger_recurring` | STAGGER | functions 1, 2, 1, 2, … |

Functions have MOA's numbers, from 1 on. Changes of `_a`, agrawal and stagger are abrupt, at N/4, N/2 and 3N/4; those
of `_g` are gradual, around 0.225 N, 0.475 N and 0.725 N, and 0.05 N wide: the DriftMoE paper's, whose abrupt changes
are 50 rows wide in a million. A gradual change is MOA's: the new concept gives row t with probability
1 / (1 + exp(-4 (t - position) / width)).

Each concept has a seed of its own, so that no segment repeats another. The paper's code gave all of them the same one
(`replay_seeds=True`): SEA's last quarter is then its first again, row by row.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, MissingDependency, UnknownSetting, suggest
from moesaic.trees.streams.stream import Chunk, Drift, Stream

Rows = Iterable[tuple[dict[Any, Any], Any]]
Concept = Callable[[int], Rows]
"""The rows of a concept from the first on, endless, for a seed."""
FAR = 10
"""So many widths from a change nothing is left of it: 1 / (1 + exp(40)) is below what float64 draws resolve."""


class SyntheticStream(Stream):
    """Concepts one after the other, each from its own generator.

    Args:
        concepts: one more than `drifts`; a row asks only for those that are near.
        seeds: of the concepts.
        seed: of the draws between an old and a new concept.
    """

    def __init__(
        self,
        name: str,
        length: int,
        features: Sequence[str],
        classes: int,
        concepts: Sequence[Concept],
        drifts: Sequence[Drift],
        seeds: Sequence[int],
        seed: int,
    ) -> None:
        self.name, self.length, self.drifts = name, length, tuple(drifts)
        self.features, self.classes = list(features), list(range(classes))
        self._concepts, self._seeds, self._seed = concepts, seeds, seed
        self._positions = [drift.position for drift in drifts]
        self._widest = max((drift.width for drift in drifts), default=1)

    def _read(self, size: int, start: int, stop: int | None) -> Iterator[Chunk]:
        assert self.length is not None
        end = self.length if stop is None else min(stop, self.length)
        if start >= end:
            return
        draws = np.random.default_rng(self._seed)
        sources: dict[int, Iterator[tuple[dict[Any, Any], Any]]] = {}
        for first in chain(range(0, start, size), range(start, end, size)):
            rows = min(size, (start if first < start else end) - first)
            first_near, which = self._which(first, rows, draws)
            for past in [concept for concept in sources if concept < first_near]:
                del sources[past]
            chunk = Chunk(np.empty((rows, len(self.features))), np.empty(rows, dtype=np.int64))
            for concept in np.unique(which).tolist():
                if concept not in sources:
                    sources[concept] = iter(self._concepts[concept](self._seeds[concept]))
                places = np.flatnonzero(which == concept)
                taken = islice(sources[concept], len(places))
                if first < start:
                    deque(taken, maxlen=0)
                    continue
                made = list(taken)
                values = chain.from_iterable(x.values() for x, _ in made)
                chunk.x[places] = np.fromiter(values, np.float64, len(made) * len(self.features)).reshape(len(made), -1)
                chunk.y[places] = np.fromiter((y for _, y in made), np.int64, len(made))
            if first >= start:
                yield chunk

    def _which(self, first: int, rows: int, draws: np.random.Generator) -> tuple[int, NDArray[np.int64]]:
        """The earliest concept that may still come, and the concept of each of so many rows (rows,)."""
        near = bisect_right(self._positions, first - FAR * self._widest)
        beyond = bisect_left(self._positions, first + rows + FAR * self._widest)
        drawn = draws.random(rows)
        which = np.full(rows, near, dtype=np.int64)
        reached = np.ones(rows)
        at = np.arange(first, first + rows)
        for drift in self.drifts[near:beyond]:
            if drift.width == 1:
                reached = reached * (at >= drift.position)
            else:
                reached = reached * (1 + np.tanh(2 * (at - drift.position) / drift.width)) / 2
            which += drawn < reached
        return near, which


def synthetic(name: str, length: int = 100_000, seed: int = 0, **settings: Any) -> Stream:
    """A stream of `SYNTHETIC` by its name; the same rows for the same arguments, whatever the size of chunks.

    Args:
        length: rows.
        settings: what the stream takes: `noise` (share of rows or attributes), `replay_seeds`, `classes` (rbf), `speed`
            (hyperplane), `period` (rows a concept of a recurring stream stays).
    Raises:
        ConfigError: there is no such stream or setting, or its value is impossible.
        MissingDependency: river is not installed.
    """
    if name not in SYNTHETIC:
        raise ConfigError(f"unknown synthetic stream '{name}': {suggest(name, SYNTHETIC)}")
    if length < 1:
        raise ConfigError(f"{name} of {length} rows: length must be 1 or more")
    if seed < 0:
        raise ConfigError(f"{name} with seed {seed}: it must be 0 or more")
    _check(name, settings)
    try:
        from river.datasets import synth
    except ImportError:
        raise MissingDependency("river", "trees") from None

    replay = settings.get("replay_seeds", False)
    features, classes, concepts, drifts = SYNTHETIC[name](synth, length, **settings)
    own, *spawned = np.random.SeedSequence(seed).spawn(2 + (0 if replay else len(drifts)))
    seeds = [int(each.generate_state(1, np.uint64)[0]) for each in spawned]
    seeds = seeds * len(concepts) if replay else seeds
    return SyntheticStream(
        name, length, features, classes, concepts, drifts, seeds, int(own.generate_state(1, np.uint64)[0])
    )


def settings_of(name: str) -> dict[str, Any]:
    """A generator's settings and their defaults."""
    return {key: each.default for key, each in list(inspect.signature(SYNTHETIC[name]).parameters.items())[2:]}


def _check(name: str, settings: dict[str, Any]) -> None:
    """Raises ConfigError where a setting is unknown, or not of the kind of its default."""
    known = settings_of(name)
    kinds: dict[type, tuple[str, tuple[type, ...]]] = {
        bool: ("true or false", (bool,)),
        int: ("a whole number", (int,)),
        float: ("a number", (int, float)),
    }
    for key, given in settings.items():
        if key not in known:
            raise UnknownSetting(f"unknown setting '{key}' of {name}: {suggest(key, known)}", key)
        wanted, types = kinds[type(known[key])]
        if not isinstance(given, types) or isinstance(given, bool) != (bool in types):
            raise ConfigError(f"{name} with {key} {given!r}: it must be {wanted}")
    if not 0 <= settings.get("noise", 0) <= 0.5:
        raise ConfigError(f"{name} with noise {settings['noise']}: it must be a share from 0 to 0.5")


Made = tuple[Sequence[str], int, Sequence[Concept], Sequence[Drift]]


def _abrupt(length: int) -> list[Drift]:
    return [Drift(length * part // 4) for part in (1, 2, 3)]


def _gradual(length: int) -> list[Drift]:
    return [Drift(length * part // 1000, max(1, length // 20)) for part in (225, 475, 725)]


def _above(share: float) -> float:
    """River draws `0.01 + u <= share`: what it must be told so that it happens to that share of draws."""
    return share + 0.01 if share else 0.0


def _numbered(count: int) -> list[str]:
    return [f"x{place}" for place in range(count)]


def _led(synth: Any, drifts: list[Drift], noise: float) -> Made:
    def concept(moved: int) -> Concept:
        return lambda seed: synth.LEDDrift(seed, _above(noise), irrelevant_features=True, n_drift_features=moved)

    return _numbered(24), 10, [concept(moved) for moved in (1, 3, 5, 7)], drifts


def _led_a(synth: Any, length: int, noise: float = 0.1, replay_seeds: bool = False) -> Made:
    return _led(synth, _abrupt(length), noise)


def _led_g(synth: Any, length: int, noise: float = 0.1, replay_seeds: bool = False) -> Made:
    return _led(synth, _gradual(length), noise)


def _sea(synth: Any, functions: Sequence[int], drifts: Sequence[Drift], noise: float) -> Made:
    def concept(function: int) -> Concept:
        return lambda seed: synth.SEA(function - 1, noise, seed)

    return _numbered(3), 2, [concept(function) for function in functions], drifts


def _sea_a(synth: Any, length: int, noise: float = 0.1, replay_seeds: bool = False) -> Made:
    return _sea(synth, (1, 2, 4, 1), _abrupt(length), noise)


def _sea_g(synth: Any, length: int, noise: float = 0.1, replay_seeds: bool = False) -> Made:
    return _sea(synth, (1, 2, 4, 1), _gradual(length), noise)


def _returning(length: int, period: int, pair: tuple[int, int]) -> tuple[list[int], list[Drift]]:
    """Two functions in turn, each for `period` rows."""
    if period < 1:
        raise ConfigError(f"a period of {period} rows: it must be 1 or more")
    drifts = [Drift(position) for position in range(period, length, period)]
    return [pair[turn % 2] for turn in range(len(drifts) + 1)], drifts


def _sea_recurring(
    synth: Any, length: int, period: int = 10_000, noise: float = 0.1, replay_seeds: bool = False
) -> Made:
    functions, drifts = _returning(length, period, (3, 4))
    return _sea(synth, functions, drifts, noise)


def _rbf(synth: Any, speed: float, classes: int) -> Made:
    if classes < 2:
        raise ConfigError(f"clouds in {classes} classes: 2 or more")

    def concept(seed: int) -> Rows:
        model, sample = np.random.SeedSequence(seed).generate_state(2, np.uint64).tolist()
        return synth.RandomRBFDrift(model, sample, classes, 10, 50, speed, 50)

    return _numbered(10), classes, [concept], []


def _rbf_m(synth: Any, length: int, classes: int = 5) -> Made:
    return _rbf(synth, 1e-4, classes)


def _rbf_f(synth: Any, length: int, classes: int = 5) -> Made:
    return _rbf(synth, 1e-3, classes)


def _agrawal(synth: Any, length: int, noise: float = 0.05, replay_seeds: bool = False) -> Made:
    def concept(function: int) -> Concept:
        return lambda seed: synth.Agrawal(function - 1, seed, perturbation=noise)

    return synth.Agrawal().feature_names, 2, [concept(function) for function in (1, 2, 3, 4)], _abrupt(length)


def _stagger_of(synth: Any, functions: Sequence[int], drifts: Sequence[Drift]) -> Made:
    def concept(function: int) -> Concept:
        return lambda seed: synth.STAGGER(function - 1, seed)

    return synth.STAGGER().feature_names, 2, [concept(function) for function in functions], drifts


def _stagger(synth: Any, length: int, replay_seeds: bool = False) -> Made:
    return _stagger_of(synth, (1, 2, 3, 1), _abrupt(length))


def _stagger_recurring(synth: Any, length: int, period: int = 10_000, replay_seeds: bool = False) -> Made:
    functions, drifts = _returning(length, period, (1, 2))
    return _stagger_of(synth, functions, drifts)


def _hyperplane(synth: Any, length: int, noise: float = 0.05, speed: float = 0.001) -> Made:
    if not 0 <= speed <= 1:
        raise ConfigError(f"hyperplane at speed {speed}: it must be from 0 to 1")

    def concept(seed: int) -> Rows:
        return synth.Hyperplane(seed, 10, 10, speed, _above(noise), _above(0.1))

    return _numbered(10), 2, [concept], []


SYNTHETIC: dict[str, Callable[..., Made]] = {
    "agrawal": _agrawal,
    "hyperplane": _hyperplane,
    "led_a": _led_a,
    "led_g": _led_g,
    "rbf_f": _rbf_f,
    "rbf_m": _rbf_m,
    "sea_a": _sea_a,
    "sea_g": _sea_g,
    "sea_recurring": _sea_recurring,
    "stagger": _stagger,
    "stagger_recurring": _stagger_recurring,
}
