"""Parameters by adapter, named as others expect: `<holder>.<adapter>.weight`.

Trainers that copy an adapter (TRL's reference of DPO, GRPO, RLOO and KTO) find its parameters by `.<adapter>.` within
their names, which those of a `ParameterDict`, that end in the adapter's name, do not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn


def named_now(key: str) -> str:
    """The name in a file of a tensor that may have been saved as `….moe_lora_A`, as it was once."""
    return re.sub(r"\.moe_lora_(A|B|scaling)$", r".moe_lora_\1.weight", key)


class _Holder(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Factors(nn.Module):
    """A dictionary from an adapter's name to its parameter."""

    def __setitem__(self, adapter: str, weight: nn.Parameter) -> None:
        self.add_module(adapter, _Holder(weight))

    def __getitem__(self, adapter: str) -> nn.Parameter:
        holder = cast(nn.Module, self._modules[adapter])
        weight = holder._parameters.get("weight")  # not where the holder is a replica's, or parametrised
        return cast(nn.Parameter, holder.weight) if weight is None else weight

    def __delitem__(self, adapter: str) -> None:
        del self._modules[adapter]

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def keys(self) -> Iterator[str]:
        return iter(self._modules)

    def values(self) -> Iterator[nn.Parameter]:
        return (self[adapter] for adapter in self._modules)

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((adapter, self[adapter]) for adapter in self._modules)

    def move(self, adapter: str, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """To a device or dtype, in place: who holds the parameter keeps holding it."""
        self[adapter].data = self[adapter].data.to(device=device, dtype=dtype)
