"""Encoders on several tasks at once: a stock Transformers encoder, mean pooling, and heads.

An example is one row: the prompt, then, where a task's choices vary, all of its choices, each closed by a separator.
Tasks with a fixed label set get a linear head of their own on the row's mean state. Tasks whose choices vary share one
scoring head on the mean state of each part: score = exp(s) * sum_i w_i q_i c_i over the normalised prompt q and choice
c. It starts as the cosine (w = 1), which a sentence encoder already answers with, so training begins above chance.
(A row for each choice takes two to three times as long: most of such a batch is padding.)

Shapes: N examples, T tokens, C choices or labels at most, d hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from moesaic.data.causal import round_up
from moesaic.data.examples import Example
from moesaic.errors import ConfigError, DataError, suggest

HEADS = "task_heads"  # the module's name, given to PEFT as modules_to_save
INITIAL_SCALE = 20.0


@dataclass(frozen=True)
class Layout:
    """Which head answers which task: stored with a run, so that evaluation rebuilds the same model.

    `labels` holds the tasks with a fixed label set; `tasks` all of them, whose position is a row's task id; `scorers`
    those of the others that have a scorer of their own, from 1 on, beside scorer 0 that all others share.
    """

    tasks: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]
    scorers: dict[str, int] = field(default_factory=dict)

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
        """What was stored. Raises ConfigError for labels that `of` cannot have given; LookupError, TypeError or
        AttributeError for what is missing or of another kind."""
        tasks, labels = tuple(stored["tasks"]), {t: tuple(names) for t, names in stored["labels"].items()}
        written = {t: list(names) for t, names in labels.items()}
        if stored["labels"] != written or list(labels) != [t for t in tasks if t in labels]:
            raise ConfigError("its labels are not those of its tasks, in their order")
        return cls(tasks, labels, dict(stored.get("scorers", {})))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def head(self, example: Example) -> int:
        """Index of the label head of an example, -1 - s for scorer s. Raises DataError where none fits."""
        labels = self.labels.get(example.task)
        if labels is not None:
            if labels != example.choices:
                raise DataError(
                    f"task '{example.task}' was trained on the labels {list(labels)}, "
                    f"this row has {list(example.choices)}"
                )
            return list(self.labels).index(example.task)
        if not example.choices:
            raise DataError(f"task '{example.task}' has rows without choices: an encoder cannot write an answer")
        return -1 - self.scorers.get(example.task, 0)

    def task_id(self, task: str) -> int:
        """Position of a task among those trained. Raises DataError for one that was not."""
        if task not in self.tasks:
            raise DataError(f"task '{task}' was not trained; {suggest(task, self.tasks)}")
        return self.tasks.index(task)


class TaskHeads(nn.Module):
    """All heads in four tensors, so that every parameter is in every step's graph, whatever a batch holds (DDP)."""

    def __init__(self, hidden: int, layout: Layout) -> None:
        super().__init__()
        sizes = [len(labels) for labels in layout.labels.values()]
        bound = hidden**-0.5
        self.weight = nn.Parameter(torch.empty(len(sizes), max(sizes, default=0), hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(len(sizes), max(sizes, default=0)))
        scorers = 1 + max(layout.scorers.values(), default=0)
        self.diagonal = nn.Parameter(torch.ones(scorers, hidden))
        self.log_scale = nn.Parameter(torch.full((scorers,), INITIAL_SCALE).log())
        self.sizes: Tensor
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.long), persistent=False)

    def forward(self, states: Tensor, segments: Tensor, heads: Tensor) -> Tensor:
        """Scores (N, C), the smallest float where an example has fewer than C choices.

        Args:
            states: (N, T, d). segments: (N, T) 0 for the prompt, k for choice k, -1 for padding.
            heads: (N,) label head, or -1 - s for scorer s.
        """
        widest = self.weight.shape[1]
        width = max(widest, int(segments.max()))
        parts = (segments[..., None] == torch.arange(width + 1, device=segments.device)).to(states.dtype)
        counts = parts.sum(1)
        pooled = torch.einsum("ntk,ntd->nkd", parts, states) / counts.clamp(min=1)[..., None]
        unit = F.normalize(pooled, dim=-1)
        scorer = (-1 - heads).clamp(min=0)
        scores = torch.einsum("nd,nd,ncd->nc", unit[:, 0], self.diagonal[scorer], unit[:, 1:])
        scores = scores * self.log_scale.exp()[scorer, None]
        valid = counts[:, 1:] > 0
        if len(self.weight):
            head, own = heads.clamp(min=0), (heads >= 0)[:, None]
            labelled = torch.einsum("nd,nld->nl", pooled[:, 0], self.weight[head]) + self.bias[head]
            scores = torch.where(own, F.pad(labelled, (0, width - widest)), scores)
            places = torch.arange(width, device=segments.device)
            valid = torch.where(own, places < self.sizes[head][:, None], valid)
        return scores.masked_fill(~valid, torch.finfo(scores.dtype).min)


class EncoderForTasks(nn.Module):
    """A stock encoder with `TaskHeads`; what PEFT wraps. Its forward takes what `EncoderCollator` gives.

    It takes no **kwargs and says `accepts_loss_kwargs = False`: encoders swallow `num_items_in_batch` without dividing
    by it, and Trainer would then scale the gradient by the number of accumulated batches.
    """

    accepts_loss_kwargs = False

    def __init__(self, encoder: Any, layout: Layout) -> None:
        super().__init__()
        self.encoder = encoder
        self.config: Any = encoder.config
        self.layout = layout
        self.task_heads = TaskHeads(int(self.config.hidden_size), layout)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        segments: Tensor,
        heads: Tensor,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (N, C) and, given labels (N,), the mean cross-entropy of the examples."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        with torch.autocast(states.device.type, enabled=False):
            logits = self.task_heads(states.float(), segments, heads)
            loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class EncoderCollator:
    """Examples to one padded batch.

    Args:
        max_length: tokens a row; where there are more, the longest parts are cut.
        task_ids: emit `routing_task_ids` (N,), which a mixture's router may read; a plain encoder would choke on it.
        targets: what the routing of a prompt should be like; then `routing_targets` (N, E) is emitted too.
        positions: the encoder's, where there is an end to them.
    """

    def __init__(
        self,
        tokenizer: Any,
        layout: Layout,
        *,
        max_length: int = 128,
        task_ids: bool = False,
        targets: Mapping[str, Sequence[float]] | None = None,
        positions: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self.max_length = max_length
        self.task_ids = task_ids
        self.targets = targets
        self.positions = positions
        first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        self.opening = [] if first is None else [first]
        last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        self.closing = [] if last is None else [last]

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        heads = [self.layout.head(e) for e in examples]
        rows = [self._row(e, head) for e, head in zip(examples, heads, strict=True)]
        longest = round_up(max(len(ids) for ids, _ in rows), self.positions)
        pad = self.tokenizer.pad_token_id
        segments = torch.tensor([parts + [-1] * (longest - len(parts)) for _, parts in rows])
        batch = {
            "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
            "attention_mask": (segments >= 0).long(),
            "segments": segments,
            "heads": torch.tensor(heads),
            "labels": torch.tensor([e.label for e in examples]),
        }
        if self.task_ids:
            batch["routing_task_ids"] = torch.tensor([self.layout.task_id(e.task) for e in examples])
        if self.targets is not None:
            batch["routing_targets"] = torch.tensor([self.targets[e.prompt] for e in examples])
        return batch

    def _row(self, example: Example, head: int) -> tuple[list[int], list[int]]:
        """Token ids, and the part each belongs to."""
        texts = [example.prompt, *(example.choices if head < 0 else ())]
        parts: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.max_length - len(self.opening) - len(parts) * len(self.closing)
        if room < len(parts):
            where = example.where or f"task '{example.task}'"
            raise DataError(f"{where}: {len(parts)} parts do not fit max_length={self.max_length} tokens")
        lengths = [len(p) for p in parts]
        while sum(lengths) > room:
            lengths[lengths.index(max(lengths))] -= 1
        ids, owners = list(self.opening), [0] * len(self.opening)
        for number, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            ids += part[:length] + self.closing
            owners += [number] * (length + len(self.closing))
        return ids, owners
