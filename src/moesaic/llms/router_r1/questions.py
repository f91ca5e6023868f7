"""Questions as people have them: JSONL, {"question": …, "answers": […]} a line."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from moesaic.data.jsonl import decode, encodable, lines
from moesaic.errors import ConfigError, DataError, path_of
from moesaic.llms.catalog import Catalog, Model
from moesaic.llms.router_r1.engine import Question

_SHAPE = 'a line is {"question": "…", "answers": ["…"]}, and "models": ["…"] where not all may be asked'


def read_questions(file: str, catalog: Catalog, alphas: Sequence[float] = (), seed: int = 0) -> list[Question]:
    """Questions of a file, about which the catalog's models may be asked.

    Args:
        alphas: weights of cost of which each question draws one.
    Raises:
        DataError: a line is none, or the same as another. ConfigError: a model cannot be asked.
    """
    check_askable(catalog)
    draw, found, taken = random.Random(f"alphas {seed}"), list[Question](), dict[tuple[str, ...], str]()
    twice = list[str]()
    for where, line in lines(path_of(file)):
        row = decode(line, where)
        question = _question(row, where, catalog, draw.choice(alphas) if alphas else None)
        key = (question.text, *question.catalog)
        if key in taken:
            twice.append(f"{where}: this question stands in {taken[key]} already: keep one")
        taken[key] = where
        found.append(question)
    if twice:
        raise DataError(twice[0] + (f"; so do {len(twice) - 1:,} others" if len(twice) > 1 else ""))
    if not found:
        raise DataError(f"{file} is empty: {_SHAPE}")
    return found


def _question(row: Any, where: str, catalog: Catalog, alpha: float | None) -> Question:
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
        raise DataError(f"{where}: {_SHAPE}")
    answers = row.get("answers", row.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    if not (isinstance(answers, list) and answers and all(isinstance(a, str) and a.strip() for a in answers)):
        raise DataError(f"{where}: answers are texts, one at least: {_SHAPE}")
    names = row.get("models")
    if names is not None and not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        raise DataError(f"{where}: models are names out of the catalog, one at least")
    try:
        chosen = catalog if names is None else Catalog(_distinct(names, catalog), catalog.source)
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None
    truths = tuple(encodable(answer, "answers", where) for answer in answers)
    return Question(encodable(row["question"], "question", where), chosen, truths, alpha=alpha)


def _distinct(names: Sequence[str], catalog: Catalog) -> list[Model]:
    return list({model.name: model for model in map(catalog.resolve, names)}.values())


def check_askable(catalog: Catalog) -> None:
    """Raise ConfigError for a model that cannot be asked over HTTP, or whose key is not set."""
    for model in catalog.values():
        if not model.endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"{catalog.source}: model {model.name} has no endpoint of its own (http://…/v1): add it")
        model.key()


def check_named(catalog: Catalog, dialect: str) -> None:
    """Raise ConfigError for a name that a dialect cannot write."""
    for model in catalog.values() if dialect == "tags" else ():
        if ":" in model.name or "<" in model.name:
            raise ConfigError(
                f"{catalog.source}: model {model.name}: a search ends a name at its colon, so the tags cannot name it: "
                f"name it otherwise, with served_as: {model.name}, or dialect=calls"
            )
