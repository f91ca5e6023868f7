"""Vocabularies: which topics there are, and what is known of the tasks that carry them.

A vocabulary is a JSON file; `bigbench.json` beside this file is the one that comes along:

    {"groups": {group: description},
     "keywords": {keyword: {"group", "description"[, "tasks": how many carry it][, "format": true]}},
     "tasks": {task: [keywords]}}                                             optional: the pairs that occur together

A list of tasks put on top of a vocabulary is either `{task: [keywords]}` or a file like the above, whose keywords are
added; none replaces what another file says. Keywords marked `format` say how a task is posed, not what it is about:
they are known, and no topics. A count that is missing is unknown, not zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moesaic.errors import ConfigError, DataError, first_line, path_of, suggest
from moesaic.lora.methods.topics.settings import PACKAGED

LEVELS = ("keyword", "group")
SECTIONS = ("groups", "keywords", "tasks")

T = TypeVar("T")


@dataclass(frozen=True)
class Keyword:
    """What a task can be about. `tasks` is how many carry it; None where nobody counted."""

    group: str
    description: str
    tasks: int | None = None
    format: bool = False


@dataclass(frozen=True)
class Topic:
    """A node of the graph. `tasks` are those that carry it; None where they are not listed."""

    name: str
    group: str
    text: str
    tasks: frozenset[str] | None = None


@dataclass(frozen=True)
class Vocabulary:
    """Groups and keywords with descriptions and, if listed, the keywords of every task."""

    groups: Mapping[str, str]
    keywords: Mapping[str, Keyword]
    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def topics(self, level: str = "keyword", *, min_tasks: int = 2) -> list[Topic]:
        """The nodes: keywords that at least `min_tasks` tasks carry (or nobody counted), or groups that one carries.

        Raises:
            ConfigError: an unknown level.
        """
        if level not in LEVELS:
            raise ConfigError(f"level={level}; {suggest(str(level), LEVELS)}")
        least = min_tasks if level == "keyword" else min(min_tasks, 1)
        carriers: dict[str, set[str]] = {name: set() for name in self.keywords}
        for task, names in self.tasks.items():
            for name in names:
                carriers[name].add(task)
        kept = []
        for name, keyword in self.keywords.items():
            count = len(carriers[name]) if self.tasks else keyword.tasks
            if not keyword.format and (count is None or count >= least):
                kept.append(Topic(name, keyword.group, f"{name}: {keyword.description}", frozenset(carriers[name])))
        if level == "group":
            kept = self._groups(kept)
        return kept if self.tasks else [Topic(t.name, t.group, t.text) for t in kept]

    def lone(self) -> list[str]:
        """Keywords that one task alone carries, and that are no topics therefore."""
        carried = [name for names in self.tasks.values() for name in set(names)]
        return [name for name in self.keywords if carried.count(name) == 1]

    def _groups(self, topics: list[Topic]) -> list[Topic]:
        nodes = []
        for group, description in self.groups.items():
            members = [t.tasks or frozenset() for t in topics if t.group == group]
            if members:
                nodes.append(Topic(group, group, f"{group}: {description}", frozenset().union(*members)))
        return nodes


def load(name: str, tasks: Sequence[str] = ()) -> Vocabulary:
    """Read a vocabulary and, on top, lists of tasks with their keywords.

    Args:
        name: `bigbench`, or the path of a vocabulary file.
        tasks: paths of lists of tasks; a keyword that one of them uses may be described in another.

    Raises:
        DataError: naming file and entry; for an unknown keyword, the task and the nearest known one too; for a task in
            two files, or a keyword or group that is not the same in both, the other file too.
    """
    packaged = Path(__file__).with_name("bigbench.json")
    files = [packaged if name == PACKAGED else path_of(name), *map(path_of, tasks)]
    contents = {str(file): _read(file) for file in files}
    groups = _merged(contents, "groups", _text)
    keywords = _merged(contents, "keywords", lambda entry, where: _keyword(entry, where, groups))
    listed = _merged(contents, "tasks", lambda names, where: _keywords_of(names, where, keywords))
    return Vocabulary(groups, keywords, listed)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
        json.dumps(content, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise DataError(f"no such file: {file} (the vocabulary that comes along is called {PACKAGED!r})") from None
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    except UnicodeEncodeError as error:
        raise DataError(f"{file} holds {error.object[error.start]!r}, half a character: write it whole") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: not a JSON file that can be read: {first_line(error)}") from None
    if not isinstance(content, dict) or not content:
        got = type(content).__name__ if content or not isinstance(content, dict) else "an empty one"
        raise DataError(f"{file}: expected an object like {{'task': ['keyword', …]}}, got {got}")
    known = {"about", *SECTIONS}
    first, entry = next(iter(content.items()))
    if first not in known and not isinstance(entry, dict):
        return {"tasks": content}
    odd = content.keys() - known
    if odd:
        raise DataError(f"{file}: unknown entry '{min(odd)}'; {suggest(min(odd), SECTIONS)}")
    return content


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise DataError(f"'{key}' is there twice in one object: keep one")
        entries[key] = value
    return entries


def _merged(contents: Mapping[str, dict[str, Any]], key: str, read: Callable[[Any, str], T]) -> dict[str, T]:
    """A section's entries from all files, each as `read(entry, where)` gives it.

    Raises:
        DataError: a task in two files; a keyword or group in two that is not the same in both.
    """
    found: dict[str, T] = {}
    source: dict[str, str] = {}
    for file, content in contents.items():
        for name, entry in _section(content, key, file).items():
            what = f"{key.removesuffix('s')} '{name}'"
            if not name.strip():
                raise DataError(f"{file}: {what} must have a name")
            value = read(entry, f"{file}: {what}")
            if name in found and key == "tasks":
                raise DataError(f"{what} is listed twice: in {source[name]} and in {file}")
            if name in found and value != found[name]:
                raise DataError(f"{what} is described differently in {source[name]} and in {file}")
            found[name], source[name] = value, file
    return found


def _keywords_of(names: Any, where: str, keywords: Mapping[str, Keyword]) -> tuple[str, ...]:
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise DataError(f"{where} must have a list of keywords")
    for name in names:
        if name not in keywords:
            raise DataError(
                f"{where} has the unknown keyword '{name}'; {_nearest(name, keywords)}, or describe it: "
                '{"keywords": {keyword: {"group": …, "description": …}}, "tasks": {…}}'
            )
    return tuple(dict.fromkeys(names))


def _nearest(name: str, options: Iterable[str]) -> str:
    """The nearest known name alone: keywords are ninety, and names of groups hold commas."""
    hint, _, _ = suggest(name, options).partition("known: ")
    return hint.strip().rstrip("?") or "none is near"


def _section(content: dict[str, Any], key: str, file: str) -> dict[str, Any]:
    section = content.get(key, {})
    if not isinstance(section, dict):
        raise DataError(f"{file}: '{key}' must be an object, got {type(section).__name__}")
    return section


def _keyword(entry: Any, where: str, groups: dict[str, str]) -> Keyword:
    if not isinstance(entry, dict) or not {"group", "description"} <= entry.keys():
        raise DataError(f"{where} must have a 'group' and a 'description'")
    odd = entry.keys() - {"group", "description", "tasks", "format"}
    if odd:
        raise DataError(f"{where} has the unknown entry '{min(odd)}'")
    group, count = _text(entry["group"], where), entry.get("tasks")
    if group not in groups:
        known = ", ".join(f"'{name}'" for name in groups)
        raise DataError(f"{where} is in the unknown group '{group}'; {_nearest(group, groups)}; known: {known}")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
        raise DataError(f"{where}: 'tasks' must be a whole number, got {count!r}")
    form = entry.get("format", False)
    if not isinstance(form, bool):
        raise DataError(f"{where}: 'format' must be true or false, got {form!r}")
    return Keyword(group, _text(entry["description"], where), count, form)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: expected a text, got {value!r}")
    return value
