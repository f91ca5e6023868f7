"""What `moesaic llm r1` is told, as people write it."""

from __future__ import annotations

from dataclasses import dataclass, field

from moesaic.errors import ConfigError, suggest
from moesaic.llms.router_r1.calls import Calls
from moesaic.llms.router_r1.prompt import FIELDS
from moesaic.llms.router_r1.transcript import TAGGED, Dialect
from moesaic.llms.running import check_given
from moesaic.runs.settings import check_within

DIALECTS: dict[str, Dialect] = {"tags": TAGGED, "calls": Calls()}
_CATALOG = {"help": "YAML file of the models that may be asked, with endpoints and output_price"}
_DATA = {"help": 'JSONL of {"question": …, "answers": […]}; "models": [names] where not all may be asked'}


@dataclass
class Pool:
    """How models are asked."""

    catalog: str = field(default="", metadata=_CATALOG)
    at_once: int = field(default=10, metadata={"help": "requests to models"})
    retries: int = field(default=2, metadata={"help": "tries after the first, for what may pass"})
    timeout: float | None = field(default=None, metadata={"help": "seconds of a try; as the catalog says where null"})


@dataclass
class R1Train(Pool):
    """Settings of `moesaic llm r1 train`."""

    data: str = field(default="", metadata=_DATA)
    model: str = field(default="", metadata={"help": "the policy's base: nano, smollm2, a folder or a hub id"})
    out: str = field(default="runs/router-r1", metadata={"help": "folder of the run; goes on where it ended"})
    overwrite: bool = field(default=False, metadata={"help": "replace a run that is there"})
    eval_data: str = field(default="", metadata={"help": "questions that it is tried on while it trains"})
    eval_every: int = field(default=25, metadata={"help": "steps between tries"})
    alpha: float = field(default=0.0, metadata={"help": "weight of cost in the reward, 0 to 1"})
    alphas: list[float] = field(
        default_factory=list, metadata={"help": "several instead: each question draws one, and the prompt says which"}
    )
    metric: str = field(default="em", metadata={"help": "what an answer is worth: em (exact match) or f1"})
    failure: float = field(default=0.0, metadata={"help": "taken off where a model that was asked did not answer"})
    steps: int = field(default=150, metadata={"help": "of GRPO"})
    questions: int = field(default=8, metadata={"help": "a step"})
    group: int = field(default=8, metadata={"help": "transcripts of a question"})
    lr: float = field(default=1e-6, metadata={"help": "learning rate of GRPO"})
    beta: float = field(default=0.0, metadata={"help": "weight of the divergence from the start"})
    r: int = field(default=0, metadata={"help": "rank of a LoRA that is trained; 0 trains all weights"})
    temperature: float = field(default=1.0, metadata={"help": "of transcripts in training"})
    warm: int = field(
        default=0, metadata={"help": "steps of imitation before: one model asked at random, then the answer"}
    )
    warm_lr: float = field(default=1e-5, metadata={"help": "learning rate of imitation"})
    warm_batch: int = field(default=32, metadata={"help": "transcripts of a step of imitation"})
    tags: bool = field(
        default=False, metadata={"help": "give each tag a token of its own; small models want it, and a warm start"}
    )
    tell: list[str] = field(default_factory=lambda: [*FIELDS], metadata={"help": "what the prompt says of models"})
    dialect: str = field(default="tags", metadata={"help": "tags, as published, or calls: models as functions"})
    turns: int = field(default=4, metadata={"help": "generations that may ask, before a last one"})
    max_new_tokens: int = field(default=1024, metadata={"help": "of a generation"})
    reply_tokens: int = field(default=600, metadata={"help": "of a reply that are read"})
    max_tokens: int = field(default=512, metadata={"help": "of a reply, as its model is asked"})
    bare: bool = field(default=False, metadata={"help": "send queries without the words around them"})
    save_every: int = field(default=25, metadata={"help": "steps between checkpoints"})
    seed: int = field(default=0, metadata={"help": "of the start, of draws and of whom a warm start asks"})

    def check(self) -> None:
        """Raise ConfigError for what cannot be."""
        check_given(self, "data", "catalog", "model", "out")
        check_within(self, _TRAIN)
        check_pool(self)
        for alpha in self.alphas:
            if not 0 <= alpha <= 1:
                raise ConfigError(f"alphas={alpha} must be from 0 to 1")
        from moesaic.llms.router_r1.rewards import METRICS

        if self.metric not in METRICS:
            raise ConfigError(f"metric={self.metric}: {suggest(self.metric, METRICS)}")
        if self.tags and self.r:
            raise ConfigError("tags=true wants all weights trained, the new tokens' among them: leave r out")
        if self.dialect not in DIALECTS:
            raise ConfigError(f"dialect={self.dialect}: {suggest(self.dialect, DIALECTS)}")
        for what in self.tell:
            if what not in FIELDS:
                raise ConfigError(f"tell={what}: {suggest(what, FIELDS)}")


@dataclass
class R1Eval(Pool):
    """Settings of `moesaic llm r1 eval`."""

    data: str = field(default="", metadata=_DATA)
    out: str = field(default="", metadata={"help": "a .jsonl file for transcripts"})
    overwrite: bool = field(default=False, metadata={"help": "replace a file that is there"})
    alpha: float | None = field(default=None, metadata={"help": "told to a policy that was trained with alphas"})
    budget: float | None = field(default=None, metadata={"help": "USD of a question"})
    turns: int | None = field(default=None, metadata={"help": "generations that may ask; as it was trained where null"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "of a generation; as it was trained where null"})
    beside: str = field(default="", metadata={"help": "a model that is prompted alike, untrained"})
    every: bool = field(
        default=False, metadata={"help": "ask each model each question too: a row each, and the oracle"}
    )
    train: str = field(
        default="", metadata={"help": "questions that k-NN learns from; every model is asked each of them"}
    )
    limit: int = field(default=0, metadata={"help": "questions at most; 0 for all"})
    seed: int = field(default=0, metadata={"help": "of who asks at random"})


@dataclass
class R1Chat(Pool):
    """Settings of `moesaic llm r1 chat`."""

    prompt: str | None = field(default=None, metadata={"help": "a question; - reads it; asked for where left out"})
    alpha: float | None = field(default=None, metadata={"help": "told to a policy that was trained with alphas"})
    budget: float | None = field(default=None, metadata={"help": "USD of a question"})
    turns: int | None = field(default=None, metadata={"help": "generations that may ask; as it was trained where null"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "of a generation; as it was trained where null"})


@dataclass
class R1Export:
    """Settings of `moesaic llm r1 export`."""

    data: str = field(default="", metadata=_DATA)
    catalog: str = field(default="", metadata=_CATALOG)
    model: str = field(default="Qwen/Qwen2.5-3B-Instruct", metadata={"help": "hub id of the policy's base"})
    alpha: float = field(default=0.0, metadata={"help": "weight of cost in the reward, 0 to 1"})
    out: str = field(default="verl", metadata={"help": "folder for a configuration and data"})
    overwrite: bool = field(default=False, metadata={"help": "replace an export that is there"})


SETTINGS: dict[str, type] = {"train": R1Train, "eval": R1Eval, "chat": R1Chat, "export": R1Export}
_TRAIN: dict[str, tuple[float, float]] = {
    "alpha": (0, 1), "failure": (0, 1), "steps": (0, 10**7), "questions": (1, 10**5), "group": (2, 10**4),
    "lr": (0, 1e3), "beta": (0, 1e3), "r": (0, 10**5), "temperature": (1e-3, 100), "warm": (0, 10**7),
    "warm_lr": (0, 1e3), "warm_batch": (1, 10**5), "turns": (0, 1000), "max_new_tokens": (1, 10**6),
    "reply_tokens": (1, 10**6), "max_tokens": (1, 10**6), "save_every": (1, 10**7), "eval_every": (1, 10**7),
    "seed": (0, 2**32 - 1),
}  # fmt: skip


def check_pool(settings: Pool) -> None:
    """Raise ConfigError for bounds that cannot be."""
    check_within(settings, {"at_once": (1, 1000), "retries": (0, 100)})
    for name in ("turns", "max_new_tokens", "limit"):
        value, least = getattr(settings, name, None), int(name == "max_new_tokens")
        if value is not None and not least <= value <= 10**9:
            raise ConfigError(f"{name}={value} must be a whole number from {least} on")
    for name in ("timeout", "budget", "alpha"):
        value = getattr(settings, name, None)
        if value is not None and not 0 <= value <= (1 if name == "alpha" else 1e6):
            raise ConfigError(f"{name}={value} must be {'from 0 to 1' if name == 'alpha' else 'a number from 0 on'}")
