"""The page of a run of Router-R1, and tables of its evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.report import charts
from moesaic.report.page import Figure, of_run
from moesaic.report.text import Grid

SMOOTHED = 10
"""Steps that a point of a curve is the mean of."""
_CURVES = {
    "reward": ("Reward", "of a transcript, mean"),
    "outcome": ("Answers that are right", "share"),
    "cost": ("Cost of a question", "micro-dollars"),
    "calls": ("Calls a question", "calls"),
    "broken": ("Transcripts whose format is broken", "share"),
}
_LEGEND = [
    ("EM", "exact match with one of the right answers"),
    ("cost", "micro-dollars a question: completion tokens of replies times their price of a million"),
    ("commonest", "share of calls that go to the model that is asked most"),
    ("broken", "transcripts that break the format"),
    ("failed", "questions in which a model that was asked did not answer"),
]


def page(results: Mapping[str, Any]) -> str:
    """Curves of training, and of tries, where there are any."""
    settings = results["settings"]
    facts = [
        ("policy", settings["model"]), ("may ask", ", ".join(results["models"])), ("steps", f"{results['steps']:,}"),
        ("cost weighs", ", ".join(map(str, settings["alphas"])) or str(settings["alpha"])),
        ("calls", f"{results['asked']:,}, of which {results['hits']:,} were known already"),
        ("command", results["command"]),
    ]  # fmt: skip
    figures = [_curve(name, *said, results) for name, said in _CURVES.items() if results["figures"].get(name)]
    grids = [tried(results["tried"])] if results["tried"] else []
    return of_run(
        "moesaic llm r1", f"Router-R1, {settings['model']}", facts=facts, grids=grids, figures=figures,
        settings=dict(settings), versions=results["versions"],
    )  # fmt: skip


def _curve(name: str, title: str, up: str, results: Mapping[str, Any]) -> Figure:
    key = {"outcome": "em"}.get(name, name)
    series = [charts.Line("training, drawn", smoothed(results["figures"][name]), 0)]
    held = [(of["step"], of[key]) for of in results["tried"] if key in of]
    series += [charts.Line("tried, likeliest tokens", held, 1)] if len(held) > 1 else []
    drawing = charts.lines(series, across="step", up=up, title=title, description=f"{title} by step")
    return Figure(title, [("", drawing)], f"Training: means over {SMOOTHED} steps.")


def smoothed(values: Sequence[float], width: int = SMOOTHED) -> list[tuple[float, float]]:
    """Means over so many steps, at the last of them."""
    parts = [values[start : start + width] for start in range(0, len(values), width)]
    ends = [min(len(values), start + width) for start in range(0, len(values), width)]
    return [(float(end), sum(part) / len(part)) for end, part in zip(ends, parts, strict=True)]


def tried(entries: Sequence[Mapping[str, Any]]) -> Grid:
    rows = [[str(of["step"]), *_cells(of)] for of in entries]
    return Grid("Tries on other questions", ["after step", *_HEADER], rows, _LEGEND)


def compared(rows: Mapping[str, Mapping[str, Any]], questions: int) -> Grid:
    """Ways to answer the same questions."""
    return Grid(
        f"{questions:,} questions", ["who", *_HEADER], [[name, *_cells(of)] for name, of in rows.items()], _LEGEND
    )  # fmt: skip


def asked(rows: Mapping[str, Mapping[str, Any]]) -> Grid:
    """Shares of calls, by who asks and who is asked."""
    names = list(dict.fromkeys(name for of in rows.values() for name in of["named"]))
    cells = [[who, *(_share(of, name) for name in names)] for who, of in rows.items()]
    return Grid("Who is asked, % of calls", ["who", *names], cells, [])


def _share(of: Mapping[str, Any], name: str) -> str:
    calls = sum(of["named"].values())
    return f"{100 * of['named'].get(name, 0) / calls:.0f}" if calls else "–"


_HEADER = ["EM, %", "F1, %", "cost", "calls", "commonest, %", "broken, %", "failed, %", "tokens"]


def _cells(of: Mapping[str, Any]) -> list[str]:
    def percent(name: str) -> str:
        return "–" if of.get(name) is None else f"{100 * of[name]:.1f}"

    tokens = "–" if of.get("tokens") is None else f"{of['tokens']:.0f}"
    return [
        percent("em"), percent("f1"), f"{of['cost']:.2f}", f"{of['calls']:.2f}", percent("commonest"),
        percent("broken"), percent("failed"), tokens,
    ]  # fmt: skip
