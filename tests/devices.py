"""Two devices on one CPU: tensors carry a mark of where they lie, and an operation on two marks raises, as on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PLACES = (torch.device("cuda:0"), torch.device("cuda:1"))
_MOVES = ("to", "cpu", "cuda", "type_as")
_ANYWHERE = ("backward", "copy_", "__get__", "__set__")


def lay(values: Tensor, place: int) -> Tensor:
    """Mark a tensor as lying on `PLACES[place]`."""
    values._place = place  # type: ignore[attr-defined]
    return values


def lay_module(module: nn.Module, place: int) -> None:
    """A module's parameters and buffers, and what it is called with from now on."""
    for values in (*module.parameters(), *module.buffers()):
        lay(values, place)
    module.register_forward_pre_hook(lambda _, args, kwargs: _moved((args, kwargs), place), with_kwargs=True)


def _moved(found: Any, place: int) -> Any:
    if isinstance(found, Tensor):
        return found.to(PLACES[place])
    if isinstance(found, (tuple, list)):
        return type(found)(_moved(each, place) for each in found)
    return {key: _moved(each, place) for key, each in found.items()} if isinstance(found, dict) else found


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for each in found:
            yield from _tensors(each)
    elif isinstance(found, dict):
        yield from _tensors(list(found.values()))


class TwoDevices(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return PLACES[args[0]._place] if hasattr(args[0], "_place") else func(*args)
        if name in _ANYWHERE:
            return func(*args, **kwargs)
        asked = next((a for a in (*args[1:], kwargs.get("device")) if isinstance(a, torch.device)), None)
        other = next((a for a in args[1:2] if isinstance(a, Tensor)), None) if name in _MOVES else None
        places = {t._place for t in _tensors((args, kwargs)) if hasattr(t, "_place") and t.dim() > 0}
        if name not in _MOVES and len(places) > 1:
            raise RuntimeError(f"{name}: tensors on {sorted(places)}, expected all on one device")
        args = [torch.device("cpu") if isinstance(a, torch.device) else a for a in args]
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        out = func(*args, **kwargs)
        place = PLACES.index(asked) if asked in PLACES else getattr(other, "_place", None)
        if place is None and places:
            place = getattr(args[0], "_place", min(places)) if name in _MOVES else min(places)
        for made in _tensors(out):
            if place is not None and getattr(made, "_place", None) != place:
                if any(made is given for given in _tensors(args)):  # a move that copied nothing
                    out = lay(made.view_as(made), place)
                else:
                    lay(made, place)
        return out
