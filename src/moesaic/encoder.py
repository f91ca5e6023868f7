"""Encoders on several tasks at once: a stock Transformers encoder, mean pooling, and heads.

Tasks with a fixed label set get a linear head of their own. Tasks whose choices vary share one scoring head: question
and choice are encoded apart, score = exp(s) * sum_i w_i q_i c_i over normalised embeddings q, c. It starts as the
cosine (w = 1), which a sentence encoder already answers with, so training begins above chance.

Shapes: R rows of text (sentences, questions and choices, in one encoder call), N examples, C choices at most, d hidden.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from moesaic.data import Example
from moesaic.errors import DataError, suggest

HEADS = "task_heads"  # the module's name, given to PEFT as modules_to_save
INITIAL_SCALE = 20.0


@dataclass(frozen=True)
class Layout:
    """Which head answers which task: stored with a run, so that evaluation rebuilds the same model.

    `labels` holds the tasks with a fixed label set; `tasks` all of them, whose position is a row's task id.
    """

    tasks: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Layout":
        """Read the layout off the training rows. Raises DataError for rows without choices."""
        sets: dict[str, set[tuple[str, ...]]] = {}
        for example in examples:
            if not example.choices:
                raise DataError(f"task '{example.task}' has rows without choices: an encoder cannot write an answer")
            sets.setdefault(example.task, set()).add(example.choices)
        tasks = tuple(sorted(sets))
        return cls(tasks, {t: next(iter(sets[t])) for t in tasks if len(sets[t]) == 1})

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Layout":
        return cls(tuple(stored["tasks"]), {t: tuple(labels) for t, labels in stored["labels"].items()})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def head(self, example: Example) -> int:
        """Index of the label head of an example, -1 for the shared scorer. Raises DataError where none fits."""
        labels = self.labels.get(example.task)
        if labels is not None:
            if labels != example.choices:
                raise DataError(
                    f"task '{example.task}' was trained on the labels {list(labels)}, this row has {list(example.choices)}"
                )
            return list(self.labels).index(example.task)
        if not example.choices:
            raise DataError(f"task '{example.task}' has rows without choices: an encoder cannot write an answer")
        return -1

    def task_id(self, task: str) -> int:
        """Position of a task among those trained. Raises DataError for one that was not."""
        if task not in self.tasks:
            raise DataError(f"task '{task}' was not trained; {suggest(task, self.tasks)}")
        return self.tasks.index(task)


class TaskHeads(nn.Module):
    """All heads in three tensors, so that every parameter is in every step's graph, whatever a batch holds (DDP)."""

    def __init__(self, hidden: int, layout: Layout) -> None:
        super().__init__()
        sizes = [len(labels) for labels in layout.labels.values()]
        widest = max(sizes, default=0)
        bound = hidden**-0.5
        self.weight = nn.Parameter(torch.empty(len(sizes), widest, hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(len(sizes), widest))
        self.diagonal = nn.Parameter(torch.ones(hidden))
        self.log_scale = nn.Parameter(torch.tensor(INITIAL_SCALE).log())
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.long), persistent=False)

    def forward(self, pooled: Tensor, questions: Tensor, choices: Tensor, heads: Tensor) -> Tensor:
        """Scores (N, C), the smallest float where an example has fewer than C choices.

        Args:
            pooled: (R, d). questions: (N,) row of each sentence or question. choices: (N, C) rows of the choices, -1
            where there is none. heads: (N,) label head, -1 for the shared scorer.
        """
        pooled = pooled.float()
        width = choices.shape[1]
        places = torch.arange(width, device=pooled.device)
        question = pooled[questions]
        unit = F.normalize(pooled, dim=-1)
        scores = torch.einsum("nd,d,ncd->nc", unit[questions], self.diagonal, unit[choices.clamp(min=0)])
        scores = scores * self.log_scale.exp()
        valid = choices >= 0
        if len(self.weight):
            head = heads.clamp(min=0)
            labelled = torch.einsum("nd,nld->nl", question, self.weight[head]) + self.bias[head]
            labelled = F.pad(labelled, (0, width - labelled.shape[1])) if width > labelled.shape[1] else labelled[:, :width]
            own = (heads >= 0)[:, None]
            scores = torch.where(own, labelled, scores)
            valid = torch.where(own, places < self.sizes[head][:, None], valid)
        return scores.masked_fill(~valid, torch.finfo(scores.dtype).min)


class EncoderForTasks(nn.Module):
    """A stock encoder with `TaskHeads`; what PEFT wraps. Its forward takes what `EncoderCollator` gives.

    It takes no **kwargs and says `accepts_loss_kwargs = False`: encoders swallow `num_items_in_batch` without dividing
    by it, and Trainer would then scale the gradient by the number of accumulated batches.
    """

    accepts_loss_kwargs = False

    def __init__(self, encoder: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.encoder = encoder
        self.config: Any = encoder.config
        self.layout = layout
        self.task_heads = TaskHeads(int(self.config.hidden_size), layout)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        questions: Tensor,
        choices: Tensor,
        heads: Tensor,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (N, C) and, given labels (N,), the mean cross-entropy of the examples."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(torch.float32)
        with torch.autocast(states.device.type, enabled=False):
            pooled = (states.float() * mask).sum(1) / mask.sum(1).clamp(min=1)
            logits = self.task_heads(pooled, questions, choices, heads)
            loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class EncoderCollator:
    """Examples to one padded batch of rows.

    Args:
        task_ids: emit `routing_task_ids` (R,), which a mixture's router may read; a plain encoder would choke on it.
    """

    def __init__(self, tokenizer: Any, layout: Layout, *, max_length: int = 128, task_ids: bool = False) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self.max_length = max_length
        self.task_ids = task_ids

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        texts: list[str] = []
        owners: list[int] = []
        questions, rows, heads = [], [], []
        for number, example in enumerate(examples):
            head = self.layout.head(example)
            heads.append(head)
            questions.append(len(texts))
            texts.append(example.prompt)
            rows.append([] if head >= 0 else list(range(len(texts), len(texts) + len(example.choices))))
            if head < 0:
                texts += example.choices
            owners += [number] * (len(texts) - len(owners))
        width = max(len(e.choices) for e in examples)
        encoded = self.tokenizer(
            texts, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        batch = {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "questions": torch.tensor(questions),
            "choices": torch.tensor([r + [-1] * (width - len(r)) for r in rows]),
            "heads": torch.tensor(heads),
            "labels": torch.tensor([e.label for e in examples]),
        }
        if self.task_ids:
            ids = [self.layout.task_id(e.task) for e in examples]
            batch["routing_task_ids"] = torch.tensor([ids[owner] for owner in owners])
        return batch
