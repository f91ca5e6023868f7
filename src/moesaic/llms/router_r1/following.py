"""While a policy trains: a line a step, tries, how far it is, and an end that can be gone on from."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesaic.llms.router_r1.engine import Question, Rollout, roll
from moesaic.llms.router_r1.for_trl import Rollouts
from moesaic.llms.router_r1.scores import measured
from moesaic.llms.router_r1.settings import R1Train
from moesaic.runs.folder import write_text
from moesaic.runs.pace import Pace

METRICS, TRANSCRIPTS = "metrics.jsonl", "transcripts.jsonl"
BROKEN = 5
"""Steps whose formats are all broken, after which that is said."""

Say = Callable[[str], None]


def following(wanted: R1Train, out: Path, rollouts: Rollouts, tried: Sequence[Question], say: Say) -> Any:
    """A callback that writes a line a step, tries the policy where it is time to, and says how far it is."""
    from transformers import TrainerCallback

    class Following(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.pace, self.warned = Pace(wanted.steps, state.global_step), False
            if tried and not rollouts.tried:
                self._try(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step, now = state.global_step, {name: values[-1] for name, values in rollouts.figures.items()}
            _add_line(out / METRICS, {"step": step, **now})
            if tried and (step % wanted.eval_every == 0 or step == wanted.steps):
                self._try(step)
            if step % wanted.save_every == 0 or step == wanted.steps:
                write_text(out / TRANSCRIPTS, "".join(json.dumps(r.trace()) + "\n" for r in rollouts.last))
            recent = rollouts.figures["broken"][-BROKEN:]
            if len(recent) == BROKEN and min(recent) == 1.0 and not self.warned:
                self.warned = True
                say(
                    f"{BROKEN} steps in which every format is broken: reward tells nothing; warm= and warm_lr= teach it"
                )
            if self.pace.due(step) or step == wanted.steps:
                say(f"step {step} of {wanted.steps}: {_said(now)}")

        def _try(self, step: int) -> None:
            found = measured(greedy(rollouts, tried))
            rollouts.tried.append({"step": step, **found})
            _add_line(out / METRICS, {"tried": step, **found})
            say(f"tried after step {step}: {_said({name: found[name] for name in ('em', 'cost', 'calls', 'broken')})}")

    return Following()


def greedy(rollouts: Rollouts, questions: Sequence[Question]) -> list[Rollout]:
    """What the policy does where it takes the likeliest token."""
    policy = rollouts.policy
    before, training = policy.temperature, policy.model.training
    policy.temperature = 0.0
    policy.model.eval()
    try:
        return roll(policy, rollouts.pool, questions, rollouts.limits, say=rollouts.say, dialect=policy.dialect)
    finally:
        policy.temperature = before
        policy.model.train(training)


def _said(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())


def _add_line(file: Path, entry: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(entry) + "\n")


def keep_lines(file: Path, steps: int) -> None:
    """Cut what was written after the checkpoint that a run goes on from."""
    if file.is_file():
        entries = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        kept = [line for line in entries if _step_of(line) <= steps]
        write_text(file, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    """Of a line of metrics; beyond all where it was not written whole."""
    try:
        entry = json.loads(line)
    except ValueError:
        return float("inf")
    return float(entry.get("step", entry.get("tried", 0)))


@contextmanager
def stopping(trainer: Any) -> Iterator[None]:
    """Ctrl-C and SIGTERM end training after the running step, with a checkpoint; a second one ends it at once."""

    from transformers import TrainerCallback

    asked = threading.Event()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if asked.is_set():
                control.should_save = control.should_training_stop = True

    def stop(number: int, frame: Any) -> None:
        asked.set()
        for kind, held in before.items():
            signal.signal(kind, held)

    trainer.add_callback(Stop())
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {kind: signal.signal(kind, stop) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, held in before.items():
            signal.signal(kind, held)
