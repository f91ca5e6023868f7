"""Tables of compositions of experts: what was fitted, who answers, how well it would have done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.report.tables import number
from moesaic.report.text import Grid, percent, points, printable

ARMS = {
    "composition": "composition", "best_single": "best single, known afterwards", "largest": "largest",
    "best_within": "best single within its budget",
    "random_expert": "one of its experts at random", "oracle": "oracle",
}  # fmt: skip
"""What `replayed` compares, in words."""


def fitted(made: Any) -> list[Grid]:
    """Of a composition: each category's expert, and its figures on held-out prompts."""
    of = made.solution.expert
    experts = Grid(
        "Who answers what",
        ["category", "expert"],
        [[_name(category), _name(of[category])] for category in sorted(of)],
        [],
    )
    held = made.about["held_out"]
    seen = "" if held["seen"] == 1 else f"the {percent(held['seen'])} % that their expert saw of "
    rows = [
        ["score, %", percent(held["score"]), f"of {seen}held-out prompts, each routed by fits without it (replayed)"],
        ["right category, %", percent(held["category_accuracy"]), "of held-out prompts"],
        ["to general, %", percent(held["general"]), "of held-out prompts: not sure of their category"],
        ["average active, B", number(held["average_active"], "{:.1f}"), "billions of parameters a prompt"],
        ["resident, B", number(made.solution.resident_size, "{:.1f}"), ", ".join(map(_name, made.solution.resident))],
    ]
    if held["average_cost"] is not None:
        rows.append(["USD a million prompts", number(1e6 * held["average_cost"], "{:,.2f}"), "as recorded"])
    return [experts, Grid("How well, at what cost", ["", "", "of what"], rows, [])]


def decided(prompts: Sequence[str], found: Sequence[Any]) -> list[Grid]:
    """Who answers each prompt; of one prompt, also what else there was."""
    rows = [
        [_short(prompt), _name(decision.expert), _about(decision), percent(decision.confidence)]
        for prompt, decision in zip(prompts, found, strict=True)
    ]
    shown = [Grid("Who answers", ["prompt", "expert", "category", "likeliest, %"], rows, [])]
    if len(found) == 1:
        (decision,) = found
        likely = sorted(decision.probabilities.items(), key=lambda pair: -pair[1])[:5]
        shown.append(Grid("What it is about", ["category", "%"], [[_name(k), percent(p)] for k, p in likely], []))
        worth = sorted(decision.scores.items(), key=lambda pair: -pair[1])
        shown.append(Grid("Expected scores", ["expert", "%"], [[_name(k), percent(s)] for k, s in worth], []))
    return shown


def benched(found: Mapping[str, Any]) -> list[Grid]:
    """What `replayed` found, and how long a decision takes."""
    costs = any(arm["average_cost"] is not None for arm in found["arms"].values())
    header = ["", "score, %", "95 %", "ahead of the best single", "active, B"]
    header += ["USD a million prompts"] if costs else []
    rows = []
    for name, arm in found["arms"].items():
        low, ahead, high = (points(arm[key]) for key in ("ahead_low", "ahead", "ahead_high"))
        cost = [number(1e6 * arm["average_cost"], "{:,.2f}")] if costs else []
        span = f"{percent(arm['low'])} to {percent(arm['high'])}"
        rows.append(
            [ARMS[name] + (f" ({_name(arm['model'])})" if arm["model"] else ""), percent(arm["score"]), span,
             "" if name == "best_single" else f"{ahead} ({low} to {high})", number(arm["average_active"], "{:.1f}"),
             *cost]
        )  # fmt: skip
    legend = [
        ("95 %", "of the bootstrap over prompts, in brackets of the difference, paired"),
        ("oracle", "who scored best on each prompt, the smaller of equals"),
    ]
    shares = [[_name(expert), percent(share)] for expert, share in found["experts"].items()]
    shares += [["(uncertain: to general)", percent(found["general"])]]
    if found["category_accuracy"] is not None:
        shares.append(["(category right)", percent(found["category_accuracy"])])
    took = found["milliseconds"]
    times = [["median", f"{took['median']:.2f}"], ["95th percentile", f"{took['p95']:.2f}"]]
    count = found["prompts"]
    return [
        Grid(f"Replayed on {count:,} prompt{'s' * (count != 1)}", header, rows, legend),
        Grid("Who was chosen", ["expert", "% of prompts"], shares, []),
        Grid("A decision takes", ["", "ms"], times, []),
    ]


def _short(text: str, most: int = 60) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _name(text: str) -> str:
    return _short(text, 200)


def _about(decision: Any) -> str:
    return _name(decision.category) + (" (not sure)" if decision.uncertain else "")
