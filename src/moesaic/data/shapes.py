"""One row of data to an `Example`, in the shapes that people have.

    {"prompt", "completion"[, "answer": text]}               generation
    {"instruction"[, "input"], "output"}                     the same, as Alpaca has it
    {"prompt", "choices": [...], "answer": index or text}    multiple choice or classification
    {"messages": [{"role", "content"}, ...]}                 chat; the last message is the assistant's

Each may name its "task"; else it is its file's, or its folder's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from moesaic.data.jsonl import encodable
from moesaic.errors import DataError

KNOWN = (
    '{"prompt", "completion"}, {"prompt", "choices", "answer"}, {"messages"} or {"instruction", "input", "output"}, '
    'each with a "task" or without'
)


@dataclass(frozen=True)
class Example:
    """One row. `choices` is empty unless `answer` indexes it; `messages` is empty unless the row is a chat."""

    task: str
    prompt: str = ""
    completion: str = ""
    choices: tuple[str, ...] = ()
    answer: int | str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    where: str = field(default="", repr=False, compare=False)
    """File and line, for messages about the row."""

    @property
    def label(self) -> int:
        """The index of the right choice (multiple-choice rows only)."""
        assert isinstance(self.answer, int), "label is for rows with choices"
        return self.answer


def parse(row: Any, where: str, *, of: str | None = None) -> Example:
    """One decoded JSON value to an `Example`; `where` ("file:line") opens the message of the DataError.

    Args:
        of: the task of a row that names none.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object like {{'task': …, 'prompt': …}}, got {type(row).__name__}")
    task = encodable(of, "task", where) if of is not None and "task" not in row else _text(row, "task", where)
    if not task.strip():
        raise DataError(f"{where}: 'task' is empty")
    if row.get("messages") is not None and row.get("tools"):
        raise DataError(f"{where}: 'tools' are not read: write the calls into the messages' content")
    if row.get("messages") is not None:
        return Example(task, messages=_messages(row["messages"], where))
    if "instruction" in row and "output" in row and "prompt" not in row:
        row = _of_instruction(row, where)
    if "prompt" not in row:
        raise DataError(f"{where}: a row is {KNOWN}; this one has {', '.join(sorted(map(str, row))) or 'nothing'}")
    prompt = _text(row, "prompt", where)
    if row.get("choices") is not None and row.get("completion") is not None:
        raise DataError(f"{where}: 'choices' and 'completion' are both there: leave one of them out")
    if row.get("choices") is not None:
        return _choice(task, prompt, row, where)
    if row.get("completion") is not None:
        answer, completion = row.get("answer"), _text(row, "completion", where)
        if not isinstance(answer, (str, int, float, type(None))):
            raise DataError(f"{where}: 'answer' must be a text or a number, got {type(answer).__name__}")
        if not prompt and not completion:
            raise DataError(f"{where}: 'prompt' and 'completion' are both empty: there is nothing to learn")
        return Example(task, prompt, completion, answer=None if answer is None else str(answer))
    raise DataError(f"{where}: a row is {KNOWN}; this one has a prompt and nothing to answer")


def _of_instruction(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Alpaca's row as one of prompt and completion: what is asked, then what it is asked of."""
    parts = [_text(row, key, where) for key in ("instruction", "input") if row.get(key)]
    kept = {key: value for key, value in row.items() if key not in ("instruction", "input", "output")}
    return {**kept, "prompt": "\n\n".join(parts), "completion": row["output"]}


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        how = ": each row names its task, or lies in a folder of that name, TASK/train.jsonl" if key == "task" else ""
        raise DataError(f"{where}: field '{key}' is missing{how}")
    if not isinstance(row[key], str):
        raise DataError(f"{where}: '{key}' must be text, got {type(row[key]).__name__}")
    return encodable(row[key], key, where)


def _listed(value: Any) -> Any:
    """A list that a table's cell holds as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _choice(task: str, prompt: str, row: dict[str, Any], where: str) -> Example:
    choices, answer = _listed(row["choices"]), row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        raise DataError(f"{where}: 'choices' must be a list of at least two texts")
    if not all(encodable(c, "choices", where).strip() for c in choices):
        raise DataError(f"{where}: one of the 'choices' is empty")
    if "answer" not in row:
        raise DataError(f"{where}: field 'answer' is missing: the right choice, or its index")
    if isinstance(answer, str):
        answer = choices.index(answer) if answer in choices else int(answer) if answer.isdecimal() else answer
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise DataError(f"{where}: 'answer' must be one of 'choices', or an index into them, got {answer!r}")
    if not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: 'answer' is {answer}, but there are {len(choices)} choices (0 to {len(choices) - 1})"
        )
    if choices.count(choices[answer]) > 1:
        raise DataError(
            f"{where}: the right choice {choices[answer]!r} is there twice: answers could not be told apart"
        )
    return Example(task, prompt, choices=tuple(choices), answer=answer)


def _messages(messages: Any, where: str) -> tuple[tuple[str, str], ...]:
    messages = _listed(messages)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be a list of {{'role', 'content'}} objects")
    turns = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"{where}: messages[{i}] must be an object with 'role' and 'content'")
        called = next((key for key in ("tool_calls", "function_call") if message.get(key)), None)
        if called is not None and message.get("content") is not None:
            raise DataError(f"{where}: messages[{i}]: {called!r} is not read: write the call into 'content'")
        turns.append(
            (_text(message, "role", f"{where}: messages[{i}]"), _text(message, "content", f"{where}: messages[{i}]"))
        )
    if turns[-1][0] != "assistant":
        raise DataError(
            f"{where}: the last message is by '{turns[-1][0]}'; it must be the assistant's, which is learned"
        )
    if len(turns) < 2:
        raise DataError(f"{where}: the chat is one message: at least one must come before the assistant's answer")
    return tuple(turns)
