"""The arrays that a pool of trees lies in: made, and checked before a compiled loop runs over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import AdapterError

NONE = -1
"""No feature, no node."""


class Forest(NamedTuple):
    """N nodes and S leaves of any number of trees; m features a leaf, C classes. Free ones wait on two stacks."""

    feature: Any
    """(N,) -1 in a leaf."""
    threshold: Any
    """(N,)"""
    left: Any
    right: Any
    """(N,) where values up to the threshold go, and the others."""
    missing: Any
    """(N,) where a row goes that lacks the feature."""
    leaf: Any
    """(N,) a leaf's number among the leaves."""
    counts: Any
    """(S, C) weight of each class."""
    used: Any
    """(S, m) features; -1 where there are fewer."""
    weight: Any
    mean: Any
    square: Any
    """(S, m, C) of a feature in a class: weight, mean, sum of squared differences to it."""
    narrow: Any
    height: Any
    """(S, m, C) of the normal distribution: 1 / (2 variance), and the logarithm of its height."""
    low: Any
    high: Any
    """(S, m) least and largest value."""
    right_majority: Any
    right_bayes: Any
    """(S,) weight of the rows that either was right about."""
    seen: Any
    due: Any
    """(S,) weight since a split was tried last, and that at which it is tried next."""
    free_nodes: Any
    free_leaves: Any
    tops: Any
    """(2,) how many of them wait."""
    random: Any
    """(1,) state of the random numbers."""
    order: Any
    """(d,) features, in the order that they were drawn in last."""
    leaves: Any
    """(roots,) how many leaves a tree has."""


def check(f: Forest, roots: NDArray[Any], beside: NDArray[Any]) -> None:
    """Raise AdapterError for arrays that a compiled loop could run out of, or be caught in."""
    nodes, (leaves, classes) = len(f.feature), f.counts.shape
    share = f.used.shape[1]
    shapes = {
        "threshold": (nodes,), "left": (nodes,), "right": (nodes,), "missing": (nodes,), "leaf": (nodes,),
        "free_nodes": (nodes,), "used": (leaves, share), "low": (leaves, share), "high": (leaves, share),
        "weight": (leaves, share, classes), "mean": (leaves, share, classes), "square": (leaves, share, classes),
        "narrow": (leaves, share, classes), "height": (leaves, share, classes), "right_majority": (leaves,),
        "right_bayes": (leaves,), "seen": (leaves,), "due": (leaves,), "free_leaves": (leaves,), "tops": (2,),
        "random": (1,),
    }  # fmt: skip
    within = all(getattr(f, name).shape == shape for name, shape in shapes.items())
    if within:
        inner = np.flatnonzero(f.feature >= 0)
        children = np.stack([f.left[inner], f.right[inner]])
        within = (
            f.tops.min() >= 0
            and f.tops[0] <= nodes
            and f.tops[1] <= leaves
            and all(_inside(values, 0, nodes) for values in (children, f.missing[inner], roots, f.free_nodes))
            and _inside(beside, NONE, nodes)
            and all(_inside(values, 0, leaves) for values in (f.leaf, f.free_leaves))
            and _inside(f.feature, NONE, len(f.order))
            and _inside(f.used, NONE, len(f.order))
            and bool((np.sort(f.order) == np.arange(len(f.order))).all())
            and len(np.unique(children)) == children.size
            and not np.isin(roots, children).any()
        )
    if not within:
        raise AdapterError("these trees are damaged: their nodes lead nowhere")


def _inside(values: NDArray[Any], least: int, end: int) -> bool:
    return values.size == 0 or bool(values.min() >= least and values.max() < end)


def empty(nodes: int, leaves: int, features: int, share: int, classes: int, seed: int, *, roots: int = 0) -> Forest:
    def numbers(*shape: int) -> NDArray[np.float64]:
        return np.zeros(shape)

    def places(*shape: int) -> NDArray[np.int64]:
        return np.zeros(shape, np.int64)

    wide = leaves, max(share, 1), classes
    return Forest(
        feature=np.full(nodes, NONE), threshold=numbers(nodes), left=places(nodes), right=places(nodes),
        missing=places(nodes), leaf=places(nodes), counts=numbers(leaves, classes), used=np.full(wide[:2], NONE),
        weight=numbers(*wide), mean=numbers(*wide), square=numbers(*wide), narrow=numbers(*wide),
        height=numbers(*wide), low=numbers(*wide[:2]), high=numbers(*wide[:2]), right_majority=numbers(leaves),
        right_bayes=numbers(leaves), seen=numbers(leaves), due=numbers(leaves), free_nodes=places(nodes),
        free_leaves=places(leaves), tops=places(2), random=np.array([seed], np.uint64), order=np.arange(features),
        leaves=places(roots),
    )  # fmt: skip
