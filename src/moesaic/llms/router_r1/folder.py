"""A trained policy in a folder: its weights and tokenizer as Transformers saves them, and how it is asked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.errors import AdapterError, ConfigError, path_of
from moesaic.llms.router_r1.engine import Limits, Question
from moesaic.llms.router_r1.prompt import FIELDS
from moesaic.llms.router_r1.settings import DIALECTS
from moesaic.runs.folder import read_json, write_json

if TYPE_CHECKING:
    from moesaic.llms.router_r1.local import LocalPolicy
    from moesaic.models.embedded import LoadedModel

FILE = "router_r1.json"
POLICY = "policy"
"""Where a run keeps its policy."""


@dataclass(frozen=True)
class Asking:
    """How a policy is asked, and how far it goes.

    Attributes:
        models: whom it learned to ask. tell: what its prompt says of them.
        turns, reply_tokens: as `Limits`. max_tokens: of a reply, as its model is asked. bare: queries go as they are.
        max_new_tokens: of one generation. dialect: a name of `DIALECTS`.
    """

    models: tuple[str, ...] = ()
    tell: tuple[str, ...] = FIELDS
    turns: int = 4
    reply_tokens: int = 600
    max_tokens: int = 512
    max_new_tokens: int = 1024
    bare: bool = False
    dialect: str = "tags"

    def say(self, question: Question) -> str:
        """What the policy is asked of a question."""
        models = question.catalog.values()
        return DIALECTS[self.dialect].prompt(question.text, models, self.tell, alpha=question.alpha)

    def limits(self, budget: float | None = None) -> Limits:
        """As far as a rollout goes. budget: USD of a question."""
        return Limits(self.turns, self.reply_tokens, budget, self.max_tokens)


def save(policy: LocalPolicy, asking: Asking, folder: Path) -> None:
    """Write into a folder that is there."""
    policy.model.save_pretrained(folder, safe_serialization=True)
    policy.tokenizer.save_pretrained(folder)
    write_json(folder / FILE, asdict(asking))


def file_of(folder: Path) -> Path:
    """Where it says how its policy is asked: in the folder itself, or in that of the run that made it."""
    return folder / FILE if (folder / FILE).is_file() else folder / POLICY / FILE


def is_policy(folder: Path) -> bool:
    return file_of(folder).is_file()


def base(place: str) -> LoadedModel:
    """A model to make a policy of, with its tokenizer, as loaded. Raises ConfigError where it writes no text."""
    from moesaic.models.embedded import load_model

    loaded = load_model(place)
    if loaded.kind != "causal":
        raise ConfigError(f"{place} writes no text: a policy is a causal language model")
    return loaded


def load(folder: str | Path) -> tuple[LocalPolicy, Asking]:
    """A policy, which takes the likeliest token, of its folder or of the run that made it.

    Raises:
        ConfigError: there is none. AdapterError: it is damaged.
    """
    from moesaic.llms.router_r1.local import LocalPolicy

    file = file_of(path_of(folder))
    if not file.is_file():
        raise ConfigError(f"{folder} holds no policy; `moesaic llm r1 train` makes one")
    loaded, stored = base(str(file.parent)), read_json(file)
    if stored.keys() != {f.name for f in fields(Asking)}:
        raise AdapterError(f"{file} is not as it was written: train the policy again")
    asking = Asking(**{name: _plain(value) for name, value in stored.items()})
    if not _sound(asking):
        raise AdapterError(f"{file} is not as it was written: train the policy again")
    policy = LocalPolicy(
        loaded.model.eval(), loaded.tokenizer, temperature=0.0, max_new_tokens=asking.max_new_tokens,
        dialect=DIALECTS[asking.dialect],
    )  # fmt: skip
    return policy, asking


_LEAST = {"turns": 0, "reply_tokens": 1, "max_tokens": 1, "max_new_tokens": 1}


def _sound(asking: Asking) -> bool:
    """Whether everything in it is of its kind."""
    return (
        all(type(value := getattr(asking, name)) is int and value >= least for name, least in _LEAST.items())
        and all(isinstance(part, tuple) for part in (asking.models, asking.tell))
        and all(isinstance(text, str) for text in (*asking.models, *asking.tell, asking.dialect))
        and {*asking.tell} <= {*FIELDS}
        and isinstance(asking.bare, bool)
        and asking.dialect in DIALECTS
    )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
