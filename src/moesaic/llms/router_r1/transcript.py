"""What a policy wrote and what it was told: the grammar of Router-R1's transcripts, and what breaks it.

    <think> … </think>  ( <search> NAME: QUERY </search>  <information> REPLY </information>  <think> … </think> )*
    <answer> … </answer>

A transcript is kept in pieces, the policy's own and replies apart. What is checked, scored and trained on is the
policy's own: a reply is an opaque block there, whatever its text holds. To the policy replies are shown with the `<` of
the grammar's tags written out, so that none can close its block.

How calls, replies and answers are written is a dialect. Router-R1's own is `Tags`; `calls.Calls` is the other.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from moesaic.errors import ConfigError
from moesaic.llms.catalog import Catalog, Model
from moesaic.llms.router_r1.prompt import FIELDS, prompt

TAGS = ("think", "search", "information", "answer")
NOTHING = "None"
"""The reply where nobody could be asked."""
STOPS = ("</search>", "</answer>")
PLACEHOLDERS = ("llm-name", "your-query")
_TAG = re.compile(rf"<(/?)({'|'.join(TAGS)})>")
_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """<tag>text</tag> at a place of a text: start, end."""

    tag: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Search:
    """A call that a policy asks for: the name as it wrote it, and the query."""

    name: str
    query: str


class Dialect(ABC):
    """How calls, replies and answers are written.

    Attributes:
        stops: a generation ends with the first of these that it holds; a later one counts only where no earlier does.
        around: what stands before and after a reply. turns: whether a chat has a reply as a user's turn of its own.
    """

    stops: ClassVar[tuple[str, ...]]
    around: ClassVar[tuple[str, str]]
    turns: ClassVar[bool] = False

    @abstractmethod
    def prompt(
        self, question: str, models: Iterable[Model], tell: Iterable[str] = FIELDS, *, alpha: float | None = None
    ) -> str:
        """What a policy is asked, as one user turn. alpha: how much cost matters, where it is to be told."""

    @abstractmethod
    def call(self, thought: str, model: Model, query: str) -> str:
        """A generation that asks a model."""

    @abstractmethod
    def end(self, thought: str, answer: str) -> str:
        """A generation that answers."""

    @abstractmethod
    def action(self, text: str) -> Search | str | None:
        """The first thing that a generation does: a call, an answer's text, or None where it does neither properly."""

    @abstractmethod
    def resolve(self, name: str, catalog: Catalog) -> Model | None:
        """Whom a call's name means."""

    @abstractmethod
    def harmless(self, text: str) -> str:
        """A reply's text, which can neither close its block nor be taken for a call."""

    @abstractmethod
    def answer(self, transcript: Transcript) -> str:
        """Empty where there is none."""

    @abstractmethod
    def fault(self, transcript: Transcript, catalog: Catalog, *, strict: bool = False) -> str:
        """What breaks the grammar, in a few words; empty where nothing does. `strict` allows nothing beside it."""

    def shown(self, reply: str) -> str:
        """A reply as the policy reads it."""
        return self.around[0] + self.harmless(reply) + self.around[1]

    def cut(self, text: str) -> str:
        """What a generation counts up to."""
        return cut(text, self.stops)

    def closed(self, text: str) -> str:
        """A generation with the stop that an endpoint cut off: of the tag that was opened last and not closed."""
        at, stop = max((text.rfind(stop.replace("/", "", 1)), stop) for stop in self.stops)
        return text + stop if at >= 0 and stop not in text[at:] else text


class Tags(Dialect):
    """Router-R1's tags, all in one turn of the policy's."""

    stops = STOPS
    around = ("\n\n<information>", "</information>\n\n")

    def prompt(
        self, question: str, models: Iterable[Model], tell: Iterable[str] = FIELDS, *, alpha: float | None = None
    ) -> str:
        return prompt(question, models, tell, alpha=alpha)

    def call(self, thought: str, model: Model, query: str) -> str:
        return f"<think> {thought} </think><search> {model.name}: {harmless(query)} </search>"

    def end(self, thought: str, answer: str) -> str:
        return f"<think> {thought} </think><answer> {answer} </answer>"

    def action(self, text: str) -> Search | str | None:
        return action(text)

    def resolve(self, name: str, catalog: Catalog) -> Model | None:
        return resolve(name, catalog)

    def harmless(self, text: str) -> str:
        return harmless(text)

    def answer(self, transcript: Transcript) -> str:
        """Of the last <answer> that the policy wrote."""
        found = [block.text for block in blocks(transcript.checked) if block.tag == "answer"]
        return found[-1].strip() if found else ""

    def fault(self, transcript: Transcript, catalog: Catalog, *, strict: bool = False) -> str:
        """A reply that the policy wrote itself is one."""
        if any("information" in tag[2] for own in transcript.generations for tag in tags(own)):
            return "the policy wrote a reply of its own"
        return fault(transcript.checked, catalog, strict=strict)


TAGGED = Tags()


@dataclass(frozen=True)
class Piece:
    """A piece of a transcript: the policy's own text, or a reply; and its tokens, where the policy tells them."""

    text: str
    reply: bool = False
    ids: tuple[int, ...] = ()


@dataclass
class Transcript:
    """Pieces in their order, in a dialect."""

    pieces: list[Piece] = field(default_factory=list)
    dialect: Dialect = TAGGED

    def shown(self, piece: Piece) -> str:
        """As the policy reads it."""
        return self.dialect.shown(piece.text) if piece.reply else piece.text

    @property
    def text(self) -> str:
        """As the policy reads it."""
        return "".join(map(self.shown, self.pieces))

    @property
    def checked(self) -> str:
        """What is scored: every reply is the same word, whatever it says; tags of replies that a policy wrote stay."""
        return "".join(self.dialect.shown(NOTHING) if piece.reply else piece.text for piece in self.pieces)

    @property
    def generations(self) -> list[str]:
        """What the policy wrote, one text a generation."""
        return [piece.text for piece in self.pieces if not piece.reply]

    @property
    def own(self) -> str:
        """What the policy wrote."""
        return "".join(self.generations)

    @property
    def answer(self) -> str:
        """What it came to; empty where it came to none."""
        return self.dialect.answer(self)

    def fault(self, catalog: Catalog, *, strict: bool = False) -> str:
        """What breaks the dialect's grammar; empty where nothing does."""
        return self.dialect.fault(self, catalog, strict=strict)


def tags(text: str) -> Iterator[re.Match[str]]:
    """Opening and closing tags of the grammar."""
    return _TAG.finditer(text)


def harmless(text: str) -> str:
    """A text without the grammar's tags: their `<` is written out."""
    return _TAG.sub(lambda tag: "&lt;" + tag[0][1:], text)


def blocks(text: str) -> list[Block]:
    """Pairs of tags, each opening one with the next closing one of its kind; what lies within is text."""
    found, at = [], 0
    while opening := _TAG.search(text, at):
        at = opening.end()
        if opening[1]:
            continue
        close = text.find(f"</{opening[2]}>", at)
        if close >= 0:
            end = close + len(opening[2]) + 3
            found.append(Block(opening[2], text[at:close], opening.start(), end))
            at = end
    return found


def cut(text: str, stops: Sequence[str] = STOPS) -> str:
    """What a generation counts up to: the first </search>, else the first </answer>."""
    for stop in stops:
        before, found, _ = text.partition(stop)
        if found:
            return before + found
    return text


def action(text: str) -> Search | str | None:
    """The first thing that a generation does: a search, an answer's text, or None where it does neither properly.

    A search without a colon, without a query, or with the prompt's placeholder in it is none.
    """
    found = _ACTION.search(text)
    if found is None:
        return None
    if found[1] == "answer":
        return found[2].strip()
    name, colon, query = found[2].partition(":")
    if not colon or not query.strip() or any(word in found[2].lower() for word in PLACEHOLDERS):
        return None
    return Search(name.strip(), query.strip())


def resolve(name: str, catalog: Catalog) -> Model | None:
    """The model of an exact name or alias."""
    try:
        return catalog.resolve(name.strip())
    except ConfigError:
        return None


def fault(text: str, catalog: Catalog, *, strict: bool = False) -> str:
    """What breaks the grammar in a whole text, in a few words; empty where nothing does.

    The rules of the released format check, exact names instead of parts of names. `strict` holds the order of blocks
    too, and allows nothing but white space between them.
    """
    found = blocks(text)
    if not found:
        return "no block"
    for tag in TAGS:
        if text.count(f"<{tag}>") != text.count(f"</{tag}>"):
            return f"<{tag}> and </{tag}> do not pair"
    for block in found:
        if next(tags(block.text), None):
            return f"a tag within <{block.tag}>"
        if block.tag == "think" and block.text.strip() in ("", "..."):
            return "an empty <think>"
    count = {tag: sum(block.tag == tag for block in found) for tag in TAGS}
    if count["answer"] != 1:
        return f"{count['answer']} answers"
    if not count["think"]:
        return "no <think>"
    if count["search"] != count["information"]:
        return f"{count['search']} searches and {count['information']} replies"
    if not text.strip().startswith("<think>") or not text.strip().endswith("</answer>"):
        return "does not begin with <think> and end with </answer>"
    for block in found:
        if block.tag == "search" and (why := _search_fault(block.text, catalog)):
            return why
    return _order_fault(text, found) if strict else ""


def _search_fault(body: str, catalog: Catalog) -> str:
    if body.count(":") != 1:
        return "a search needs one colon, between name and query"
    name, query = (part.strip() for part in body.split(":"))
    if not query:
        return "a search without a query"
    if any(word in body.lower() for word in PLACEHOLDERS):
        return "a search with the prompt's placeholder"
    if name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", query):
        return "the name stands in the query"
    return "" if resolve(name, catalog) else f"no model {name[:40]!r}"


_NEXT = {
    "": ("think",), "think": ("search", "answer"), "search": ("information",), "information": ("think",), "answer": (),
}  # fmt: skip


def _order_fault(text: str, found: Sequence[Block]) -> str:
    """start -> think -> (search -> information -> think)* -> answer, and nothing between."""
    before, at = "", 0
    for block in found:
        if text[at : block.start].strip():
            return "text between the blocks"
        if block.tag not in _NEXT[before]:
            return f"<{block.tag}> after {f'<{before}>' if before else 'the beginning'}"
        before, at = block.tag, block.end
    return ""
