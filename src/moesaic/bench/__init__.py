"""`moesaic bench`: what a mixture costs beside plain LoRA of the same total rank, measured side by side.

All arms of a table run in turn, in a new order each round, in one process and one thread; a ratio is the median of
the ratios round by round, so a machine that slows down slows all arms alike. Peak memory is that of a fresh process
for each arm.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class BenchSettings:
    """Settings of `moesaic bench`."""

    suites: list[str] | None = field(
        default=None,
        metadata={"help": "of mix (one linear), train, decode, compiled, prefill and scale; all where left out"},
    )
    rounds: int = field(default=20, metadata={"help": "times that all arms run in turn"})
    tokens: int = field(default=1024, metadata={"help": "tokens of the single linear"})
    methods: list[str] | None = field(default=None, metadata={"help": "these methods only, e.g. methods=rmoe,mola"})
    memory: bool = field(default=True, metadata={"help": "also measure peak memory, a fresh process for each arm"})
    out: str | None = field(default=None, metadata={"help": "a JSON file for the figures"})


def main(overrides: list[str], *, as_json: bool = False) -> None:
    """Run everything, print the tables, and write them to `out=` if given."""
    from rich.console import Console

    from moesaic.bench import arms, measure, suite
    from moesaic.errors import ConfigError, path_of, suggest
    from moesaic.runs.folder import check_writable, write_json
    from moesaic.runs.recipe import parse_settings

    settings = parse_settings(BenchSettings, overrides)
    if settings.rounds < 2:
        raise ConfigError(f"rounds={settings.rounds} must be at least 2: quartiles need them")
    if settings.tokens < 1:
        raise ConfigError(f"tokens={settings.tokens} must be at least 1")
    known = [*arms.methods("linear"), *arms.methods("block")]
    for name in settings.methods or ():
        if name not in known:
            raise ConfigError(f"methods: no method {name!r} to measure; {suggest(name, known)}")
    for name in settings.suites or ():
        if name not in suite.SUITES:
            raise ConfigError(f"suites: there is no suite {name!r}; {suggest(name, suite.SUITES)}")
    path = None if settings.out is None else path_of(settings.out)
    if path is not None:
        if path.is_dir():
            raise ConfigError(f"out={path} is a folder; name a file for the figures")
        check_writable(path, f"out={path}")
    measure.keep_freed_memory()
    console = Console()
    with Console(stderr=True).status("warming up") as status:
        result = suite.run(
            suites=settings.suites or suite.SUITES,
            rounds=settings.rounds,
            tokens=settings.tokens,
            only=settings.methods,
            memory=settings.memory,
            progress=status.update,
        )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    if as_json:
        console.print_json(json.dumps(result))
        return
    for title, rows in tables(result):
        console.print(_rich(title, rows))


Rows = list[dict[str, str]]
"""Column -> cell, a dictionary a row."""


def tables(result: dict[str, Any]) -> list[tuple[str, Rows]]:
    """The figures as titled tables of text, for the terminal and for documents."""
    s, found = result["settings"], []
    if "linear" in result:
        linear = [_timed(result, name, "linear") for name in result["linear"]]
        found.append((f"One linear, forward and backward ({s['tokens']} tokens, d={s['d']})", linear))
    if "model_step" in result:
        m = result["model"]
        what = f"Llama, {m['layers']} layers, d={m['d']}, {m['targets']}, {m['batch']} x {m['tokens']} tokens"
        found.append(
            (f"A training step ({what})", [_timed(result, name, "model_step") for name in result["model_step"]])
        )
    if result.get("arithmetic"):
        found.append(("FFNs as experts: a training step beside its arithmetic", _arithmetic(result["arithmetic"])))
    if "generating" in result:
        found += _generating(result)
    for what, rows in result.get("scale", {}).items():
        found.append((f"How cost grows: {what}", [_grown(name, row) for name, row in rows.items()]))
    return found


def _grown(name: str, row: dict[str, float]) -> dict[str, str]:
    """A column for megabytes on disk where they are counted."""
    cells = {
        "arm": name, "ms": f"{row['ms']:.1f}",
        "ratio": f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
    }  # fmt: skip
    return cells | ({"on disk, MB": f"{row['megabytes']:.1f}"} if "megabytes" in row else {})


def _generating(result: dict[str, Any]) -> list[tuple[str, Rows]]:
    m, found = result["generating"], []
    what = f"Llama, {m['layers']} layers, d={m['d']}, {m['targets']}"
    if "decode" in result:
        tables, counts = result["decode"], result["decode_kernels"]
        rows = [
            {"arm": name, "kernels (to LoRA)": f"{counts[name]['kernels']} ({counts[name]['kernels_ratio']:.2f})"}
            | {key: cell for number, table in tables.items() for key, cell in _ratios(table[name], number).items()}
            for name in counts
        ]
        found.append((f"A step of decoding ({what}, behind {m['prompt']} tokens)", rows))
    if "compiled" in result:
        rows = [
            {
                "arm": name,
                **_ratios(row),
                "compiling, s (to LoRA)": f"{row['compiling']:.0f} ({row['compiling_ratio']:.2f})",
            }
            for name, row in result["compiled"].items()
        ]
        found.append((f"A step of decoding, compiled ({what}, behind {m['prompt']} tokens)", rows))
    if "prefill" in result:
        rows = [{"arm": name, **_ratios(row)} for name, row in result["prefill"].items()]
        found.append((f"Reading a prompt ({what}, {m['tokens']} tokens)", rows))
    return found


def _ratios(row: dict[str, float], number: str | None = None) -> dict[str, str]:
    """Columns of one table; of `number` rows of text, where there are several such tables."""
    of = "" if number is None else "1 row, " if number == "1" else f"{number} rows, "
    return {
        f"{of}ms": f"{row['ms']:.1f}",
        f"{of}to LoRA": f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
        f"{of}to the base": f"{row['to_base']:.2f}",
    }


def _timed(result: dict[str, Any], name: str, key: str) -> dict[str, str]:
    row = result[key][name]
    share = result.get(f"{key.partition('_')[0]}_overhead_share_of_loop", {}).get(name)
    cells = {
        "arm": name,
        "ms": f"{row['ms']:.1f}",
        "ratio to LoRA": f"{row['ratio']:.3f}",
        "quartiles": f"{row['low']:.2f} to {row['high']:.2f}",
        "overhead over frozen, of the loop's": "" if share is None else f"{100 * share:.0f} %",
    }
    if key == "model_step":
        share = result.get("model_overhead_share_of_xlora", {}).get(name)
        cells["of X-LoRA's"] = "" if share is None else f"{100 * share:.0f} %"
        counts, peak = result.get("kernels", {}).get(name), result.get("peak_memory_mib", {}).get(name)
        for key in ("events", "kernels"):
            cells[f"{key} (to LoRA)"] = f"{counts[key]} ({counts[f'{key}_ratio']:.2f})" if counts else ""
        cells["syncs"] = str(counts["syncs"]) if counts else ""
        cells["peak memory added, MiB (to LoRA)"] = f"{peak['mib']:.0f} ({peak['ratio']:.2f})" if peak else ""
    return cells


def _arithmetic(rows: dict[str, dict[str, float]]) -> Rows:
    return [
        {
            "arm": name,
            "ms": f"{row['ms']:.1f}",
            "LoRA + (k-1)/3 of the frozen FFNs, ms": f"{row['expected_ms']:.1f}",
            "frozen FFNs, ms": f"{row['ffn_ms']:.1f}",
            "ratio": f"{row['ratio']:.3f}",
            "quartiles": f"{row['low']:.2f} to {row['high']:.2f}",
        }
        for name, row in rows.items()
    ]


def _rich(title: str, rows: Rows) -> Any:
    from rich.table import Table

    view = Table(title=title)
    for column in rows[0]:
        view.add_column(column, justify="left" if column == "arm" else "right")
    for row in rows:
        view.add_row(*row.values())
    return view
