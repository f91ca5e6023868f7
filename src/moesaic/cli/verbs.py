"""What a verb of the command line is: a function, its settings dataclass, and a line of help."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

VERBS: dict[str, Verb] = {}


@dataclass(frozen=True)
class Section:
    """Settings that a verb takes as key=value: those of a dataclass, `but` some, under a title in its help."""

    of: type
    title: str = "settings (key=value):"
    but: Collection[str] = ()
    brief: bool = False
    """Names alone: another verb's help tells them."""
    actions: Collection[str] = ()
    """Of the verb's first words, where they are those of some alone: the help of another leaves them out."""

    def is_of(self, words: Sequence[str]) -> bool:
        """Whether it is of an action that the words name, or begin to."""
        split = [action.split() for action in self.actions]
        return bool(words) and any(all(map(str.__eq__, action, words)) for action in split)

    def fields(self) -> list[Field[Any]]:
        return [f for f in fields(self.of) if f.name not in self.but]

    def help(self) -> str:
        """A line a setting: its name, what it is, its default."""
        if self.brief:
            return f"{self.title}\n  {', '.join(f.name for f in self.fields())}"
        lines = [self.title]
        for f in self.fields():
            default = _plain(f.default_factory() if callable(f.default_factory) else f.default)
            lines.append(f"  {f.name:<14} {f.metadata['help']}{f' [{default}]' if default else ''}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        run: called with the operands, the list of other arguments, and `as_json` (and `dry_run`, where it has one).
        group, place: under which heading of `moesaic --help`, and how far down.
        operands: what comes first on the line, by name: its help. One that ends in "?" may be left out.
        takes: what the other arguments are, as help shows it; empty where there are none.
        dry_run: help of --dry-run; empty where there is none.
        about: more that its help says before the settings.
    """

    run: Callable[..., int | None]
    name: str
    summary: str
    group: str
    place: int
    settings: Sequence[Section] = ()
    operands: Mapping[str, str] = field(default_factory=dict)
    takes: str = "key=value"
    dry_run: str = ""
    about: Callable[[], str] = str

    def call(self, args: argparse.Namespace) -> int | None:
        given = [getattr(args, name.removesuffix("?")) for name in self.operands]
        options = {"dry_run": args.dry_run} if self.dry_run else {}
        return self.run(*given, *([args.settings] if self.takes else []), as_json=args.json, **options)

    def parser(self, common: argparse.ArgumentParser, words: Sequence[str] = ()) -> argparse.ArgumentParser:
        """Its arguments; of settings that are an action's, help shows those of the one that the `words` begin with."""
        known = [section for section in self.settings if section.is_of(words)]
        shown = [section for section in self.settings if not known or section in known or not section.actions]
        parser = argparse.ArgumentParser(
            prog=f"moesaic {self.name}",
            description=self.summary,
            epilog="\n\n".join(filter(None, [self.about(), *(section.help() for section in shown)])),
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, said in self.operands.items():
            parser.add_argument(name.removesuffix("?"), nargs="?" if name.endswith("?") else None, help=said)
        if self.takes:
            parser.add_argument("settings", nargs="*", metavar=self.takes, help="settings, put on top of what there is")
        if self.dry_run:
            parser.add_argument("--dry-run", action="store_true", help=self.dry_run)
        return parser


def verb(name: str, summary: str, **more: Any) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Make a function a verb of the command line; see `Verb` for what there is to say of it."""

    def register(run: Callable[..., int | None]) -> Callable[..., int | None]:
        VERBS[name] = Verb(run, name, summary, **more)
        return run

    return register


def find() -> dict[str, Verb]:
    """Every verb, from all files of this folder, in the order in which help shows them."""
    package = importlib.import_module(__package__ or "moesaic.cli")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(VERBS.items(), key=lambda item: item[1].place))


def verbs_with(key: str) -> Iterator[str]:
    """The verbs that have a setting of that name."""
    for name, known in find().items():
        if any(f.name == key for section in known.settings for f in section.fields()):
            yield name


def _plain(default: object) -> str:
    """A default as it would be written; nothing for one that is empty."""
    if isinstance(default, list | tuple):
        return ",".join(map(_plain, default))
    if default is None or isinstance(default, Mapping):
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)
