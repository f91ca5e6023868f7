"""TopicLoRA's graph of topics to look at: a table for the terminal, an SVG for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from moesaic.report.labels import beside
from moesaic.report.page import alone
from moesaic.report.sheet import SERIES, SMALL, Sheet, drawn, shorten, width

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

    def draw(sheet: Sheet) -> None:
        sheet.resize(_WIDTH, _HEIGHT)
        for i, j in topics.adjacency.triu(1).nonzero().tolist():
            wide = 0.4 + 2 * float(topics.adjacency[i, j]) / heaviest
            sheet.line([at[i], at[j]], "soft", "edge", linewidth=wide, alpha=0.3)
        for (x, y), name, group, expert in zip(at, topics.names, topics.groups, owner, strict=True):
            sheet.dot(x, y, _colour(expert), 14, f"{name} ({group}): expert {expert}")
        names, frame = [shorten(name, 60) for name in topics.names], (4.0, 4.0, float(_WIDTH - _LEGEND), _HEIGHT - 4.0)
        places = beside(at, [width(name, 11) for name in names], frame, size=11.0)
        for name, (x, y, anchor) in zip(names, places, strict=True):
            sheet.text(x, y, name, ha=anchor, size=11, kind="name")
        x, step = _WIDTH - _LEGEND + 40.0, min(24.0, (_HEIGHT - 2.0 * _MARGIN) / experts)
        sheet.text(x - 8, _MARGIN - 28.0, "topics by first expert", size=SMALL, paint="soft")
        for expert in range(experts):
            y = _MARGIN + step * expert
            sheet.dot(x, y, _colour(expert), min(14.0, step))
            sheet.text(x + 16, y, f"expert {expert}: {owner.count(expert)}", size=12)

    return alone(drawn(draw, "Topics and their experts", caption(topics), {"": _WIDTH}))


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
    """One of the style sheet's, which stay apart for the colour-blind; then evenly spread hues."""
    return f"c{expert}" if expert < SERIES else f"hsl({137 * expert % 360} 45% 55%)"
