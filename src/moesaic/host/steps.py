"""Counting optimizer steps. A parameter's version counter does not tell them: fused optimizers leave it as it is."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_steps = 0


def optimizer_steps() -> int:
    """How often any `torch.optim.Optimizer` of this process has stepped."""
    return _steps


def _count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)
