"""Our own count of tokens, which stands in the ledger beside the backend's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, first_line

BYTES = 4
"""Of UTF-8 a token, where a model's tokenizer is not named: about what BPE takes for English prose."""
MESSAGE = 4
"""Tokens that a chat's template spends on each message."""


class Counter:
    """Counts by each model's tokenizer.json, where one is named; by bytes otherwise.

    Raises:
        ConfigError: a file that is no tokenizer.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._tokenizers = {model: _opened(file) for model, file in files.items()}

    def exact(self, model: str) -> bool:
        return model in self._tokenizers

    def count(self, model: str, texts: Iterable[str]) -> int:
        """Tokens of some texts together."""
        tokenizer = self._tokenizers.get(model)
        if tokenizer is None:
            return estimate(sum(len(text.encode("utf-8", "replace")) for text in texts))
        valid = [text.encode("utf-8", "replace").decode() for text in texts]
        return sum(len(found.ids) for found in tokenizer.encode_batch_fast(valid, add_special_tokens=False))


def estimate(size: int) -> int:
    """Tokens of so many bytes."""
    return -(-size // BYTES)


def _opened(file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file / "tokenizer.json" if file.is_dir() else file))
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(f"{file} is no tokenizer.json that can be read: {first_line(error)}") from None
