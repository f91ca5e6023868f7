"""Wrapped modules that a model never calls: it reads their weight itself, so their experts would train nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from moesaic.host.frames import Frame


class Unused:
    """Looks at the first whole forward in each mode, and warns of wrapped modules that were not called in it.

    Whole is one through all stacks with wrapped modules: a model that is shown no picture runs no vision tower.
    """

    def __init__(self, stack_of: Mapping[str, str] | None = None) -> None:
        self.wrapped, self.stacks = set(stack_of or ()), set((stack_of or {}).values())
        self._checked: set[bool] = set()

    def called(self, frame: Frame, name: str) -> None:
        if len(self._checked) < 2 and not torch.compiler.is_compiling():
            frame.called.add(name)

    def check(self, frame: Frame) -> None:
        """Once a whole forward has ended."""
        if not frame.complete or frame.training in self._checked or torch.compiler.is_compiling():
            return
        if not self.stacks <= frame.stacks.keys():
            return
        self._checked.add(frame.training)
        dead = sorted(self.wrapped - frame.called)
        if dead:
            shown = ", ".join(dead[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
            warnings.warn(
                f"wrapped but never called in {'training' if frame.training else 'evaluation'}: {shown}. The model "
                "reads their weight directly (a fused kernel, or an attention module), so their experts have no "
                "effect: leave them out of target_modules",
                stacklevel=2,
            )
