"""Examples from JSONL files: one a line, in one of three shapes.

    {"task", "prompt", "choices": [...], "answer": index}      multiple choice or classification
    {"task", "prompt", "completion"[, "answer": text]}         generation
    {"task", "messages": [{"role", "content"}, ...]}           chat; the last message is the assistant's

A path is a file, a folder (`<task>/{train,validation,test}.jsonl`, or `<split>.jsonl` itself) or a `datasets` hub id.
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from moesaic.data.jsonl import decode, encodable, lines
from moesaic.errors import DataError, MissingDependency, first_line, path_of, suggest

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


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


def load(
    path: str | Path,
    split: str = "train",
    *,
    tasks: Sequence[str] | None = None,
    on_bad_lines: Literal["error", "skip"] = "error",
) -> list[Example]:
    """Read one split.

    Args:
        path: a file (then `split` is ignored), a folder, or a hub id.
        tasks: which tasks, in this order; all that are there, sorted, where None.
        on_bad_lines: stop at a row that cannot be read, or leave it out, counted and logged.
    Raises:
        DataError: with file, line and reason; or naming the tasks there are.
    """
    if on_bad_lines not in ("error", "skip"):
        raise DataError(f"on_bad_lines is '{on_bad_lines}'; use error or skip")
    place = path_of(path)
    if place.is_dir():
        examples = _folder(place, split, tasks, on_bad_lines)
    elif place.is_file():
        examples = _select(_read(place, on_bad_lines), tasks, str(place))
    elif _is_path(str(path)):
        raise DataError(f"no such file or folder: {place}")
    else:
        examples = _select(_hub(str(path), split, on_bad_lines), tasks, str(path))
    return examples


def has_split(path: str | Path, split: str, tasks: Sequence[str] | None = None) -> bool:
    """Whether a folder has rows of a split, of each of its tasks; one file, or a data set of the hub, has none."""
    folder = path_of(path)
    if not folder.is_dir():
        return False
    inner = [folder / task for task in tasks] if tasks else [p for p in folder.iterdir() if _splits(p)]
    return (folder / f"{split}.jsonl").is_file() or (bool(inner) and all(split in _splits(p) for p in inner))


def _splits(folder: Path) -> list[str]:
    return [split for split in SPLITS if (folder / f"{split}.jsonl").is_file()]


def _is_path(name: str) -> bool:
    """Whether what is not there was meant as a path: a hub id has one slash at most, and no folder is its owner."""
    place = path_of(name)
    return (
        bool(place.suffix)
        or place.is_absolute()
        or name.startswith((".", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or (name.count("/") == 1 and place.parent.is_dir())
    )


def digest(examples: Sequence[Example]) -> str:
    """A fingerprint of the rows and their order: a run is resumed on the same data or not at all."""
    sha = hashlib.sha256()
    for example in examples:
        sha.update(repr(example).encode())
    return sha.hexdigest()


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
    if "prompt" not in row:
        raise DataError(
            f"{where}: field 'prompt' is missing: a row has 'prompt', or 'messages' if it is a chat; this one has "
            f"{', '.join(sorted(map(str, row)))}"
        )
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
    raise DataError(f"{where}: neither 'choices', 'completion' nor 'messages' is there; one of them is needed")


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        how = ": each row names its task, or lies in a folder of that name, TASK/train.jsonl" if key == "task" else ""
        raise DataError(f"{where}: field '{key}' is missing{how}")
    if not isinstance(row[key], str):
        raise DataError(f"{where}: '{key}' must be text, got {type(row[key]).__name__}")
    return encodable(row[key], key, where)


def _choice(task: str, prompt: str, row: dict[str, Any], where: str) -> Example:
    choices, answer = row["choices"], row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        raise DataError(f"{where}: 'choices' must be a list of at least two texts")
    if not all(encodable(c, "choices", where).strip() for c in choices):
        raise DataError(f"{where}: one of the 'choices' is empty")
    if "answer" not in row:
        raise DataError(f"{where}: field 'answer' is missing: the index of the right choice")
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise DataError(f"{where}: 'answer' must be an index into 'choices', got {answer!r}")
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


def _folder(folder: Path, split: str, tasks: Sequence[str] | None, on_bad_lines: str) -> list[Example]:
    if split not in SPLITS:
        raise DataError(f"unknown split '{split}'; {suggest(split, SPLITS)}")
    whole = folder / f"{split}.jsonl"
    if whole.is_file():
        own = min((p.name for p in folder.iterdir() if (p / whole.name).is_file()), default=None)
        if own is not None:
            raise DataError(f"{folder} holds {whole.name} and {own}/{whole.name}: keep one file, or a folder a task")
        return _select(_read(whole, on_bad_lines), tasks, str(whole))
    there = sorted(p.name for p in folder.iterdir() if _splits(p))
    if not there:
        raise DataError(f"{folder}: neither {split}.jsonl nor <task>/{split}.jsonl is in it")
    examples: list[Example] = []
    for task in _known(tasks, there, str(folder)):
        file = folder / task / f"{split}.jsonl"
        if not file.is_file():
            splits = ", ".join(_splits(folder / task))
            raise DataError(
                f"task '{task}' has no {split} split: {file} is missing; data=… names other rows, split=… takes those "
                f"that there are ({splits})"
            )
        rows = _read(file, on_bad_lines, of=task)
        stranger = next((e.task for e in rows if e.task != task), None)
        if stranger is not None:
            raise DataError(f"{file}: a row's task is '{stranger}'; in folder '{task}' it must be '{task}'")
        examples += rows
    return examples


def _known(tasks: Sequence[str] | None, there: Sequence[str], where: str) -> list[str]:
    if tasks is None:
        return list(there)
    if not tasks:
        raise DataError(f"tasks is an empty list; leave it out for all of: {', '.join(there)}")
    for task in tasks:
        if task not in there:
            raise DataError(f"no task '{task}' in {where}; {suggest(task, there)}")
    return list(dict.fromkeys(tasks))


def _select(examples: list[Example], tasks: Sequence[str] | None, where: str) -> list[Example]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.task, []).append(example)
    return [e for task in _known(tasks, sorted(groups), where) for e in groups[task]]


def _read(file: Path, on_bad_lines: str, *, of: str | None = None) -> list[Example]:
    return _collect(lines(file), on_bad_lines, str(file), of=of)


def _hub(name: str, split: str, on_bad_lines: str) -> list[Example]:
    try:
        import datasets
    except ImportError:
        raise MissingDependency("datasets", "train") from None
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise DataError(
            f"'{name}' is neither a file, a folder nor a data set that could be loaded: {first_line(error)}"
        ) from None
    return _collect(((f"{name}[{split}]:{i}", row) for i, row in enumerate(table)), on_bad_lines, name)


def _collect(
    rows: Iterable[tuple[str, Any]], on_bad_lines: str, source: str, *, of: str | None = None
) -> list[Example]:
    examples, skipped = [], 0
    for where, row in rows:
        try:
            examples.append(replace(parse(decode(row, where), where, of=of), where=where))
        except DataError as error:
            if on_bad_lines == "error":
                raise
            skipped += 1
            logger.debug("skipped %s", error)
    if skipped:
        logger.warning("%s: skipped %d bad lines, kept %d", source, skipped, len(examples))
    if not examples:
        raise DataError(f"{source}: no examples in it")
    return examples
