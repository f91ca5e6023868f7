"""What was made of parameters, kept for as long as it would be made the same."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

Value = TypeVar("Value")


class Made(Generic[Value]):
    """A value, and the tensors that it was made of.

    It holds until one of them is another tensor, was written to, or lies elsewhere: optimizer steps, loading, moving
    and assigning show by that. What is written through `.data` does not.
    """

    def __init__(self, value: Value, sources: Sequence[Any]) -> None:
        self.value, self.sources = value, tuple(sources)
        self.tensors = [source for source in self.sources if isinstance(source, Tensor)]
        self.marks = _marks(self.tensors) if all(map(_tells, self.tensors)) else None

    def holds(self, sources: Sequence[Any]) -> bool:
        """Whether it would be the same, made of `sources`: tensors, and objects that count by identity."""
        if len(sources) != len(self.sources) or not all(map(is_, sources, self.sources)):
            return False
        return self.marks is not None and _marks(self.tensors) == self.marks


def _marks(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Version and place of each."""
    return [(tensor._version, tensor.data_ptr()) for tensor in tensors]


def _tells(tensor: Tensor) -> bool:
    """Not one that is spread over processes, for example."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()
