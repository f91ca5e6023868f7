"""Hoeffding trees (Domingos & Hulten, KDD 2000) that lie in arrays, and what grows, reads and fells them.

    G(X) = H(leaf) - sum_b (n_b / n) H(b)                     information gain of a binary split at a threshold
    split if G(best) - G(second) > eps or eps < tau,          eps = sqrt(R^2 ln(1/delta) / 2n),  R = log2 C

A leaf keeps, for each of its features and classes, the weight, mean and variance of what it has seen, and answers by
the majority or by naive Bayes over these normal distributions, whichever was right more often in it (Gama et al. 2003).
Thresholds are tried at ten even places between the least and the largest value. A leaf looks at a random part of the
features, as in a random forest.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from moesaic.trees.arrays.forest import Forest

PLACES = 10
"""Thresholds that are tried between a feature's least and largest value."""
NEVER = -1e300
"""Logarithm of a probability of nothing."""
LEAST_SHARE = 0.01
"""Of a leaf's weight on either side of a split."""
LEAST_VARIANCE = 1e-20
"""Of a feature's squared mean: what is below is rounding."""
PATIENCE = 0.3
"""Part of the weight that a split still wants, as features stand, after which it is tried again; trying costs more than
learning a row (García-Martín et al., DSAA 2018, wait for all of it)."""
APART = 30.0
"""What it costs at most, in nats, that a value is far from the mean of a class."""
POINT = 1e250
"""1 / (2 variance) where a feature had one value."""


@njit(cache=True)
def uniform(random: Any) -> float:
    """In [0, 1): splitmix64, whose state is one number that can be saved."""
    random[0] += np.uint64(0x9E3779B97F4A7C15)
    z = random[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return float((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / 9007199254740992.0


@njit(cache=True)
def entropy(weights: Any) -> float:
    total = 0.0
    for value in weights:
        total += value
    if total <= 0.0:
        return 0.0
    found = 0.0
    for value in weights:
        if value > 0.0:
            found -= value * math.log2(value)
    return found / total + math.log2(total)


@njit(cache=True)
def find(f: Forest, x: Any, node: int) -> int:
    """The leaf's node that a row falls into."""
    while f.feature[node] >= 0:
        value = x[f.feature[node]]
        if value != value:
            node = f.missing[node]
        elif value <= f.threshold[node]:
            node = f.left[node]
        else:
            node = f.right[node]
    return node


@njit(cache=True)
def majority(f: Forest, s: int) -> int:
    best = 0
    for c in range(f.counts.shape[1]):
        if f.counts[s, c] > f.counts[s, best]:
            best = c
    return best


@njit(cache=True)
def bayes(f: Forest, s: int, x: Any, out: Any) -> int:
    """Naive Bayes' probabilities of a leaf into `out` (C,); returns the likeliest class."""
    classes = f.counts.shape[1]
    total = 0.0
    for c in range(classes):
        total += f.counts[s, c]
        out[c] = math.log(f.counts[s, c]) if f.counts[s, c] > 0.0 else NEVER
    for j in range(f.used.shape[1]):
        if f.used[s, j] < 0:
            break
        value = x[f.used[s, j]]
        if value != value:
            continue
        mean, narrow, height = f.mean[s, j], f.narrow[s, j], f.height[s, j]
        for c in range(classes):
            apart = value - mean[c]
            out[c] += height[c] - min(apart * apart * narrow[c], APART)
    best = 0
    for c in range(classes):
        if out[c] > out[best]:
            best = c
    most, whole = out[best], 0.0
    for c in range(classes):
        out[c] = math.exp(out[c] - most) if total > 0.0 else 1.0
        whole += out[c]
    for c in range(classes):
        out[c] /= whole
    return best


@njit(cache=True)
def answer(f: Forest, s: int, x: Any, out: Any) -> tuple[int, int]:
    """A leaf's probabilities into `out` (C,); returns the class by majority and the one by naive Bayes."""
    by_count, by_bayes = majority(f, s), bayes(f, s, x, out)
    if f.right_majority[s] > f.right_bayes[s]:
        total = 0.0
        for c in range(f.counts.shape[1]):
            total += f.counts[s, c]
        for c in range(f.counts.shape[1]):
            out[c] = f.counts[s, c] / total
    return by_count, by_bayes


@njit(cache=True)
def choose(f: Forest, s: int, features: int, share: int) -> None:
    """Draw features for a leaf, beside those that it has."""
    held = 0
    while held < f.used.shape[1] and f.used[s, held] >= 0:
        held += 1
    i = 0
    while held < min(share, features):
        j = i + int(uniform(f.random) * (features - i))
        f.order[i], f.order[j] = f.order[j], f.order[i]
        known = False
        for k in range(held):
            known = known or f.used[s, k] == f.order[i]
        if not known:
            f.used[s, held], f.low[s, held], f.high[s, held] = f.order[i], 1e300, -1e300
            held += 1
        i += 1


@njit(cache=True)
def choose_all(f: Forest, features: int, share: int) -> None:
    for s in range(len(f.used)):
        choose(f, s, features, share)


@njit(cache=True)
def plant(f: Forest, features: int, share: int) -> int:
    """A new leaf, which looks at `share` of the first `features`; returns its node."""
    f.tops[0] -= 1
    f.tops[1] -= 1
    node, s = f.free_nodes[f.tops[0]], f.free_leaves[f.tops[1]]
    f.feature[node], f.leaf[node] = -1, s
    f.used[s] = -1
    choose(f, s, features, share)
    f.counts[s] = 0.0
    f.weight[s], f.mean[s], f.square[s], f.narrow[s], f.height[s] = 0.0, 0.0, 0.0, 0.0, 0.0
    f.right_majority[s], f.right_bayes[s], f.seen[s], f.due[s] = 0.0, 0.0, 0.0, 0.0
    return node


@njit(cache=True)
def fell(f: Forest, root: int, stack: Any) -> None:
    """Give a tree's nodes and leaves free."""
    stack[0], top = root, 1
    while top > 0:
        top -= 1
        node = stack[top]
        if f.feature[node] >= 0:
            stack[top], stack[top + 1] = f.left[node], f.right[node]
            top += 2
            f.feature[node] = -1
        else:
            f.free_leaves[f.tops[1]] = f.leaf[node]
            f.tops[1] += 1
        f.free_nodes[f.tops[0]] = node
        f.tops[0] += 1


@njit(cache=True)
def observe(f: Forest, s: int, x: Any, y: int, weight: float) -> None:
    """Add a row to a leaf's statistics."""
    f.counts[s, y] += weight
    f.seen[s] += weight
    for j in range(f.used.shape[1]):
        if f.used[s, j] < 0:
            break
        value = x[f.used[s, j]]
        if value != value:
            continue
        f.low[s, j], f.high[s, j] = min(f.low[s, j], value), max(f.high[s, j], value)
        whole = f.weight[s, j, y] + weight
        apart = value - f.mean[s, j, y]
        f.mean[s, j, y] += apart * weight / whole
        f.square[s, j, y] += weight * apart * (value - f.mean[s, j, y])
        f.weight[s, j, y] = whole
        variance = f.square[s, j, y] / (whole - 1.0) if whole > 1.0 else 0.0
        if variance > LEAST_VARIANCE * f.mean[s, j, y] * f.mean[s, j, y]:
            f.narrow[s, j, y] = 0.5 / variance
            f.height[s, j, y] = -0.5 * math.log(6.283185307179586 * variance)
        else:
            f.narrow[s, j, y], f.height[s, j, y] = POINT, 0.0


@njit(cache=True)
def parted(f: Forest, s: int, j: int, threshold: float, sides: Any) -> tuple[float, float]:
    """The weight of each class on either side of a threshold into `sides` (2, C), by their distributions."""
    lower, upper = 0.0, 0.0
    for c in range(f.counts.shape[1]):
        whole = f.weight[s, j, c]
        if whole <= 0.0:
            sides[0, c], sides[1, c] = 0.0, 0.0
            continue
        if f.narrow[s, j, c] < POINT:
            below = 0.5 * (1.0 + math.erf((threshold - f.mean[s, j, c]) * math.sqrt(f.narrow[s, j, c])))
        else:
            below = 1.0 if f.mean[s, j, c] <= threshold else 0.0
        sides[0, c], sides[1, c] = whole * below, whole - whole * below
        lower += sides[0, c]
        upper += sides[1, c]
    return lower, upper


@njit(cache=True)
def best_split(f: Forest, s: int, delta: float, tau: float, sides: Any, kept: Any) -> tuple[int, float, float]:
    """The feature and threshold that a leaf is to be split at, and its classes' weights on both sides into `kept`.

    -1 where none is better than the next by more than chance; and then the weight at which one would be, as they stand.
    """
    classes = f.counts.shape[1]
    total = 0.0
    for c in range(classes):
        total += f.counts[s, c]
    before = entropy(f.counts[s])
    reach = math.log2(max(classes, 2))
    enough = reach * reach * math.log(1.0 / delta) / 2.0
    eps = math.sqrt(enough / total)
    if before <= 0.0 or (eps >= tau and before <= eps):
        return -1, 0.0, 0.0
    best, second, feature, place = 0.0, 0.0, -1, 0.0
    for j in range(f.used.shape[1]):
        if f.used[s, j] < 0:
            break
        if f.high[s, j] <= f.low[s, j]:
            continue
        own, at, known = -1.0, 0.0, entropy(f.weight[s, j])
        for q in range(1, PLACES + 1):
            threshold = f.low[s, j] + (f.high[s, j] - f.low[s, j]) * q / (PLACES + 1)
            lower, upper = parted(f, s, j, threshold, sides)
            if min(lower, upper) <= LEAST_SHARE * (lower + upper):
                continue
            gain = known - (lower * entropy(sides[0]) + upper * entropy(sides[1])) / (lower + upper)
            if gain > own:
                own, at = gain, threshold
                if gain > best:
                    kept[:] = sides
        if own > best:
            best, second, feature, place = own, best, f.used[s, j], at
        elif own > second:
            second = own
    if feature >= 0 and (best - second > eps or eps < tau):
        return feature, place, 0.0
    return -1, 0.0, enough / max(best - second, tau) ** 2 - total


@njit(cache=True)
def split(f: Forest, node: int, feature: int, threshold: float, kept: Any, features: int, share: int) -> None:
    """Make two leaves of one, which begin with the classes' weights on either side, (2, C)."""
    s = f.leaf[node]
    f.free_leaves[f.tops[1]] = s
    f.tops[1] += 1
    left, right = plant(f, features, share), plant(f, features, share)
    f.feature[node], f.threshold[node], f.left[node], f.right[node] = feature, threshold, left, right
    f.counts[f.leaf[left]], f.counts[f.leaf[right]] = kept[0], kept[1]
    f.missing[node] = left if kept[0].sum() >= kept[1].sum() else right


@njit(cache=True)
def answer_all(f: Forest, x: Any, roots: Any, votes: Any, nodes: Any, by_count: Any, by_bayes: Any) -> None:
    for k in range(len(roots)):
        nodes[k] = find(f, x, roots[k])
        by_count[k], by_bayes[k] = answer(f, f.leaf[nodes[k]], x, votes[k])


@njit(cache=True)
def learn(
    f: Forest, x: Any, y: int, weights: Any, roots: Any, beside: Any, nodes: Any, by_count: Any, by_bayes: Any,
    grace: float, delta: float, tau: float, features: int, share: int, most: int, work: Any,
) -> None:  # fmt: skip
    for k in range(len(roots)):
        if weights[k] <= 0.0:
            continue
        _one(f, x, y, weights[k], nodes[k], by_count[k], by_bayes[k], k, grace, delta, tau, features, share, most, work)
        if beside[k] >= 0:
            node = find(f, x, beside[k])
            by_most, likeliest = majority(f, f.leaf[node]), bayes(f, f.leaf[node], x, work[4])
            tree = len(roots) + k
            _one(f, x, y, weights[k], node, by_most, likeliest, tree, grace, delta, tau, features, share, most, work)


@njit(cache=True)
def _one(
    f: Forest, x: Any, y: int, weight: float, node: int, by_count: int, by_bayes: int, tree: int,
    grace: float, delta: float, tau: float, features: int, share: int, most: int, work: Any,
) -> None:  # fmt: skip
    s = f.leaf[node]
    if by_count == y:
        f.right_majority[s] += weight
    if by_bayes == y:
        f.right_bayes[s] += weight
    observe(f, s, x, y, weight)
    if f.seen[s] < max(grace, f.due[s]) or f.leaves[tree] >= most:
        return
    feature, threshold, missing = best_split(f, s, delta, tau, work[:2], work[2:4])
    f.seen[s], f.due[s] = 0.0, PATIENCE * missing
    if feature >= 0:
        split(f, node, feature, threshold, work[2:4], features, share)
        f.leaves[tree] += 1


@njit(cache=True)
def begin(f: Forest, beside: Any, tree: int, features: int, share: int, stack: Any, which: int) -> None:
    if beside[which] >= 0:
        fell(f, beside[which], stack)
    beside[which] = plant(f, features, share)
    f.leaves[tree] = 1


@njit(cache=True)
def replace(f: Forest, roots: Any, beside: Any, which: int, features: int, share: int, stack: Any) -> None:
    fell(f, roots[which], stack)
    if beside[which] >= 0:
        roots[which], f.leaves[which] = beside[which], f.leaves[len(roots) + which]
        beside[which] = -1
    else:
        roots[which], f.leaves[which] = plant(f, features, share), 1
