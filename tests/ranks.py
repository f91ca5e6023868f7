"""What `torchrun` runs for test_ranks.py: every method in a trainer, on two processes.

torchrun --nproc-per-node 2 tests/ranks.py FOLDER ddp|fsdp|dies NAME...
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import Trainer, TrainerCallback

from moesaic.host import TARGETS, TASK_IDS, RoutedTrainerMixin, find_host
from moesaic.lora import METHODS
from tests.loops import collate, rows, trainer
from tests.tiny import llama, small, wrap

STEPS, ROWS, RANKS = 3, 2, 2
TRAINED = sorted({name for name, cls in METHODS.items() if cls.kind.weights == "learned" or cls.kind.experts == "own"})
Losses = dict[str, list[float]]


class RoutedTrainer(RoutedTrainerMixin, Trainer):
    """As docs/training.md says."""


class Dies(TrainerCallback):
    """The last rank is killed behind the first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.process_index == RANKS - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def examples() -> list[dict[str, Any]]:
    """Rows of one length, each with a task and a target of its own."""
    number = RANKS * ROWS * STEPS
    shares = torch.rand(number, 4, generator=torch.Generator().manual_seed(3)).softmax(-1)
    return [{**row, TASK_IDS: i % 4, TARGETS: shares[i].tolist()} for i, row in enumerate(rows([8] * number))]


def model_of(method: str) -> Any:
    """With an auxiliary loss that weighs something; HotMoE's looks at one micro-batch, as it does on a rank."""
    own = {"step_window": False} if method == "hotmoe" else {}
    return wrap(llama(initializer_range=0.5), small(method, aux_weight=0.1, **own))


def in_a_trainer(method: str, folder: Path, **settings: Any) -> Losses:
    """Losses by step of a run that leaves its adapter in `folder`."""
    model, callbacks = model_of(method), settings.pop("callbacks", [])
    loop = trainer(
        model, folder, cls=RoutedTrainer, train_dataset=examples(), max_steps=STEPS, per_device_train_batch_size=ROWS,
        remove_unused_columns=False, callbacks=callbacks, **settings,
    )  # fmt: skip
    loop.train()
    loop.save_model(str(folder / "adapter"))
    assert find_host(model).frame is None
    logged = loop.state.log_history
    return {key: [entry[key] for entry in logged if key in entry] for key in ("loss", "router_aux_loss")}


def micro_batches() -> Iterator[list[dict[str, Any]]]:
    """A step's, one for each rank."""
    own = examples()
    for start in range(0, len(own), RANKS * ROWS):
        yield [collate(own[start + ROWS * rank : start + ROWS * (rank + 1)]) for rank in range(RANKS)]


def in_a_loop(method: str, folder: Path, rank: int | None = None) -> Losses:
    """Losses, the auxiliary one included, by step; where there is a rank, FSDP2 shards each layer over all of them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = model_of(method).train()
    if rank is not None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for batches in micro_batches():
        mine = batches if rank is None else [batches[rank]]
        total = torch.zeros(())
        for batch in mine:
            loss = model(**batch).loss / len(mine)
            loss.backward()
            total += loss.detach()
        if rank is not None:
            dist.all_reduce(total)
            total /= RANKS
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) if rank is not None else None
    if not rank:
        model.save_pretrained(folder / "adapter", state_dict=state)
    return {"loss": losses}


def main(folder: str, how: str, *methods: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for method in methods:
        place = Path(folder) / how / method
        if how == "fsdp":
            found = in_a_loop(method, place, dist.get_rank())
        else:
            callbacks = [Dies()] if how == "dies" else []
            found = in_a_trainer(method, place, ddp_backend="gloo", callbacks=callbacks)
        if dist.get_rank() == 0:
            (place / "losses.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # once in some hundred runs gloo's threads never end with the interpreter: all is written by now


if __name__ == "__main__":
    main(*sys.argv[1:])
