"""`moesaic bench`: what a mixture costs beside plain LoRA of the same total rank, measured side by side.

All arms of a table run in turn, in a new order each round, in one process and one thread; a ratio is the median of
the ratios round by round, so a machine that slows down slows all arms alike. Peak memory is that of a fresh process
for each arm.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.bench.shown import Rows, tables

__all__ = ["BenchSettings", "main", "tables"]

SOME_MODELS = 512
"""Hidden size from which a crossover says something of models: it is kept."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class BenchSettings:
    """Settings of `moesaic bench`."""

    suites: list[str] | None = field(
        default=None,
        metadata={
            "help": "of mix (one linear), train, decode, compiled, prefill, scale, crossover (measured and kept for "
            "this device) and quantised; all where left out"
        },
    )
    rounds: int = field(default=20, metadata={"help": "times that all arms run in turn"})
    methods: list[str] | None = field(default=None, metadata={"help": "these methods only, e.g. methods=rmoe,mola"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    dtype: str = field(
        default="float32", metadata={"help": "of the base: float32, bfloat16 or float16, trained under autocast"}
    )
    dropout: float = field(default=0.0, metadata={"help": "of what adapters read, LoRA's too"})
    d: int | None = field(default=None, metadata={"help": "hidden size of all models; each suite's own where left out"})
    layers: int | None = field(default=None, metadata={"help": "of all models; each suite's own where left out"})
    memory: bool = field(default=True, metadata={"help": "also measure peak memory, a fresh process for each arm"})
    out: str | None = field(
        default=None,
        metadata={"help": "a JSON file for the figures, written whenever a suite ends; others stay in it"},
    )


def main(overrides: list[str], *, as_json: bool = False) -> None:
    """Run everything, print the tables, and write them to `out=` if given."""
    from rich.console import Console

    from moesaic.bench import measure, suite
    from moesaic.lora import crossover
    from moesaic.runs.folder import write_json
    from moesaic.runs.recipe import parse_settings

    settings = parse_settings(BenchSettings, overrides)
    shape = _checked(settings)
    asked = suite.described(settings.rounds, shape, settings.device)
    path, before = _kept(settings.out, asked)
    if settings.device == "cpu":
        measure.keep_freed_memory()
    console = Console()

    def keep(found: dict[str, Any]) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {**before, **found})

    with Console(stderr=True).status("warming up") as status:
        result = suite.run(
            suites=settings.suites or suite.SUITES,
            rounds=settings.rounds,
            shape=shape,
            device=settings.device,
            only=settings.methods,
            memory=settings.memory,
            progress=status.update,
            keep=keep,
        )
    if "crossover" in result and result["crossover"]["d"] >= SOME_MODELS:
        crossover.keep(settings.device.partition(":")[0], settings.dtype, result["crossover"]["limit"])
    if as_json:
        console.print_json(json.dumps(result))
        return
    for title, rows in tables(result):
        console.print(_rich(title, rows))


def _checked(settings: BenchSettings) -> dict[str, Any]:
    """What is asked of every model. Raises ConfigError for what cannot be measured."""
    import torch

    from moesaic.bench import arms, suite
    from moesaic.errors import ConfigError, first_line, suggest
    from moesaic.lora import crossover
    from moesaic.runs.folder import check_writable

    if settings.rounds < 2:
        raise ConfigError(f"rounds={settings.rounds} must be at least 2: quartiles need them")
    known = [*arms.methods("linear"), *arms.methods("block")]
    for name in settings.methods or ():
        if name not in known:
            raise ConfigError(f"methods: no method {name!r} to measure; {suggest(name, known)}")
    for name in settings.suites or ():
        if name not in suite.SUITES:
            raise ConfigError(f"suites: there is no suite {name!r}; {suggest(name, suite.SUITES)}")
    if "crossover" in (settings.suites or suite.SUITES):
        check_writable(crossover.file(), f"{crossover.file()}, where crossovers are kept (set MOESAIC_CACHE),")
    if settings.dtype not in DTYPES:
        raise ConfigError(f"dtype: there is no {settings.dtype!r}; {suggest(settings.dtype, DTYPES)}")
    if not 0 <= settings.dropout < 1:
        raise ConfigError(f"dropout={settings.dropout} must be at least 0 and below 1")
    if settings.d is not None and (settings.d < 16 or settings.d % 16):
        raise ConfigError(f"d={settings.d} must be a multiple of 16: models have 8 heads of even size")
    if settings.layers is not None and settings.layers < 1:
        raise ConfigError(f"layers={settings.layers} must be at least 1")
    if settings.device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device: there is no {settings.device!r}; {suggest(settings.device, ('cpu', 'cuda'))}")
    try:
        torch.empty(1, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={settings.device} cannot be used: {first_line(error)}") from None
    shape = {"dtype": settings.dtype, "dropout": settings.dropout, "d": settings.d, "layers": settings.layers}
    return {key: value for key, value in shape.items() if value}


def _kept(out: str | None, asked: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """The file for the figures, and what it holds already: of the same settings, versions and device."""
    from moesaic.errors import ConfigError, path_of
    from moesaic.runs.folder import check_writable, read_json

    if out is None:
        return None, {}
    path = path_of(out)
    if path.is_dir():
        raise ConfigError(f"out={path} is a folder; name a file for the figures")
    check_writable(path, f"out={path}")
    found = read_json(path) if path.exists() else {}
    for key, value in asked.items():
        if found and found.get(key) != value:
            raise ConfigError(f"out={path} holds figures of other {key} ({found.get(key)}); name another file")
    return path, found


def _rich(title: str, rows: Rows) -> Any:
    from rich.table import Table

    view = Table(title=title)
    for column in rows[0]:
        view.add_column(column, justify="left" if column == "arm" else "right")
    for row in rows:
        view.add_row(*row.values())
    return view
