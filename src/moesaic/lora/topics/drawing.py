"""A graph of topics to look at: a table for the terminal, an SVG for the rest. Needs no plotting library."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesaic.lora.topics.artefact import Topics

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH, _HEIGHT, _MARGIN, _LEGEND = 1200, 900, 70, 190
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#777777")


def rows(topics: Topics, *, top: int = 3) -> list[dict[str, Any]]:
    """One a topic, ordered by its first expert: {"topic", "group", "experts": [[expert, share], ...]}."""
    found: list[dict[str, Any]] = []
    for name, group, shares in zip(topics.names, topics.groups, topics.assignment, strict=True):
        share, expert = shares.topk(min(top, len(shares)))
        experts = [[int(e), round(float(s), 3)] for e, s in zip(expert, share, strict=True) if s >= 0.05]
        found.append({"topic": name, "group": group, "experts": experts})
    return sorted(found, key=lambda row: (row["experts"][0][0], row["topic"]))


def table(topics: Topics) -> Table:
    """Topic, group and top experts, a line each."""
    from rich.table import Table

    made = Table("topic", "group", "experts", title=caption(topics))
    for row in rows(topics):
        experts = ", ".join(f"{e} ({100 * s:.0f}%)" for e, s in row["experts"])
        made.add_row(row["topic"], row["group"], experts)
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
    at = layout(topics.adjacency, seed=topics.settings.seed).tolist()
    owner = topics.assignment.argmax(dim=1).tolist()
    heaviest = float(topics.adjacency.max().clamp(min=1e-9))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">',
        f"<title>{escape(caption(topics))}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, j in topics.adjacency.triu(1).nonzero().tolist():
        (x1, y1), (x2, y2) = at[i], at[j]
        width = 0.4 + 2 * float(topics.adjacency[i, j]) / heaviest
        parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#bbb" stroke-width="{width:.2f}" '
            'stroke-opacity="0.5"/>'
        )
    nodes = list(zip(at, topics.names, topics.groups, owner, strict=True))
    for (x, y), name, group, expert in nodes:
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="{_colour(expert)}" stroke="white">'
            f"<title>{escape(f'{name} ({group}): expert {expert}')}</title></circle>"
        )
    for (x, y), name, _, _ in nodes:
        parts.append(
            f'<text x="{x:.1f}" y="{y - 10:.1f}" font-size="11" text-anchor="middle" paint-order="stroke" '
            f'stroke="white" stroke-width="3">{escape(name)}</text>'
        )
    for expert in range(len(topics.prototypes)):
        x, y = _WIDTH - _LEGEND + 90, 40 + 20 * expert
        parts.append(f'<circle cx="{x}" cy="{y}" r="7" fill="{_colour(expert)}"/>')
        parts.append(f'<text x="{x + 14}" y="{y + 4}" font-size="12">expert {expert}</text>')
    return "\n".join([*parts, "</svg>", ""])


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
