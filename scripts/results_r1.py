"""What Router-R1 came to: the blocks of docs/router-r1.md and its picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pages import Blocks, Pictures, seeds, spread, table

from moesaic.report import charts
from moesaic.report.page import alone
from moesaic.report.router_r1 import smoothed

ORDER = ("untrained", "warm start", "alpha 0", "alpha 0.6", "alpha 0.9")
NAMES = {"untrained": "prompted, untrained", "warm start": "warm start alone"}

_ABOUT = """**A world that fits two cores**: questions about lists of digits that want one task or two, one after the
other, and four small language models behind HTTP (`scripts/llm_pool.py`): three know two tasks each at 1 to 3 dollars
a million tokens, one all six at 6 to 9. Whom a question may be put to, by what name and at what price, is drawn for
each question and stands in its prompt, so that nobody can be asked by heart. The policy is nano (2.9 million
parameters); its warm start imitates a script that asks one who knows, at any price. Exact match on 200 questions a test
(50 for the untrained policy, which is told the format), cost in micro-dollars a question, mean ± standard deviation
over {seeds}; scripts (one run) know how a question is taken apart, and choose whom they ask. `newcomer`: a cheap
specialist is offered whose two tasks no specialist had together; it is asked for that share of the hops that are its
own, {chance} % by chance. `unseen name`: a specialist goes by a word that training never had. Command:
`python scripts/r1.py FOLDER`."""

Cells = list[dict[str, Any]]


def read(results: Path) -> dict[str, Cells]:
    """Cells by arm, scripts first."""
    found: dict[str, Cells] = {}
    for line in (results / "r1.jsonl").read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        if cell.get("tests"):
            found.setdefault(cell["arm"], []).append(cell)
    scripts = [arm for arm in found if arm not in ORDER]
    return {arm: found[arm] for arm in (*scripts, *ORDER) if arm in found}


def measured(results: Path) -> str:
    arms = read(results)
    header = ["who asks", "two hops, EM %", "cost", "calls", "commonest, %", "broken, %", "one hop, EM %",
              "newcomer, EM %", "asks it, %",
              "unseen name, EM %", "asks it, %", "changed prices, EM %", "cost"]  # fmt: skip
    rows = [[NAMES.get(arm, arm.replace("alpha", "α =")), *_cells(cells)] for arm, cells in arms.items()]
    trained = {arm: cells for arm, cells in arms.items() if arm.startswith("alpha")}
    if not trained:
        return ""
    chances = [c["tests"]["newcomer"]["by chance"] for cells in trained.values() for c in cells]
    chance = f"{100 * statistics.fmean(chances):.0f}"
    about = _ABOUT.format(seeds=seeds(map(len, trained.values())), chance=chance)
    lines = [about, "", *table(header, rows), ""]
    took = [
        f"{arm.replace('alpha', 'α =')}: {spread([100 * _first(c) for c in cells], 0)} % of sampled answers are right "
        f"in the first ten steps, {spread([100 * _last(c) for c in cells], 0)} % in the last ten"
        for arm, cells in trained.items()
    ]  # fmt: skip
    each = [
        c["cpu_seconds"] / len(c["figures"]["reward"]) for cells in trained.values() for c in cells if not c["resumed"]
    ]
    hits = [c["hits"] / c["asked"] for cells in trained.values() for c in cells]
    lines.append(
        f"{'; '.join(took)}. A step of GRPO (64 transcripts) takes {spread(each)} CPU seconds on a busy machine; "
        f"{spread([100 * h for h in hits], 0)} % of the queries had been asked before, and were not asked again."
    )  # fmt: skip
    return "\n".join(lines)


def _cells(cells: Cells) -> list[str]:
    def of(test: str, key: str, times: float = 1, digits: int = 1) -> str:
        values = [c["tests"][test][key] for c in cells]
        return spread([times * v for v in values], digits) if None not in values else "–"

    return [
        of("two hops", "em", 100), of("two hops", "cost"), of("two hops", "calls", 1, 2),
        of("two hops", "commonest", 100, 0), of("two hops", "broken", 100), of("one hop", "em", 100),
        of("newcomer", "em", 100), of("newcomer", "asks the newcomer", 100, 0), of("unseen name", "em", 100),
        of("unseen name", "asks the unseen", 100, 0), of("changed prices", "em", 100), of("changed prices", "cost"),
    ]  # fmt: skip


def _first(cell: Mapping[str, Any]) -> float:
    return statistics.fmean(cell["figures"]["outcome"][:10])


def _last(cell: Mapping[str, Any]) -> float:
    return statistics.fmean(cell["figures"]["outcome"][-10:])


def speed(results: Path) -> str:
    found = json.loads((results / "r1-speed.json").read_text(encoding="utf-8"))
    rows = [
        [
            name, str(of["conversations"]), str(of["prompt_tokens"]),
            *(f"{of['tokens_per_second'][way]:.1f}" for way in ("kept", "anew each round")),
            f"{of['faster']['median']:.1f} ({of['faster']['least']:.1f} to {of['faster']['most']:.1f})",
        ]
        for name, of in found["cases"].items()
    ]  # fmt: skip
    header = [
        "policy",
        "side by side",
        "tokens of a prompt",
        "cache kept, tokens/s",
        "anew each round",
        "times as fast",
    ]
    return "\n".join([
        f"**Rollouts**, the published prompt, five generations and four replies, one thread, the two ways in turn "
        f"{found['rounds']} times. Command: `python scripts/r1_speed.py`.", "", *table(header, rows), "",
        f"**A step of GRPO** (64 transcripts, α = 0, the members beside it on the same two cores): {_steps(results)}.",
    ])  # fmt: skip


def _steps(results: Path) -> str:
    lines = (results / "r1-steps.jsonl").read_text(encoding="utf-8").splitlines()
    return "; ".join(
        f"{one['seconds']:.1f} s with {one['threads']} thread{'s' if one['threads'] > 1 else ''} "
        f"(`python scripts/r1.py FOLDER steps={one['steps']} threads={one['threads']}`)"
        for one in map(json.loads, lines)
    )  # fmt: skip


def curves(results: Path, figure: str, up: str) -> str:
    """A figure of training by step, means over seeds."""
    trained = {arm: cells for arm, cells in read(results).items() if arm.startswith("alpha")}
    if not trained:
        return ""
    series = [
        charts.Line(arm.replace("alpha", "α ="), smoothed(_mean([c["figures"][figure] for c in cells])), i)
        for i, (arm, cells) in enumerate(trained.items())
    ]
    return alone(charts.lines(
        series, across="step of GRPO", up=up, title="Router-R1 in training", description=f"{up}, by step and α",
    ))  # fmt: skip


right = partial(curves, figure="outcome", up="sampled answers that are right")
cost = partial(curves, figure="cost", up="micro-dollars a question")


def _mean(runs: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(step) for step in zip(*runs, strict=False)]


BLOCKS: Blocks = {"router-r1.md": {"r1": ("r1.jsonl", measured), "speed": ("r1-speed.json", speed)}}
PICTURES: Pictures = {"router-r1.svg": ("r1.jsonl", right), "router-r1-cost.svg": ("r1.jsonl", cost)}
