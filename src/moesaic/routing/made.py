"""What was made of parameters, kept for as long as it would be made the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

Value = TypeVar("Value")


class Made(Generic[Value]):
    """A value, and the tensors that it was made of.

    It holds until one of them is another tensor, was written to, or lies elsewhere: optimizer steps, loading, moving
    and assigning show by that. What is written through `.data` does not.
    """

    def __init__(self, value: Value, sources: Sequence[Any]) -> None:
        self.value, self.sources, self.marks = value, tuple(sources), [_mark(source) for source in sources]

    def holds(self, sources: Sequence[Any]) -> bool:
        """Whether it would be the same, made of `sources`: tensors, and objects that count by identity."""
        return len(sources) == len(self.sources) and all(
            now is then and mark is not None and _mark(now) == mark
            for now, then, mark in zip(sources, self.sources, self.marks, strict=True)
        )


def _mark(source: Any) -> tuple[int, int] | None:
    """Version and place; None where they cannot be told, as of a tensor that is spread over processes."""
    if not isinstance(source, Tensor):
        return 0, 0
    if type(source) not in (Tensor, nn.Parameter) or source.is_inference():
        return None
    return source._version, source.data_ptr()
