"""The sections of docs/results.md on adapters that were trained apart; `scripts/results.py` puts them there."""

from __future__ import annotations

import json
import statistics
import textwrap
from pathlib import Path
from typing import Any

from adapters import GLIDER, MERGES, SETTINGS, TRAINED, UNTRAINED
from pages import Pictures

from moesaic.report import charts
from moesaic.report.page import alone

TITLES = {
    "smollm2": "Six adapters of a real LLM, SmolLM2-135M-Instruct, routed by every method",
    "minilm": "Six adapters of all-MiniLM-L6-v2, routed by every method",
    "nano": "Six adapters of nano, routed by every method",
}
DRAWN = "smollm2"
NOTE = """Plain LoRA adapters, one a task, trained apart; then every method over all six of a seed (held in), and over
five of them on the task of the sixth (zero-shot), for methods that can leave an adapter out without new training. The
heads of an encoder are the adapters' own. `{split}` rows, {rows}; percent, mean ± standard deviation over seeds
{seeds}; differences in points, paired by seed. `merge-…` are PEFT's `add_weighted_adapter`: `linear` and `svd` at
weight 1/6, `sum` (its `cat`), `ties` and `dare-ties` at weight 1, density 0.5. `glider` takes the mean of
a hundred rows of each task and adapts alpha; `glider-alpha-100` does not, and `glider-top-1` has one expert a token;
`glider-instructions` has one sentence by hand for each task{written}. All have `phatgoose`'s gates. Command:
`{command}`."""
DIGITS = """ The tokenizer of these runs parted digits from two and more blanks before them less finely than today's:
1.1 % of gsm8k's rows differ by that, and no row of the others."""
WRITTEN = """, `glider-written` one that the model wrote itself, asked as an endpoint would be (the sentences are in
`results/adapters-smollm2/instructions.json`: a model of this size mostly repeats the example)"""


def spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def gap(values: list[float], others: list[float]) -> str:
    pairs = [a - b for a, b in zip(values, others, strict=True)]
    return f"{100 * statistics.mean(pairs):+.1f} ± {100 * statistics.stdev(pairs):.1f}"


def by_seed(scores: dict[str, list[float]]) -> list[float]:
    """The mean over tasks for each seed."""
    return [statistics.mean(column) for column in zip(*scores.values(), strict=True)]


def routed(file: Path) -> str:
    """Held-in and zero-shot scores of one setting, and what they say of GLIDER."""
    found: dict[str, Any] = json.loads(file.read_text())
    arms, setting = found["arms"], SETTINGS[found["setting"]]
    oracle, uniform = arms["oracle"]["held_in"], arms["uniform"]["held_in"]
    rows = found.get("rows", {})
    asked = {n: ", ".join(task for task, of in rows.items() if of == n) for n in rows.values()}
    note = NOTE.format(
        split=found["split"],
        rows="the first " + " and ".join(f"{n} of {tasks}" for n, tasks in asked.items()) if asked else "all of them",
        seeds=", ".join(map(str, found["seeds"])),
        written=WRITTEN if "glider-written" in arms else "",
        command=found["command"],
    )
    note += DIGITS if found["setting"] == "smollm2" else ""
    header = ["method", *setting.tasks, "mean", "to oracle", "to uniform", "zero-shot"]
    lines = [f"## {TITLES[found['setting']]}", "", textwrap.fill(note, 120, break_on_hyphens=False), ""]
    lines += ["| " + " | ".join(header) + " |", "| --- " + "| ---: " * (len(header) - 1) + "|"]
    order = [name for name in ("oracle", *GLIDER, *TRAINED, *UNTRAINED, *MERGES) if name in arms]
    for name in dict.fromkeys(order):
        arm = arms[name]
        tasks = [f"{100 * statistics.mean(arm['tasks'][task]):.1f}" for task in setting.tasks]
        zero = spread(by_seed(arm["zero_shot"])) if "zero_shot" in arm else ""
        cells = [f"`{name}`", *tasks, spread(arm["held_in"]), gap(arm["held_in"], oracle), gap(arm["held_in"], uniform)]
        lines.append("| " + " | ".join([*cells, zero]) + " |")
    if found["setting"] == DRAWN:
        lines[3:3] = ["", f"![Mean score of each method above the base's]({found['setting']}-adapters.svg)"]
        lines[5:5] = ["", "Routed in blue, merged in orange; a ring is a seed, a dot their mean."]
    base = arms["base"]
    tasks = [f"{100 * statistics.mean(base['tasks'][t]):.1f}" if "tasks" in base else "" for t in setting.tasks]
    cells = ["untrained base", *tasks, spread(base["held_in"]), gap(base["held_in"], oracle)]
    cells.append(gap(base["held_in"], uniform))
    lines.append("| " + " | ".join([*cells, spread(by_seed(base["zero_shot"]))]) + " |")
    return "\n".join([*lines, "", *verdicts(arms), ""])


def picture(results: Path) -> str:
    """Each method's mean score over tasks, in points above the base; rings are seeds."""
    arms: dict[str, Any] = json.loads((results / f"adapters-{DRAWN}.json").read_text())["arms"]
    base = arms["base"]["held_in"]
    dots = []
    for name, arm in sorted(arms.items(), key=lambda item: -statistics.mean(item[1]["held_in"])):
        above = [own - of for own, of in zip(arm["held_in"], base, strict=True)]
        series = 0 if name in ("oracle", "base") else 2 if name in MERGES else 1
        dots.append(charts.Dot(name, statistics.mean(above), (min(above), max(above)), above, series))
    said = "; ".join(f"{dot.label} {100 * dot.value:+.1f}" for dot in dots)
    title = "Mean score over six tasks, above the untrained base: routed in blue, merged in orange"
    return alone(charts.intervals(dots, zero="base", title=title, description=f"In points: {said}.")[0])


def verdicts(arms: dict[str, Any]) -> list[str]:
    """The best router beside oracle and merges; for each kind of GLIDER, what it is surely above."""
    oracle = statistics.mean(arms["oracle"]["held_in"])
    means = {name: statistics.mean(arm["held_in"]) for name, arm in arms.items()}
    best = max((name for name in means if name not in ("oracle", "base", *MERGES)), key=means.__getitem__)
    merge = max((name for name in means if name in MERGES), key=means.__getitem__)
    said = [
        f"- The best router is `{best}`, {100 * (1 - means[best] / oracle):.1f} % below the oracle and "
        f"{gap(arms[best]['held_in'], arms[merge]['held_in'])} points from the best merge, `{merge}`."
    ]
    for name in (name for name in GLIDER if name in arms):
        own = arms[name]["held_in"]
        below = 100 * (1 - statistics.mean(own) / oracle)
        above, not_above = [], []
        for other in ("arrow", "phatgoose", *(merge for merge in MERGES if merge in arms)):
            pairs = [a - b for a, b in zip(own, arms[other]["held_in"], strict=True)]
            sure = statistics.mean(pairs) > 2 * statistics.stdev(pairs)
            (above if sure else not_above).append(f"{other} ({gap(own, arms[other]['held_in'])})")
        said.append(
            f"- `{name}` is {below:.1f} % below the oracle held in; above by more than two standard deviations: "
            f"{', '.join(above) or 'none'}; not so: {', '.join(not_above) or 'none'}."
        )
    zero = {n: by_seed(a["zero_shot"]) for n, a in arms.items() if "zero_shot" in a and n != "base"}
    best = max(zero, key=lambda n: statistics.mean(zero[n]))
    base = by_seed(arms["base"]["zero_shot"])
    said.append(
        f"- Zero-shot the highest is `{best}`, {spread(zero[best])}; the untrained base has {spread(base)}, and "
        + ", ".join(f"`{name}` {spread(zero[name])}" for name in GLIDER if name in zero)
        + "."
    )
    return said


def bench(file: Path) -> str:
    """Ours beside PEFT's Arrow and X-LoRA."""
    found: dict[str, Any] = json.loads(file.read_text())
    lines = [
        "## Beside PEFT's Arrow and X-LoRA",
        "",
        f"{found['experts']} adapters of rank {found['rank']} on a Llama of width {found['width']} and "
        f"{found['layers']} layers, one thread, {found['rounds']} rounds with every arm in turn; ratios are medians "
        f"over rounds, quartiles in brackets. Prefill: {found['prefill_tokens']} tokens; decoding: "
        f"{found['new_tokens']} tokens after a prompt of {found['prompt_tokens']}. X-LoRA forbids the KV cache. "
        f"Command: `{found['command']}`.",
        "",
        "| | prefill, ms a token | to PEFT's Arrow | to X-LoRA | decode, cache | to PEFT's Arrow | decode, no cache | "
        "to PEFT's Arrow | to X-LoRA | peak MiB |",
        "| --- " + "| ---: " * 9 + "|",
    ]
    for name in found["prefill"]:
        cells = [f"`{name}`"]
        for kind, references in (
            ("prefill", ("peft-arrow", "x-lora")),
            ("decode", ("peft-arrow",)),
            ("decode-no-cache", ("peft-arrow", "x-lora")),
        ):
            row = found[kind].get(name)
            cells.append(f"{row['ms_per_token']:.2f}" if row else "refused")
            cells += [_ratio(row[f"to_{reference}"]) if row else "" for reference in references]
        peak = found.get("peak_memory_mib", {}).get(name)
        lines.append("| " + " | ".join([*cells, "" if peak is None else f"{peak:.0f}"]) + " |")
    lines += ["", "Prototypes, |cos| to the first right singular vector of B A:", ""]
    lines += ["| adapters | PEFT's Arrow, mean (lowest) | ours, mean (lowest) |", "| --- | ---: | ---: |"]
    for kind, row in found["prototypes"].items():
        figures = [f"{row[who]['mean']:.4f} ({row[who]['lowest']:.4f})" for who in ("peft", "moesaic")]
        lines.append(f"| {kind}, {row['moesaic']['n']} modules x experts | " + " | ".join(figures) + " |")
    return "\n".join([*lines, ""])


def _ratio(row: dict[str, float]) -> str:
    return f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def turned_away(file: Path) -> str:
    """What `none_below=own` keeps of each task's own prompts, and of the others'."""
    found: dict[str, Any] = json.loads(file.read_text())
    note = (
        f"`adapter.none_below=own` with MiniLM: for an expert that knows {found['known']} training prompts of a task, "
        f"the share of {found['asked']} held-out prompts that it takes, percent: its own task's (mean ± standard "
        f"deviation over seeds {', '.join(map(str, found['seeds']))}), and each other task's, which are turned away "
        f"where no other expert takes them. Tasks of one kind (the three of school science) take each other's. "
        f"Command: `{found['command']}`."
    )
    lines = ["## Whose prompts are turned away", "", textwrap.fill(note, 120, break_on_hyphens=False), ""]
    tasks = list(next(iter(found["taken"].values())))
    lines += ["| method | expert | own | " + " | ".join(tasks) + " |"]
    lines += ["| --- | --- |" + " ---: |" * (len(tasks) + 1)]
    for method, rows in found["taken"].items():
        for expert, row in rows.items():
            others = [f"{100 * row['others'][task]:.0f}" if task in row["others"] else "" for task in tasks]
            lines.append(f"| `{method}` | {expert} | {spread(row['own'])} | " + " | ".join(others) + " |")
    return "\n".join([*lines, ""])


PICTURES: Pictures = {f"{DRAWN}-adapters.svg": (f"adapters-{DRAWN}.json", picture)}


def sections(results: Path) -> list[str]:
    """All there are."""
    files = [results / f"adapters-{name}.json" for name in TITLES]
    nobody = results / "nobody.json"
    made = [routed(file) for file in files if file.is_file()]
    return [*made, turned_away(nobody)] if nobody.is_file() else made
