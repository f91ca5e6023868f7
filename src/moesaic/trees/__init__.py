"""Incremental trees as experts on streams whose concepts drift.

from moesaic.trees import DriftMoEClassifier
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from moesaic.errors import MissingDependency

__all__ = ["DriftMoEClassifier", "load"]


def needed() -> None:
    """Raise MissingDependency where a package of the extra `[trees]` is not installed."""
    for package in ("river", "numba", "threadpoolctl"):
        if find_spec(package) is None:
            raise MissingDependency(package, "trees")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    needed()
    from moesaic.trees import classifier

    return getattr(classifier, name)
