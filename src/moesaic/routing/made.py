"""What was made of modules, kept for as long as it would be made the same."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter, getitem, is_
from typing import Any

from torch import Tensor, nn

_version, _place = attrgetter("_version"), Tensor.data_ptr


class Seen:
    """Modules as they were when they were looked at: which tensors they hold, unwritten, in which mode, heard by whom.

    Optimizer steps, loading, moving and assigning show; what is written in place through `.data`, or replaced within a
    module's own objects, does not. A step of decoding asks once, between products that leave nothing of this in the
    processor's caches: so it is flat lists, and short.
    """

    def __init__(self) -> None:
        self._holders: list[Mapping[Any, Any]] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._grown: list[Mapping[Any, Any]] = []
        self._sizes: list[int] = []
        self._tensors: list[Tensor] = []
        self._versions: list[int] = []
        self._places: list[int] = []
        self._storages: list[Any] = []
        """Held, or another tensor might come to lie in the place of one that is let go."""
        self._modules: set[nn.Module] = set()
        self._tells = True

    def value(self, holder: Mapping[Any, Any], key: Any) -> None:
        """Look at which object a dictionary has under a key."""
        self._holders.append(holder)
        self._keys.append(key)
        self._values.append(holder[key])

    def module(self, holder: Mapping[Any, Any], key: Any) -> None:
        """Look at a module that a dictionary has under a key: its settings, who hears it, and what it is made of."""
        self.value(holder, key)
        module: nn.Module = holder[key]
        own = vars(module)
        for setting in own:
            if isinstance(own[setting], int | float | str | None):
                self.value(own, setting)
        for each in (own, module._forward_pre_hooks, module._forward_hooks):
            self.may_grow(each)
        self.inside(module)

    def may_grow(self, holder: Mapping[Any, Any]) -> None:
        """Look at how much a dictionary holds."""
        self._grown.append(holder)
        self._sizes.append(len(holder))

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
            self._storages.append(tensor.untyped_storage())

    def holds(self) -> bool:
        """Whether all is as it was."""
        try:
            same = all(map(is_, map(getitem, self._holders, self._keys), self._values))
        except KeyError:
            return False
        unwritten = self._tells and list(map(_version, self._tensors)) == self._versions
        as_large = list(map(len, self._grown)) == self._sizes
        return same and as_large and unwritten and list(map(_place, self._tensors)) == self._places
