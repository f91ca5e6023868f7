"""How far a run is, on stderr: a bar on a terminal, and a line now and then where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from moesaic.runs.pace import Pace, in_words


class Progress(TrainerCallback):
    """Tells of a step once its loss is known, so that what is shown belongs to the step that it stands beside.

    Args:
        bar: a bar; lines where False.
        tokens: how many tokens this process has trained on.
    """

    def __init__(self, *, bar: bool, tokens: Callable[[], int]) -> None:
        self.shows_bar, self.tokens = bar, tokens
        self.held_out = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm

        done, total = state.global_step, state.max_steps
        shown = self.shows_bar and state.is_local_process_zero
        self.bar = tqdm(total=total, initial=done, unit="step", file=sys.stderr, leave=False, disable=not shown)
        self.pace, self.began, self.first = Pace(total, done), time.monotonic(), done

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            self.held_out = f", held-out loss {logs['eval_loss']:.3f}"
        if "loss" not in logs:
            return
        self.bar.set_postfix_str(f"loss of this step {logs['loss']:.3f}{self.held_out}", refresh=False)
        self.bar.update(state.global_step - self.bar.n)
        if not self.shows_bar and state.is_local_process_zero and self.pace.due(state.global_step):
            print(self.line(state.global_step, state.max_steps, logs["loss"]), file=sys.stderr, flush=True)

    def line(self, step: int, total: int, loss: float) -> str:
        spent = max(time.monotonic() - self.began, 1e-9)
        left = spent / max(step - self.first, 1) * (total - step)
        return (
            f"step {step:,} of {total:,}, its loss {loss:.3f}{self.held_out}, {self.tokens() / spent:,.0f} tokens/s, "
            f"{in_words(left)} left"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
