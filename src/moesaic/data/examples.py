"""Examples from files of rows (see `shapes`): JSONL, JSON, CSV or Parquet.

A path is a file, a folder (`<task>/{train,validation,test}.jsonl`, or `<split>.jsonl` itself) or a `datasets` hub id.
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from moesaic.data.files import SUFFIXES, read_rows
from moesaic.data.hub import fetched_alone, unreachable
from moesaic.data.jsonl import decode
from moesaic.data.shapes import Example, parse
from moesaic.errors import DataError, MissingDependency, first_line, path_of, suggest

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


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
    return bool(_files(folder, split)) or (bool(inner) and all(split in _splits(p) for p in inner))


def _splits(folder: Path) -> list[str]:
    return [split for split in SPLITS if _files(folder, split)]


def _files(folder: Path, split: str) -> list[Path]:
    """The files of a split, which should be one at most."""
    return [file for suffix in SUFFIXES if (file := folder / f"{split}{suffix}").is_file()]


def _file(folder: Path, split: str) -> Path | None:
    """The file of a split; None where there is none. Raises DataError where there are several."""
    found = _files(folder, split)
    if len(found) > 1:
        raise DataError(f"{folder} holds {' and '.join(file.name for file in found)}: keep one")
    return found[0] if found else None


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


def _folder(folder: Path, split: str, tasks: Sequence[str] | None, on_bad_lines: str) -> list[Example]:
    if split not in SPLITS:
        raise DataError(f"unknown split '{split}'; {suggest(split, SPLITS)}")
    whole = _file(folder, split)
    if whole is not None:
        own = min((file for p in folder.iterdir() if p.is_dir() for file in _files(p, split)), default=None)
        if own is not None:
            inner = own.relative_to(folder)
            raise DataError(f"{folder} holds {whole.name} and {inner}: keep one file, or a folder a task")
        return _select(_read(whole, on_bad_lines), tasks, str(whole))
    there = sorted(p.name for p in folder.iterdir() if _splits(p))
    if not there:
        raise DataError(f"{folder}: neither {split}.jsonl nor <task>/{split}.jsonl is in it")
    examples: list[Example] = []
    for task in _known(tasks, there, str(folder)):
        file = _file(folder / task, split)
        if file is None:
            splits = ", ".join(_splits(folder / task))
            raise DataError(
                f"task '{task}' has no {split} split: {folder / task / split}.jsonl is missing; data=… names others, "
                f"split=… takes those that there are ({splits})"
            )
        found = _read(file, on_bad_lines, of=task)
        stranger = next((e.task for e in found if e.task != task), None)
        if stranger is not None:
            raise DataError(f"{file}: a row's task is '{stranger}'; in folder '{task}' it must be '{task}'")
        examples += found
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
    named = file.stem if file.stem not in SPLITS else file.absolute().parent.name or "rows"
    return _collect(read_rows(file), on_bad_lines, str(file), of=of or named)


def _hub(name: str, split: str, on_bad_lines: str) -> list[Example]:
    try:
        import datasets
    except ImportError:
        raise MissingDependency("datasets", "train") from None
    try:
        with fetched_alone():
            table = datasets.load_dataset(name, split=split)
    except Exception as error:
        near = get_close_matches(name, [p.name for p in Path().iterdir()], n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        away = "the hub cannot be reached from here" if unreachable() else first_line(error)
        raise DataError(
            f"'{name}' is neither a file, a folder{hint} nor a data set that could be loaded: {away}"
        ) from None
    numbered = ((f"{name}[{split}]:{i}", row) for i, row in enumerate(table))
    return _collect(numbered, on_bad_lines, name, of=Path(name).name)


def _collect(found: Iterable[tuple[str, Any]], on_bad_lines: str, source: str, *, of: str) -> list[Example]:
    examples, skipped = [], 0
    for where, row in found:
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
