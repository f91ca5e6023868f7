"""What a model answers to held-out rows: one `Answer` a row, and the figures of a task's answers.

Encoders answer through their heads. Causal models answer choices by the log-likelihood of the choice, and of what ends
it, given the prompt (`accuracy`; `accuracy_per_byte` divides by the choice's length), and other rows by greedy
generation (`exact_match`). Both go through the chat template where the recipe's `prompts` says so.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.data import causal
from moesaic.data.examples import Example
from moesaic.errors import AdapterError, ConfigError, DataError, TrainingError
from moesaic.evaluation import metrics
from moesaic.evaluation.likelihood import likelihoods, prompts_known
from moesaic.models.encoder import EncoderCollator
from moesaic.models.precision import numerics
from moesaic.training.prepared import Prepared

LONGEST_ANSWER = 512


@dataclass(frozen=True)
class Answer:
    """One row's answer: the index of a choice, or a text.

    `index` counts the rows of its task in the order of the data; `per_byte` is the likeliest choice by byte.
    """

    task: str
    index: int
    correct: bool
    predicted: int | str
    per_byte: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"task": self.task, "index": self.index, "correct": self.correct, "predicted": self.predicted}


def answer(
    prepared: Prepared, examples: Sequence[Example], *, batch_size: int = 32, progress: bool = False
) -> dict[str, list[Answer]]:
    """Answers by task, in the order of `examples`. Task ids reach the routers by position in `prepared.tasks`."""
    groups = by_task(prepared.given(examples))
    check_known(prepared, list(groups))
    training = prepared.model.training
    prepared.model.eval()
    found: dict[str, list[Answer]] = {}
    try:
        with torch.no_grad(), numerics(prepared.recipe.precision).context():
            for task, rows in groups.items():
                with _task_known(prepared, task):
                    found[task] = _answer_task(prepared, rows, batch_size, progress)
    finally:
        prepared.model.train(training)
    return found


def check_known(prepared: Prepared, tasks: Sequence[str]) -> None:
    """Raise ConfigError where a method that is told the task would be told none, or one that it does not know."""
    config: Any = prepared.model.peft_config["default"] if prepared.routed else None
    if config is None or not config.kind.needs_tasks:
        return
    if max(config.task_of or [0]) >= max(len(prepared.tasks), 1):
        raise AdapterError(
            f"the run's layout.json is damaged: it names {len(prepared.tasks)} tasks, too few for its experts"
        )
    known = prepared.tasks if config.task_of is None else [prepared.tasks[i] for i in sorted(set(config.task_of))]
    stray = [task for task in tasks if task not in known]
    if stray or not tasks:
        what = f"does not know {stray[0]!r}: tasks=… picks rows" if stray else "is told none: task=NAME says it"
        raise ConfigError(f"method {config.method} routes by task, and {what}; its tasks: {', '.join(known) or 'none'}")


def by_task(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Rows by task. Raises DataError for a task that mixes rows with and without choices."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.task, []).append(example)
    for task, rows in groups.items():
        if len({bool(e.choices) for e in rows}) > 1:
            raise DataError(f"task '{task}' has rows with and without choices: give them two names")
    return groups


def figures(rows: Sequence[Example], answers: Sequence[Answer]) -> dict[str, Any]:
    """Of one task: {"metric", "n", "score", "stderr"} and, for fixed label sets, {"majority", "matthews"}."""
    n = len(answers)
    share = sum(a.correct for a in answers) / n
    found: dict[str, Any] = {
        "metric": "accuracy" if rows[0].choices else "exact_match",
        "n": n,
        "score": share,
        "stderr": metrics.standard_error(share, n),
    }
    if not rows[0].choices:
        return found
    gold = [e.label for e in rows]
    if answers[0].per_byte is not None:
        found["accuracy_per_byte"] = sum(a.per_byte == g for a, g in zip(answers, gold, strict=True)) / n
    if len({e.choices for e in rows}) == 1:
        predicted = [a.predicted for a in answers if isinstance(a.predicted, int)]
        found |= {"majority": metrics.majority_rate(gold), "matthews": metrics.matthews(predicted, gold)}
    return found


def generate(prepared: Prepared, examples: Sequence[Example], *, max_new_tokens: int) -> list[str]:
    """Greedy answers of a causal model, in one batch padded on the left. Prompts are cut so that answers have room."""
    tokenizer, positions = prepared.base.tokenizer, prepared.base.positions
    room = prepared.max_length if positions is None else min(prepared.max_length, positions - max_new_tokens)
    rows = [causal.prompt_ids(e, tokenizer)[-room:] for e in examples]
    empty = next((e for e, row in zip(examples, rows, strict=True) if not row), None)
    if empty is not None:
        raise DataError(
            f"{empty.where or empty.task}: an empty prompt, and the tokenizer has no token to begin with: there is "
            "nothing to answer"
        )
    longest = max(len(r) for r in rows)
    device = prepared.model.device
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    out = prepared.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        eos_token_id=ends(prepared, examples),
        pad_token_id=tokenizer.pad_token_id,
    )
    return [str(text) for text in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]


def ends(prepared: Prepared, examples: Sequence[Example]) -> list[int]:
    """Tokens at which an answer ends: the model's own, and those that the rows' chats end in."""
    own = prepared.model.generation_config.eos_token_id
    known = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({*known, *causal.closing_ids(examples, prepared.base.tokenizer)})


def _task_known(prepared: Prepared, task: str) -> AbstractContextManager[Any]:
    """Tell routers and traces the task of all rows within; a task that was not trained has no id."""
    if not prepared.routed or task not in prepared.tasks:
        return nullcontext()
    from moesaic.host import routing_tasks

    return routing_tasks(prepared.model, task_ids=torch.tensor([prepared.tasks.index(task)], device=prepared.device))


def _answer_task(prepared: Prepared, rows: list[Example], batch_size: int, progress: bool) -> list[Answer]:
    if not rows[0].choices:
        ask = _generated
    else:
        ask = _encoder_choices if prepared.layout is not None else _likelihood_choices
    longest = 0 if rows[0].choices else _longest_answer(prepared, rows)
    found: dict[int, Answer] = {}
    for indices in _batches(rows, batch_size, progress):
        for i, (correct, predicted, per_byte) in zip(
            indices, ask(prepared, [rows[i] for i in indices], longest), strict=True
        ):
            found[i] = Answer(rows[i].task, i, correct, predicted, per_byte)
    return [found[i] for i in range(len(rows))]


_Found = Iterator[tuple[bool, int | str, int | None]]


def _encoder_choices(prepared: Prepared, batch: list[Example], longest: int) -> _Found:
    assert prepared.layout is not None
    collate = EncoderCollator(prepared.base.tokenizer, prepared.layout, max_length=prepared.max_length)
    inputs = {k: v.to(prepared.device) for k, v in collate(batch).items()}
    with prompts_known(prepared, batch):
        logits = prepared.model(**inputs).logits
    for example, best in zip(batch, logits.argmax(-1).tolist(), strict=True):
        yield best == example.label, best, None


def _likelihood_choices(prepared: Prepared, batch: list[Example], longest: int) -> _Found:
    """The likeliest choice of each row, by log-likelihood and by log-likelihood per byte."""
    tokenizer = prepared.base.tokenizer
    prompts = [causal.prompt_ids(example, tokenizer) for example in batch]
    answers = [[causal.answer_ids(example, choice, tokenizer) for choice in example.choices] for example in batch]
    for example, tokens in zip(batch, answers, strict=True):
        same = next((i for i, ids in enumerate(tokens) if ids in tokens[:i]), None)
        if same is not None:
            pair = f"{example.choices[tokens.index(tokens[same])]!r} and {example.choices[same]!r}"
            raise DataError(f"{example.where or example.task}: the choices {pair} are the same tokens to this model")
    totals = likelihoods(prepared, batch, prompts, answers)
    for example, scores in zip(batch, totals, strict=True):
        if not all(map(math.isfinite, scores)):
            raise TrainingError(f"{example.where or example.task}: the model's likelihoods are not finite numbers")
        by_byte = [s / max(1, len(c.encode())) for s, c in zip(scores, example.choices, strict=True)]
        best = scores.index(max(scores))
        yield best == example.label, best, by_byte.index(max(by_byte))


def _generated(prepared: Prepared, batch: list[Example], longest: int) -> _Found:
    with prompts_known(prepared, batch):
        texts = generate(prepared, batch, max_new_tokens=longest)
    for example, text in zip(batch, texts, strict=True):
        wanted = None if example.answer is None else str(example.answer)
        yield metrics.answers_match(text, causal.answer_text(example), wanted), text, None


def _longest_answer(prepared: Prepared, rows: list[Example]) -> int:
    """Tokens to generate: a few more than the longest right answer has."""
    if prepared.layout is not None:
        raise DataError(f"task '{rows[0].task}' has rows without choices: an encoder cannot write an answer")
    tokenizer = prepared.base.tokenizer
    longest = max(len(causal.answer_ids(e, causal.answer_text(e), tokenizer)) for e in rows)
    wanted, positions = min(longest + 7, LONGEST_ANSWER), prepared.base.positions
    if positions is None or wanted < positions:
        return wanted
    if longest >= positions:
        raise DataError(f"task '{rows[0].task}' has answers of {longest} tokens, and the model {positions} positions")
    return longest


def _batches(rows: list[Example], size: int, progress: bool) -> Iterator[list[int]]:
    """Indices of rows of like length, so that little is padding."""
    ordered = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    chunks: Any = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    if progress:
        from tqdm import tqdm

        chunks = tqdm(chunks, desc=rows[0].task, leave=False)
    yield from chunks
