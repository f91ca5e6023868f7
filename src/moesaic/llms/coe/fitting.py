"""How a composition is fitted."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Fitting:
    """How a composition is fitted."""

    map: str = field(
        default="posterior",
        metadata={
            "help": "hard: the category's expert; posterior: the best expected; blend: likewise, with k-NN, ridge"
        },
    )
    encoder: str = field(
        default="tfidf+minilm", metadata={"help": "tfidf, minilm, both with a +, or a sentence-transformers model"}
    )
    classifier: str = field(default="logistic", metadata={"help": "logistic or knn"})
    calibration: str | None = field(default="temperature", metadata={"help": "temperature, isotonic or null"})
    uncertainty: str = field(default="entropy", metadata={"help": "entropy, novelty, conformal or none"})
    accuracy: float = field(
        default=0.9, metadata={"help": "of categories, among held-out prompts that do not go to general"}
    )
    z: float = field(default=0.0, metadata={"help": "standard errors that are taken off a score before mapping"})
    taxonomy: str = field(default="", metadata={"help": "YAML file of categories, where data has none; ours if empty"})
    seed: int = field(default=0, metadata={"help": "of folds and of the encoder"})
