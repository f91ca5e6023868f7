"""Questions answered in rounds: the policy writes, whom it names is asked, it reads the reply, and writes on.

    GENERATE -> a search: the model is asked, INFORMATION is read, GENERATE again
             -> a search that cannot be asked (no such model, a failure, no budget): INFORMATION says None
             -> neither search nor answer: nothing is read, GENERATE again
             -> an answer, or a policy that fails: the end
    after `turns` generations one last, whose search is not asked

As the released engine of arXiv 2506.09033; but a reply is cut before it is wrapped, so that it cannot lose its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from moesaic.errors import ConfigError
from moesaic.llms.catalog import Catalog, Model
from moesaic.llms.router_r1.transcript import NOTHING, TAGGED, Dialect, Piece, Search, Transcript


@dataclass(frozen=True)
class Question:
    """What is asked, of a policy that may ask the models of a catalog about it.

    Attributes:
        truths: answers that count as right. alpha: how much cost matters here, where the policy is to be told.
        about: whatever else is known of it (its kind, say), for tables.
    """

    text: str
    catalog: Catalog
    truths: tuple[str, ...] = ()
    alpha: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.catalog or not self.text.strip():
            raise ConfigError("a question needs a text, and models that may be asked")


def plainly(question: Question, dialect: Dialect = TAGGED) -> str:
    """A dialect's prompt, with all that is known of the models."""
    return dialect.prompt(question.text, question.catalog.values(), alpha=question.alpha)


@dataclass(frozen=True)
class Written:
    """What a policy wrote in one generation.

    Attributes:
        text: up to where it stopped. tokens: how many it took.
        ids, logprobs: the tokens and their log probabilities, of a policy that tells them.
        failure: why it can write no more; the question ends here.
    """

    text: str
    tokens: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    failure: str = ""


class Rounds(Protocol):
    """Conversations that go on side by side, each by its number."""

    def write(self, who: Sequence[int]) -> list[Written]:
        """Go on with these, in that order, each until a stop of the dialect, its end or its most tokens."""
        ...

    def read(self, who: int, text: str) -> tuple[int, ...]:
        """Take in what the environment says to one: its tokens, where they are known."""
        ...

    def clip(self, text: str, tokens: int) -> str:
        """As much of a text as so many tokens hold."""
        ...


class Policy(Protocol):
    """A language model that is asked to go on."""

    def begin(self, prompts: Sequence[str]) -> Rounds: ...


STEP: ContextVar[Callable[[], None]] = ContextVar("STEP", default=lambda: None)
"""What policies that can call before each token they write; it may raise, which ends the rollout."""


@dataclass(frozen=True)
class Reply:
    """What a model of the pool said: its text, its completion tokens, and how long it took; `failure` says why not."""

    text: str
    tokens: int = 0
    seconds: float = 0.0
    failure: str = ""


class Pool(Protocol):
    """Models that can be asked, several at once."""

    def ask(self, calls: Sequence[tuple[Model, str]]) -> list[Reply]:
        """A reply to each (model, query); one that failed has no text."""
        ...


@dataclass(frozen=True)
class Limits:
    """How far a rollout goes.

    Attributes:
        turns: generations whose searches are asked; one more may answer. reply_tokens: of a reply that are read.
        budget: USD for the calls of one question; a call that could go beyond it is not made. None for no end.
        longest: tokens that a reply is taken to have at most, before it is known (for the budget).
    """

    turns: int = 4
    reply_tokens: int = 600
    budget: float | None = None
    longest: int = 512

    def __post_init__(self) -> None:
        if self.turns < 0 or self.reply_tokens < 1 or self.longest < 1 or (self.budget is not None and self.budget < 0):
            raise ConfigError("turns from 0 on, reply_tokens and longest from 1 on, a budget from 0 on")


@dataclass(frozen=True)
class Call:
    """One search, asked or not.

    Attributes:
        name: as the policy wrote it. model: whom that means; empty where it means none. query, reply: as they were.
        cost: micro-dollars, the completion tokens times the price of a million. failure: why there is no reply.
        asked: whether the model was.
    """

    name: str
    model: str
    query: str
    reply: str
    tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    failure: str = ""
    asked: bool = True


@dataclass
class Rollout:
    """One question, whole: what was written and read, who was asked, what it cost."""

    question: Question
    transcript: Transcript = field(default_factory=Transcript)
    calls: list[Call] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """Micro-dollars of all calls."""
        return sum(call.cost for call in self.calls)

    @property
    def answer(self) -> str:
        return self.transcript.answer

    def fault(self, *, strict: bool = False) -> str:
        """What breaks its format; empty where nothing does."""
        return self.transcript.fault(self.question.catalog, strict=strict)

    @property
    def failed(self) -> bool:
        """Whether a model that was asked did not answer."""
        return any(call.failure and call.asked for call in self.calls)

    @property
    def policy_tokens(self) -> int:
        return sum(written.tokens for written in self.written)

    @property
    def failure(self) -> str:
        """Why the policy wrote no more; empty where it ended by itself, or by the limits."""
        return self.written[-1].failure if self.written else ""

    def trace(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "question": self.question.text, "answer": self.answer, "transcript": self.transcript.text,
            "fault": self.fault(), "calls": [vars(call) for call in self.calls],
            "cost": self.cost, "policy_tokens": self.policy_tokens,
            "generations": len(self.written), "failure": self.failure,
        }  # fmt: skip


def roll(
    policy: Policy,
    pool: Pool,
    questions: Sequence[Question],
    limits: Limits | None = None,
    *,
    dialect: Dialect = TAGGED,
    say: Callable[[Question], str] | None = None,
    watch: Callable[[int, Piece], None] = lambda which, piece: None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Rollout]:
    """Answer questions side by side, whatever becomes of single calls.

    Args:
        dialect: the policy's. say: what it is asked; `plainly` where None.
        watch: is told each piece as it comes, and of which question.
        progress: is told how many have ended, each round.
    """
    limits, say = limits or Limits(), say or partial(plainly, dialect=dialect)
    found = [Rollout(question, Transcript(dialect=dialect)) for question in questions]
    rounds = policy.begin([say(question) for question in questions])
    active = list(range(len(found)))
    for turn in range(limits.turns + 1):
        if not active:
            break
        searching: list[tuple[int, Search]] = []
        going = []
        for i, written in zip(active, rounds.write(active), strict=True):
            text = dialect.cut(written.text)
            found[i].written.append(written)
            found[i].transcript.pieces.append(Piece(text, ids=written.ids))
            watch(i, found[i].transcript.pieces[-1])
            done = dialect.action(text)
            if isinstance(done, str) or written.failure:
                continue
            going.append(i)
            if done is not None:
                searching.append((i, done))
        active = going
        if turn < limits.turns:
            _ask(found, rounds, pool, limits, searching, watch)
        progress(len(found) - len(active))
    return found


def _ask(
    found: Sequence[Rollout],
    rounds: Rounds,
    pool: Pool,
    limits: Limits,
    searching: Sequence[tuple[int, Search]],
    watch: Callable[[int, Piece], None],
) -> None:
    """Ask whom searches name, all at once, and let each be read."""
    models = [found[i].transcript.dialect.resolve(search.name, found[i].question.catalog) for i, search in searching]
    why = [refused(model, search, found[i].cost, limits) for (i, search), model in zip(searching, models, strict=True)]
    asked = [at for at, refusal in enumerate(why) if not refusal]
    replies = dict(zip(asked, pool.ask([_call(models[at], searching[at][1]) for at in asked]), strict=True))
    for at, (i, search) in enumerate(searching):
        reply = replies.get(at, Reply("", failure=why[at]))
        text = NOTHING if reply.failure else rounds.clip(reply.text, limits.reply_tokens)
        found[i].calls.append(called(search, models[at], reply, text, asked=not why[at]))
        ids = rounds.read(i, found[i].transcript.dialect.shown(text))
        found[i].transcript.pieces.append(Piece(text, reply=True, ids=ids))
        watch(i, found[i].transcript.pieces[-1])


def _call(model: Model | None, search: Search) -> tuple[Model, str]:
    assert model is not None
    return model, search.query


def called(search: Search, model: Model | None, reply: Reply, text: str, *, asked: bool) -> Call:
    """A search as it went, of whose reply `text` was read. asked: whether anybody was."""
    price = 0.0 if model is None or reply.failure else model.cost(0, reply.tokens) * 1e6
    name = "" if model is None else model.name
    return Call(search.name, name, search.query, text, reply.tokens, price, reply.seconds, reply.failure, asked)


def refused(model: Model | None, search: Search, spent: float, limits: Limits) -> str:
    """Why a search is not asked, after so many micro-dollars; empty where it is."""
    if model is None:
        return f"no model {search.name[:80]!r}"
    if not search.query:
        return "a call without a query"
    if limits.budget is not None and spent / 1e6 + model.cost(0, limits.longest) > limits.budget * (1 + 1e-12):
        return "no budget is left for it"
    return ""
