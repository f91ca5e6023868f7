"""What our training adds to HF Trainer and TRL's SFTTrainer: order, checkpoints, metrics, stopping in good time."""

import json
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from moesaic.data.sampling import InterleavedSampler
from moesaic.errors import TrainingError
from moesaic.models.precision import numerics
from moesaic.runs.folder import RunFolder, atomic_folder
from moesaic.runs.pretraining import Pretraining
from moesaic.runs.recipe import Recipe
from moesaic.training.held_out import Best, Evaluates, HeldOut
from moesaic.training.progress import Progress
from moesaic.training.reporting import into_folder, reports

logger = logging.getLogger(__name__)


class RunMixin:
    """Put before Trainer or SFTTrainer (and before host's mixin) in the bases; then call `attach`.

    - one epoch is the whole run, in task-interleaved order;
    - checkpoints appear complete or not at all;
    - every step and every evaluation is a line of metrics.jsonl;
    - a loss or gradient that is not finite stops the run before the optimizer sees it;
    - Ctrl-C and SIGTERM end the run after the step, with a checkpoint.
    """

    def attach(self, folder: RunFolder, sampler: InterleavedSampler, *, keep: int, progress: bool | None) -> None:
        """Say where the run is written and in which order it reads.

        Args:
            progress: a bar on stderr; where None, if that is a terminal, and else a line now and then.
        """
        self.folder = folder
        self.run_sampler = sampler
        self.keep = keep
        self.stopper = _Stopper()
        self.tokens = 0
        self.seconds = 0.0
        self.last_loss = math.nan
        self.held_out: HeldOut | None = None
        self.takes_best = False
        self.best: Best | None = None
        self._staging: Any = None
        me: Any = self
        for callback in (ProgressCallback, PrinterCallback):
            me.remove_callback(callback)
        into_folder(me, folder)
        me.add_callback(self.stopper)
        me.add_callback(_Rate())
        if progress is not False:
            bar = sys.stderr.isatty() if progress is None else progress
            me.add_callback(Progress(bar=bar, tokens=lambda: self.tokens))

    def evaluates(self, held_out: HeldOut, *, every: int, takes_best: bool) -> None:
        """Score rows every so many steps; `takes_best` keeps the adapter at its least loss at hand."""
        self.held_out, self.takes_best = held_out, takes_best
        me: Any = self
        me.add_callback(Evaluates(every))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        me: Any = self
        assert self.held_out is not None
        me.model.eval()
        loss = self.held_out.loss(self)
        self._require_finite(loss, "held-out loss")
        found = {"eval_loss": loss}
        me.log(dict(found))
        me.model.train()
        me.control = me.callback_handler.on_evaluate(me.args, me.state, me.control, found)
        if self.takes_best and (self.best is None or loss < self.best.loss):
            self.best = Best.of(me.model, me.state.global_step, loss)
        return found

    def _get_train_sampler(self, train_dataset: Any = None) -> InterleavedSampler:
        return self.run_sampler

    def train(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            with self.stopper.listening(), labelled_alone():
                return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.seconds = time.perf_counter() - start

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.tokens += int(inputs["attention_mask"].sum())
        result = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        loss = result[0] if isinstance(result, tuple) else result
        if model.training:
            self._require_finite(loss, "loss")
        return result

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        self._require_finite(norm, "gradient norm")
        return norm

    def _require_finite(self, value: Tensor | float, what: str) -> None:
        number = float(value.detach().mean()) if isinstance(value, Tensor) else float(value)
        if math.isfinite(number):
            return
        steps = self.folder.steps()
        kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint was written yet"
        step = self.state.global_step + 1  # type: ignore[attr-defined]
        raise TrainingError(
            f"{what} is {number} at step {step}: lower lr, clip or lora_alpha, or look at the data; {kept}"
        )

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step  # type: ignore[attr-defined]
        final = self.folder.checkpoint(step)
        if final.is_dir():
            return
        with atomic_folder(final) as staging:
            self._staging = staging.parent
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            if self.best is not None:
                self.best.write(staging)
        self.folder.prune(self.keep)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter alone: no pickled arguments, no tokenizer (both can be had from the recipe)."""
        self.model.save_pretrained(output_dir, state_dict=state_dict)  # type: ignore[attr-defined]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: SFTTrainer would write one into every checkpoint."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)  # type: ignore[misc]
        # the history would be carried by every checkpoint, and metrics.jsonl holds it
        entry = self.state.log_history.pop()  # type: ignore[attr-defined]
        if "loss" not in entry and "eval_loss" not in entry:
            return
        self.last_loss = entry.get("loss", self.last_loss)
        kept = {k: v for k, v in entry.items() if k not in ("step", "epoch", "num_tokens", "eval_num_tokens")}
        with self.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": entry["step"], **kept}) + "\n")


@contextmanager
def labelled_alone() -> Iterator[None]:
    """Let TRL project the labelled tokens alone into the vocabulary, on a CPU as on a GPU, for as long.

    It projects all of them where there is no Triton, for compilers to which every length is a new shape. On a CPU that
    took as long as the rest of a step of SmolLM2 on short answers.
    """
    utils: Any = sys.modules.get("trl.trainer.utils")  # an encoder's trainer has no need of it
    kept = getattr(utils, "_use_triton", None)
    if kept is None or torch.cuda.is_available():
        yield
        return
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = kept


class _Stopper(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into a checkpoint and an orderly end after the step; a second interrupts."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("stopping after this step; once more to stop at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested:
            control.should_save = True
            control.should_training_stop = True


class _Rate(TrainerCallback):
    """A step that follows a checkpoint is made at the rate that this run's schedule has there.

    The checkpoint's optimizer holds the rate of the schedule that it was written under: of a finished run that is to
    go on, none.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.save_steps = args.save_steps  # a checkpoint holds those of the run that wrote it
        scheduler = kwargs["lr_scheduler"]
        groups = zip(kwargs["optimizer"].param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        for group, peak, share in groups:
            group["lr"] = peak * share(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in kwargs["optimizer"].param_groups]  # what is logged


def training_arguments(recipe: Recipe | Pretraining, folder: RunFolder) -> dict[str, Any]:
    """What a recipe means in the words of `TrainingArguments`."""
    from transformers import TrainingArguments

    plan = numerics(recipe.precision)
    renamed = "activation_checkpointing" in {f.name for f in fields(TrainingArguments)}  # since Transformers 5.2x
    checkpointing = "activation" if renamed else "gradient"
    return {
        "output_dir": str(folder.checkpoints),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.used_warmup(),
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.clip,
        "seed": recipe.seed,
        "bf16": plan.autocast,
        "use_cpu": plan.device.type == "cpu",
        "save_strategy": "steps",
        "save_steps": recipe.save_every,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": plan.device.type == "cuda",
        f"{checkpointing}_checkpointing": recipe.checkpointing,
        f"{checkpointing}_checkpointing_kwargs": {"use_reentrant": False},
        "disable_tqdm": True,
        "report_to": reports(recipe.report_to),
        "run_name": folder.path.name,
    }
