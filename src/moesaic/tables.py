"""Results as rich tables."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def methods_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("method", "what it is", "paper", "recipe")
    for row in rows:
        table.add_row(row["method"], row["summary"], row["paper"], row["recipe"] or "")
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


_ROUTING = (
    ("entropy, 0 certain to 1 uniform", "entropy", "{:.2f}"),
    ("dead experts", "dead_share", "{:.0%}"),
    ("task-expert information, 0 to 1", "mutual_information", "{:.3f}"),
    ("first over second probability", "inner_balance", "{:.2f}"),
    ("spread of utilisation, std / mean", "outer_balance", "{:.2f}"),
    ("layer-to-layer information, bits", "layer_information", "{:.2f}"),
)


def routing_table(results: Sequence[dict[str, Any]]) -> Table | None:
    """What the routers did on the scored rows, one column a routed run; None where there is none."""
    routed = [r for r in results if r.get("routing")]
    if not routed:
        return None
    table = Table("routing", *[r["run"] for r in routed])
    for column in table.columns[1:]:
        column.justify = "right"
    for label, key, form in _ROUTING:
        values = [r["routing"].get(key) for r in routed]
        if any(v is not None for v in values):
            table.add_row(label, *["" if v is None else form.format(v).replace("%", " %") for v in values])
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    text = f"{100 * score['score']:.1f} ± {100 * score['stderr']:.1f}"
    return f"{text} (MCC {score['matthews']:.2f})" if "matthews" in score else text
