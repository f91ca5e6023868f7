"""Prompts of three kinds, told by their words, with some between; and models that are good at one kind each."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from moesaic.llms.catalog import Catalog
from moesaic.llms.tables import Table

WORDS = {
    "birds": ["heron", "wren", "plover", "nest", "feather", "wing", "beak", "egret", "moult", "flock", "roost"],
    "metal": ["anvil", "forge", "rivet", "alloy", "ingot", "solder", "brass", "zinc", "lathe", "weld", "furnace"],
    "sums": ["add", "divide", "total", "remainder", "fraction", "decimal", "multiply", "digits", "ratio", "minus"],
}
SHARED = ["please", "what", "is", "the", "of", "a", "and", "how", "many", "say", "which", "for", "with", "in"]
MODELS = ("all-9b", "bird-1b", "metal-2b", "sums-3b")


def prompts(count: int, seed: int = 0, mixed: float = 0.15) -> tuple[list[str], list[str]]:
    """Texts and kinds; a share of them takes half of its words from another kind."""
    draw = random.Random(seed)
    texts, kinds = [], []
    for i in range(count):
        kind = [*WORDS][i % len(WORDS)]
        other = draw.choice([*WORDS]) if draw.random() < mixed else kind
        words = draw.choices(WORDS[kind], k=3) + draw.choices(WORDS[other], k=3) + draw.choices(SHARED, k=6)
        draw.shuffle(words)
        texts.append(" ".join(words))
        kinds.append(kind)
    return texts, kinds


def table(count: int = 180, seed: int = 0, **given: Any) -> Table:
    """Each small model is right on its own kind nine times of ten, and seldom else; the large one mostly."""
    texts, kinds = prompts(count, seed)
    chance = np.array([[0.7, *(0.9 if name == kind else 0.15 for name in WORDS)] for kind in kinds])
    scores = (np.random.default_rng(seed).random(chance.shape) < chance).astype(float)
    costs = np.tile([9e-3, 1e-3, 2e-3, 3e-3], (count, 1))
    held: dict[str, Any] = {"prompts": tuple(texts), "categories": tuple(kinds), "models": MODELS, "scores": scores,
                            "costs": costs}  # fmt: skip
    return Table(**{**held, **given})


def catalog() -> Catalog:
    sizes = {"all-9b": 9, "bird-1b": 1, "metal-2b": 2, "sums-3b": 3}
    return Catalog.of([{"name": n, "parameters": b, "input_price": b, "output_price": b} for n, b in sizes.items()])
