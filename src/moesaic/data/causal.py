"""Examples for causal language models: tokens, labels on the answers alone, batches.

A chat goes through the tokenizer's own template, and every turn of the assistant is learned, up to the token that ends
it. Where the template marks the assistant's turns itself, or TRL knows it, the labels are those of TRL's
`assistant_only_loss`. A prompt and its answer are joined as written; where neither brings white space at the seam, one
blank goes between them, so that the answer's first token is the one a model writes after the prompt.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moesaic.data.examples import Example
from moesaic.errors import ConfigError, DataError, first_line

logger = logging.getLogger(__name__)

IGNORED = -100


def as_chat(example: Example) -> Example:
    """A row of prompt and answer as a chat of one turn each; its choices, and the answer, stay beside it."""
    if example.messages:
        return example
    return replace(example, messages=(("user", example.prompt), ("assistant", answer_text(example))))


def writes_turns(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template puts anything about a prompt; not where it has none, or nano's."""
    asked = Example("", messages=(("user", "?"), ("assistant", "")))
    try:
        return tokenizer.chat_template is not None and prompt_text(asked, tokenizer) != "?"
    except (ConfigError, DataError):  # the rows will say why
        return True


def prompt_text(example: Example, tokenizer: Any) -> str:
    """What the model is given: the prompt, or a chat up to the last message in the tokenizer's template."""
    return _templated(example, tokenizer, len(example.messages) - 1) if example.messages else example.prompt


def _templated(example: Example, tokenizer: Any, turns: int, *, asks: bool = True) -> str:
    """A chat's first turns in the tokenizer's template, as the prompt of what comes next where it `asks`."""
    return str(_applied(example, tokenizer, turns, tokenize=False, add_generation_prompt=asks))


def _applied(example: Example, tokenizer: Any, turns: int, **how: Any) -> Any:
    from jinja2 import TemplateSyntaxError

    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{example.where or example.task}: the row is a chat, but this model's tokenizer has no chat template: "
            "take an instruct model, or set tokenizer.chat_template and save the tokenizer into the model's folder"
        )
    messages = [{"role": role, "content": content} for role, content in example.messages[:turns]]
    try:
        return tokenizer.apply_chat_template(messages, **how)
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
    text = turn(replace(example, messages=(*example.messages[:-1], ("assistant", answer))), tokenizer)
    ids = _tokens(text, tokenizer)
    ends = text != answer.rstrip() and ids[-1:] and ids[-1] in tokenizer.added_tokens_decoder
    return ids if ends else [*_tokens(answer, tokenizer), closing_id(tokenizer)]


def turn(example: Example, tokenizer: Any) -> str:
    """A chat's last message as the template writes it behind its prompt, up to the token that ends the turn.

    Where the prompt is none of the whole chat's beginning (a template that opens a thought, or writes the turns before
    an answer anew), the place of the message is found by one that stands nowhere else.
    """
    whole = _templated(example, tokenizer, len(example.messages), asks=False)
    prompt = prompt_text(example, tokenizer)
    if whole.startswith(prompt):
        return whole[len(prompt) :].rstrip()
    before = _before(example, tokenizer, len(example.messages))
    if before is not None and whole.startswith(before):
        return whole[len(before) :].rstrip()
    return example.messages[-1][1].rstrip()


_NOWHERE = "\ue000\ue001\ue000"


def _before(example: Example, tokenizer: Any, turns: int) -> str | None:
    """What the template writes before the content of the last of a chat's first turns; None where it drops it."""
    role = example.messages[turns - 1][0]
    asked = replace(example, messages=(*example.messages[: turns - 1], (role, _NOWHERE)))
    before, found, _ = _templated(asked, tokenizer, turns, asks=False).partition(_NOWHERE)
    return before if found else None


def chat_ids(example: Example, tokenizer: Any, marked: str | None) -> tuple[list[int], list[int]]:
    """A chat's tokens and its labels.

    Args:
        marked: a template that marks the assistant's turns (`marked_template`).
    """
    if marked is not None:
        how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "chat_template": marked}
        found = _applied(example, tokenizer, len(example.messages), **how)
        said = zip(found["input_ids"], found["assistant_masks"], strict=True)
        if any(found["assistant_masks"]):
            return found["input_ids"], [i if learned else IGNORED for i, learned in said]
    answer = answer_ids(example, answer_text(example), tokenizer)
    labels: list[int]
    ids, labels = [], []
    for text, learned in _turns(example, tokenizer):
        tokens = _tokens(text, tokenizer)
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    return ids + answer, labels + answer


def _turns(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """All that comes before a chat's last message, in pieces, and whether each is the assistant's.

    One piece, where the template writes the turns before an answer anew when another follows.
    """
    prompt = prompt_text(example, tokenizer)
    pieces, done = [], ""
    for i, (role, _) in enumerate(example.messages[:-1]):
        if role == "assistant":
            asked = _templated(example, tokenizer, i) if i else _before(example, tokenizer, 1) or ""
            whole = _templated(example, tokenizer, i + 1, asks=False).rstrip()
            if not (asked.startswith(done) and whole.startswith(asked) and prompt.startswith(whole)):
                return [(prompt, False)]
            pieces += [(asked[len(done) :], False), (whole[len(asked) :], True)]
            done = whole
    return [*pieces, (prompt[len(done) :], False)]


def marked_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template with its assistant's turns marked: as it is, or as TRL has it; else None."""
    if tokenizer.chat_template is None:
        return None
    try:
        from trl.chat_template_utils import get_training_chat_template

        return get_training_chat_template(tokenizer) or str(tokenizer.chat_template)
    except Exception:  # an older TRL, or one that does not know the template, or cannot read it
        return None


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


def fitting(labels: Sequence[int], max_length: int) -> slice:
    """What is kept of a row: all before its last answer is cut from its start, then the end of the answer itself."""
    learned = len(labels) - next((i for i, label in enumerate(reversed(labels)) if label != IGNORED), 0)
    answer = next((i for i in range(learned, 0, -1) if labels[i - 1] == IGNORED), 0)
    start = min(max(0, learned - max_length), answer)
    return slice(start, min(learned, start + max_length))


def tokenize(
    examples: Sequence[Example], tokenizer: Any, tasks: Sequence[str], *, max_length: int
) -> list[dict[str, Any]]:
    """Rows {"input_ids", "labels", "task"}: loss on answers and what ends them only; `task` indexes `tasks`.

    Raises:
        DataError: a row that the chat template refuses, named by file and line.
    """
    position = {task: i for i, task in enumerate(tasks)}
    marked = marked_template(tokenizer) if any(e.messages for e in examples) else None
    rows, lengths, unlearned = [], [], 0
    for example in examples:
        if example.messages:
            ids, labels = chat_ids(example, tokenizer, marked)
            begun = sum(label != IGNORED == before for before, label in pairwise([IGNORED, *labels]))
            unlearned += begun < sum(role == "assistant" for role, _ in example.messages)
        else:
            prompt, answer = prompt_ids(example, tokenizer), answer_ids(example, answer_text(example), tokenizer)
            ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
        kept = fitting(labels, max_length)
        lengths.append(len(ids))
        rows.append({"input_ids": ids[kept], "labels": labels[kept], "task": position[example.task]})
    if unlearned:
        logger.warning(
            "of %d chats the last answer alone is learned: this chat template writes earlier ones anew", unlearned
        )
    if max(lengths, default=0) > max_length:
        logger.warning(
            "%d of %d rows were cut to max_length=%d tokens, from the start of their prompts; max_length=%d takes all "
            "of them whole",
            sum(length > max_length for length in lengths), len(rows), max_length, max(lengths),
        )  # fmt: skip
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
