"""Tables of a comparison: as grids of text, and those as Markdown, for a terminal, and tidy as CSV."""

from __future__ import annotations

import csv as csv_module
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesaic.report.tables import MINUS, ROUTING, number

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Grid:
    """A table: the first column is to the left, the others to the right. `legend` explains signs and columns."""

    title: str
    header: list[str]
    rows: list[list[str]]
    legend: list[tuple[str, str]]


def facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What was compared, on what and how: (name, value) of all that is known."""
    settings = summary["settings"]
    rows = sum(task["n"] for task in summary["tasks"].values())
    found = [
        ("model", settings.get("model")),
        ("data", settings.get("data")),
        ("scored on", f"{rows:,} rows of the {summary['split']} split" if rows else None),
        ("seeds", ", ".join(map(str, summary["seeds"]))),
        ("baseline", summary["baseline"]),
        ("steps", settings.get("steps")),
        ("matched on", _matched(settings)),
        ("rates tried", _rates(settings)),
        ("rows a step", (settings.get("batch_size") or 0) * (settings.get("accumulation") or 1)),
        ("device", summary["device"]),
        ("moesaic", summary["versions"].get("moesaic")),
        ("command", settings.get("command")),
    ]
    return [(name, str(value)) for name, value in found if value]


def _matched(settings: dict[str, Any]) -> str | None:
    """What the arms have in common beside data and steps."""
    match, budget = settings.get("match"), settings.get("budget")
    if match == "trainable_params":
        return f"{budget:,} trainable parameters, within 1 %"
    if match == "rank":
        return f"total rank{'' if budget is None else f' {budget}'}: numbers of trainable parameters differ"
    return "nothing: each arm has the rank of its recipe" if match else None


def _rates(settings: dict[str, Any]) -> str | None:
    rates, tuning = settings.get("lrs"), settings.get("tuning") or {}
    if not rates or len(rates) < 2:
        return None
    text = ", ".join(f"{rate:g}" for rate in rates)
    text += f" for each arm, in trials of {settings.get('tune_steps')} steps on the validation split"
    good = {arm: {r: score for r, score in scores.items() if score is not None} for arm, scores in tuning.items()}
    best = {arm: float(max(scores, key=scores.__getitem__)) for arm, scores in good.items() if scores}
    at_the_edge = [arm for arm, rate in best.items() if rate == max(rates)]
    if at_the_edge:
        text += f"; a higher one may do better for those that took the highest: {', '.join(at_the_edge)}"
    return text


def grids(summary: dict[str, Any]) -> list[Grid]:
    """Scores, costs and, if anything was routed, routing."""
    made = [_scores(summary), _costs(summary)]
    routing = _routing(summary)
    return [*made, routing] if routing.rows else made


def markdown(summary: dict[str, Any]) -> str:
    """What was compared, all tables and verdicts."""
    parts = ["\n".join(f"- {name}: {value}" for name, value in facts(summary))]
    for grid in grids(summary):
        lines = [grid.header, ["---", *["---:"] * (len(grid.header) - 1)], *grid.rows]
        table = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
        parts += [
            f"**{grid.title}**",
            table,
            "\n".join(f"- *{sign}*: {meaning}" for sign, meaning in grid.legend),
        ]
    parts += ["\n".join(f"- {line}" for line in lines) for lines in (conclusions(summary), missing(summary)) if lines]
    return "\n\n".join(parts) + "\n"


def printable(text: str) -> str:
    """A line without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def rich_table(summary: dict[str, Any]) -> RenderableType:
    """The same for a terminal."""
    from rich.console import Group
    from rich.text import Text

    parts = [table(grid) for grid in grids(summary)]
    return Group(*parts, *[Text(line) for line in (*conclusions(summary), *missing(summary))])


def table(grid: Grid, *, legend: bool = False) -> RenderableType:
    """A grid for a terminal, with its legend where that is asked for. Columns without a figure are to the left."""
    from rich.table import Table
    from rich.text import Text

    told = "\n".join(f"{sign}: {meaning}" for sign, meaning in grid.legend) if legend else ""
    made = Table(title=Text(grid.title), title_justify="left", caption=Text(told) or None, caption_justify="left")
    for i, name in enumerate(grid.header):
        figures = any(row[i].lstrip(f"+-{MINUS}")[:1].isdigit() for row in grid.rows)
        made.add_column(Text(name), justify="right" if i and figures else "left")
    for row in grid.rows:
        made.add_row(*[Text(cell) for cell in row])
    return made


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
    return number(100 * difference, "{:+.1f}")


def _scores(summary: dict[str, Any]) -> Grid:
    tasks, baseline = summary["tasks"], summary["baseline"]
    dominated = any(t["dominated"] for t in tasks.values())
    rows = []
    for arm in summary["arms"]:
        if "scores" not in arm:
            rows.append([arm["arm"], arm["status"], *[""] * (len(tasks) + 2)])
            continue
        gap = arm["difference"]
        rows.append(
            [
                arm["arm"] if arm["status"] == "done" else f"{arm['arm']} ({len(arm['seeds'])} seeds)",
                percent(arm["mean"], arm["sd"]),
                "" if gap is None else f"{points(gap['mean'])} [{', '.join(points(end) for end in gap['interval'])}]",
                number(arm["mean_relative_difference"], "{:+.1f}"),
                *[_score(arm["scores"][task], tasks[task]["dominated"]) for task in tasks],
            ]
        )
    if any(t["base_score"] is not None for t in tasks.values()):
        rows.append(["untrained base", percent(summary["base_mean"]), "", "", *[_base(t) for t in tasks.values()]])
    if any(t["majority"] is not None for t in tasks.values()):
        rows.append(["commonest label", "", "", "", *[percent(t["majority"]) for t in tasks.values()]])
    n = len(summary["seeds"])
    title = f"Scores on the {summary['split']} split, percent, mean ± standard deviation over {n} seed{'s' * (n != 1)}"
    legend = [
        ("±", "one standard deviation over seeds: how far another training moves a score"),
        (
            f"to {baseline} [95 %]",
            "difference of the means in points; in brackets 95 % of 10,000 bootstrap draws of the scored rows, paired "
            "by row: how far other rows move it. The brackets know nothing of other trainings, ± nothing of other rows",
        ),
        ("relative, %", f"mean over tasks of the difference divided by {baseline}'s score"),
    ]
    if dominated:
        legend.append(
            ("MCC", "Matthews correlation, where one label is so common that naming it always would look like skill")
        )
    return Grid(title, ["arm", "mean", f"to {baseline} [95 %]", "relative, %", *tasks], rows, legend)


def _score(scores: dict[str, Any], dominated: bool) -> str:
    text = percent(scores["mean"], scores["sd"])
    return f"{text}, MCC {scores['matthews']['mean']:.2f}" if dominated else text


def _base(task: dict[str, Any]) -> str:
    text, matthews = percent(task["base_score"]), task["base_matthews"]
    return f"{text}, MCC {matthews:.2f}" if task["dominated"] and matthews is not None else text


def _costs(summary: dict[str, Any]) -> Grid:
    baseline = summary["baseline"]
    header = ["arm", "method", "lr", "trainable parameters", "tokens/s", f"time over {baseline}", "peak MiB"]
    rows = []
    for arm in summary["arms"]:
        if "scores" in arm:
            figures = (
                number(arm["trainable_parameters"], "{:,}"),
                number(arm["tokens_per_second"], "{:,.0f}"),
                number(arm["overhead"], "{:+.0%}"),
                number(arm["peak_memory_mib"], "{:,.0f}"),
            )
            rows.append([arm["arm"], arm["method"], f"{arm['lr']:g}", *figures])
    legend = [
        ("trainable parameters", "routers and heads counted"),
        (f"time over {baseline}", "how much longer a token takes in training; blurred where runs share a machine"),
        ("peak MiB", "the most memory held: of a GPU, or of the whole process, libraries and base model included"),
    ]
    return Grid("Cost of training, mean over seeds", header, rows, legend)


def _routing(summary: dict[str, Any]) -> Grid:
    rows = [
        [arm["arm"], *[number(arm["routing"].get(figure.key), figure.form) for figure in ROUTING]]
        for arm in summary["arms"]
        if arm.get("routing")
    ]
    legend = [(figure.name, figure.meaning) for figure in ROUTING]
    return Grid("Routing on the scored rows, mean over seeds", ["arm", *[f.name for f in ROUTING]], rows, legend)
