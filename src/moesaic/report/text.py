"""Tables of a comparison: as grids of text, and those as Markdown, for a terminal, and tidy as CSV."""

from __future__ import annotations

import csv as csv_module
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Grid:
    """A table: the first column is to the left, the others to the right."""

    title: str
    header: list[str]
    rows: list[list[str]]


def grids(summary: dict[str, Any]) -> list[Grid]:
    """Scores, costs and, if anything was routed, routing."""
    made = [_scores(summary), _costs(summary)]
    routing = _routing(summary)
    return [*made, routing] if routing.rows else made


def markdown(summary: dict[str, Any]) -> str:
    """All tables and verdicts."""
    parts = []
    for grid in grids(summary):
        lines = [grid.header, ["---", *["---:"] * (len(grid.header) - 1)], *grid.rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts.append(f"**{grid.title}**\n\n{table}")
    parts += ["\n".join(f"- {line}" for line in lines) for lines in (conclusions(summary), missing(summary)) if lines]
    return "\n\n".join(parts) + "\n"


def rich_table(summary: dict[str, Any]) -> RenderableType:
    """The same for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for grid in grids(summary):
        table = Table(title=grid.title, title_justify="left")
        for i, name in enumerate(grid.header):
            table.add_column(Text(name), justify="right" if i else "left")
        for row in grid.rows:
            table.add_row(*[Text(cell) for cell in row])
        parts.append(table)
    return Group(*parts, *[Text(line) for line in (*conclusions(summary), *missing(summary))])


def csv(summary: dict[str, Any]) -> str:
    """One row for each arm, task and seed."""
    file = io.StringIO()
    writer = csv_module.writer(file, lineterminator="\n")
    writer.writerow(["arm", "method", "seed", "lr", "task", "metric", "n", "score", "matthews"])
    for arm in summary["arms"]:
        for task, scores in arm.get("scores", {}).items():
            known = summary["tasks"][task]
            for i, seed in enumerate(arm["seeds"]):
                matthews = scores["matthews"]["values"][i] if "matthews" in scores else ""
                head = [arm["arm"], arm["method"], seed, arm["lr"], task, known["metric"], known["n"]]
                writer.writerow([*head, scores["values"][i], matthews])
    return file.getvalue()


def conclusions(summary: dict[str, Any]) -> list[str]:
    return [verdict["text"] for verdict in summary["verdicts"]]


def missing(summary: dict[str, Any]) -> list[str]:
    """The cells without a result, and why."""
    return [
        f"{cell['arm']}, seed {cell['seed']}: {cell['status']}" + (f": {cell['error']}" if cell["error"] else "")
        for cell in summary["missing"]
    ]


def percent(share: float | None, deviation: float | None = None) -> str:
    if share is None:
        return ""
    text = f"{100 * share:.1f}"
    return text if deviation is None else f"{text} ± {100 * deviation:.1f}"


def points(difference: float) -> str:
    """A difference of shares in percentage points, signed."""
    text = f"{100 * difference:+.1f}"
    return text.replace("-", MINUS)


def _scores(summary: dict[str, Any]) -> Grid:
    tasks, baseline = summary["tasks"], summary["baseline"]
    rows = []
    for arm in summary["arms"]:
        if "scores" not in arm:
            rows.append([arm["arm"], *[""] * (len(tasks) + 2), arm["status"]])
            continue
        gap, relative = arm["difference"], arm["mean_relative_difference"]
        rows.append(
            [
                arm["arm"] if arm["status"] == "done" else f"{arm['arm']} ({len(arm['seeds'])} seeds)",
                *[_score(arm["scores"][task], tasks[task]["dominated"]) for task in tasks],
                percent(arm["mean"], arm["sd"]),
                "" if gap is None else f"{points(gap['mean'])} [{', '.join(points(end) for end in gap['interval'])}]",
                "" if relative is None else f"{relative:+.1f}".replace("-", MINUS),
            ]
        )
    if any(t["base_score"] is not None for t in tasks.values()):
        base = [_base(t) for t in tasks.values()]
        rows.append(["untrained base", *base, percent(summary["base_mean"]), "", ""])
    if any(t["majority"] is not None for t in tasks.values()):
        rows.append(["commonest label", *[percent(t["majority"]) for t in tasks.values()], "", "", ""])
    header = ["arm", *tasks, "mean", f"to {baseline} [95 %]", "relative, %"]
    n = len(summary["seeds"])
    title = f"Scores on the {summary['split']} split, percent, mean ± standard deviation over {n} seed{'s' * (n != 1)}"
    return Grid(title, header, rows)


def _score(scores: dict[str, Any], dominated: bool) -> str:
    text = percent(scores["mean"], scores["sd"])
    return f"{text}, MCC {scores['matthews']['mean']:.2f}" if dominated else text


def _base(task: dict[str, Any]) -> str:
    text = percent(task["base_score"])
    return (
        f"{text}, MCC {task['base_matthews']:.2f}" if task["dominated"] and task["base_matthews"] is not None else text
    )


def _costs(summary: dict[str, Any]) -> Grid:
    header = ["arm", "method", "lr", "trainable parameters", "tokens/s", f"time over {summary['baseline']}", "peak MiB"]
    rows = []
    for arm in summary["arms"]:
        if "scores" in arm:
            figures = (
                _number(arm["trainable_parameters"], "{:,}"),
                _number(arm["tokens_per_second"], "{:,.0f}"),
                _number(arm["overhead"], "{:+.0%}").replace("-", MINUS).replace("%", " %"),
                _number(arm["peak_memory_mib"], "{:,.0f}"),
            )
            rows.append([arm["arm"], arm["method"], f"{arm['lr']:g}", *figures])
    return Grid("Cost of training (speed is blurred where cells share a machine)", header, rows)


def _routing(summary: dict[str, Any]) -> Grid:
    header = ["arm", "entropy", "dead experts", "task-expert information", "first / second probability"]
    header += ["spread of utilisation", "layer-to-layer bits"]
    forms = {
        "entropy": "{:.2f}",
        "dead_share": "{:.0%}",
        "mutual_information": "{:.3f}",
        "inner_balance": "{:.2f}",
        "outer_balance": "{:.2f}",
        "layer_information": "{:.2f}",
    }
    rows = [
        [arm["arm"], *[_number(arm["routing"].get(key), form).replace("%", " %") for key, form in forms.items()]]
        for arm in summary["arms"]
        if arm.get("routing")
    ]
    return Grid("Routing on the scored rows, mean over seeds", header, rows)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
