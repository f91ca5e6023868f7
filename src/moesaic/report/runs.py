"""The page of one run: what it cost and scored, how it learned, which expert does what, and some of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from moesaic.report import charts
from moesaic.report.page import Figure, of_run
from moesaic.report.tables import number
from moesaic.report.text import Grid, percent

Curve = Sequence[Mapping[str, Any]]

ROUTING = {
    "router_entropy": (
        "entropy", "Entropy of a token's probabilities over log E: 0 is certain, 1 uniform.",
    ),
    "router_dead_share": ("dead experts", "Dead: experts with less than a tenth of the fair share."),
    "router_task_information": (
        "task information", "Task information: what a task tells of the experts used, 1 is all.",
    ),
}  # fmt: skip
"""Figures of routing that lie between 0 and 1: what they are called, and what they say."""
KICKER = "moesaic run"
_POINTS = 60


def page(run: Mapping[str, Any]) -> str:
    """A self-contained page.

    Args:
        run: `name`, `method`, `model`, `settings`, `results` (of training; may be empty), `trained` (its steps, in
            words), `curve` (what was logged, a mapping with a `step` a line), `scores` (by split, as `moesaic eval`
            writes them), `samples` (by split), `experts` (their names, with the folders that they came from; empty
            where they have none).
    """
    split, scores = next(iter(run["scores"].items()), ("", None))
    figures = [_loss(run["curve"]), _over_time(run["curve"]), *_routed(scores, run["experts"]), _samples(run, split)]
    return of_run(
        KICKER,
        headline(run),
        facts=_facts(run, scores),
        grids=[*_grids(run["scores"]), *_sources(run["experts"])],
        figures=[figure for figure in figures if figure is not None],
        settings=run["settings"],
        versions=(scores or run["results"]).get("versions", {}),
    )


def headline(run: Mapping[str, Any]) -> str:
    """What came out, in a sentence."""
    what = f"{run['method']} on {run['model']}"
    if run["scores"]:
        split, scores = next(iter(run["scores"].items()))
        base = f", {percent(scores['base_mean'])}\u00a0% without it" if "base_mean" in scores else ""
        return f"{what}: {percent(scores['mean'])}\u00a0% of the answers {_rows_of(split, scores)} right{base}"
    if run["experts"] and not run["results"].get("steps"):
        return f"{what}: one model of {len(run['experts'])} adapters"
    if run["results"].get("steps"):
        return f"{what}: {run['results']['steps']:,} steps of training"
    return what


def _facts(run: Mapping[str, Any], scores: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    results = run["results"]
    trainable, total = results.get("trainable_parameters"), results.get("total_parameters")
    share = f" ({100 * trainable / total:.2g} % of all)" if trainable and total else ""
    seconds, speed = results.get("train_seconds"), results.get("tokens_per_second")
    memory = results.get("peak_memory_mib")
    found = [
        ("folder", run["name"]),
        ("tasks", ", ".join(results.get("tasks") or (scores or {}).get("tasks", {}))),
        ("adapter's parameters", trainable and f"{trainable:,}{share}"),
        ("training", results.get("steps") and f"{run['trained']} in {_time(seconds or 0)}"),
        ("taken", results.get("taken") and f"step {results['taken']['step']}, of the least held-out loss"),
        ("tokens a second", speed and number(speed, "{:,.0f}")),
        ("memory at most", memory and f"{memory:,.0f} MiB ({results.get('peak_memory_of', 'process')})"),
        ("device", results.get("device")),
        ("seed", run["settings"].get("seed")),
        ("scored by", (scores or {}).get("command")),
        ("made by", results.get("command")),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "", False)]


def _time(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


_COLUMNS = (
    ("base", "base_score", "the model without the adapter, on the same rows"),
    (
        "majority",
        "majority",
        "the commonest answer always, where all rows have the same choices",
    ),
)


def _grids(by_split: Mapping[str, Mapping[str, Any]]) -> list[Grid]:
    """A table of scores for each split that was scored."""
    made = []
    for split, scores in by_split.items():
        tasks = scores["tasks"]
        shown = [column for column in _COLUMNS if any(column[1] in found for found in tasks.values())]
        header = ["task", "rows", "metric", "score", *(name for name, _, _ in shown)]
        rows = []
        for task, found in tasks.items():
            score = percent(found["score"], found["stderr"])
            more = [percent(found.get(key)) for _, key, _ in shown]
            rows.append([task, f"{found['n']:,}", found["metric"].replace("_", " "), score, *more])
        means = {"base": scores.get("base_mean")}
        rows.append(["mean", "", "", percent(scores["mean"]), *(percent(means.get(name)) for name, _, _ in shown)])
        legend = [("±", "standard error of a share of so many rows"), *((name, said) for name, _, said in shown)]
        made.append(Grid(f"Scores {_rows_of(split, scores)}", header, rows, legend))
    return made


def _rows_of(split: str, scores: Mapping[str, Any]) -> str:
    """Which rows were scored: a file's, or a split's."""
    return f"on {scores['file']}" if "file" in scores else f"on the {split} split"


def _sources(experts: Mapping[str, str]) -> list[Grid]:
    if not experts:
        return []
    rows = [[name, str(i), folder] for i, (name, folder) in enumerate(experts.items())]
    return [Grid("Experts", ["expert", "number", "from"], rows, [])]


def _loss(curve: Curve) -> Figure | None:
    """The task's loss, and the held-out one where there is one."""
    series = []
    for i, (key, label) in enumerate((("loss", "training"), ("eval_loss", "held out"))):
        points = _points(curve, key)
        if len(points) > 1:
            series.append(charts.Line(label, _thinned(points), i))
    if not series:
        return None
    said = "; ".join(f"{s.label} from {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in series)
    drawn = charts.lines(
        series, across="step", up="task loss", title="Loss by step", description=f"{said}.", logarithmic=True
    )
    caption = "Task loss alone, without the routers' auxiliary loss."
    if len(_points(curve, "loss")) > _POINTS:
        caption += " Each point averages neighbouring steps."
    return Figure("How it learned", [("", drawn)], caption)


def _over_time(curve: Curve) -> Figure | None:
    series = [
        charts.Line(label, _thinned(points), i + 1)
        for i, (key, (label, _)) in enumerate(ROUTING.items())
        if len(points := _points(curve, key)) > 1
    ]
    if not series:
        return None
    said = "; ".join(f"{s.label} from {s.points[0][1]:.2f} to {s.points[-1][1]:.2f}" for s in series)
    drawn = charts.lines(series, across="step", up="0 to 1", title="Routing by step", description=f"{said}.")
    caption = " ".join(meaning for name, (_, meaning) in ROUTING.items() if len(_points(curve, name)) > 1)
    return Figure("How its routing changed", [("", drawn)], caption)


def _points(curve: Curve, key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in curve if _finite(line.get(key))]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_POINTS`, each the mean of its neighbours."""
    size = -(-len(points) // _POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _routed(scores: Mapping[str, Any] | None, experts: Mapping[str, str]) -> list[Figure]:
    routing = (scores or {}).get("routing")
    if not routing:
        return []
    names = ", ".join(f"{i} {name}" for i, name in enumerate(experts))
    numbered = f" Experts: {names}." if names else ""
    found = []
    layers = {layer: rows for layer, rows in routing.get("by_layer_and_task", {}).items() if rows}
    if not layers:  # rows of tasks that the run does not know
        layers = {layer: {"all rows": row} for layer, row in routing.get("by_layer", {}).items()}
    if layers:
        first, *others = layers.values()
        alike = others and all(other == first for other in others)
        drawn = charts.shares(
            {"all": first} if alike else layers, title="Experts' share of the weight by layer and task",
            description="One row a task, one block of columns a layer, one column an expert.",
        )  # fmt: skip
        caption = "Share of the weight that each expert got."
        if len(first) > 1:
            caption += " Rows that look alike mean that tasks are not told apart."
        if not experts:
            caption += " A layer's modules are averaged, their experts put in order by what they answer."
        found.append(Figure("Who does what", [("", drawn)], caption + numbered))
        tasks = {name: rows for name, rows in routing.get("by_module_and_task", {}).items() if rows}
        modules = _by_task(tasks or {n: {"all rows": row} for n, row in routing.get("utilisation", {}).items()})
        if not alike and modules:
            drawn = charts.shares(
                modules, over="task", title="Experts' share of the weight by module and task",
                description="One row a module, one block of columns a task, one column an expert.",
            )  # fmt: skip
            caption = "One row a module, with its own experts: a number means another expert in another row."
            found.append(Figure("Every module by itself", [("", drawn)], caption, folded=True))
    entropy = [(float(layer), value) for layer, value in routing.get("entropy_by_layer", {}).items()]
    if len(entropy) > 1 and len({value for _, value in entropy}) > 1:
        drawn = charts.lines(
            [charts.Line("entropy", entropy, 0)], across="layer", up="entropy over log E",
            title="Router entropy by layer", description="A point a layer.",
        )  # fmt: skip
        caption = "Mean entropy of a token's probabilities, before experts are selected: 0 is certain, 1 is uniform."
        found.append(Figure("How certain the routers are", [("", drawn)], caption))
    return found


def _by_task(modules: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Sequence[float]]]:
    """Shares by task, then module under a short name."""
    found: dict[str, dict[str, Sequence[float]]] = {}
    for name, tasks in modules.items():
        parts = [part for part in name.split(".") if part not in ("base_model", "model", "layers", "layer")]
        for task, row in tasks.items():
            found.setdefault(task, {})[".".join(parts)] = row
    return found


def _samples(run: Mapping[str, Any], split: str) -> Figure | None:
    """Answers with their tokens in the colours of their first experts."""
    rows = run["samples"].get(split, [])
    if not rows:
        return None
    parts = [_sample(row) for row in rows]
    caption = (
        "A token's colour is its first expert's, stronger the more of the weight that has; pale is an equal share. "
        "Behind the arrow is the answer, without the token that ends it."
    )
    experts: list[str] = next((row["experts"] for row in rows if "experts" in row), [])
    if experts:
        chips = Markup(" ").join(
            Markup('<span class="s{} chip">{}</span>').format(i % charts.SERIES, name) for i, name in enumerate(experts)
        )
        parts.insert(0, Markup("<p>{}</p>").format(chips))
    else:
        caption = "What was asked, what was answered, and where that was wrong what was right."
    return Figure("Some answers", [("", Markup("").join(parts))], caption)


def _sample(row: Mapping[str, Any]) -> Markup:
    verdict = "right" if row["correct"] else f"wrong: {row['wanted']}"
    if "tokens" in row:
        tokens = [_token(token, shares) for token, shares in zip(row["tokens"], row["by_token"], strict=True)]
        begin = len(tokens) - row.get("answered", 0)
        then = Markup(' <b title="the answer">→</b> ') if begin < len(tokens) else ""
        said = Markup("").join([*tokens[:begin], then, *tokens[begin:]])
    else:
        said = Markup("{} <b>{}</b>").format(row["prompt"], row["answer"])
    head = Markup('<p class="sample"><b>{}</b> {}</p>').format(row["task"], f"{row['answer']} ({verdict})")
    return head + Markup('<p class="tokens">{}</p>').format(said)


def _token(token: str, shares: Sequence[float]) -> Markup:
    if not any(shares):
        return Markup('<span title="none of them">{}</span>').format(token)
    best = max(range(len(shares)), key=shares.__getitem__)
    fair = 1 / len(shares)
    strength = max(0.0, (shares[best] - fair) / (1 - fair)) if len(shares) > 1 else 1.0
    return Markup('<span class="s{}" style="--share:{:.0f}%" title="expert {}: {:.0f} %">{}</span>').format(
        best % charts.SERIES, 45 * min(strength, 1.0), best, 100 * shares[best], token
    )
