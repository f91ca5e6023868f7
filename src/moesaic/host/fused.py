"""Layers of torch that read their linears' weights themselves in evaluation, where experts would do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import nn


def unfuse(model: nn.Module, wrapped: Iterable[str]) -> Callable[[], None]:
    """Have `nn.TransformerEncoderLayer` call its wrapped linears. Returns what leaves it as it was."""
    parents = {name.rpartition(".")[0] for name in wrapped}
    layers = [model.get_submodule(name) for name in parents]
    found = [
        (layer, layer.activation_relu_or_gelu) for layer in layers if isinstance(layer, nn.TransformerEncoderLayer)
    ]
    for layer, _ in found:
        layer.activation_relu_or_gelu = 0  # what torch asks before it takes its fused path
    return partial(_restore, found)


def _restore(found: list[tuple[nn.TransformerEncoderLayer, int]]) -> None:
    for layer, activation in found:
        layer.activation_relu_or_gelu = activation
