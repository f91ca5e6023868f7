"""Encoders: texts in, unit vectors (N, f) float32 out. Frozen, and the same for topics and for prompts.

minilm      all-MiniLM-L6-v2 from its package: mean over tokens, needs no hub
hashing     signed counts of words and letter trigrams in 256 buckets: no download, no meaning either; for tests
other       any Transformers encoder by folder or hub id, mean over tokens (as sentence-transformers models mostly do)
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.errors import ConfigError

Encoder = Callable[[Sequence[str]], Tensor]

MAX_TOKENS = 256
"""Of a text; the rest is cut. What MiniLM was trained with."""
BATCH = 32
HASH_SIZE = 256


def encoder(name: str) -> Encoder:
    """An encoder by name. Raises ConfigError, or MissingDependency for `minilm` without its package."""
    return hashing if name == "hashing" else TransformerEncoder(name)


def hashing(texts: Sequence[str]) -> Tensor:
    """Each word and each trigram of letters adds +1 or -1 to a bucket: unit rows (N, 256)."""
    rows = torch.zeros(len(texts), HASH_SIZE)
    for row, text in zip(rows, texts, strict=True):
        for word in re.findall(r"\w+", text.lower()):
            marked = f"<{word}>"
            for part in (word, *(marked[i : i + 3] for i in range(len(marked) - 2))):
                code = zlib.crc32(part.encode())
                row[code % HASH_SIZE] += 1 if code >> 31 else -1
    return F.normalize(rows, dim=-1)


class TransformerEncoder:
    """Mean of a stock encoder's last states over the real tokens, as unit rows (N, hidden_size)."""

    def __init__(self, name: str) -> None:
        from moesaic.models.embedded import load_model

        loaded = load_model(name)
        if loaded.kind != "encoder":
            raise ConfigError(f"encoder={name} is a language model; an encoder is needed, such as minilm")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = loaded.model.to(self.device).eval()
        self.tokenizer: Any = loaded.tokenizer
        self.max_tokens = min(MAX_TOKENS, getattr(self.model.config, "max_position_embeddings", MAX_TOKENS))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        from tqdm import tqdm

        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # rows of like length share a batch
        shown = sys.stderr.isatty()
        rows: list[Tensor] = [torch.empty(0)] * len(texts)
        with tqdm(total=len(texts), desc="encoding", unit="text", delay=2, leave=False, disable=not shown) as bar:
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                for index, row in zip(chosen, self._batch([texts[i] for i in chosen]), strict=True):
                    rows[index] = row
                bar.update(len(chosen))
        return torch.stack(rows)

    def _batch(self, texts: list[str]) -> Tensor:
        inputs = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        states = self.model(**inputs).last_hidden_state.float()
        share = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        return F.normalize((states * share).sum(1) / share.sum(1).clamp(min=1), dim=-1).cpu()
