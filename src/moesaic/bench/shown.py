"""The figures as titled tables of text, for the terminal and for documents."""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, str]]
"""Column -> cell, a dictionary a row."""


NOTES = {
    "How cost grows: experts": "MoLA's training step, r=16, top-2, AdamW over all experts included; ratios to that of "
    "8 experts.",
    "How cost grows: length": "MoLA's training step; ratios to LoRA's on as many tokens.",
    "How cost grows: width": "MoLA's training step; ratios to LoRA's at the same hidden size.",
    "How cost grows: depth": "MoLA's training step; ratios to LoRA's in as many layers.",
    "How cost grows: adapters, decoding": "Arrow, top-2, over so many random adapters of rank 16; ratios to that of 8.",
    "How cost grows: adapters, prefill": "The same, reading a prompt.",
    "A step of decoding": "One token a row, with a KV cache of those before; milliseconds of a step of all rows. "
    "Kernels are those of one row, counted as in training.",
    "A step of decoding, compiled": "Each arm in turn with LoRA and the frozen base alone: ratios are of those turns, "
    "and milliseconds of two arms need not have them. Seconds of compiling are those of a first step, in a process "
    "that has compiled before. Methods that route by the prompt are left out: they do not decode so.",
    "A training step": "Forward, loss with auxiliary losses, backward, AdamW; the frozen base: forward and backward to "
    "its input. Events, kernels and syncs are those of forward and backward of a model of 4 layers and d=64, counted "
    "by `torch.profiler` on the CPU: all of torch's operators, views and those within others included; of these the "
    "ones below which no other computes, without views and memory, a grouped product as one; and reads of a value by "
    "Python. Peak memory is that of a fresh process for each arm.",
    "FFNs as experts: a training step beside its arithmetic": "An FFN's activation sits between its LoRAs, so experts "
    "that are whole FFNs cannot be folded into rank space. k separate FFNs a token would do (2 + k) / 3 of the frozen "
    "FFN's work: so the step is compared with plain LoRA's of the same total rank plus (k - 1) / 3 of the frozen FFNs' "
    "forward and backward. Below 1 is possible: the last linear's frozen product is made once, of the weighted sum.",
    "A training step over a quantised base": "Bases of packages that are not installed are left out.",
}


def note_of(title: str) -> str:
    """What a table's figures are of; empty where its title says it."""
    return NOTES.get(title.partition(" (")[0], "")


def header(result: dict[str, Any]) -> str:
    """What all tables of a result have in common, in a line."""
    s, machine = result["settings"], result["machine"]
    more = [f"dropout {s['dropout']}"] if "dropout" in s else []
    more += [f"all experts up to E*r = {result['rank_space_up_to']}"] if "rank_space_up_to" in result else []
    return ", ".join(
        [f"E={s['experts']} experts of r={s['r']}, top-{s['top_k']}, beside a LoRA of rank {s['experts'] * s['r']}",
         f"{machine['device']}, {machine['threads']} thread", s["dtype"], *more,
         f"{s['rounds']} rounds, medians and quartiles"]
    )  # fmt: skip


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
    return [(title, _filled(rows)) for title, rows in found]


def _filled(rows: Rows) -> Rows:
    """Without the columns that no row has anything in."""
    filled = [column for column in rows[0] if any(row[column] for row in rows)]
    return [{column: row[column] for column in filled} for row in rows]


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
