"""How well questions were answered, what that cost, and whom was asked; and ways without a policy to compare with."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moesaic.llms.catalog import Model
from moesaic.llms.router_r1.engine import Pool, Question, Reply, Rollout
from moesaic.llms.router_r1.rewards import exact_match, f1

DIRECT = "Answer in as few words as you can, with the answer alone.\n\nQuestion: {question}\n"
NEIGHBOURS = 20

Asked = Mapping[str, Reply]
"""Replies to one question, by the name of who was asked."""


def measured(found: Sequence[Rollout]) -> dict[str, Any]:
    """Means over rollouts: em, f1, shares broken and failed, cost (micro-dollars), calls, tokens, seconds.

    Beside them `named`, calls by model, and `commonest`, the share of those to the model that was asked most.
    """
    named = Counter(call.model for r in found for call in r.calls if call.asked)
    return {
        "em": statistics.fmean(exact_match(r.answer, r.question.truths) for r in found),
        "f1": statistics.fmean(f1(r.answer, r.question.truths) for r in found),
        "broken": statistics.fmean(bool(r.fault()) for r in found),
        "failed": statistics.fmean(r.failed for r in found), "cost": statistics.fmean(r.cost for r in found),
        "calls": statistics.fmean(len(r.calls) for r in found),
        "tokens": statistics.fmean(r.policy_tokens for r in found),
        "seconds": statistics.fmean(sum(call.seconds for call in r.calls) for r in found), **who(named),
    }  # fmt: skip


def who(named: Counter[str]) -> dict[str, Any]:
    """`named` and `commonest` of calls by model."""
    return {
        "commonest": max(named.values(), default=0) / max(1, sum(named.values())),
        "named": dict(named.most_common()),
    }


def ask_every(
    pool: Pool, questions: Sequence[Question], *, bare: bool = False, at_once: int = 100,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Asked]:  # fmt: skip
    """Each question to each model that it offers, once and whole."""
    found: list[Asked] = []
    for start in range(0, len(questions), at_once):
        part = questions[start : start + at_once]
        calls = [(model, _direct(q, bare)) for q in part for model in q.catalog.values()]
        replies = iter(pool.ask(calls))
        found += [{name: next(replies) for name in q.catalog} for q in part]
        progress(len(found))
    return found


def _direct(question: Question, bare: bool) -> str:
    return question.text if bare else DIRECT.format(question=question.text.strip())


def once(questions: Sequence[Question], replies: Sequence[Asked], whom: Sequence[str]) -> dict[str, Any]:
    """As `measured`, where one model is asked each question, and its reply is the answer."""
    said = [held[name] for held, name in zip(replies, whom, strict=True)]
    costs = [_cost(q.catalog[name], reply) for q, reply, name in zip(questions, said, whom, strict=True)]
    pairs = list(zip(questions, said, strict=True))
    return {
        "em": statistics.fmean(exact_match(reply.text, q.truths) for q, reply in pairs),
        "f1": statistics.fmean(f1(reply.text, q.truths) for q, reply in pairs),
        "failed": statistics.fmean(bool(reply.failure) for reply in said), "cost": statistics.fmean(costs),
        "calls": 1.0, "seconds": statistics.fmean(reply.seconds for reply in said), **who(Counter(whom)),
    }  # fmt: skip


def _cost(model: Model, reply: Reply) -> float:
    return 0.0 if reply.failure else model.cost(0, reply.tokens) * 1e6


def at_random(questions: Sequence[Question], seed: int = 0) -> list[str]:
    draw = random.Random(f"whom {seed}")
    return [draw.choice(list(q.catalog)) for q in questions]


def always(questions: Sequence[Question], name: str) -> list[str]:
    """One model where a question offers it, and else the first that it does."""
    return [name if name in q.catalog else next(iter(q.catalog)) for q in questions]


def oracle(questions: Sequence[Question], replies: Sequence[Asked]) -> list[str]:
    """The cheapest of those that are right; of all where none is."""
    found = []
    for q, held in zip(questions, replies, strict=True):
        able = [name for name in held if exact_match(held[name].text, q.truths)] or list(held)
        found.append(min(able, key=lambda name: (_cost(q.catalog[name], held[name]), name)))
    return found


def nearest(
    questions: Sequence[Question], learned: Sequence[Question], replies: Sequence[Asked], encoder: str = "tfidf"
) -> list[str]:
    """Who did best on the nearest questions of those that were learned from, the cheaper one of equals."""
    from moesaic.llms.coe.encoders import fitted

    encode = fitted(encoder, [q.text for q in learned])
    rows, known = encode([q.text for q in questions]), encode([q.text for q in learned])
    near = np.argsort(-(rows @ known.T), axis=1, kind="stable")[:, :NEIGHBOURS]
    found = []
    for q, at in zip(questions, near, strict=True):
        worth = {name: _worth(name, [(learned[i], replies[i]) for i in at]) for name in q.catalog}
        found.append(max(worth, key=lambda name: (worth[name], [*q.catalog].index(name) * -1)))
    return found


def _worth(name: str, near: Sequence[tuple[Question, Asked]]) -> tuple[float, float]:
    """Mean score among neighbours that offered it, and what it cost there, less being more."""
    said = [(q, held[name]) for q, held in near if name in held]
    if not said:
        return -1.0, 0.0
    score = statistics.fmean(exact_match(reply.text, q.truths) for q, reply in said)
    return score, -statistics.fmean(_cost(q.catalog[name], reply) for q, reply in said)
