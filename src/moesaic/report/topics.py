"""TopicLoRA's graph of topics to look at: a table for the terminal, an SVG for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from markupsafe import Markup
from torch import Tensor

from moesaic.report.svg import beside, circle, drawing, line, tag, text

if TYPE_CHECKING:
    from rich.table import Table


class _Settings(Protocol):
    encoder: str
    seed: int


class Topics(Protocol):
    """What is drawn: Nt topics in a graph, and E experts among them."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    prototypes: Tensor
    assignment: Tensor
    adjacency: Tensor
    facts: dict[str, float | None]

    @property
    def settings(self) -> _Settings: ...


_WIDTH, _HEIGHT, _MARGIN, _LEGEND = 1200, 900, 70, 190
_STYLE = """
.paper { fill: #fdfdfb } .edge { stroke: #8a939b; stroke-opacity: .3 } .node { stroke: #fdfdfb; stroke-width: 1.5 }
text { font: 11px system-ui, sans-serif; fill: #1c2126; paint-order: stroke; stroke: #fdfdfb; stroke-width: 3px }
.head { fill: #5b646d } .key { font-size: 12px }
@media (prefers-color-scheme: dark) {
.paper { fill: #14181c } .node { stroke: #14181c } text { fill: #e8ebed; stroke: #14181c } .head { fill: #9aa5af }
}"""
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#777777")


def rows(topics: Topics, *, top: int = 3) -> list[dict[str, Any]]:
    """One a topic, ordered by its first expert: {"topic", "group", "experts": [[expert, share], ...]}.

    Experts after the first are left out below a share of 0.05.
    """
    found: list[dict[str, Any]] = []
    for name, group, shares in zip(topics.names, topics.groups, topics.assignment, strict=True):
        share, expert = shares.topk(min(top, len(shares)))
        pairs = enumerate(zip(expert, share, strict=True))
        experts = [[int(e), round(float(s), 3)] for i, (e, s) in pairs if i == 0 or s >= 0.05]
        found.append({"topic": name, "group": group, "experts": experts})
    return sorted(found, key=lambda row: (row["experts"][0][0], row["topic"]))


def table(topics: Topics) -> Table:
    """Topic, group and top experts, a line each."""
    from rich.table import Table
    from rich.text import Text

    made = Table("topic", "group", "experts", title=Text(caption(topics), style="table.title"))
    for row in rows(topics):
        experts = ", ".join(f"{e} ({100 * s:.0f}%)" for e, s in row["experts"])
        made.add_row(Text(row["topic"]), Text(row["group"]), experts)
    return made


def caption(topics: Topics) -> str:
    """What it is, in a line."""
    before, after, auc = (topics.facts[name] for name in ("loss_before", "loss_after", "link_auc"))
    num_edges = int((topics.adjacency > 0).sum()) // 2
    links = "-" if auc is None else f"{auc:.3f}"
    return (
        f"{len(topics.names)} topics, {num_edges} edges, {len(topics.prototypes)} experts; "
        f"L1 {before:.3f} to {after:.3f}, held-out links AUC {links}; encoder {topics.settings.encoder}"
    )


def svg(topics: Topics) -> str:
    """The graph as a self-contained SVG: a node's colour is its first expert, an edge's width its weight."""
    at = [(x, y) for x, y in layout(topics.adjacency, seed=topics.settings.seed).tolist()]
    owner = topics.assignment.argmax(dim=1).tolist()
    heaviest = float(topics.adjacency.max().clamp(min=1e-9))
    experts = len(topics.prototypes)
    parts = [tag("style", Markup(_STYLE)), tag("rect", width="100%", height="100%", class_="paper")]
    for i, j in topics.adjacency.triu(1).nonzero().tolist():
        width = 0.4 + 2 * float(topics.adjacency[i, j]) / heaviest
        parts.append(line(at[i][0], at[i][1], at[j][0], at[j][1], "edge", stroke_width=width))
    for (x, y), name, group, expert in zip(at, topics.names, topics.groups, owner, strict=True):
        said = tag("title", f"{name} ({group}): expert {expert}")
        parts.append(circle(x, y, 7.0, "node", said, fill=_colour(expert)))
    frame = (4.0, 4.0, float(_WIDTH - _LEGEND), _HEIGHT - 4.0)
    for name, (x, y, anchor) in zip(topics.names, beside(at, topics.names, frame, size=11.0), strict=True):
        parts.append(text(x, y, name, anchor=anchor))
    x, step = _WIDTH - _LEGEND + 40.0, min(24.0, (_HEIGHT - 2.0 * _MARGIN) / experts)
    parts.append(text(x - 8, _MARGIN - 24.0, "topics by first expert", class_="head"))
    for expert in range(experts):
        y = _MARGIN + step * expert
        parts.append(circle(x, y, min(7.0, step / 2), "node", fill=_colour(expert)))
        parts.append(text(x + 16, y + 4, f"expert {expert}: {owner.count(expert)}", class_="key"))
    return f"{drawing(_WIDTH, _HEIGHT, 'Topics and their experts', caption(topics), parts)}\n"


def layout(edges: Tensor, *, seed: int = 0, rounds: int = 300) -> Tensor:
    """Positions (Nt, 2) on the canvas by springs (Fruchterman & Reingold 1991): edges pull, all pairs push."""
    num = len(edges)
    at = torch.rand(num, 2, generator=torch.Generator().manual_seed(seed))
    ideal = num**-0.5
    pull = edges / edges.max().clamp(min=1e-9)
    for step in range(rounds):
        gap = at[:, None] - at
        distance = gap.norm(dim=-1).clamp(min=1e-3)
        force = (ideal / distance).square() - pull * distance / ideal - 0.02 / ideal  # a little towards the middle
        move = (gap * force[..., None]).sum(dim=1)
        length = move.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        at = at + move / length * length.clamp(max=0.1 * (1 - step / rounds))
    low, high = at.amin(dim=0), at.amax(dim=0)
    room = torch.tensor([_WIDTH - _LEGEND - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN])
    return _MARGIN + (at - low) / (high - low).clamp(min=1e-9) * room


def _colour(expert: int) -> str:
    """One of eight colours that stay apart for the colour-blind; then evenly spread hues."""
    return _COLOURS[expert] if expert < len(_COLOURS) else f"hsl({137 * expert % 360} 45% 55%)"
