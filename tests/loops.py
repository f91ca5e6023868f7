"""Stock training loops on tiny data, and what they do to the routers: batches fed, gradients at the optimiser step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from tests.tiny import PAD, VOCAB, router_parameters

QUIET: dict[str, Any] = {
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "max_grad_norm": 0.0,
    "dataloader_pin_memory": False,
    "learning_rate": 1e-2,
}


def rows(lengths: list[int], *, seed: int = 0) -> list[dict[str, list[int]]]:
    """One random example of each length, as token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCAB, (n,), generator=generator).tolist()} for n in lengths]


LENGTHS = [4, 9, 6, 6, 12, 3, 8, 5]
"""Eight examples: four unequal micro-batches of two."""


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Right-padded ids, mask and causal labels; other columns as they are."""
    width = max(len(e["input_ids"]) for e in examples)
    ids = torch.tensor([e["input_ids"] + [PAD] * (width - len(e["input_ids"])) for e in examples])
    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    others = [key for key in examples[0] if key != "input_ids"]
    return batch | {key: torch.tensor([e[key] for e in examples]) for key in others}


def trainer(model: nn.Module, folder: Path, *, cls: type[Trainer] = Trainer, **overrides: Any) -> Trainer:
    """A `transformers.Trainer` (or subclass) for one step over `LENGTHS` in order, unless told otherwise."""
    own = {k: overrides.pop(k) for k in ("compute_loss_func", "callbacks", "eval_dataset") if k in overrides}
    data = {"train_dataset": overrides.pop("train_dataset", rows(LENGTHS)), "data_collator": collate}
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "train_sampling_strategy": "sequential",
        "bf16": False,
    }
    return cls(model=model, args=TrainingArguments(str(folder), **{**QUIET, **settings, **overrides}), **data, **own)


def sft(model: Any, folder: Path, *, cls: Any = None, **overrides: Any) -> Any:
    """TRL's SFTTrainer (or a subclass) for one step, with checkpointing and bf16 off unless told otherwise."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    own = {k: overrides.pop(k) for k in ("compute_loss_func", "callbacks", "peft_config") if k in overrides}
    settings = {"per_device_train_batch_size": 2, "max_steps": 1, "train_sampling_strategy": "sequential"}
    settings |= {"bf16": False, "gradient_checkpointing": False, "max_length": 16}
    data = Dataset.from_list(overrides.pop("train_dataset", rows(LENGTHS)))
    return (cls or SFTTrainer)(
        model=model,
        args=SFTConfig(str(folder), **{**QUIET, **settings, **overrides}),
        train_dataset=data,
        processing_class=tokenizer(),
        **own,
    )


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words w0 ... w63 of the tiny models' vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": PAD, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=64
    )


class Watch(TrainerCallback):
    """Keeps what the loop fed to forwards with gradients, and the routers' gradients at each optimiser step."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.gradients: list[dict[str, Tensor]] = []

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[Watch]:
        handle = model.register_forward_pre_hook(self._fed, with_kwargs=True)
        try:
            yield self
        finally:
            handle.remove()

    def _fed(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and model.training:
            self.batches.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = router_parameters(kwargs["model"])
        self.gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in found.items()})


def watched(loop: Any) -> Watch:
    """Train `loop` and return what was seen."""
    watch = Watch()
    loop.add_callback(watch)
    with watch.over(loop.model):
        loop.train()
    return watch
