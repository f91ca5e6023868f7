"""How many experts a token takes: a setting of a model, nothing of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from moesaic.errors import ConfigError
from moesaic.ffn.method import method_of
from moesaic.ffn.places import routed_layers


def set_top_k(model: nn.Module, k: int) -> None:
    """Take k experts a token in every layer, of a converted model or of one that is a mixture; nothing is loaded again.

    It is saved with the model.

    Raises:
        ConfigError: where k is not between 1 and the number of experts, or no layer has any.
    """
    check_top_k(model, k)
    take(model, [k] * len(routed_layers(model)))
    keep(model, k)


def keep(model: nn.Module, k: int | None) -> None:
    """Let a model be saved as one that takes k experts a token (None: all), whatever its layers take now."""
    config: Any = getattr(model, "config", None)
    if "top_k" in getattr(config, "moesaic", {}):
        config.moesaic = {**config.moesaic, "top_k": k}
    elif isinstance(config, PretrainedConfig):
        text: Any = config.get_text_config()
        text.num_experts_per_tok = k


def _kept(model: nn.Module) -> int | None:
    """The k that a model would be saved with."""
    config: Any = getattr(model, "config", None)
    if "top_k" in getattr(config, "moesaic", {}):
        return cast(int | None, config.moesaic["top_k"])
    text = config.get_text_config() if isinstance(config, PretrainedConfig) else None
    return getattr(text, "num_experts_per_tok", None)


@contextmanager
def top_k(model: nn.Module, k: int) -> Iterator[None]:
    """k experts a token inside, and what there was before afterwards. Raises ConfigError as `set_top_k` does."""
    check_top_k(model, k)
    before, kept = [layer.top_k for layer in routed_layers(model)], _kept(model)
    take(model, [k] * len(before))
    try:
        yield
    finally:
        take(model, before)
        keep(model, kept)


def take(model: nn.Module, by_layer: Sequence[int]) -> None:
    """So many experts a token in each layer, for now.

    The balance loss of a mixture knows one k for all layers: the largest.
    """
    for layer, k in zip(routed_layers(model), by_layer, strict=True):
        layer.top_k = k
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module, "num_experts_per_tok"):
            setattr(module, "num_experts_per_tok", max(by_layer))  # noqa: B010


def check_top_k(model: nn.Module, k: int) -> None:
    """Raise ConfigError where a token cannot take k experts in every layer."""
    layers = routed_layers(model)
    if not layers:
        raise ConfigError("this model has no layers made of experts: `moesaic convert` makes them")
    config: Any = getattr(model, "config", None)
    settings = getattr(config, "moesaic", {})
    if settings and not method_of(settings["method"]).slims:
        raise ConfigError(f"a {settings['method']} model takes the experts that it was made for: top_k cannot be set")
    is_stock = isinstance(config, PretrainedConfig) and not settings
    if is_stock and not hasattr(config.get_text_config(), "num_experts_per_tok"):
        raise ConfigError(f"{type(model).__name__} does not say by num_experts_per_tok how many experts a token takes")
    most = min(layer.num_experts for layer in layers)
    if type(k) is not int:
        raise ConfigError(f"top_k={k!r} must be a whole number")
    if not 1 <= k <= most:
        raise ConfigError(f"top_k={k} must be between 1 and {most}")
    if is_stock:
        for router in {type(layer): layer for layer in layers}.values():
            if not _heeds(router, k):
                raise ConfigError(f"{type(router).__name__} always takes {router.top_k} experts: top_k cannot be set")


@torch.no_grad()
def _heeds(router: Any, k: int) -> bool:
    """Whether a mixture's own router gives k experts when it is asked to, as far as that can be tried."""
    was, training, weight = router.top_k, router.training, next(router.parameters())
    router.top_k = k
    router.eval()
    try:
        made = router(weight.new_zeros(2, weight.shape[-1]))
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it takes other things
        return True
    finally:
        router.top_k = was
        router.train(training)
    chosen = [t for t in made if isinstance(t, torch.Tensor) and not t.is_floating_point()]
    return not chosen or chosen[-1].shape[-1] == k
