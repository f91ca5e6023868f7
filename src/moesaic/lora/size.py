"""How large a mixture is beside a plain LoRA: at the same `r` it has every expert's factors, and routers."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from moesaic.lora.layer import MixtureLinear

logger = logging.getLogger(__name__)

SEVERAL = 3.0
"""Times a plain LoRA from which a mixture's size is told."""
USUAL = 8
"""The rank that a `LoraConfig` has by itself. A mixture of a smaller one was given its rank on purpose."""
_told = False


def times_plain(model: nn.Module, config: Any) -> float:
    """How many times as many parameters a mixture trains as a LoRA of its `r` on the same linears would."""
    layers = [m for m in model.modules() if isinstance(m, MixtureLinear) and m.in_features and m.out_features]
    own = {id(p): p.numel() for layer in layers for p in layer.parameters() if p.requires_grad}
    plain = sum(config.r * ((layer.in_features or 0) + (layer.out_features or 0)) for layer in layers)
    return sum(own.values()) / max(plain, 1)


def told(model: nn.Module, config: Any) -> str:
    """What to say of a mixture that is several times as large; empty where there is nothing to say."""
    if config.r < USUAL or config.inference_mode or config.store is not None:
        return ""
    times = times_plain(model, config)
    if times < SEVERAL:
        return ""
    return f"this {config.method} trains {times:.1f} times the parameters of a plain LoRA of r={config.r}"


def tell_once(model: nn.Module, config: Any) -> None:
    """Say so the first time in a process, unless the size was solved for or is told by others."""
    global _told
    said = "" if _told or config.size_is_meant else told(model, config)
    if said:
        _told = True
        logger.warning(
            "%s: moesaic.matched(%s, model, like=LoraConfig(…)) is one of a LoRA's size", said, type(config).__name__
        )
