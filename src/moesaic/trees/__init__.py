"""Incremental trees as experts on streams whose concepts drift.

from moesaic.trees import DriftMoEClassifier
"""

from __future__ import annotations

from typing import Any

from moesaic.errors import MissingDependency

__all__ = ["DriftMoEClassifier", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from moesaic.trees import classifier
    except ImportError as error:
        raise MissingDependency(str(error.name or "river and numba"), "trees") from None
    return getattr(classifier, name)
