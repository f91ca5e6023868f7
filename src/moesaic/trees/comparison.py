"""What a comparison of learners on streams is made of, as the command line writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moesaic.errors import ConfigError
from moesaic.runs.settings import build, check_keys, lists, names, parse_overrides, texts

MOST_WORKERS = 1000


@dataclass
class StreamComparison:
    """What is compared. `out`, `overwrite`, `workers` and `engine` say where and how; the rest is kept with it."""

    streams: list[str] = field(default_factory=list, metadata={"help": "names or files, comma-separated"})
    learners: list[str] = field(
        default_factory=lambda: ["driftmoe", "nochange", "river-ht", "river-arf"],
        metadata={"help": "names, comma-separated, as `moesaic stream run` takes them"},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of generators and learners"})
    length: int | None = field(default=None, metadata={"help": "rows at most; generators make 100,000"})
    source: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "settings of the streams: source.noise=0.2 …"}
    )
    model: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "settings by learner: model.driftmoe.n_experts=10 …"}
    )
    window: int = field(default=1000, metadata={"help": "rows of a window"})
    delay: int = field(default=0, metadata={"help": "rows by which labels come late"})
    workers: int = field(default=1, metadata={"help": "cells at a time; 1 where times matter"})
    engine: str = field(default="local", metadata={"help": "local (processes) or ray (actors of a cluster)"})
    out: str = field(default="runs/streams", metadata={"help": "folder to write; finished cells are kept"})
    overwrite: bool = field(default=False, metadata={"help": "run the cells that are there again"})

    def describes(self) -> dict[str, Any]:
        how = ("out", "overwrite", "workers", "engine", "streams", "learners", "seeds")
        return {k: v for k, v in asdict(self).items() if k not in how}


def load_comparison(arguments: Sequence[str]) -> StreamComparison:
    """`key=value` settings to a comparison. Raises ConfigError as `load_run` does."""
    kind = StreamComparison
    given = parse_overrides(arguments, lists=lists(kind), texts=texts(kind), sections=("source", "model"))
    check_keys("settings", given, names(kind))
    made = build(kind, {}, given)
    if not made.streams or not made.learners or not made.seeds:
        raise ConfigError("streams, learners and seeds each need one entry at least: streams=led_a,sea_a")
    for name in ("streams", "learners", "seeds"):
        given = getattr(made, name)
        if doubled := [entry for entry in given if given.count(entry) > 1]:
            raise ConfigError(f"{name} has {doubled[0]} twice")
    if min(made.seeds) < 0:
        raise ConfigError(f"seeds={min(made.seeds)} must be at least 0")
    if made.engine not in ("local", "ray"):
        raise ConfigError(f"engine={made.engine}; known: local, ray")
    if made.workers < 1 or made.window < 1 or made.delay < 0:
        raise ConfigError("workers and window must be at least 1, and delay at least 0")
    if made.workers > MOST_WORKERS:
        raise ConfigError(f"workers={made.workers} is more than {MOST_WORKERS:,}")
    if unknown := made.model.keys() - {*made.learners}:
        first = made.learners[0]
        raise ConfigError(
            f"model.{min(unknown)}: no such learner is compared; settings are written model.{first}.{min(unknown)}=…"
        )
    if not all(isinstance(given, dict) for given in made.model.values()):
        raise ConfigError(f"settings of a learner are given by name: model.{made.learners[0]}.seed=1")
    return made
