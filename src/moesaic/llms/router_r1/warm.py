"""A warm start: a policy learns to write transcripts by imitating a script, replies left out of the loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moesaic.llms.router_r1 import checkpoints
from moesaic.llms.router_r1.engine import Question, Rollout, Written
from moesaic.llms.router_r1.local import LocalPolicy
from moesaic.llms.router_r1.transcript import TAGGED, TAGS, Dialect
from moesaic.runs.pace import Pace

IGNORED = -100


class Showing:
    """A policy to imitate: it asks a model that is drawn, with the question as it stands, and then knows the answer."""

    def __init__(self, questions: Sequence[Question], seed: int = 0, dialect: Dialect = TAGGED) -> None:
        self._questions, self._draw, self._dialect = questions, random.Random(f"showing {seed}"), dialect

    def begin(self, prompts: Sequence[str]) -> Showing:
        self._asked: set[int] = set()
        return self

    def write(self, who: Sequence[int]) -> list[Written]:
        return [Written(text := self._line(i), len(text.split())) for i in who]

    def _line(self, i: int) -> str:
        question = self._questions[i]
        if i in self._asked:
            return self._dialect.end("That is enough to answer.", question.truths[0])
        self._asked.add(i)
        model, query = self._draw.choice(list(question.catalog.values())), question.text.replace(":", " ")
        return self._dialect.call(f"I should ask {model.name}.", model, " ".join(query.split()))

    def read(self, who: int, text: str) -> tuple[int, ...]:
        return ()

    def clip(self, text: str, tokens: int) -> str:
        return " ".join(text.split()[:tokens])


def with_tags(model: Any, tokenizer: Any, seed: int = 0) -> None:
    """Give each tag of the grammar a token of its own, where a tokenizer would take it apart; in place."""
    import torch

    tags = [f"<{mark}{tag}>" for tag in TAGS for mark in ("", "/")]
    new = [tag for tag in tags if len(tokenizer(tag, add_special_tokens=False)["input_ids"]) > 1]
    if not new:
        return
    tokenizer.add_tokens(new)
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def rows(policy: LocalPolicy, rollouts: Sequence[Rollout], prompts: Sequence[str]) -> list[dict[str, list[int]]]:
    """Tokens and labels of transcripts; prompts and replies have no labels."""
    found = []
    for rollout, prompt in zip(rollouts, prompts, strict=True):
        ids = policy.encode(prompt)
        labels = [IGNORED] * len(ids)
        for piece in rollout.transcript.pieces:
            shown = rollout.transcript.shown(piece)
            own = policy.heard(shown) if piece.reply else policy.tokenizer(shown, add_special_tokens=False)["input_ids"]
            if policy.dialect.turns and not piece.reply and not shown.endswith(policy.dialect.stops):
                own = [*own, policy.tokenizer.eos_token_id]  # nothing else ends an answer there
            ids, labels = ids + own, labels + ([IGNORED] * len(own) if piece.reply else own)
        found.append({"input_ids": ids, "labels": labels})
    return found


def imitate(
    policy: LocalPolicy,
    given: Sequence[dict[str, list[int]]],
    out: str | Path,
    *,
    steps: int,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> float:
    """Train a policy on rows with Transformers' Trainer, which goes on from its last checkpoint in `out`.

    Returns:
        The mean loss of the last tenth.
    """
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    pace = Pace(steps)

    class Telling(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if pace.due(state.global_step) or state.global_step == steps:
                say(f"warm start: step {state.global_step} of {steps}")

    arguments = TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=lr, warmup_steps=steps // 20,
        lr_scheduler_type="cosine", seed=seed, save_steps=max(1, steps // 4), save_total_limit=1, report_to=[],
        logging_steps=max(1, steps // 10), use_cpu=policy.model.device.type == "cpu", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        policy.model, arguments, train_dataset=Dataset.from_list(list(given)),
        data_collator=DataCollatorForSeq2Seq(policy.tokenizer, label_pad_token_id=IGNORED),
        callbacks=[Telling(), checkpoints.marking()],
    )  # fmt: skip
    checkpoints.train(trainer, checkpoints.last_whole(Path(out), say))
    policy.model.eval()
    return float([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])
