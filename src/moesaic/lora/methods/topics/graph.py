"""Stage 1: a graph of topics, embedded by a two-layer graph convolution, and experts placed among the topics.

    Adj = w1 J + w2 C + w3 G         J shared tasks / tasks of either; C cosine of mutual top-5; G same group (Nt, Nt)
    Ahat = D^-1/2 (Adj + I) D^-1/2
    Z = n(Ahat relu(Ahat X W1) W2)   n: unit rows                                                             (Nt, dg)
    P = softmax(Z n(C)^T / 0.1)      C: expert prototypes, from spherical k-means on the first Z             (Nt, E)

    L1 = L_link + L_sep + L_bal + 0.1 L_ent
    L_link   cross-entropy of sigmoid(z_i z_j / 0.2) for edges and as many pairs without one, drawn anew each step
    L_sep    mean over expert pairs of relu(cos(c_i, c_j) - margin)^2
    L_bal    log E - H(mean_t P_t)
    L_ent    mean_t H(P_t)

A tenth of the edges, and of the other pairs, is held out of the convolution and of L_link, and gives the link AUC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.lora.methods.topics.vocabulary import Topic

NEIGHBOURS = 5
LINK_TEMPERATURE = 0.2
ASSIGN_TEMPERATURE = 0.1
ENTROPY_WEIGHT = 0.1
HELD_OUT = 0.1


def adjacency(topics: Sequence[Topic], x: Tensor, *, jaccard: float, cosine: float, group: float) -> Tensor:
    """Edge weights (Nt, Nt), symmetric with a zero diagonal, from topics and their unit features x (Nt, f)."""
    edges = jaccard * shared_tasks(topics) + cosine * mutual_neighbours(x)
    names = [t.group for t in topics]
    same = torch.tensor([[float(a == b) for b in names] for a in names])
    edges = edges + group * same
    return edges.fill_diagonal_(0)


def shared_tasks(topics: Sequence[Topic]) -> Tensor:
    """Jaccard overlap of the topics' tasks (Nt, Nt); 0 where the tasks are not listed."""
    overlap = torch.zeros(len(topics), len(topics))
    for i, a in enumerate(topics):
        for j, b in enumerate(topics):
            if a.tasks and b.tasks and i != j:
                overlap[i, j] = len(a.tasks & b.tasks) / len(a.tasks | b.tasks)
    return overlap


def mutual_neighbours(x: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Positive cosines (Nt, Nt) of pairs that are among each other's k nearest."""
    cosines = (x @ x.t()).fill_diagonal_(-1)
    near = torch.zeros_like(cosines).scatter(1, cosines.topk(min(k, len(x) - 1), dim=1).indices, 1.0)
    return cosines.relu() * near * near.t()


def normalized(edges: Tensor) -> Tensor:
    """D^-1/2 (Adj + I) D^-1/2: symmetric, eigenvalues in [-1, 1]; a node without edges keeps itself."""
    loops = edges + torch.eye(len(edges), dtype=edges.dtype)
    scale = loops.sum(dim=1).rsqrt()
    return loops * torch.outer(scale, scale)


@dataclass
class GCN:
    """Two graph convolutions (Kipf & Welling 2017), unit rows out: (Nt, f) -> (Nt, dg). Weights (f, h), (h, dg).

    No `nn.Module`: one is built while PEFT may have told modules to leave their parameters without storage.
    """

    first: Tensor
    second: Tensor

    @classmethod
    def drawn(cls, d_in: int, hidden: int, d_out: int, generator: torch.Generator) -> GCN:
        first, second = torch.empty(d_in, hidden), torch.empty(hidden, d_out)
        return cls(*(nn.init.xavier_uniform_(w, generator=generator).requires_grad_() for w in (first, second)))

    def __call__(self, ahat: Tensor, x: Tensor, drop: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        hidden = torch.relu(ahat @ (drop(x) @ self.first))
        return F.normalize(ahat @ (drop(hidden) @ self.second), dim=-1)


def spherical_kmeans(z: Tensor, k: int, generator: torch.Generator, *, rounds: int = 20) -> Tensor:
    """k unit centres (k, dg) of unit rows z, begun at a random row and at those farthest from the ones before."""
    chosen = [int(torch.randint(len(z), (1,), generator=generator))]
    while len(chosen) < k:
        nearest = (z @ z[chosen].t()).amax(dim=1)
        nearest[chosen] = math.inf
        chosen.append(int(nearest.argmin()))
    centres = z[chosen].clone()
    for _ in range(rounds):
        owner = (z @ centres.t()).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add(0, owner, z)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
    return centres


def assignment(z: Tensor, prototypes: Tensor) -> Tensor:
    """P (Nt, E): how much each expert is for each topic; rows sum to 1."""
    return torch.softmax(F.normalize(z, dim=-1) @ F.normalize(prototypes, dim=-1).t() / ASSIGN_TEMPERATURE, dim=-1)


def separation(prototypes: Tensor, margin: float) -> Tensor:
    """L_sep: mean over ordered pairs of relu(cos - margin)^2; 0 for a single expert."""
    unit = F.normalize(prototypes, dim=-1)
    num = len(unit)
    beyond = torch.relu(unit @ unit.t() - margin).square()
    return (beyond.sum() - beyond.diagonal().sum()) / max(num * (num - 1), 1)


def entropy(p: Tensor) -> Tensor:
    """In nats, over the last axis."""
    return torch.special.entr(p).sum(dim=-1)


def link_loss(z: Tensor, edges: Tensor, others: Tensor) -> Tensor:
    """Mean cross-entropy over edges and as many other pairs, both (pairs, 2); 0 without edges."""
    if not len(edges):
        return z.new_zeros(())
    scores = torch.cat([(z[p[:, 0]] * z[p[:, 1]]).sum(dim=1) for p in (edges, others)]) / LINK_TEMPERATURE
    truth = torch.cat([torch.ones(len(edges)), torch.zeros(len(others))])
    return F.binary_cross_entropy_with_logits(scores, truth)


def objective(
    z: Tensor, prototypes: Tensor, edges: Tensor, others: Tensor, *, separate: float, margin: float
) -> Tensor:
    """L1, a scalar, with L_sep weighed by `separate`. z (Nt, dg), prototypes (E, dg), edges and others (pairs, 2)."""
    p = assignment(z, prototypes)
    balance = math.log(len(prototypes)) - entropy(p.mean(dim=0))
    spread = separate * separation(prototypes, margin)
    return link_loss(z, edges, others) + spread + balance + ENTROPY_WEIGHT * entropy(p).mean()


def auc(positive: Tensor, negative: Tensor) -> float | None:
    """Share of (positive, negative) pairs in the right order, ties half; None where one side is empty."""
    if not len(positive) or not len(negative):
        return None
    gaps = positive[:, None] - negative
    return float((gaps > 0).float().mean() + 0.5 * (gaps == 0).float().mean())


@dataclass
class Embedding:
    """What stage 1 leaves: unit prototypes C (E, dg), assignment P (Nt, E), topics Z (Nt, dg), and how it went."""

    prototypes: Tensor
    assignment: Tensor
    nodes: Tensor
    loss_before: float
    loss_after: float
    link_auc: float | None


def embed(
    edges: Tensor,
    x: Tensor,
    *,
    num_experts: int,
    topic_dim: int = 64,
    hidden_dim: int = 128,
    dropout: float = 0.1,
    steps: int = 300,
    lr: float = 1e-2,
    separate: float = 1.0,
    margin: float = 0.0,
    seed: int = 0,
) -> Embedding:
    """Minimise L1 over the convolution and the prototypes by full-batch Adam, from one seed on the CPU.

    Args:
        edges: Adj (Nt, Nt). x: features (Nt, f).
        separate: weight of L_sep; 0 leaves it out.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = edges.triu(1).nonzero()
    others = (edges == 0).triu(1).nonzero()
    held, kept = _parted(pairs, generator)
    held_apart, apart = _parted(others, generator)
    seen = edges.clone()
    seen[held[:, 0], held[:, 1]] = seen[held[:, 1], held[:, 0]] = 0
    ahat = normalized(seen)

    gcn = GCN.drawn(x.shape[1], hidden_dim, topic_dim, generator)
    with torch.no_grad():
        prototypes = spherical_kmeans(gcn(ahat, x), num_experts, generator).requires_grad_()

    def drop(t: Tensor) -> Tensor:
        return t * (torch.rand(t.shape, generator=generator) >= dropout) / (1 - dropout) if dropout else t

    def without_edge() -> Tensor:
        return apart[torch.randint(max(len(apart), 1), (len(kept) if len(apart) else 0,), generator=generator)]

    def loss(z: Tensor, others: Tensor) -> Tensor:
        return objective(z, prototypes, kept, others, separate=separate, margin=margin)

    fixed = without_edge()
    with torch.no_grad():
        before = float(loss(gcn(ahat, x), fixed))
    optimizer = torch.optim.Adam([gcn.first, gcn.second, prototypes], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(gcn(ahat, x, drop), without_edge()).backward()
        optimizer.step()
    with torch.no_grad():
        z = gcn(ahat, x)
        after = float(loss(z, fixed))
        link_auc = auc(*((z[p[:, 0]] * z[p[:, 1]]).sum(dim=1) for p in (held, held_apart)))
        nodes, unit = gcn(normalized(edges), x), F.normalize(prototypes, dim=-1)
        return Embedding(unit, assignment(nodes, unit), nodes, before, after, link_auc)


def _parted(pairs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random tenth of the pairs, and the rest."""
    shuffled = pairs[torch.randperm(len(pairs), generator=generator)]
    number = round(HELD_OUT * len(pairs))
    return shuffled[:number], shuffled[number:]
