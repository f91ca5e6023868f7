"""Examples for causal language models: tokens, labels on the answer alone, batches.

Prompt and answer are joined as written; where neither brings white space at the seam, one blank goes between them, so
that the answer's first token is the one a model writes after the prompt.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.data.examples import Example
from moesaic.errors import ConfigError, DataError, first_line

logger = logging.getLogger(__name__)

IGNORED = -100


def prompt_text(example: Example, tokenizer: Any) -> str:
    """What the model is given: the prompt, or a chat up to the last message in the tokenizer's template."""
    if not example.messages:
        return example.prompt
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{example.where or example.task}: the row is a chat, but this model's tokenizer has no chat template: "
            "take an instruct model, or set tokenizer.chat_template and save the tokenizer into the model's folder"
        )
    return _templated(example, tokenizer, len(example.messages) - 1)


def _templated(example: Example, tokenizer: Any, turns: int) -> str:
    """A chat's first turns in the tokenizer's template; before the last, as the prompt of what comes next."""
    from jinja2 import TemplateSyntaxError

    messages = [{"role": role, "content": content} for role, content in example.messages[:turns]]
    prompt = turns < len(example.messages)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except TemplateSyntaxError as error:
        raise ConfigError(f"this model's chat template cannot be read: {first_line(error)}") from None
    except Exception as error:  # a template may call and raise what it likes
        where = example.where or f"task '{example.task}'"
        raise DataError(f"{where}: this model's chat template refuses the chat: {first_line(error)}") from None


def question(example: Example) -> str:
    """The prompt as plain text, for a teacher that reads it: of a chat, all that comes before the last message."""
    return "\n".join(content for _, content in example.messages[:-1]) if example.messages else example.prompt


def answer_text(example: Example) -> str:
    """What the model shall write: the completion, the right choice, or the last message."""
    if example.messages:
        return example.messages[-1][1]
    return example.choices[example.label] if example.choices else example.completion


def seam(prompt: str, answer: str) -> str:
    """The answer with the blank that sets it off from the prompt, where one is needed."""
    joined = not prompt or prompt[-1].isspace() or answer[:1].isspace()
    return answer if joined else " " + answer


def prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    """The prompt's tokens, with the tokenizer's own opening tokens (none added to a chat, whose template has them)."""
    text = prompt_text(example, tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=not example.messages, verbose=False)["input_ids"]
    closed = bool(ids) and ids[-1] == tokenizer.eos_token_id and not example.messages  # not a template's own
    return ids[:-1] if closed else ids


def answer_ids(example: Example, answer: str, tokenizer: Any) -> list[int]:
    """An answer's tokens as they follow the prompt, with what ends it: EOS, or the turn's end in a chat's template."""
    if not example.messages:
        return [*_tokens(seam(example.prompt, answer), tokenizer), closing_id(tokenizer)]
    text = turn(example, tokenizer)
    ends = text != answer.rstrip()
    ids = _tokens(text if ends else answer, tokenizer)
    return ids if ends else [*ids, closing_id(tokenizer)]


def turn(example: Example, tokenizer: Any) -> str:
    """A chat's last message as the template writes it behind its prompt, up to the token that ends the turn."""
    content, whole = example.messages[-1][1], _templated(example, tokenizer, len(example.messages))
    prompt = prompt_text(example, tokenizer)
    if whole.startswith(prompt):
        return whole[len(prompt) :].rstrip()
    _, found, end = whole.rpartition(content.strip())  # a template that writes the turns before an answer anew
    return (content.strip() + end if found else content).rstrip()


def closing_id(tokenizer: Any) -> int:
    """The token that ends answers. Raises ConfigError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "this model's tokenizer has no EOS token, in which answers end: name one as eos_token in its "
            "tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def closing_ids(examples: Sequence[Example], tokenizer: Any) -> list[int]:
    """All tokens that end answers of these rows."""
    chats = {answer_ids(e, answer_text(e), tokenizer)[-1] for e in examples if e.messages}
    return sorted(chats | ({tokenizer.eos_token_id} - {None}))


def _tokens(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def fit(prompt: list[int], answer: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Cut a row to `max_length` tokens: the prompt from its start, so that the answer stays, then the answer's end."""
    answer = answer[:max_length]
    room = max_length - len(answer)
    return prompt[max(0, len(prompt) - room) :] if room else [], answer


def tokenize(
    examples: Sequence[Example], tokenizer: Any, tasks: Sequence[str], *, max_length: int
) -> list[dict[str, Any]]:
    """Rows {"input_ids", "labels", "task"}: loss on the answer and what ends it only; `task` indexes `tasks`.

    Raises:
        DataError: a row that the chat template refuses, named by file and line.
    """
    position = {task: i for i, task in enumerate(tasks)}
    rows, cut = [], 0
    for example in examples:
        prompt = prompt_ids(example, tokenizer)
        answer = answer_ids(example, answer_text(example), tokenizer)
        cut += len(prompt) + len(answer) > max_length
        prompt, answer = fit(prompt, answer, max_length)
        rows.append(
            {
                "input_ids": prompt + answer,
                "labels": [IGNORED] * len(prompt) + answer,
                "task": position[example.task],
            }
        )
    if cut:
        logger.warning("%d of %d rows were cut to max_length=%d tokens", cut, len(rows), max_length)
    return rows


def round_up(tokens: int, most: int | None = None) -> int:
    """A batch's length: a multiple of 8, so that few shapes occur, but not above `most`, the model's positions.

    bf16 kernels on CPUs keep something for every shape they have seen: with lengths as they come, a process grew by
    6 MB a step.
    """
    rounded = -(-tokens // 8) * 8
    return rounded if most is None else max(min(rounded, most), tokens)


class CausalCollator:
    """Rows of `tokenize` to a batch padded on the right; with `routing_targets` where the rows have some.

    Args:
        task_ids: emit `routing_task_ids` (rows,), which a mixture's router may read; a plain model would choke on it.
        positions: the model's, where there is an end to them.
    """

    def __init__(self, pad_token_id: int, *, task_ids: bool = False, positions: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.task_ids = task_ids
        self.positions = positions

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        longest = round_up(max(len(r["input_ids"]) for r in rows), self.positions)

        def padded(key: str, filler: int) -> Tensor:
            return torch.tensor([[*r[key], *[filler] * (longest - len(r[key]))] for r in rows])

        batch = {
            "input_ids": padded("input_ids", self.pad_token_id),
            "attention_mask": torch.tensor(
                [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
            ),
            "labels": padded("labels", IGNORED),
        }
        if self.task_ids:
            batch["routing_task_ids"] = torch.tensor([r["task"] for r in rows])
        if "targets" in rows[0]:
            batch["routing_targets"] = torch.tensor([r["targets"] for r in rows])
        return batch
