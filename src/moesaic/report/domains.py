"""The page of a language model made of experts: what it loses by domain, and which experts each domain takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.report import charts
from moesaic.report.page import Figure, of_run
from moesaic.report.text import Grid

ByDomain = Mapping[str, Mapping[str, float]]


def page(
    kicker: str,
    title: str,
    *,
    facts: Sequence[tuple[str, str]],
    columns: Mapping[str, ByDomain],
    routing: Mapping[str, Any] | None,
    curve: Sequence[tuple[float, float]],
    settings: dict[str, Any],
    versions: dict[str, str],
) -> str:
    """A self-contained page.

    Args:
        columns: by name (before, after), by domain, `loss`, `perplexity` and `bits_per_byte`.
        routing: `by_layer` (layer -> domain -> shares) and `entropy` (domain -> layer -> entropy); None if none.
        curve: (step, loss).
    """
    figures = [figure for figure in (_curve(curve), _shares(routing), _entropy(routing)) if figure is not None]
    return of_run(
        kicker, title, facts=facts, grids=[_grid(columns)] if any(columns.values()) else [], figures=figures,
        settings=settings, versions=versions,
    )  # fmt: skip


def _grid(columns: Mapping[str, ByDomain]) -> Grid:
    domains = list(next(of for of in columns.values() if of))
    rows = [[d, *(f"{of[d]['perplexity']:,.2f}" for of in columns.values())] for d in domains]
    means = [math.exp(sum(of[d]["loss"] for d in domains) / len(domains)) for of in columns.values()]
    rows.append(["mean", *(f"{value:,.2f}" for value in means)])
    legend = [("mean", "geometric: the exponential of the mean loss")]
    return Grid("Perplexity of held-out text, by domain", ["domain", *columns], rows, legend)


def _curve(curve: Sequence[tuple[float, float]]) -> Figure | None:
    if len(curve) < 2:
        return None
    drawn = charts.lines(
        [charts.Line("loss", curve, 0)],
        across="step", up="nats a token", title="Training loss by step", logarithmic=True,
        description=f"From {curve[0][1]:.2f} to {curve[-1][1]:.2f}.",
    )  # fmt: skip
    return Figure("Training loss", [("", drawn)], "Each point averages neighbouring steps.")


def _shares(routing: Mapping[str, Any] | None) -> Figure | None:
    if not routing:
        return None
    title = "Experts' share of the weight by layer and domain"
    said = "One row a domain, one block of columns a layer, one column an expert."
    layers = routing["by_layer"]
    first, *others = layers.values()
    if others and all(other == first for other in others):
        layers = {"all": first}
    drawn = charts.shares(layers, title=title, description=said)
    caption = "Rows that look alike mean that domains are not told apart."
    return Figure("Who does what", [("", drawn)], caption)


def _entropy(routing: Mapping[str, Any] | None) -> Figure | None:
    if not routing:
        return None
    series = [
        charts.Line(domain, [(float(layer), value) for layer, value in of.items()], i)
        for i, (domain, of) in enumerate(routing["entropy"].items())
    ]
    if len(series[0].points) < 2 or all(len({y for _, y in line.points}) == 1 for line in series):
        return None
    title = "Router entropy by layer"
    drawn = charts.lines(series, across="layer", up="entropy over log E", title=title, description="One line a domain.")
    caption = "Mean entropy of a token's probabilities, before experts are selected: 0 is certain, 1 is uniform."
    return Figure("How certain the routers are", [("", drawn)], caption)
