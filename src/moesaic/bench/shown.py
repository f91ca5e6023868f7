"""The figures as titled tables of text, for the terminal and for documents."""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, str]]
"""Column -> cell, a dictionary a row."""


def tables(result: dict[str, Any]) -> list[tuple[str, Rows]]:
    """A title and rows for each table that was measured."""
    found = []
    if "linear" in result:
        linear, s = [_timed(result, name, "linear") for name in result["linear"]], result["linear_size"]
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
    if "crossover" in result:
        found.append(_crossover(result["crossover"]))
    if "quantised" in result:
        found += _quantised(result["quantised"])
    return found


def _crossover(made: dict[str, Any]) -> tuple[str, Rows]:
    what = f"top-2 of E experts, {made['tokens']} tokens, d={made['d']}; rank space up to E*r = {made['limit']}"
    rows = [
        {"E*r": name, "rank space, ms": f"{row['ms']:.1f}", "pairs alone, to it": _spread(row)}
        for name, row in made["table"].items()
    ]
    return f"Where products over routed pairs alone are faster ({what})", rows


def _quantised(made: dict[str, Any]) -> list[tuple[str, Rows]]:
    s, found = made["size"], []
    for kind, of in (
        ("training", f"A training step over a quantised base ({s['tokens']} tokens"),
        ("decoding", f"A step of decoding over a quantised base (behind {s['prompt']} tokens"),
    ):
        rows = [
            {"base": base, "arm": name, "ms": f"{row['ms']:.1f}", "to LoRA": _spread(row),
             "to the base as it is": f"{row['to_plain']:.2f}"}
            for base, arms in made[kind].items() for name, row in arms.items()
        ]  # fmt: skip
        found.append((f"{of}; Llama, {s['layers']} layers, d={s['d']})", rows))
    return found


def _spread(row: dict[str, float]) -> str:
    return f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _grown(name: str, row: dict[str, float]) -> dict[str, str]:
    """A column for megabytes on disk where they are counted."""
    cells = {
        "arm": name, "ms": f"{row['ms']:.1f}",
        "ratio": _spread(row),
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
        f"{of}to LoRA": _spread(row),
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
