"""What experts inside the feed-forward layer came to: blocks of docs/smoe-dropout.md, read-me.md, rmoe.md; pictures.

`scripts/results.py` puts them there.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import conversions
import pretraining
from pages import Blocks, Pictures, spread, table

from moesaic.report import charts
from moesaic.report.page import alone

Cells = dict[str, list[dict[str, Any]]]
SLIM = {
    "smoe-dropout": "SMoE-Dropout, 8 to 16",
    "smoe-dropout-from-1": "SMoE-Dropout, 1 to 16",
    "elastic": "elastic, 1 to 16",
    "learned-2": "learned router, k = 2",
    "fixed-2": "fixed router, k = 2",
    "dense": "dense",
    "dense-eighth": "dense, 1/8 as wide",
}
DEPTH = {
    "linear": "linear routers",
    "rmoe": "RMoE",
    "rmoe-detach": "RMoE, gradient cut",
    "rmoe-np": "RMoE, no state (NP)",
    "stateless-shared": "one router, no state",
}
CONVERSIONS = {
    "dense": "the model itself",
    "dense-tuned": "the model, tuned",
    "told": "Read-ME, domain told",
    "read-me": "**Read-ME**",
    "read-me-released": "Read-ME, the released loss",
    "prune": "dense prune, tuned",
    "cmoe-tuned": "CMoE's split, tuned",
    "told-untuned": "Read-ME's masks, untuned",
    "prune-untuned": "dense prune, untuned",
    "cmoe": "CMoE's split, untuned",
}


def cells(folder: Path) -> Cells:
    """By arm, its cells in the order of their seeds; a seed that an arm lacks is left out."""
    found: Cells = defaultdict(list)
    for file in sorted(folder.glob("*.json")):
        made = json.loads(file.read_text())
        found[made["arm"]].append(made)
    common = set.intersection(*({cell["seed"] for cell in of} for of in found.values())) if found else set()
    return {
        arm: sorted((cell for cell in of if cell["seed"] in common), key=lambda cell: cell["seed"])
        for arm, of in found.items()
    }


def paired(found: Cells, arm: str, other: str, value: Callable[[dict[str, Any]], float]) -> list[float]:
    """Differences of two arms, seed by seed, where both have the seed."""
    of = {cell["seed"]: value(cell) for cell in found[other]}
    return [value(cell) - of[cell["seed"]] for cell in found[arm] if cell["seed"] in of]


def _begun(text: str) -> str:
    return text[0].upper() + text[1:]


def holds(values: Sequence[float]) -> str:
    """A difference and whether it is more than two of its standard deviations over seeds."""
    if len(values) < 3:
        return f"{spread(values, 3)} (fewer than three seeds)"
    sure = abs(statistics.mean(values)) > 2 * statistics.stdev(values)
    return f"{statistics.mean(values):+.3f} ± {statistics.stdev(values):.3f}{'' if sure else ', within two deviations'}"


# -- SMoE-Dropout --------------------------------------------------------------------------------------------------


def at(cell: dict[str, Any], k: int) -> float:
    return float(cell["by_k"][str(k)])


def slim(results: Path) -> str:
    found = cells(results / "pretraining" / "slim")
    rows = []
    for arm, said in SLIM.items():
        if arm in found:
            of = found[arm]
            by_k = [spread([at(c, k) for c in of], 3) if "by_k" in of[0] else "" for k in pretraining.KS]
            rows.append([said, *(by_k if any(by_k) else ["", "", "", "", spread([c["mean_loss"] for c in of], 3)])])
    first = next(iter(found.values()))[0]
    seeds = ", ".join(str(c["seed"]) for c in found["smoe-dropout"])
    lines = [
        f"Held-out loss, nats a token, mean over seven domains of generated text; seeds {seeds}; "
        f"{first['steps']:,} steps of 2,048 tokens, 4 layers of 128, d_ff 512 in 16 experts, 1.1 M parameters. "
        "SMoE-Dropout's router is fixed, and k grows so while it trains; elastic: a learned router, k drawn anew for "
        "each step and layer. Dense twins stand at k = 16. Command: `python scripts/pretraining.py slim`.",
        "",
        *table(["", *(f"k = {k}" for k in pretraining.KS)], rows),
        "",
    ]
    rise = [at(c, 16) - at(c, 2) for c in found["learned-2"]]
    lines.append(f"- The learned router at k = 16 minus at k = 2, which it was trained at: {holds(rise)}.")
    for arm in ("smoe-dropout-from-1", "smoe-dropout", "elastic"):
        fall = [at(c, 16) - at(c, 1) for c in found[arm]]
        monotone = all(at(c, a) >= at(c, b) for c in found[arm] for a, b in pairwise(pretraining.KS))
        lines.append(
            f"- {_begun(SLIM[arm])}: at k = 16 minus at k = 1 {holds(fall)}; "
            + (
                "falling at every step of k for every seed."
                if monotone
                else "at some step of k, some seed does not fall."
            )
        )
    for arm in ("smoe-dropout", "smoe-dropout-from-1", "elastic"):
        gaps = [at(c, 16) - d["mean_loss"] for c, d in zip(found[arm], found["dense"], strict=False)]
        lines.append(f"- {_begun(SLIM[arm])}, at k = 16, minus the dense twin: {holds(gaps)}.")
    against = paired(
        found, "smoe-dropout-from-1", "elastic", lambda c: statistics.mean(at(c, k) for k in pretraining.KS)
    )
    lines.append(f"- Fixed router from 1 to 16 minus elastic training, mean over the five k: {holds(against)}.")
    best = [at(c, 16) - at(d, 2) for c, d in zip(found["smoe-dropout"], found["learned-2"], strict=False)]
    lines.append(f"- SMoE-Dropout at k = 16 minus the learned router at its best, k = 2: {holds(best)}.")
    width = paired(found, "dense", "dense-eighth", lambda c: c["mean_loss"])
    lines.append(
        f"- The dense twin minus the one of an eighth of its width: {holds(width)}: how much width this text needs."
    )
    return "\n".join(lines)


def slimming(results: Path) -> str:
    """Loss at every k."""
    found = cells(results / "pretraining" / "slim")
    drawn = []
    for number, arm in enumerate(a for a in SLIM if "by_k" in found.get(a, [{}])[0]):
        points = [(math.log2(k), statistics.mean(at(c, k) for c in found[arm])) for k in pretraining.KS]
        drawn.append(charts.Line(SLIM[arm], points, number))
    dense = statistics.mean(c["mean_loss"] for c in found["dense"])
    drawn.append(charts.Line("dense", [(0, dense), (4, dense)], len(drawn)))
    said = "; ".join(f"{line.label} {line.points[0][1]:.2f} at k=1, {line.points[-1][1]:.2f} at 16" for line in drawn)
    title = "Held-out loss by the number of experts at inference"
    across = "log2 of k, experts a token at inference"
    how = {"across": across, "up": "nats a token", "title": title, "description": said}
    return alone(charts.lines(drawn, **how))


# -- RMoE ----------------------------------------------------------------------------------------------------------


def depth(results: Path) -> str:
    found = cells(results / "pretraining" / "depth")
    rows = []
    for arm, said in DEPTH.items():
        of = found.get(arm)
        if of is None:
            continue
        routing = [
            spread([c["routing"][key] for c in of], 2)
            for key in ("layer_information", "inner_balance", "outer_balance")
        ]
        first, last = (
            spread([100 * (c["gradients"]["trained"][0 if end == 0 else -1]) for c in of], 2) for end in (0, 1)
        )
        rows.append(
            [
                said,
                spread([c["mean_loss"] for c in of], 3),
                *routing,
                first,
                last if len(of[0]["gradients"]["trained"]) > 1 else "",
            ]
        )
    first_cell = next(iter(found.values()))[0]
    seeds = ", ".join(str(c["seed"]) for c in found["rmoe"])
    lines = [
        f"A Mixtral of 6 layers of 96, 16 experts of width 96, 2 a token, balance loss 0.01; seeds {seeds}; "
        f"{first_cell['steps']:,} steps of 2,048 tokens of generated text. Loss: held out, nats a token. Information: "
        "bits that a token's first expert in one layer tells of its first in the next. Inner balance: first over "
        "second probability; outer: spread of utilisation. Gradients: of the loss to the lowest and the highest "
        "layer's map of its input (P, or a linear router's weight), percent of that map's norm, after training. "
        "Command: `python scripts/pretraining.py depth`.",
        "",
        *table(
            ["", "loss", "information", "inner balance", "outer balance", "gradient, lowest", "gradient, highest"], rows
        ),
        "",
    ]
    figures: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("loss", lambda c: c["mean_loss"]),
        ("information, bits", lambda c: c["routing"]["layer_information"]),
    )
    for said, value in figures:
        for other in ("linear", "rmoe-np", "rmoe-detach"):
            gap = holds(paired(found, "rmoe", other, value))
            lines.append(f"- {_begun(said)}, RMoE minus {DEPTH[other].removeprefix('RMoE, ')}: {gap}.")
    gaps = (holds(paired(found, "rmoe", other, lambda c: c["mean_loss"])) for other in DEPTH if other != "rmoe")
    if all("within" in gap for gap in gaps):
        lines += ["", "So nothing is gained in loss at this size: no difference between RMoE and another row holds."]
    return "\n".join(lines)


def routers(results: Path) -> str:
    """Information between layers against loss, a point an arm."""
    found = cells(results / "pretraining" / "depth")
    dots = []
    for number, (arm, of) in enumerate((arm, found[arm]) for arm in DEPTH if arm in found):
        losses = [100 * c["mean_loss"] for c in of]
        bits = statistics.mean(c["routing"]["layer_information"] for c in of)
        dots.append(charts.Point(DEPTH[arm], bits, statistics.mean(losses), statistics.stdev(losses), number))
    title = "Held-out loss and what one layer's expert says of the next"
    said = "; ".join(f"{dot.label}: {dot.x:.2f} bits, {dot.y / 100:.3f} nats" for dot in dots)
    across, up = "bits that a token's expert tells of its expert in the next layer", "loss, hundredths of a nat"
    return alone(charts.scatter(dots, across=across, up=up, title=title, description=said)[0])


# -- conversions ---------------------------------------------------------------------------------------------------


def perplexities(found: Cells) -> dict[str, list[dict[str, float]]]:
    """By name of CONVERSIONS, perplexities by domain, a dict a seed."""
    made = {arm: [c["perplexity"] for c in of] for arm, of in found.items()}
    for name, arm, key in (
        ("dense", "read-me", "dense"),
        ("told", "read-me", "told"),
        ("told-untuned", "read-me", "told-untuned"),
        ("prune-untuned", "prune", "untuned"),
    ):
        if arm in found:
            made[name] = [c[key] for c in found[arm]]
    return made


def mean_of(by_domain: dict[str, float]) -> float:
    """Geometric."""
    return math.exp(statistics.mean(map(math.log, by_domain.values())))


def converted(results: Path) -> str:
    parts = []
    for setting, said in (
        ("smollm2", "SmolLM2-135M-Instruct, four domains of real text"),
        ("nano", "nano, four kinds of generated lines"),
    ):
        found = cells(results / "conversions" / setting)
        if not found:
            continue
        made = perplexities(found)
        domains = list(made["read-me"][0])
        how = conversions.SETTINGS[setting]["rounds"]
        rows = [
            [
                said,
                *(spread([one[d] for one in made[name]], 2) for d in domains),
                spread([mean_of(one) for one in made[name]], 2),
            ]
            for name, said in CONVERSIONS.items()
            if name in made
        ]
        seeds = ", ".join(str(c["seed"]) for c in found["read-me"])
        right = [statistics.mean(c["routed_right"].values()) for c in found["read-me"]]
        sizes = conversions.SETTINGS[setting]
        parts += [
            f"**{said}**: held-out perplexity; seeds {seeds}; {how.rounds} rounds of {how.router_steps} + "
            f"{how.expert_steps} steps of {sizes['batch']} x {sizes['length']} tokens, the others tuned for as many "
            f"steps as the experts. All but the model itself and the model tuned have half the neurons active (CMoE: "
            f"2 shared experts and 2 of 6), and untuned masks are told the domain. Mean: geometric. "
            f"{found['read-me'][0]['device']}. Command: `python scripts/conversions.py {setting}`.",
            "",
            *table(["", *domains, "mean"], rows),
            "",
            f"- Read-ME's router sends {spread([100 * r for r in right], 1)} % of held-out tokens to "
            "their domain's expert.",
        ]
        logs: Cells = {
            name: [{"seed": i, "log": math.log(mean_of(one))} for i, one in enumerate(of)] for name, of in made.items()
        }
        for other in ("told", "prune", "cmoe-tuned", "dense-tuned"):
            gaps = paired(logs, "read-me", other, lambda c: c["log"])
            lines = f"- Mean loss in nats, Read-ME minus {CONVERSIONS[other]}: {holds(gaps)}."
            parts.append(lines)
        parts.append("")
    return "\n".join(parts).rstrip()


def domains_picture(results: Path) -> str:
    """Perplexity of each tuned half above the model's, SmolLM2."""
    made = perplexities(cells(results / "conversions" / "smollm2"))
    base = [mean_of(one) for one in made["dense"]]
    dots = []
    halves = {"told", "read-me", "read-me-released", "prune", "cmoe-tuned"}
    for name in sorted(halves & set(made), key=lambda n: statistics.mean(map(mean_of, made[n]))):
        above = [mean_of(one) / of - 1 for one, of in zip(made[name], base, strict=False)]
        series = 1 if name.startswith(("read-me", "told")) else 2
        label = CONVERSIONS[name].strip("*")
        dots.append(charts.Dot(label, statistics.mean(above), (min(above), max(above)), above, series))
    said = "; ".join(f"{dot.label} {100 * dot.value:+.0f} %" for dot in dots)
    title, across = (
        "Perplexity of Read-ME and of other halves of a model",
        "perplexity above SmolLM2's own, mean of domains, %",
    )
    return alone(charts.intervals(dots, zero="the model itself", title=title, description=said, across=across)[0])


# -- serving -------------------------------------------------------------------------------------------------------


def serving(results: Path) -> str:
    found = json.loads((results / "serving.json").read_text())
    rows = []
    for load, engines in found["engines"].items():
        base = engines["decode first"]
        for name, of in engines.items():
            ratios = [
                "" if of is base else spread([100 * (a[key] / b[key] - 1) for a, b in zip(of, base, strict=True)], 1)
                for key in ("mean", "p95")
            ]
            rows.append([
                f"{load}: {name}", spread([c["mean"] for c in of], 2), ratios[0], spread([c["p95"] for c in of], 2),
                ratios[1], spread([c["experts_a_batch"] for c in of], 2), spread([100 * c["hit_ratio"] for c in of], 1),
                spread([c["moved_mib"] for c in of], 0), spread([c["waiting"] for c in of], 1),
            ])  # fmt: skip
    right, asked = found["answers_equal"]
    lines = [
        f"SmolLM2 with {found['experts']} experts a layer (`{found['conversion']}`), {found['requests']} requests of "
        f"{found['prompt_tokens'][0]} to {found['prompt_tokens'][1]} tokens, {found['new_tokens']} new tokens each, "
        f"Poisson arrivals at 0.8 and 1.5 of what decode-first batches take, "
        f"batches of {found['batch_tokens']} tokens, memory for {found['kept']} of "
        f"{found['experts']} experts ({found['budget_mib']:.0f} MiB), reads past the page cache, one "
        f"torch thread; {found['rounds']} rounds with every engine in turn, mean ± standard deviation over rounds. "
        f"Latency from arrival to the last token, seconds; {right} of {asked} runs gave the same tokens as the first. "
        "`experts`, `first come`, `decode first` and `prefill first` are orders of batches (`order=`), with prefetch "
        "and Belady's policy; on demand: nothing is read ahead; routers by layer: as in a mixture whose next layer's "
        f"experts are not known. Command: `{found['command']}`.",
        "",
        *table(
            ["", "mean latency", "to decode first, %", "p95", "to decode first, %", "experts a full batch", "hits, %",
             "MiB read", "waiting for experts, s"], rows,
        ),
        "",
        "By budget, all requests at once, prefetch beside reading on demand:",
        "",
    ]  # fmt: skip
    by_budget = []
    for kept, of in found["budgets"].items():
        ahead, demand = of["prefetch"], of["on demand"]
        by_budget.append([
            f"{kept} of {found['experts']} experts", f"{100 * demand['hit_ratio']:.1f}",
            f"{ahead['moved_mib'] / demand['moved_mib']:.2f}",
            f"{100 * (1 - ahead['waiting'] / demand['waiting']):.0f}",
            f"{ahead['seconds'] / demand['seconds']:.2f}",
        ])  # fmt: skip
    lines += table(["memory for", "hits, %", "bytes read, ratio", "loading hidden, %", "time, ratio"], by_budget)
    lines += ["", "Peak memory of a process beside what it may hold, MiB:", ""]
    lines += table(
        ["expert budget", "model without experts", "before", "peak", "above before, of budget + model"],
        [
            [f"{m['budget_mib']:.0f}", f"{m['resident_mib']:.0f}", f"{m['before_mib']:.0f}", f"{m['peak_mib']:.0f}",
             f"{(m['peak_mib'] - m['before_mib']) / (m['budget_mib'] + m['resident_mib']):.2f}"]
            for m in found["memory"]
        ],
    )  # fmt: skip
    simulated = found["simulated"]
    lines += [
        "",
        "Simulated, uses of one expert a token by 64 requests in turn that keep the last token's expert with "
        "probability 0.95, 5 seeds; and the routes of the trace's own prompts. Hits in a cache of k of 7 experts, "
        "percent:",
        "",
    ]
    hit_rows = []
    for policy in simulated["prompts"]:
        sticky = [spread([one[policy][i] for one in simulated["sticky"]], 1) for i in range(4)]
        own = [f"{value:.1f}" for value in simulated["prompts"][policy]]
        hit_rows.append([policy, *sticky, *own])
    lines += table(["", *(f"k = {k}" for k in (2, 3, 4, 5)), *(f"prompts, k = {k}" for k in (2, 3, 4, 5))], hit_rows)
    fcfs, by = ([one[order] for one in simulated["sticky_experts"]] for order in ("fcfs", "experts"))
    own = simulated["prompts_experts"]
    lines += [
        "",
        f"- Experts a batch of 16 from one pool: first come {spread(fcfs, 2)}, by expert {spread(by, 2)} "
        f"({100 * (1 - statistics.mean(by) / statistics.mean(fcfs)):.0f} % fewer); the trace's own prompts "
        f"{own['fcfs']:.2f} and {own['experts']:.2f} ({100 * (1 - own['experts'] / own['fcfs']):.0f} % fewer). The "
        "engine's pool is smaller, and it may take more experts for a batch with a prompt in it: see the table.",
        *_enlarged(found),
    ]
    return "\n".join(lines)


def _enlarged(found: dict[str, Any]) -> list[str]:
    """The engine's batches on a model that this machine cannot hold."""
    machine = found["enlarged"]["machine"]
    ways = list(next(iter(found["enlarged"]["experts"].values())))
    rows = [
        [
            f"{order}, {kept} of {found['experts']} experts",
            *(f"{of[way]['waiting']:.0f} of {of[way]['seconds']:.0f}" for way in ways),
            *(f"{of[way]['moved'] / 1e9:,.0f}" for way in ways),
        ]
        for order in ("experts", "decode first")
        for kept, of in found["enlarged"][order].items()
    ]
    near = "; ".join(f"{said:.1f} and {was:.1f} at {kept}" for kept, (said, was) in found["simulator"].items())
    return [
        "",
        f"The engine's batches at the higher load, simulated (`moesaic.ffn.serving.simulator`) on a model of "
        f"{machine['layers']} layers whose experts take {machine['expert_bytes'] / 1e6:.0f} MB (Llama-2-7B in bf16), "
        f"read at {machine['bandwidth'] / 1e9:.0f} GB/s; a layer's {1000 * machine['layer_seconds']:.0f} ms are "
        "assumed. Seconds of waiting and in all, and GB read. On the model above, on demand, the simulator says and "
        f"the engine measured, seconds of waiting by experts kept: {near}.",
        "",
        *table(["", *(f"{way}, s" for way in ways), *(f"{way}, GB" for way in ways)], rows),
    ]


def latencies(results: Path) -> str:
    found = json.loads((results / "serving.json").read_text())["engines"]
    dots = []
    for load, engines in found.items():
        for name, of in engines.items():
            if name == "routers by layer":  # some times as long: in the table
                continue
            ratios = [a["p95"] / b["p95"] - 1 for a, b in zip(of, engines["decode first"], strict=True)]
            series = 1 if name == "experts" else 0
            dots.append(
                charts.Dot(f"{load}: {name}", statistics.mean(ratios), (min(ratios), max(ratios)), ratios, series)
            )
    said = "; ".join(f"{dot.label} {100 * dot.value:+.1f} %" for dot in dots)
    title = "95th percentile of latency beside decode-first batches, at two loads"
    across = "95th percentile of latency above that of decode-first batches, %"
    return alone(charts.intervals(dots, zero="decode first", title=title, description=said, across=across)[0])


def backends(files: list[Path]) -> str:
    """A layer of experts on each backend beside the loop, by device."""
    lines = [
        "## A layer of experts on Transformers' backends",
        "",
        "Forward and backward of one feed-forward layer, every backend in turn in each round, medians and quartiles of "
        "the ratios to the loop over experts (`eager`). `grouped_mm` is the default; where a token takes three "
        "quarters of the experts or more, one product over all of them stands in for it on a CPU. `batched_mm` copies "
        "an expert's weights for each token and is for GPUs; wide layers leave it out.",
        "",
    ]
    for file in files:
        found = json.loads(file.read_text())
        rows = []
        for name, of in found["found"].items():
            cells = [name, f"{of['eager']['ms']:.{1 if of['eager']['ms'] >= 1 else 2}f}"]
            for backend in ("grouped_mm", "batched_mm"):
                row = of.get(backend)
                cells.append(f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if row else "")
            rows.append(cells)
        lines += [
            f"{found['device']}, torch {found['versions']['torch']}, {found['rounds']} rounds: `{found['command']}`.",
            "",
            *table(["layer", "loop, ms", "grouped_mm", "batched_mm"], rows),
            "",
        ]
    return "\n".join(lines)


BLOCKS: Blocks = {
    "smoe-dropout.md": {"slim": ("pretraining/slim", slim)},
    "rmoe.md": {"depth": ("pretraining/depth", depth)},
    "read-me.md": {"conversions": ("conversions/smollm2", converted), "serving": ("serving.json", serving)},
}
PICTURES: Pictures = {
    "slimming.svg": ("pretraining/slim", slimming),
    "rmoe.svg": ("pretraining/depth", routers),
    "read-me.svg": ("conversions/smollm2", domains_picture),
    "serving.svg": ("serving.json", latencies),
}
