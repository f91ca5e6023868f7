"""Running text by domain, for language models: documents, a held-out part of them, rows of tokens.

A source is a text file, a folder or a pattern (`src/**/*.py`) of them, or one of two that every Python brings along:
`stdlib`, the sources of its standard library, and `pydoc`, the pages of its language reference. Of a JSONL file each
row is a document: its `text`, or its prompt and answer; of a folder of tasks or of one task, the rows to learn from.
"""

from __future__ import annotations

import glob
import importlib
import os
import re
import sys
import sysconfig
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.data.examples import has_split
from moesaic.data.files import SUFFIXES, read_rows
from moesaic.data.jsonl import decode, encodable
from moesaic.data.shapes import parse
from moesaic.errors import DataError, path_of

HELD_OUT = 10
"""One document in so many is held out."""
BUILT_IN = ("stdlib", "pydoc")


def documents(source: str) -> list[str]:
    """The texts of a source, none empty, in an order of their own.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    found: Iterator[str]
    if source == "stdlib":
        found = map(_read, sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    elif source == "pydoc":
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        found = map(str.strip, topics.values())
    else:
        found = _from_files(source)
    texts = [text for text in found if text.strip()]
    if not texts:
        raise DataError(f"{source} holds no text")
    return texts


def _from_files(source: str) -> Iterator[str]:
    if not source.strip():
        raise DataError("a source of text is empty: name a file, a folder or a pattern")
    place = path_of(source)
    pattern = glob.escape(str(place)) if place.exists() else str(place)
    found = _below(place) if place.is_dir() else map(Path, glob.iglob(pattern, recursive=True))
    files = {file.resolve(): file for file in sorted(found, reverse=True) if file.is_file()}  # a link's text once
    of_tasks = place.is_dir() and has_split(place, "train")
    if of_tasks:
        files = {real: file for real, file in files.items() if file.stem == "train" and file.suffix in SUFFIXES}
    if not files:
        raise DataError(f"there is no text at {source}: name a file, a folder, a pattern, or {' or '.join(BUILT_IN)}")
    for file in sorted(files.values()):
        yield from _rows(file) if of_tasks or file.suffix == ".jsonl" else [_read(file)]


def _below(folder: Path) -> Iterator[Path]:
    """Files at any depth; hidden ones and what links of folders lead to are left out."""
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _rows(file: Path) -> Iterator[str]:
    for where, given in read_rows(file):
        row = decode(given, where)
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            yield encodable(row["text"], "text", where)
            continue
        found = parse(row, where, of=file.parent.name or "rows")
        chosen = found.choices[found.label] if found.choices else found.completion
        yield " ".join(filter(None, [text for _, text in found.messages] or [found.prompt, chosen]))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # an image or an archive among the texts of a folder
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def parted(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Documents to learn from and documents that are held out, every tenth.

    Fewer than ten are cut into twenty first, between lines, or between words where there are few lines.
    """
    pieces = list(texts)
    if len(pieces) < HELD_OUT:
        whole = "\n".join(texts)
        lines = whole.splitlines(keepends=True)
        if len(lines) < 2 * HELD_OUT:
            lines = re.findall(r"\s*\S+\s*", whole) or lines
        size = max(1, -(-len(lines) // (2 * HELD_OUT)))
        pieces = ["".join(lines[i : i + size]) for i in range(0, len(lines), size)]
    if len(pieces) < HELD_OUT:
        return pieces[:-1], pieces[-1:]
    return [text for i, text in enumerate(pieces) if i % HELD_OUT != HELD_OUT - 1], pieces[HELD_OUT - 1 :: HELD_OUT]


def rows(tokenizer: Any, texts: Iterable[str], length: int, limit: int | None = None) -> Tensor:
    """Rows (n, length) of token ids, document after document with the end-of-text token behind each.

    What does not fill the last row is left out. At most `limit` rows are made, and no more text is read for them.
    """
    from tqdm import tqdm

    ids = array("q")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    shown = {"unit": "row", "file": sys.stderr, "leave": False, "delay": 5, "disable": not sys.stderr.isatty()}
    with tqdm(total=limit, desc="reading text", **shown) as bar:
        for text in texts:
            ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end)
            count = len(ids) // length
            bar.update(count - bar.n)
            if limit is not None and count >= limit:
                break
    count = len(ids) // length if limit is None else min(len(ids) // length, limit)
    return torch.from_numpy(np.array(ids[: count * length], dtype=np.int64)).view(-1, length)
