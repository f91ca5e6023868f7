"""RoutingCallback: what the routers do, in the logs of any transformers.Trainer."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from moesaic.errors import TrainingError
from moesaic.host.hooks import Host, find_host
from moesaic.routing import RoutingTrace

METRICS = "metrics.jsonl"


class RoutingCallback(TrainerCallback):
    """Logs routing to whatever `report_to` names, to the trainer's state, and to `metrics.jsonl` in its output folder.

        trainer = SFTTrainer(model, args, train_dataset=rows, peft_config=config, callbacks=[moesaic.RoutingCallback()])

    | logged | meaning |
    | --- | --- |
    | `router_aux_loss` | the auxiliary loss, weighted, beside the task's `loss`; mean since the last log |
    | `router_entropy` | of a token's probabilities, over log E: 0 is certain, 1 uniform |
    | `router_load_spread` | standard deviation over mean of the experts' shares of the weight: 0 is even |
    | `router_dead_share` | of all experts, those with less than a tenth of the fair share, 1/E, of the weight |
    | `router_task_information` | what a task tells of the experts used, 0 to 1; where batches have `routing_task_ids` |

    Averaged over the routers, of the step that is logged; `eval_router_…` of an evaluation during training, of all its
    tokens. Of several processes, the first one's. It also tells routers and losses how far the training is.

    Args:
        by_layer: also log entropy, spread and dead share of each layer, `router_entropy_layer_3`.
        file: write `metrics.jsonl`, a line for every log.
        every: count what the routers do in the first step, the last, and every so many; counting takes a few per cent
            of a small model's step. The auxiliary loss costs nothing and is in every log.
    """

    def __init__(self, *, by_layer: bool = False, file: bool = True, every: int = 1) -> None:
        self.by_layer, self.file, self.every = by_layer, file, every
        self._host: Host | None = None
        self._trace: RoutingTrace | None = None
        self._aux: list[Tensor] = []

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _go_first(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _go_first(self)
        try:
            self._host = find_host(kwargs["model"])
        except TrainingError:
            self._host = None
        self._aux = []
        if self.file and state.is_world_process_zero:
            _cut(Path(args.output_dir) / METRICS, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()
        if self._host is None:
            return
        self._host.progress = state.global_step / max(state.max_steps, 1)
        step = state.global_step + 1
        counted = step in (1, state.max_steps) or step % self.every == 0
        if counted and self._is_logged(step, args, state):
            self._start()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        aux = None if self._host is None else self._host.aux
        if aux is not None:
            self._aux.append(aux.detach())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_substep_end(args, state, control)
        if self._trace is None:
            self._start()  # for an evaluation that may follow

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = {} if logs is None else logs
        prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
        if prefix or "loss" in logs:
            found = self._figures(prefix)
            logs.update(found)
            if state.log_history:
                state.log_history[-1].update(found)
        if self.file and state.is_world_process_zero:
            entry = {"step": state.global_step, **logs}
            with (Path(args.output_dir) / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, default=float) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()

    def _figures(self, prefix: str) -> dict[str, float]:
        found: dict[str, float] = {}
        if not prefix and self._aux:
            found["router_aux_loss"] = torch.stack(self._aux).mean().item()
            self._aux.clear()
        if self._trace is not None and self._trace.modules:
            found |= {prefix + name: value for name, value in figures(self._trace, by_layer=self.by_layer).items()}
        self._stop()
        self._start()
        return found

    @staticmethod
    def _is_logged(step: int, args: Any, state: Any) -> bool:
        every = state.logging_steps or 1
        by_steps = args.logging_strategy == "steps" and step % every == 0
        return by_steps or args.logging_strategy == "epoch" or (args.logging_first_step and step == 1)

    def _start(self) -> None:
        if self._host is not None and self._trace is None:
            self._trace = RoutingTrace()
            self._host.traces.append(self._trace)

    def _stop(self) -> None:
        if self._host is not None and self._trace is not None:
            self._host.traces.remove(self._trace)
        self._trace = None


def figures(trace: RoutingTrace, *, by_layer: bool = False) -> dict[str, float]:
    """What `RoutingCallback` logs of a trace; what cannot be told of it is left out."""
    dead = trace.dead_experts()
    found = {
        "router_entropy": trace.entropy(),
        "router_load_spread": trace.outer_balance(),
        "router_dead_share": len(dead) / trace.num_experts(),
        "router_task_information": trace.mutual_information(),
    }
    for layer, entropy in trace.entropy_by_layer().items() if by_layer else ():
        inside = {name: module for name, module in trace.modules.items() if trace.layer_of[name] == layer}
        spreads = [module.outer_balance for module in inside.values() if module.outer_balance is not None]
        idle, experts = sum(name in inside for name, _ in dead), sum(len(m.weight) for m in inside.values())
        found |= {
            f"router_entropy_layer_{layer}": entropy,
            f"router_load_spread_layer_{layer}": fmean(spreads) if spreads else None,
            f"router_dead_share_layer_{layer}": idle / experts,
        }
    return {name: float(value) for name, value in found.items() if value is not None}


def _go_first(callback: TrainerCallback) -> None:
    """Move a callback before those that report, which Trainer puts first: they are to see what it adds to the logs.

    Transformers hands callbacks everything but the list that they are in, so it is read off the caller.
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is not None:
        frame.f_locals["self"].callbacks.sort(key=lambda other: other is not callback)


def _cut(file: Path, step: int) -> None:
    """Drop what was logged after the step that is gone on from; all of it, where that is the first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() and step else []
    part = file.with_name(f".{file.name}.part")
    part.write_text("".join(line for line in lines if _step_of(line) <= step), encoding="utf-8")
    os.replace(part, file)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")
