"""Categories for prompts that come without: names, descriptions and examples, in a file that is there to be edited.

A prompt takes the category of the nearest description or example. That is a weak label: it follows words more than what
is asked, more so with tfidf. Categories of one's own, in the table, are better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesaic.errors import ConfigError, path_of
from moesaic.llms.coe.encoders import Encoder
from moesaic.llms.coe.problem import GENERAL
from moesaic.llms.tables import Floats
from moesaic.runs.settings import read_yaml

OURS = Path(__file__).with_name("taxonomy.yaml")


@dataclass(frozen=True)
class Taxonomy:
    """T texts, descriptions and examples, and of which category each is."""

    texts: tuple[str, ...]
    categories: tuple[str, ...]

    @classmethod
    def read(cls, file: str | Path = OURS) -> Taxonomy:
        """`categories:`, by name `description:` and `examples:`. Raises ConfigError for anything else."""
        path = path_of(file)
        stored = read_yaml(path).get("categories")
        if not isinstance(stored, dict) or len(stored) < 2:
            raise ConfigError(f"{path}: categories must hold two names at least, each with description and examples")
        texts: list[str] = []
        names: list[str] = []
        for name, held in stored.items():
            if not isinstance(held, dict) or held.keys() - {"description", "examples"}:
                raise ConfigError(f"{path}: {name} must hold description and examples, and nothing else")
            told, shown = held.get("description"), held.get("examples") or []
            found = [*([] if told is None else [told]), *(shown if isinstance(shown, list) else [shown])]
            if not found or not all(isinstance(text, str) and text.strip() for text in found):
                raise ConfigError(f"{path}: {name} needs a description or examples, which are texts")
            texts += found
            names += [name] * len(found)
        return cls(tuple(texts), tuple(names))

    def label(self, prompts: Sequence[str], encoder: Encoder, least: float = 0.1) -> tuple[list[str], Floats]:
        """The nearest category of each prompt, `general` below a cosine of `least`; and that cosine."""
        cosines = encoder(prompts) @ encoder(self.texts).T
        nearest, at = cosines.max(axis=1), cosines.argmax(axis=1)
        found = [self.categories[i] if near >= least else GENERAL for i, near in zip(at, nearest, strict=True)]
        return found, np.asarray(nearest, float)
