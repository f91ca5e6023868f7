"""Streams by name or path: generators, files, and real streams that river and CapyMOA know where to find."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, DataError, MissingDependency, UnknownSetting, first_line, path_of, suggest
from moesaic.trees.streams import synthetic as generators
from moesaic.trees.streams.files import SUFFIXES, file_stream
from moesaic.trees.streams.rows import RowsStream
from moesaic.trees.streams.stream import Stream
from moesaic.trees.streams.synthetic import SYNTHETIC, synthetic

CAPYMOA = {
    "airlines": "Airlines",
    "covtype": "Covtype",
    "covtype_norm": "CovtypeNorm",
    "electricity": "Electricity",
    "kdd99": "KDD99",
    "nomao": "Nomao",
    "pokerhand": "PokerHand",
    "sensor": "Sensor",
    "spambase": "Spambase",
}
"""Names, and the data sets of CapyMOA's: ARFF files that it fetches once."""
INSECTS = (
    "abrupt_balanced",
    "abrupt_imbalanced",
    "gradual_balanced",
    "gradual_imbalanced",
    "incremental_abrupt_balanced",
    "incremental_balanced",
    "incremental_reoccurring_balanced",
)
RIVER: dict[str, tuple[str, tuple[str, ...]]] = {
    "bananas": ("Bananas", ()),
    "credit_card": ("CreditCard", ()),
    "elec2": ("Elec2", ()),
    "image_segments": ("ImageSegments", ()),
    "phishing": ("Phishing", ()),
    "shuttle": ("Shuttle", ()),
    **{f"insects_{variant}": ("Insects", (variant,)) for variant in INSECTS},
}
"""Names, and the data sets of river's: its package holds bananas, image_segments, phishing and shuttle, others are
fetched once."""
_FETCH = """
import sys
try:
    from capymoa import datasets
    print(getattr(datasets, sys.argv[1])(directory=sys.argv[2]).path)
except Exception as error:
    print(error or type(error).__name__)
    sys.exit(1)
"""


def open_stream(name_or_path: str | Path, length: int | None = None, seed: int = 0, **settings: Any) -> Stream:
    """A stream by its name (of a generator or a real stream), or out of a file.

    Args:
        length: rows at most; generators make 100,000 where it is not given.
        seed: of generators; real streams are as they are.
        settings: of `synthetic` or of `file_stream`.
    Raises:
        ConfigError: there is neither such a name nor such a file, or no such setting.
        DataError: it cannot be fetched or read.
        MissingDependency: what the stream needs is not installed.
    """
    name = str(name_or_path)
    if name in SYNTHETIC:
        return synthetic(name, **{} if length is None else {"length": length}, seed=seed, **settings)
    if name in CAPYMOA:
        stream: Stream = _file(_fetched(CAPYMOA[name]), {"name": name, **settings})
    elif name in RIVER:
        if settings:
            raise UnknownSetting(f"{name} has no setting '{next(iter(settings))}'", next(iter(settings)))
        stream = _of_river(name)
    elif isinstance(name_or_path, Path) or os.sep in name or name.endswith(SUFFIXES) or path_of(name).is_file():
        stream = _file(name_or_path, settings)
    else:
        raise ConfigError(f"unknown stream '{name}': {suggest(name, [*SYNTHETIC, *CAPYMOA, *RIVER])}; or name a file")
    return stream if length is None else stream.head(length)


def settings_of(name_or_path: str | Path) -> set[str]:
    """The settings that `open_stream` takes for a stream, beside length and seed."""
    name = str(name_or_path)
    if name in SYNTHETIC:
        return {*generators.settings_of(name)}
    return set() if name in RIVER else {*list(inspect.signature(file_stream).parameters)[1:]}


def _file(path: str | Path, settings: dict[str, Any]) -> Stream:
    known = list(inspect.signature(file_stream).parameters)[1:]
    for key in settings:
        if key not in known:
            raise UnknownSetting(f"unknown setting '{key}' of a file: {suggest(key, known)}", key)
    return file_stream(path, **settings)


def _fetched(data_set: str) -> Path:
    """The file of a data set of CapyMOA's, which is fetched where it is not here yet.

    Another process asks for it: CapyMOA starts a JVM where it is imported. What it shows meanwhile goes to stderr.
    """
    if find_spec("capymoa") is None:
        raise MissingDependency("capymoa", "capymoa")
    cache = os.environ.get("MOESAIC_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "moesaic")
    folder = path_of(cache).absolute() / "streams"
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-c", _FETCH, data_set, str(folder)], stdout=subprocess.PIPE, text=True)
    said = done.stdout.strip().splitlines() or ["it ended without a word"]
    if done.returncode:
        raise DataError(f"CapyMOA cannot fetch {data_set}: {said[-1]}; name a file of your own instead")
    return Path(said[-1])


def _of_river(name: str) -> Stream:
    """A data set of river's, which is fetched where it is not here yet."""
    try:
        from river import datasets
    except ImportError:
        raise MissingDependency("river", "trees") from None
    kind, arguments = RIVER[name]
    data_set = getattr(datasets, kind)(*arguments)
    if not getattr(data_set, "is_downloaded", True):
        try:
            with redirect_stdout(sys.stderr):
                data_set.download()
        except OSError as error:
            raise DataError(f"river cannot fetch {name}: {first_line(error)}") from None
    rows: Callable[[], Iterator[Any]] = data_set.__iter__
    return RowsStream(rows, None, name, data_set.n_samples)
