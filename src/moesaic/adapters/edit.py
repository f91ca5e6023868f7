"""One expert more, another in its place, or one less: the rest of a composed mixture stays as it is, bit for bit.

Every tensor of an expert, its router's too, has the experts on its first axis: those that stay keep their rows, and a
new expert has those of a fresh router, which for Arrow are its prototypes and for a gate zeros until it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from moesaic.errors import AdapterError, ConfigError, first_line, suggest
from moesaic.lora.layer import MixtureLinear
from moesaic.lora.loading import saved_tensors
from moesaic.lora.stored import WEIGHTS

_CHANGED = (
    "the adapters that {folder} was made of have other ranks or modules now, so that its experts cannot stay as they "
    "are: restore them, or compose anew"
)


def experts_after(before: Sequence[str], add: Sequence[str], drop: Sequence[str]) -> list[str]:
    """The experts' names: those that stay, in their order, then new ones; one of a name that is there replaces it.

    Raises:
        ConfigError: a name to drop that is not there, or nothing left.
    """
    for name in drop:
        if name not in before:
            raise ConfigError(f"drop={name}: there is no such expert; {suggest(name, before)}")
        if name in add:
            raise ConfigError(f"expert {name!r} is both added and dropped")
    names = [name for name in before if name not in drop]
    names += [name for name in add if name not in names]
    if not names:
        raise ConfigError("nothing would be left: keep at least one expert")
    return names


@torch.no_grad()
def carry_over(
    folder: Path, model: nn.Module, before: Sequence[str], kept: Mapping[int, str], *, whole: bool = False
) -> int:
    """Give experts of `model` what they are in a saved mixture: factors, scalings and their part of every router.

    Of routers, what both have by the same name and size: all of it in one method, PHATGOOSE's gates in GLIDER.

    Args:
        folder: the saved adapter. before: its experts' names.
        model: a model of the same base; method, ranks, modules and other experts may differ.
        kept: position in `model` to name in `folder`, of the experts that stay.
        whole: the methods are one, so that nothing of a router may be missing.
    Returns:
        How many of the routers' tensors were carried over.
    Raises:
        AdapterError: the saved adapter is damaged.
    """
    carried = 0
    to, of = list(kept), [before.index(name) for name in kept.values()]
    try:
        saved = saved_tensors(folder)
        gone = {key for key in saved if key.endswith(".moe_lora_B.weight")}
        for path, layer in model.named_modules():
            if not isinstance(layer, MixtureLinear) or f"{path}.moe_lora_A.weight" not in saved:
                continue
            gone.discard(f"{path}.moe_lora_B.weight")
            router = layer.router("default")
            assert router is not None
            after = router.num_experts
            for part in ("moe_lora_A", "moe_lora_B"):
                write = getattr(layer, part)["default"].unflatten(0, (after, -1))
                read = saved[f"{path}.{part}.weight"].unflatten(0, (len(before), -1))
                rank = min(read.shape[1], write.shape[1])  # what one has more of the other has zeros for
                if bool(read[of][:, rank:].any()):
                    raise AdapterError(_CHANGED.format(folder=folder))
                write[to] = 0.0
                write[to, :rank] = read[of][:, :rank]
            layer.moe_lora_scaling["default"][to] = saved[f"{path}.moe_lora_scaling.weight"][of]
            for name, values in (*router.named_parameters(), *router.named_buffers()):
                key = f"{path}.moe_lora_router.{name}"
                if name.startswith("library.") or name == "task_of":
                    continue
                if key not in saved:
                    if whole:
                        raise AdapterError(f"{folder} is damaged: it lacks {key}; restore it, or compose anew")
                    continue
                rows = saved[key]
                if name in router.shared and rows.shape == values.shape:
                    values.copy_(rows)
                elif name not in router.shared and rows.shape[1:] == values.shape[1:]:
                    values[to] = rows[of]
                else:
                    continue
                carried += 1
        for key in gone:
            if bool(saved[key].unflatten(0, (len(before), -1))[of].any()):
                raise AdapterError(_CHANGED.format(folder=folder))
    except (SafetensorError, OSError, RuntimeError, IndexError) as error:
        raise AdapterError(f"{folder / WEIGHTS} is damaged ({first_line(error)}): restore it from a copy") from None

    return carried
