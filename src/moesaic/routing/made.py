"""What was made of modules, kept for as long as it would be made the same."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter, getitem, is_
from typing import Any

from torch import Tensor, nn

_version, _place = attrgetter("_version"), Tensor.data_ptr


class Seen:
    """Modules as they were when they were looked at: which tensors they hold, unwritten, in which mode, heard by whom.

    Optimizer steps, loading, moving and assigning show; what is written through `.data` does not. A step of decoding
    asks once, between products that leave nothing of this in the processor's caches: so it is flat lists, and short.
    """

    def __init__(self) -> None:
        self._holders: list[Mapping[Any, Any]] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._hooks: list[Mapping[Any, Any]] = []
        self._heard: list[int] = []
        self._tensors: list[Tensor] = []
        self._versions: list[int] = []
        self._places: list[int] = []
        self._modules: set[nn.Module] = set()
        self._tells = True

    def value(self, holder: Mapping[Any, Any], key: Any) -> None:
        """Look at which object a dictionary has under a key."""
        self._holders.append(holder)
        self._keys.append(key)
        self._values.append(holder[key])

    def module(self, holder: Mapping[Any, Any], key: Any) -> None:
        """Look at a module that a dictionary has under a key: its mode, who hears it, and what it is made of."""
        self.value(holder, key)
        module: nn.Module = holder[key]
        self.value(vars(module), "training")
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            self._hooks.append(hooks)
            self._heard.append(len(hooks))
        self.inside(module)

    def inside(self, module: nn.Module, *, written: bool = True) -> None:
        """Look at a module's tensors and modules, also at those that it borrows, and whether one is `written` to."""
        if module in self._modules:
            return
        self._modules.add(module)
        own = vars(module)
        borrowed = {key: own for key, value in own.items() if isinstance(value, (Tensor, nn.Module))}
        held = {key: each for each in (module._parameters, module._buffers, module._modules) for key in each}
        for key, holder in (held | borrowed).items():
            self.value(holder, key)
            if isinstance(value := holder[key], nn.Module):
                self.inside(value, written=written)
            elif value is not None and written:
                self._tensor(value)

    def _tensor(self, tensor: Tensor) -> None:
        self._tells = self._tells and type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()
        if self._tells:  # not one that is spread over processes, for example
            self._tensors.append(tensor)
            self._versions.append(_version(tensor))
            self._places.append(_place(tensor))

    def holds(self) -> bool:
        """Whether all is as it was."""
        try:
            same = all(map(is_, map(getitem, self._holders, self._keys), self._values))
        except KeyError:
            return False
        unwritten = self._tells and list(map(_version, self._tensors)) == self._versions
        heard = list(map(len, self._hooks)) == self._heard
        return same and heard and unwritten and list(map(_place, self._tensors)) == self._places
