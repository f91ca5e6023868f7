"""`moesaic bench`: what a mixture costs beside plain LoRA of the same total rank, measured side by side.

All arms of a table run in turn, in a new order each round, in one process and one thread; a ratio is the median of
the ratios round by round, so a machine that slows down slows all arms alike. Peak memory is that of a fresh process
for each arm.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.bench.shown import Rows, header, note_of, tables

__all__ = ["BenchSettings", "main", "tables"]

SOME_MODELS = 512
"""Hidden size from which a crossover says something of models: it is kept."""
ENOUGH = 5
"""Rounds from which one is kept."""
WIDE = 240
"""Columns of what is not a terminal."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class BenchSettings:
    """Settings of `moesaic bench`."""

    suites: list[str] | None = field(
        default=None,
        metadata={
            "help": "of mix (one linear), train, decode, compiled (needs a C++ compiler), prefill, scale, crossover "
            "(measured and kept for this device) and quantised (needs bitsandbytes or torchao); where left out, all "
            "that out= does not have yet"
        },
    )
    rounds: int = field(default=20, metadata={"help": "times that all arms run in turn; 2 at least"})
    methods: list[str] | None = field(
        default=None,
        metadata={"help": "these methods only, e.g. methods=rmoe,mola; scale and crossover have arms of their own"},
    )
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    dtype: str = field(
        default="float32", metadata={"help": "of the base: float32, bfloat16 or float16, trained under autocast"}
    )
    experts: int | None = field(default=None, metadata={"help": "of a mixture: 8; scale and crossover have their own"})
    r: int | None = field(default=None, metadata={"help": "rank of an expert: 8; LoRA's is experts * r"})
    top_k: int | None = field(default=None, metadata={"help": "experts a token: 2"})
    tokens: int | None = field(default=None, metadata={"help": "a row; each suite's own where left out"})
    dropout: float = field(default=0.0, metadata={"help": "of what adapters read, LoRA's too"})
    d: int | None = field(
        default=None, metadata={"help": "hidden size, a multiple of 16; each suite's own where left out"}
    )
    layers: int | None = field(default=None, metadata={"help": "of all models; each suite's own where left out"})
    memory: bool = field(default=True, metadata={"help": "also measure peak memory, a fresh process for each arm"})
    out: str | None = field(
        default=None,
        metadata={"help": "a JSON file for the figures, written whenever a suite ends; others stay in it"},
    )


def main(overrides: list[str], *, as_json: bool = False) -> None:
    """Run everything, print each table when its suite ends, and write the figures to `out=` if given."""
    from rich.console import Console

    from moesaic.bench import measure, suite
    from moesaic.runs.folder import read_json, write_json
    from moesaic.runs.recipe import parse_settings

    settings = parse_settings(BenchSettings, overrides)
    shape = _checked(settings)
    asked = suite.described(settings.rounds, shape, settings.device, settings.methods)
    path, before = _kept(settings.out, asked)
    wanted = settings.suites or [name for name in suite.SUITES if suite.KEYS[name] not in before]
    console, errors = Console(width=None if sys.stdout.isatty() else WIDE), Console(stderr=True, soft_wrap=True)
    if len(wanted) < len(settings.suites or suite.SUITES):
        there = [name for name in suite.SUITES if name not in wanted]
        errors.print(f"{path} has {', '.join(there)} already; name them in suites= to measure them again")
    if not wanted:
        return
    if settings.device == "cpu":
        measure.keep_freed_memory()
    printed: set[str] = set()

    def keep(found: dict[str, Any]) -> None:
        if path is not None:
            write_json(path, {**(read_json(path) if path.exists() else {}), **found})
        for title, rows in [] if as_json else tables(found):
            if title not in printed:
                console.print(*([] if printed else [header(found), ""]), _rich(title, rows), "", sep="\n")
                printed.add(title)

    try:
        with errors.status("warming up") as status:
            result = suite.run(
                suites=wanted,
                rounds=settings.rounds,
                shape=shape,
                device=settings.device,
                only=settings.methods,
                memory=settings.memory,
                progress=status.update if errors.is_terminal else _Lines(),
                keep=keep,
            )
    except KeyboardInterrupt:
        if path is not None and path.exists():
            errors.print(f"{path} has what was measured; the same command goes on with the other suites")
        raise
    if "crossover" in result:
        errors.print(_keep_crossover(settings, result["crossover"]))
    if as_json:
        console.print_json(json.dumps(result))


class _Lines:
    """Progress where nobody watches: a line for each thing that is measured, not for each round."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, what: str) -> None:
        what = what.partition(": round")[0]
        if what != self._last:
            print(what, file=sys.stderr, flush=True)
        self._last = what


def _keep_crossover(settings: BenchSettings, found: dict[str, Any]) -> str:
    """Keep the crossover for later processes, if it says something of models. What came of it, in words."""
    from moesaic.lora import crossover

    kind = settings.device.partition(":")[0]
    if found["d"] < SOME_MODELS or settings.rounds < ENOUGH:
        return f"the crossover is not kept: that takes d={SOME_MODELS} and rounds={ENOUGH} at least"
    crossover.keep(kind, settings.dtype, found["limit"])
    return (
        f"kept in {crossover.file()}: on {crossover.device_name(kind)}, in {settings.dtype}, later processes compute "
        f"all experts of every token up to E*r = {found['limit']}; remove the file to go back to "
        f"{crossover.LIMITS[kind]}"
    )


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
    for setting, names in (("methods", settings.methods), ("suites", settings.suites)):
        if names == []:
            raise ConfigError(f"{setting}=[] names nothing to measure; leave it out for all")
    for name in settings.methods or ():
        if name == "lora":
            raise ConfigError("methods: LoRA is always measured beside the methods; leave it out")
        if name not in known:
            raise ConfigError(f"methods: no method {name!r} to measure; {suggest(name, known)}")
    for name in settings.suites or ():
        if name not in suite.SUITES:
            raise ConfigError(f"suites: there is no suite {name!r}; {suggest(name, suite.SUITES)}")
    if "crossover" in (settings.suites or suite.SUITES):
        if crossover.file().is_dir():
            raise ConfigError(f"{crossover.file()}, where crossovers are kept, is a folder; remove it")
        check_writable(crossover.file(), f"{crossover.file()}, where crossovers are kept (set MOESAIC_CACHE),")
    if settings.dtype not in DTYPES:
        raise ConfigError(f"dtype: there is no {settings.dtype!r}; {suggest(settings.dtype, DTYPES)}")
    if settings.dtype == "float16" and settings.device == "cpu":
        raise ConfigError("dtype=float16 has no fast products on a CPU; choose bfloat16")
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
    usual = arms.Mixtures()
    for name in ("experts", "r", "top_k", "tokens"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if (settings.top_k or usual.top_k) > (settings.experts or usual.experts):
        raise ConfigError(
            f"top_k={settings.top_k or usual.top_k} must be at most experts={settings.experts or usual.experts}"
        )
    given = ("dtype", "dropout", "d", "layers", "tokens", "experts", "r", "top_k")
    shape = {name: getattr(settings, name) for name in given}
    return {key: value for key, value in shape.items() if value}


def _kept(out: str | None, asked: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """The file for the figures, and what it holds already: of the same settings, versions and device."""
    from moesaic.errors import ConfigError, path_of
    from moesaic.runs.folder import check_writable, read_json

    if out is None:
        return None, {}
    path = path_of(out)
    path = path.resolve() if path.is_symlink() and path.exists() else path
    if path.is_dir():
        raise ConfigError(f"out={path} is a folder; name a file for the figures")
    check_writable(path, f"out={path}")
    found = read_json(path) if path.exists() else {}
    if found and not all(isinstance(found.get(key), dict) for key in asked):
        raise ConfigError(f"out={path} holds something else than figures of `moesaic bench`; name another file")
    for key, value in asked.items() if found else ():
        own = found[key]
        if other := [name for name in {**own, **value} if own.get(name) != value.get(name)]:
            told = ", ".join(
                f"{name} {own.get(name, 'not given')}, now {value.get(name, 'not given')}" for name in other
            )
            raise ConfigError(f"out={path} holds figures of other {key} ({told}); name another file")
    return path, found


def _rich(title: str, rows: Rows) -> Any:
    from rich.table import Table

    view = Table(title=title, caption=note_of(title) or None, caption_justify="left", title_justify="left")
    for column in rows[0]:
        view.add_column(column, justify="left" if column in ("arm", "base") else "right", overflow="fold")
    for row in rows:
        view.add_row(*row.values())
    return view
