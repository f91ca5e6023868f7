"""A few answers of a run to look at: the rows, what was said, and where each token went."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moesaic.data.causal import answer_ids, prompt_ids, question
from moesaic.data.examples import Example
from moesaic.errors import ConfigError
from moesaic.evaluation.answers import Answer
from moesaic.evaluation.routed import read, routed
from moesaic.training.prepared import Prepared

A_TASK = 3
"""Answers shown of each task, half of them wrong where there are such."""
MOST = 24


def samples(
    prepared: Prepared, rows: Mapping[str, Sequence[Example]], answers: Mapping[str, Sequence[Answer]]
) -> list[dict[str, Any]]:
    """One a row: {"task", "prompt", "answer", "wanted", "correct"} and, of a routed model, what `routed` says.

    `experts`, `tokens` (texts), and `by_token` (T, E) are those of the prompt with its answer, of an encoder the
    prompt's; `answered` of the tokens are the answer's.
    """
    found = []
    for task, said in answers.items():
        for answer in _chosen(said, min(A_TASK, max(1, MOST // len(answers)))):
            found.append(_sample(prepared, rows[task][answer.index], answer))
    return found


def _chosen(answers: Sequence[Answer], count: int) -> list[Answer]:
    """In the order of the data: half of them wrong ones, or as many as there are, and more where right ones lack."""
    right, wrong = ([a for a in answers if a.correct is correct] for correct in (True, False))
    failures = max(min(count // 2, len(wrong)), min(count - len(right), len(wrong)))
    return sorted([*right[: count - failures], *wrong[:failures]], key=lambda answer: answer.index)


def _sample(prepared: Prepared, row: Example, answer: Answer) -> dict[str, Any]:
    said = row.choices[answer.predicted] if isinstance(answer.predicted, int) else answer.predicted
    wanted = row.choices[row.label] if row.choices else row.completion or row.messages[-1][1]
    found = {
        "task": row.task, "prompt": question(row), "answer": said.strip(), "wanted": wanted.strip(),
        "correct": answer.correct,
    }  # fmt: skip
    if not prepared.routed:
        return found
    if prepared.layout is not None:
        ids, written = read(prepared, row.prompt, prepared.max_length)[0].tolist(), 0
    else:
        (given,) = prepared.given([row])
        prompt, own = prompt_ids(given, prepared.base.tokenizer), answer_ids(given, said, prepared.base.tokenizer)
        ids, written = [*prompt, *own[:-1]][-prepared.max_length :], len(own) - 1
    task = row.task if row.task in prepared.tasks else ""
    scores = prepared.model.peft_config["default"].scores([question(row)])
    try:
        where = routed(
            prepared, torch.tensor([ids], device=prepared.device), answered=written, task=task, scores=scores
        )
    except ConfigError:  # routers that share no table
        return found
    by_token = [[round(share, 3) for share in token] for token in where["by_token"]]
    tokens = [_text(prepared.base.tokenizer, token) for token in where["tokens"]]
    return {**found, "experts": where["experts"], "tokens": tokens, "by_token": by_token, "answered": written}


def _text(tokenizer: Any, token: str) -> str:
    """A token as it reads in a text, with the blank before it."""
    blank = " " if token.startswith("▁") else ""
    return blank + str(tokenizer.convert_tokens_to_string([token])).removeprefix(blank)
