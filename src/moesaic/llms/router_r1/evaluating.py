"""What a policy makes of questions, beside ways that need none."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, path_of
from moesaic.llms.catalog import Catalog
from moesaic.llms.router_r1 import folder as folders
from moesaic.llms.router_r1 import scores
from moesaic.llms.router_r1.engine import Pool, Question, Rollout, roll
from moesaic.llms.router_r1.local import LocalPolicy
from moesaic.llms.router_r1.questions import check_named, read_questions
from moesaic.llms.router_r1.running import pool_of, tell_failures
from moesaic.llms.router_r1.settings import R1Eval
from moesaic.runs.folder import check_writable, write_text

AT_ONCE = 64
"""Questions that stand in one batch."""

Say = Callable[[str], None]


def policy_of(place: str) -> tuple[LocalPolicy, folders.Asking]:
    """A trained policy, or a base model as it is. Raises ConfigError where there is neither."""
    given = path_of(place)
    if folders.is_policy(given):
        return folders.load(place)
    if given.is_dir() and not (given / "config.json").is_file():
        raise ConfigError(f"{place} holds no policy; `moesaic llm r1 train` makes one")
    asking, loaded = folders.Asking(), folders.base(place)
    return LocalPolicy(
        loaded.model.eval(), loaded.tokenizer, temperature=0.0, max_new_tokens=asking.max_new_tokens
    ), asking  # fmt: skip


def adjusted(
    policy: LocalPolicy, asking: folders.Asking, turns: int | None, max_new_tokens: int | None
) -> tuple[LocalPolicy, folders.Asking]:
    """A policy that goes as far as is asked for now, where anything is."""
    if turns is not None:
        asking = replace(asking, turns=turns)
    if max_new_tokens is not None:
        asking = replace(asking, max_new_tokens=max_new_tokens)
        policy.max_new_tokens = max_new_tokens
    return policy, asking


def _check_out(out: Path, wanted: R1Eval) -> None:
    """Raise ConfigError where transcripts cannot go, or would replace what is there."""
    if out.is_dir():
        raise ConfigError(f"out={wanted.out} is a folder; name a file, such as transcripts.jsonl")
    if out.suffix != ".jsonl":
        raise ConfigError(f"out={wanted.out} must end in .jsonl")
    check_writable(out, f"out={wanted.out}")
    given = [path_of(file) for file in (wanted.data, wanted.train, wanted.catalog) if file]
    if out.exists() and any(file.exists() and out.samefile(file) for file in given):
        raise ConfigError(f"out={wanted.out} is what is read here; name another file")
    if out.exists() and not wanted.overwrite:
        raise ConfigError(f"out={wanted.out} is already there; overwrite=true replaces it")


def evaluate(wanted: R1Eval, place: str, *, say: Say = lambda line: None) -> dict[str, Any]:
    """Rows by who asks: figures as `scores.measured` gives them.

    Raises:
        ConfigError, DataError: something cannot be had. Nothing has been asked then.
    """
    catalog = Catalog.read(wanted.catalog)
    alphas = [] if wanted.alpha is None else [wanted.alpha]
    asked = read_questions(wanted.data, catalog, alphas)[: wanted.limit or None]
    learned = read_questions(wanted.train, catalog) if wanted.train else []
    out = path_of(wanted.out) if wanted.out else None
    if out is not None:
        _check_out(out, wanted)
    policy, asking = adjusted(*policy_of(place), wanted.turns, wanted.max_new_tokens)
    if folders.is_policy(path_of(place)):
        check_named(catalog, asking.dialect)
    beside = None
    if wanted.beside:
        other = policy_of(wanted.beside)[0]
        beside = LocalPolicy(
            other.model, other.tokenizer, temperature=0.0, max_new_tokens=asking.max_new_tokens, dialect=policy.dialect
        )  # fmt: skip
    pool = pool_of(wanted, asking.max_tokens, bare=asking.bare)

    def rolled(who: LocalPolicy, name: str) -> list[Rollout]:
        found: list[Rollout] = []
        for start in range(0, len(asked), AT_ONCE):
            part, limits = asked[start : start + AT_ONCE], asking.limits(wanted.budget)
            found += roll(who, pool, part, limits, say=asking.say, dialect=who.dialect)
            say(f"{name}: {len(found):,} of {len(asked):,} questions")
        return found

    try:
        found = rolled(policy, place)
        rows = {place: scores.measured(found)}
        if beside is not None:
            rows[f"{wanted.beside}, untrained"] = scores.measured(rolled(beside, wanted.beside))
        if wanted.every or learned:
            rows |= _without(wanted, pool, asked, learned, asking.bare, say)
    finally:
        pool.close()
        tell_failures(pool, say)
    if out is not None:
        write_text(out, "".join(json.dumps(r.trace()) + "\n" for r in found))
    return {"questions": len(asked), "rows": rows, "asked": pool.asked, "hits": pool.hits}


def _without(
    wanted: R1Eval, pool: Pool, asked: Sequence[Question], learned: Sequence[Question], bare: bool, say: Say
) -> dict[str, dict[str, Any]]:
    """Ways without a policy: one model for all, at random, k-NN, and the oracle; each asks once, with all of it."""
    say("asking each model each question")
    replies, chosen = scores.ask_every(pool, asked, bare=bare), {}
    if wanted.every:
        names = list(dict.fromkeys(name for q in asked for name in q.catalog))
        chosen = {f"{name}, once": scores.always(asked, name) for name in names}
    chosen["at random, once"] = scores.at_random(asked, wanted.seed)
    if learned:
        say("asking each model each question that k-NN learns from")
        told = scores.ask_every(pool, learned, bare=bare)
        chosen["k-NN, once"] = scores.nearest(asked, learned, told)
    chosen["oracle, once"] = scores.oracle(asked, replies)
    return {who: scores.once(asked, replies, whom) for who, whom in chosen.items()}
