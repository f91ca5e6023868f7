"""What `moesaic llm` is told, as people write it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from moesaic.errors import ConfigError
from moesaic.llms.coe.fitting import Fitting

_DATA = {
    "help": "recorded outcomes: JSONL or CSV of prompts and scores by model, logs, or LLMRouter's, RouteLLM's files"
}
_CATALOG = {"help": "YAML file of the models, or LLMRouter's descriptors (.json)"}


@dataclass
class Limits:
    """Of a mapping; null is no limit."""

    resident: float | None = field(default=None, metadata={"help": "billions of parameters of all experts together"})
    active: float | None = field(default=None, metadata={"help": "billions of active parameters, an average prompt"})
    cost: float | None = field(default=None, metadata={"help": "USD, an average prompt"})
    experts: int | None = field(default=None, metadata={"help": "how many models"})
    pins: dict[str, dict[str, bool]] = field(
        default_factory=dict, metadata={"help": "{CATEGORY: {MODEL: true}}: it answers these; false: it must not"}
    )


@dataclass
class LlmFit(Limits, Fitting):
    """Settings of `moesaic llm fit`."""

    data: str = field(default="", metadata=_DATA)
    catalog: str = field(default="", metadata=_CATALOG)
    format: str = field(default="", metadata={"help": "of data, where its first row does not tell"})
    out: str = field(default="composition", metadata={"help": "folder of the composition"})
    overwrite: bool = field(default=False, metadata={"help": "replace a composition that is there"})


@dataclass
class LlmFrontier(Limits):
    """Settings of `moesaic llm frontier`."""

    data: str = field(default="", metadata=_DATA)
    catalog: str = field(default="", metadata=_CATALOG)
    format: str = field(default="", metadata={"help": "of data, where its first row does not tell"})
    over: str = field(default="resident", metadata={"help": "which limit is moved: resident, active, cost, experts"})
    z: float = field(default=0.0, metadata={"help": "standard errors that are taken off a score"})
    step: float | None = field(default=None, metadata={"help": "between points; every breakpoint where left out"})
    out: str = field(default="", metadata={"help": "an .svg file for the picture"})


@dataclass
class LlmRoute:
    """Settings of `moesaic llm route`."""

    prompt: str | None = field(default="", metadata={"help": "who is to answer it; - reads it from standard input"})
    file: str = field(default="", metadata={"help": "prompts instead, one a line"})


@dataclass
class LlmBench:
    """Settings of `moesaic llm bench`."""

    data: str = field(
        default="", metadata={"help": "recorded outcomes, of other prompts than it was fitted to; no logs"}
    )
    catalog: str = field(default="", metadata=_CATALOG)
    format: str = field(default="", metadata={"help": "of data, where its first row does not tell"})
    rounds: int = field(default=200, metadata={"help": "decisions that are timed, one by one"})
    seed: int = field(default=0, metadata={"help": "of the bootstrap, and of who answers at random"})


@dataclass
class LlmServe:
    """None: all that a gateway is told stands in its file."""


SETTINGS: dict[str, type] = {"fit": LlmFit, "frontier": LlmFrontier, "route": LlmRoute, "bench": LlmBench}


def check_given(settings: Any, *keys: str) -> None:
    """Raise ConfigError for one of the settings that is empty."""
    for own in fields(settings):
        if own.name in keys and not getattr(settings, own.name):
            raise ConfigError(f"{own.name} is missing: {own.name}=… ({own.metadata['help']})")
