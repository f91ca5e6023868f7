"""Policies that follow a script in the world of lists: what a warm start imitates, and what a table compares with.

A script knows how a question is taken apart, hop by hop, and copies replies; whom it asks is a rule of its own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moesaic.llms.catalog import Model
from moesaic.llms.router_r1.engine import Question, Written
from moesaic.llms.router_r1.world import called, written
from moesaic.models.nano.tasks import CUES

Choose = Callable[[Question, int], str]
"""From a question and a hop to the name of a model that the question offers."""


def at_random(seed: int | str) -> Choose:
    draw = random.Random(f"script {seed}")
    return lambda question, hop: draw.choice(list(question.catalog))


def able(question: Question, hop: int) -> list[Model]:
    """Whom the prompt says to know the hop's task."""
    cue = CUES[question.about["tasks"][hop]]
    return [model for model in question.catalog.values() if cue in model.description.split()]


def able_at_random(seed: int | str) -> Choose:
    """One of those, whatever its price: reading is to be learned from it, choosing is not."""
    draw = random.Random(f"script {seed}")
    return lambda question, hop: draw.choice(able(question, hop)).name


def always(name: str) -> Choose:
    """One of `KNOWS` where it is offered, and else the first that is."""
    return lambda question, hop: called(question, name) or next(iter(question.catalog))


def cheapest(question: Question, hop: int) -> str:
    """Of those that the prompt says know the hop's task, the cheapest: as good as it gets."""
    return min(able(question, hop), key=lambda model: (model.output_price, model.name)).name


@dataclass
class Script:
    """A policy for these questions, in their order.

    Attributes:
        choose: whom to ask. whole: ask once, with the whole question, and answer with the reply.
    """

    questions: Sequence[Question]
    choose: Choose
    whole: bool = False

    def begin(self, prompts: Sequence[str]) -> Script:
        self._hop = [0] * len(prompts)
        self._held = [written(question.about["digits"]) for question in self.questions]
        return self

    def write(self, who: Sequence[int]) -> list[Written]:
        return [Written(text := self._line(i), len(text.split())) for i in who]

    def _line(self, i: int) -> str:
        question, hop = self.questions[i], self._hop[i]
        cues = [CUES[task] for task in question.about["tasks"]]
        if self.whole:
            cues = [" then ".join(cues)]
        self._hop[i] += 1
        if hop == len(cues):
            return f"<think> done </think><answer> {self._held[i]} </answer>"
        name = self.choose(question, hop)
        return f"<think> {cues[hop]} ? {name} </think><search> {name}: {self._held[i]} {cues[hop]} = </search>"

    def read(self, who: int, text: str) -> tuple[int, ...]:
        said = re.sub(r"</?information>", " ", text)
        self._held[who] = " ".join(said.split()) or "none"
        return ()

    def clip(self, text: str, tokens: int) -> str:
        return " ".join(text.split()[:tokens])
