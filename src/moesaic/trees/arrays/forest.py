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


def check(f: Forest, roots: NDArray[Any], beside: NDArray[Any], size: int, features: Any) -> None:
    """Raise AdapterError for arrays that a compiled loop could run out of, be caught in, or count wrongly with.

    Args:
        size: K, of the bank.
        features: that rows are said to have.
    """
    try:
        _check(f, roots, beside, size, features)
    except (ValueError, IndexError, OverflowError) as error:
        raise AdapterError(f"these trees are damaged: {error}") from None


def _check(f: Forest, roots: NDArray[Any], beside: NDArray[Any], size: int, features: Any) -> None:
    if f.counts.ndim != 2 or f.used.ndim != 2 or f.feature.ndim != 1 or type(features) is not int:
        raise ValueError("they are of no shape")
    nodes, (leaves, classes), share = len(f.feature), f.counts.shape, f.used.shape[1]
    wanted = empty(nodes, leaves, features, share, classes, 0, roots=2 * size)._asdict()
    wanted |= {"roots": np.zeros(size, np.int64), "beside": np.zeros(size, np.int64)}
    for name, own in wanted.items():
        given = {"roots": roots, "beside": beside}.get(name)
        given = getattr(f, name) if given is None else given
        if given.shape != own.shape or given.dtype != own.dtype:
            raise ValueError(f"{name} is {given.dtype} {given.shape}, and must be {own.dtype} {own.shape}")
    for name in ("counts", "weight", "narrow", "right_majority", "right_bayes", "seen"):
        if not (np.isfinite(getattr(f, name)).all() and (getattr(f, name) >= 0).all()):
            raise ValueError(f"{name} has what no sum of weights can be")
    if not all(np.isfinite(values).all() for values in (f.mean, f.square, f.height, f.due)):
        raise ValueError("a mean is infinite")
    if not (np.sort(f.order) == np.arange(features)).all() or f.used.max(initial=NONE) >= features:
        raise ValueError("a leaf looks at a feature that there is not")
    if not (0 <= f.tops[0] <= nodes and 0 <= f.tops[1] <= leaves):
        raise ValueError("more is free than there is")
    own, sizes = _visited(f, [*roots.tolist(), *(node for node in beside.tolist() if node != NONE)], features)
    held = [f.leaf[node] for node in own if f.feature[node] == NONE]
    _part("nodes", own, f.free_nodes[: f.tops[0]], nodes)
    _part("leaves", held, f.free_leaves[: f.tops[1]], leaves)
    counted = f.leaves[[*range(size), *(size + np.flatnonzero(beside != NONE))]].tolist()
    if counted != sizes:
        raise ValueError("a tree has another number of leaves than is said")


def _visited(f: Forest, roots: list[int], features: int) -> tuple[list[int], list[int]]:
    """Every node that a root leads to, each once, and how many leaves each tree has. Raises ValueError in a circle."""
    own: list[int] = []
    sizes = []
    for root in roots:
        waiting, leaves = [root], 0
        while waiting:
            node = waiting.pop()
            if not 0 <= node < len(f.feature) or len(own) >= len(f.feature):
                raise ValueError("its nodes lead nowhere")
            own.append(node)
            if f.feature[node] == NONE:
                leaves += 1
                continue
            if not 0 <= f.feature[node] < features or f.missing[node] not in (f.left[node], f.right[node]):
                raise ValueError("its nodes lead nowhere")
            waiting += [int(f.left[node]), int(f.right[node])]
        sizes.append(leaves)
    return own, sizes


def _part(what: str, own: Any, free: NDArray[Any], total: int) -> None:
    """Raise ValueError unless those in use and those that are free are all that there are, each once."""
    every = np.concatenate([np.asarray(own, np.int64), free])
    if len(every) != total or not (np.sort(every) == np.arange(total)).all():
        raise ValueError(f"{what} are in use twice, or lost")


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


def fill(larger: Forest, f: Forest) -> None:
    """Copy arrays into the beginnings of larger ones."""
    for name, values in larger._asdict().items():
        old = getattr(f, name)
        values[tuple(slice(0, n) for n in old.shape)] = old
