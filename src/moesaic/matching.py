"""Equal budgets: the rank at which plain LoRA has as many trainable parameters as a mixture, routers counted."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moesaic.results import count_trainable


def matching_lora_rank(model: nn.Module, mixture_config: Any, lora_config: Any = None) -> int:
    """The LoRA rank whose trainable parameters come closest to the mixture's, both on `model`.

    Args:
        model: the base model; it is not touched, and its weights are not copied.
        lora_config: a `peft.LoraConfig` whose rank is solved; by default one on the mixture's target modules.
    """
    from peft import LoraConfig

    if lora_config is None:
        lora_config = LoraConfig(
            target_modules=mixture_config.target_modules, modules_to_save=mixture_config.modules_to_save
        )
    target = trainable_with(model, mixture_config)
    # a rank costs the same everywhere it is raised by one, so two counts give the line
    one, two = (trainable_with(model, replace(lora_config, r=r)) for r in (1, 2))
    return max(1, round((target - one) / (two - one)) + 1)


def trainable_with(model: nn.Module, config: Any) -> int:
    """How many parameters of `model` would be trained under a PEFT config."""
    from peft import get_peft_model

    return count_trainable(get_peft_model(_hollow(model), copy.deepcopy(config)))


def _hollow(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters and buffers have shapes but no storage."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)
