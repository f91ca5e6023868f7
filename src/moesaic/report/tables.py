"""Results as rich tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean
from typing import Any

from rich.table import Table

MINUS = "\N{MINUS SIGN}"
MATCHED = 1.05
"""Arms whose trainable parameters differ by no more than this factor count as equal in them."""


def methods_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("method", "what it is", "paper", "recipe")
    for row in rows:
        table.add_row(row["method"], row["summary"], row["paper"], row["recipe"] or "")
    table.caption = "moesaic methods NAME tells all of one"
    return table


def eval_table(results: Sequence[dict[str, Any]]) -> Table:
    """One row a task, one column a run, the first run's untrained base beside them; percent, ± one standard error."""
    title = f"{results[0]['model']}, {results[0]['split']} split"
    table = Table("task", "n", "majority", "base", *[r["run"] for r in results], title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    tasks = list(dict.fromkeys(task for r in results for task in r["tasks"]))
    for task in tasks:
        first = next(r["tasks"][task] for r in results if task in r["tasks"])
        table.add_row(
            task,
            str(first["n"]),
            _percent(first.get("majority")),
            _percent(first.get("base_score")),
            *[_cell(r["tasks"].get(task)) for r in results],
        )
    table.add_section()
    table.add_row("mean", "", "", _percent(results[0].get("base_mean")), *[_percent(r["mean"]) for r in results])
    table.add_row("trainable", "", "", "", *[f"{r['trainable_parameters'] or 0:,}" for r in results])
    return table


@dataclass(frozen=True)
class Figure:
    """A figure of the routing: its key in the JSON, its name, how it is shown, and what it means."""

    key: str
    name: str
    form: str
    meaning: str


ROUTING = (
    Figure("entropy", "entropy", "{:.2f}", "of a token's probabilities, over log E: 0 is certain, 1 uniform"),
    Figure(
        "dead_share", "dead experts", "{:.0%}", "those with less than a tenth of the fair share, 1/E, of the weight"
    ),
    Figure(
        "mutual_information",
        "task-expert information",
        "{:.3f}",
        "what a task tells of the experts used: 0 is nothing, 1 as much as can be",
    ),
    Figure(
        "inner_balance",
        "first / second probability",
        "{:,.2f}",
        "a token's largest probability over its second largest, geometric mean over tokens: 1 is a tie",
    ),
    Figure(
        "outer_balance",
        "spread of utilisation",
        "{:.2f}",
        "standard deviation over mean of the experts' shares of the weight: 0 is even, sqrt(E - 1) a single expert",
    ),
    Figure(
        "layer_information",
        "layer-to-layer bits",
        "{:.2f}",
        "what a token's first expert in one layer tells of its first in the next: 0 is nothing",
    ),
)


def routing_table(results: Sequence[dict[str, Any]]) -> Table | None:
    """What the routers did on the scored rows, one column a routed run; None where there is none."""
    routed = [r for r in results if r.get("routing")]
    if not routed:
        return None
    table = Table("routing", *[r["run"] for r in routed])
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_column("meaning", style="dim")
    for figure in ROUTING:
        values = [r["routing"].get(figure.key) for r in routed]
        if any(v is not None for v in values):
            table.add_row(figure.name, *[number(v, figure.form) for v in values], figure.meaning)
    return table


def number(value: float | None, form: str) -> str:
    """A figure as it is shown, empty where there is none: 12 %, −3; thousands have no decimals."""
    if value is None:
        return ""
    if abs(value) >= 1000:
        form = form.replace(".2f", ".0f")
    return form.format(value).replace("%", " %").replace("-", MINUS)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    text = f"{100 * score['score']:.1f} ± {100 * score['stderr']:.1f}"
    return f"{text} (MCC {score['matthews']:.2f})" if "matthews" in score else text


def perplexity_table(columns: Mapping[str, Mapping[str, Mapping[str, float]]], rows: str = "") -> Table:
    """Perplexities by domain (rows) of several models, or of one before and after (columns); their geometric mean.

    Of models whose tokens are not the same, bits a byte and their mean: their perplexities do not compare.
    """
    domains = list(next(iter(columns.values())))
    one_tokenizer = all(len({_nats_a_bit(found[domain]) for found in columns.values()}) == 1 for domain in domains)
    title, shown, mean = (
        ("perplexity of held-out text", "perplexity", geometric_mean)
        if one_tokenizer
        else ("held-out text in bits a byte, as tokenizers differ", "bits_per_byte", fmean)
    )
    table = Table("domain", *columns, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for domain in domains:
        table.add_row(domain, *[f"{found[domain][shown]:,.2f}" for found in columns.values()])
    table.add_section()
    table.add_row("mean", *[f"{mean(found[d][shown] for d in domains):,.2f}" for found in columns.values()])
    table.caption = rows
    return table


def _nats_a_bit(figures: Mapping[str, float]) -> float:
    """Nats a token for a bit a byte: how long tokens are."""
    return round(figures["loss"] / figures["bits_per_byte"], 6) if figures["bits_per_byte"] else 0.0
