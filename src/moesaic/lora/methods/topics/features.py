"""MiniLM's features of the packaged vocabulary, kept beside it: its topics need no encoder.

78 KB of float16. `python -m moesaic.lora.methods.topics.features` makes them anew; they are used only while they fit
the vocabulary's words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from moesaic.lora.methods.topics import encoders, vocabulary

ENCODER = "minilm"
FILE = Path(__file__).with_name("bigbench.safetensors")


def of(texts: Sequence[str], encoder: str) -> Tensor:
    """Unit features (N, f) of topics' texts: the kept ones if all are there, else from the encoder itself."""
    kept = _kept() if encoder == ENCODER else {}
    if all(text in kept for text in texts):
        return F.normalize(torch.stack([kept[text] for text in texts]).float(), dim=-1)
    return encoders.encoder(encoder)(texts)


def packaged_texts() -> list[str]:
    """The texts of every topic that the packaged vocabulary can give, whatever tasks are put on top."""
    words = vocabulary.load(vocabulary.PACKAGED)
    return [t.text for level in vocabulary.LEVELS for t in words.topics(level, min_tasks=0)]


@cache
def _kept() -> dict[str, Tensor]:
    texts = packaged_texts()
    with safe_open(FILE, framework="pt") as stored:
        if stored.metadata()["texts"] != _digest(texts):
            return {}
        return dict(zip(texts, stored.get_tensor("features"), strict=True))


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def make() -> None:
    """Encode the packaged vocabulary."""
    texts = packaged_texts()
    save_file({"features": encoders.encoder(ENCODER)(texts).half()}, FILE, metadata={"texts": _digest(texts)})


if __name__ == "__main__":
    make()
