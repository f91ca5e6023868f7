"""report.html: one file that asks the network for nothing and needs no script."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moesaic.report import charts
from moesaic.report.tables import MATCHED
from moesaic.report.text import Grid, facts, grids, missing

HERE = Path(__file__).parent

MARGIN = 12
"""About a drawing that is a file of its own."""

Arm = dict[str, Any]

_ARROW = " Arrow: off the scale, at the number beside it."


@dataclass(frozen=True)
class Figure:
    """Drawings under one heading, each with a name of its own where they are several; `folded` until asked for."""

    heading: str
    drawings: Sequence[tuple[str, Markup]]
    caption: str
    folded: bool = False


def html(summary: dict[str, Any]) -> str:
    """The page of a comparison's summary."""
    return _rendered(
        kicker="moesaic compare",
        judged=True,
        title=headline(summary),
        facts=facts(summary),
        verdicts=summary["verdicts"],
        missing=missing(summary),
        grids=grids(summary) if _done(summary) else [],
        figures=figures(summary),
        settings=summary["settings"],
        versions=summary["versions"],
    )


def headline(summary: dict[str, Any]) -> str:
    """What came out, in a few words: who routing helps, where that can be told."""
    arms, tasks = len(summary["arms"]), len(summary["tasks"])
    size = f"{arms} arms on {tasks} {'task' if tasks == 1 else 'tasks'}"
    judged = [v for v in summary["verdicts"] if v["claim"] == "routing helps" and v["holds"] is not None]
    helped = [v["arm"] for v in judged if v["holds"]]
    if not judged:
        return size
    if helped:
        said = f"Routing helps {', '.join(helped)}"
    else:
        said = (
            f"Routing helps none of {len(judged)}" if len(judged) > 1 else f"Routing does not help {judged[0]['arm']}"
        )
    return f"{said}: {size}"


def of_run(
    kicker: str,
    title: str,
    *,
    facts: Sequence[tuple[str, str]],
    grids: Sequence[Grid],
    figures: Sequence[Figure],
    settings: dict[str, Any],
    versions: dict[str, str],
) -> str:
    """The page of one run: what it was, tables, and figures below the first of them."""
    return _rendered(
        kicker=kicker, judged=False, title=title, facts=facts, verdicts=[], missing=[], grids=grids, figures=figures,
        settings=settings, versions=versions,
    )  # fmt: skip


def is_page(file: Path, kicker: str) -> bool:
    """Whether a file is such a page, which may be replaced by another."""
    try:
        return f'<p class="kicker">{kicker}</p>' in file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _rendered(*, settings: dict[str, Any], **parts: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        settings=json.dumps(settings, indent=2, ensure_ascii=False, default=str),
        **parts,
    )


def alone(drawing: Markup) -> str:
    """A drawing as a file of its own, with a margin and the colours of the page: the wide one."""
    head, end, rest = str(drawing).partition("</svg>")[0].replace(' class="wide"', "", 1).partition(">")

    def with_margin(found: re.Match[str]) -> str:
        w, h = (int(side) + 2 * MARGIN for side in found.groups())
        return f'viewBox="{-MARGIN} {-MARGIN} {w} {h}" width="{w}"'

    head = re.sub(r'viewBox="0 0 (\d+) (\d+)" width="\d+"', with_margin, head)
    sheet = (HERE / "page.css").read_text(encoding="utf-8")
    own = "svg { background: var(--paper); font-family: system-ui, sans-serif; }"
    return f"{head}{end}<style>{sheet}{own}</style>{rest}</svg>\n"


def figures(summary: dict[str, Any]) -> list[Figure]:
    """Those that the results at hand allow."""
    made = (_differences(summary), _by_task(summary), _against_parameters(summary), _against_time(summary))
    found = (*made, _curves(summary), _entropy(summary), _utilisation(summary))
    return [figure for figure in found if figure is not None]


def _done(summary: dict[str, Any]) -> list[tuple[int, Arm]]:
    """Arms with results, each with the number of its colour."""
    return [(i, arm) for i, arm in enumerate(summary["arms"]) if "scores" in arm]


def _differences(summary: dict[str, Any]) -> Figure | None:
    gaps = [(i, arm["arm"], arm["difference"]) for i, arm in _done(summary) if arm["difference"] is not None]
    if not gaps:
        return None
    baseline = summary["baseline"]
    said = "; ".join(f"{name} {100 * gap['mean']:+.1f}" for _, name, gap in gaps)
    drawing, clipped = charts.intervals(
        [charts.Dot(name, gap["mean"], gap["interval"], gap["values"], i) for i, name, gap in gaps],
        zero=baseline,
        title=f"Difference of the mean score to {baseline}",
        description=f"In points: {said}.",
    )
    caption = (
        "Dot: the mean over tasks and seeds. Ring: one seed. Bar: 95 % of 10,000 bootstrap draws of the scored rows, "
        "paired by row; another training would move the dot about as far as the rings lie apart."
    )
    return Figure(f"Difference to {baseline}", [("", drawing)], caption + _ARROW * clipped)


def _by_task(summary: dict[str, Any]) -> Figure | None:
    arms = [arm for _, arm in _done(summary) if arm["difference"] is not None]
    if not arms:
        return None
    tasks, baseline = list(summary["tasks"]), summary["baseline"]
    values = [[arm["difference"]["by_task"][task]["mean"] for task in tasks] for arm in arms]
    drawing, clipped = charts.heat(
        [arm["arm"] for arm in arms],
        tasks,
        values,
        title=f"Difference to {baseline} by task",
        description="Percentage points, one row an arm and one column a task; the score table has the scores.",
    )
    caption = f"Percentage points to {baseline}, by task. Blue is above it, orange below."
    if clipped:
        caption += " What lies far out shares the strongest colour."
    return Figure("Where the difference is made", [("", drawing)], caption)


def _against_parameters(summary: dict[str, Any]) -> Figure | None:
    """None where the arms were given equally many; an oracle may have had more."""
    counts = [arm["trainable_parameters"] or 0 for _, arm in _done(summary) if arm["method"] != "oracle"]
    if not counts or max(counts) <= MATCHED * min(counts):
        return None
    return _scatter(
        summary, lambda arm: arm["trainable_parameters"], "Score and trainable parameters", "trainable parameters"
    )


def _against_time(summary: dict[str, Any]) -> Figure | None:
    return _scatter(
        summary,
        lambda arm: None if arm["overhead"] is None else 100 * arm["overhead"],
        "Score and time of training",
        f"time a token over {summary['baseline']}, %",
    )


def _scatter(summary: dict[str, Any], at: Callable[[Arm], float | None], heading: str, across: str) -> Figure | None:
    """Mean scores against what `at` reads of an arm; None with fewer than two."""
    found = [(i, arm, x) for i, arm in _done(summary) if (x := at(arm)) is not None]
    if len(found) < 2:
        return None
    dots = [charts.Point(arm["arm"], x, 100 * arm["mean"], 100 * (arm["sd"] or 0.0), i) for i, arm, x in found]
    said = "; ".join(f"{p.label} {p.y:.1f} % at {p.x:,.4g}" for p in dots)
    title = f"Mean score against {across}"
    drawing, clipped = charts.scatter(dots, across=across, up="mean score, %", title=title, description=f"{said}.")
    caption = "Bar: one standard deviation over seeds, to each side." + _ARROW * clipped
    return Figure(heading, [("", drawing)], caption)


def _curves(summary: dict[str, Any]) -> Figure | None:
    return _lines(
        summary,
        lambda arm: arm["curve"],
        "Training loss",
        "Task loss alone, without the routers' auxiliary loss; each point averages seeds and neighbouring steps.",
        across="step",
        up="task loss",
        title="Training loss by step",
        logarithmic=True,
    )


def _entropy(summary: dict[str, Any]) -> Figure | None:
    return _lines(
        summary,
        lambda arm: [(float(k), v) for k, v in (arm["routing"] or {}).get("entropy_by_layer", {}).items()],
        "How certain the routers are",
        "Mean entropy of a token's probabilities, before experts are selected: 0 is certain, 1 is uniform.",
        across="layer",
        up="entropy over log E",
        title="Router entropy by layer",
    )


def _lines(
    summary: dict[str, Any],
    of: Callable[[Arm], Sequence[tuple[float, float]]],
    heading: str,
    caption: str,
    *,
    title: str,
    **axes: Any,
) -> Figure | None:
    """A line for each arm that `of` finds points for."""
    series = [charts.Line(arm["arm"], found, i) for i, arm in _done(summary) if (found := of(arm))]
    if not series:
        return None
    said = "; ".join(f"{s.label} from {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in series)
    return Figure(
        heading, [("", charts.lines(series, title=title, description=f"First to last: {said}.", **axes))], caption
    )


def _utilisation(summary: dict[str, Any]) -> Figure | None:
    routed = [(arm, (arm["routing"] or {}).get("by_layer_and_task", {})) for _, arm in _done(summary)]
    found = [(arm, {k: v for k, v in layers.items() if v}) for arm, layers in routed if any(layers.values())]
    if not found:
        return None
    title, strongest = "Experts' share of the weight by layer and task", charts.largest(layers for _, layers in found)
    said = "One row a task, one block of columns a layer, one column an expert."
    made = [
        (name, charts.shares(layers, title=f"{title}, {name}", description=said, strongest=strongest))
        for name, layers in ((arm["arm"], layers) for arm, layers in found)
    ]
    seeds = {arm["seeds"][0] for arm, _ in found}
    caption = (
        "Share of the weight that each expert got, averaged over a layer's modules, whose experts were aligned by the "
        f"tasks that they answer; seed {', '.join(map(str, sorted(seeds)))}. Rows that look alike mean that tasks are "
        "not told apart."
    )
    return Figure("Who does what", made, caption)
