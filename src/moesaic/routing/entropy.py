"""Entropies of rows of probabilities p (..., E), in nats over the last axis.

| entropy | of a row | maximum, at p = 1/E |
| --- | --- | --- |
| Shannon | -sum p ln p | ln E |
| Tsallis | (1 - sum p^q) / (q - 1) | (1 - E^(1-q)) / (q - 1) |
| Rényi | ln(sum p^q) / (1 - q) | ln E |

Tsallis' and Rényi's tend to Shannon's as q tends to 1, and are Shannon's at q = 1. Both go through
`sum p^q - 1 = sum p expm1((q-1) ln p)`, which keeps its digits there: 1 - sum p^q itself does not.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

EntropyType = Literal["tsallis", "renyi"]


def shannon(p: Tensor) -> Tensor:
    """Shannon entropy; exact zeros count as zero."""
    return -(p * (p + 1e-9).log()).sum(dim=-1)


def tsallis(p: Tensor, q: float, *, eps: float = 0.0, normalize: bool = True) -> Tensor:
    """Tsallis entropy of index q > 0 (Tsallis 1988).

    Args:
        p: rows that sum to 1; exact zeros are allowed.
        q: the index; above 1 it cares for the large probabilities, below 1 for the small ones.
        eps: added to every probability without renormalising. This shifts the value by about -E*eps/(q-1), so that a
            certain row may fall below 0: keep it at 0 unless figures of DynMoLE's code are to be met.
        normalize: divide by the maximum, so that 1 is uniform and 0 certain.
    """
    num_experts = p.shape[-1]
    scale = 1.0 if q == 1 else 1 / (q - 1)
    maximum = math.log(num_experts) if q == 1 else -math.expm1((1 - q) * math.log(num_experts)) * scale
    return _power_sum(p, q, eps) * (-scale / (maximum or 1.0) if normalize else -scale)


def renyi(p: Tensor, q: float, *, eps: float = 0.0, normalize: bool = True) -> Tensor:
    """Rényi entropy of order q > 0 (Rényi 1961); arguments as in `tsallis`."""
    value = -_power_sum(p, q, eps) if q == 1 else -torch.log1p(_power_sum(p, q, eps)) / (q - 1)
    return value / (math.log(p.shape[-1]) or 1.0) if normalize else value


def generalised_entropy(kind: EntropyType, p: Tensor, q: float, *, eps: float = 0.0) -> Tensor:
    """The entropy of that name, divided by its maximum."""
    return {"tsallis": tsallis, "renyi": renyi}[kind](p, q, eps=eps)


def exceeds(kind: EntropyType, p: Tensor, q: float, threshold: float, *, eps: float = 0.0) -> Tensor:
    """Whether `generalised_entropy` is above a threshold, asked of the sum that it is a monotonic map of."""
    num_experts, maximum = p.shape[-1], math.log(p.shape[-1])
    if q == 1:
        bound = -threshold * (maximum or 1.0)
    elif kind == "renyi":
        bound = math.expm1((1 - q) * threshold * (maximum or 1.0))
    else:
        bound = threshold * (math.expm1((1 - q) * maximum) or 1 - q)
    p = p + eps if eps > 0 else p
    log_p = torch.special.xlogy(1.0 if q == 1 else q - 1, p if eps > 0 else p.clamp(min=torch.finfo(p.dtype).tiny))
    if q == 1:
        return (p * log_p).sum(dim=-1) < bound
    total, bound = (p * log_p.expm1_()).sum(dim=-1), bound - num_experts * eps
    return total < bound if q > 1 else total > bound


def _power_sum(p: Tensor, q: float, eps: float) -> Tensor:
    """`sum (p+eps)^q - 1` where p sums to 1; at q = 1 `sum (p+eps) ln(p+eps)`, what it tends to over q - 1."""
    p = p + eps if eps > 0 else p
    log_p = (p if eps > 0 else p.clamp(min=torch.finfo(p.dtype).tiny)).log()
    if q == 1:
        return (p * log_p).sum(dim=-1)
    return (p * torch.expm1((q - 1) * log_p)).sum(dim=-1) + p.shape[-1] * eps
