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
HELD = 16_384
"""Characters that a tokenizer is given at once where texts come in pieces."""


class Counter:
    """Counts by each model's tokenizer.json, where one is named; by bytes otherwise.

    Raises:
        ConfigError: a file that is no tokenizer.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._tokenizers = {model: _opened(file) for model, file in files.items()}

    def exact(self, model: str) -> bool:
        return model in self._tokenizers

    def tally(self, model: str) -> Tally:
        return Tally(self._tokenizers.get(model))

    def count(self, model: str, texts: Iterable[str]) -> int:
        """Tokens of some texts together."""
        tokenizer = self._tokenizers.get(model)
        if tokenizer is None:
            return estimate(sum(len(text.encode("utf-8", "replace")) for text in texts))
        valid = [text.encode("utf-8", "replace").decode() for text in texts]
        return sum(len(found.ids) for found in tokenizer.encode_batch_fast(valid, add_special_tokens=False))


class Tally:
    """Counts texts that come in pieces, and keeps few of them."""

    def __init__(self, tokenizer: Any = None) -> None:
        self._tokenizer = tokenizer
        self._tokens = self._bytes = self._length = 0
        self._held: list[str] = []

    def add(self, text: str) -> None:
        """The next piece."""
        if self._tokenizer is None:
            self._bytes += len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
            return
        for at in range(0, len(text), HELD):
            self._held.append(text[at : at + HELD])
            self._length += len(self._held[-1])
            if self._length >= HELD:
                self._tokens, self._held, self._length = self.total(), [], 0

    def add_tokens(self, count: int) -> None:
        """What is no text."""
        self._tokens += count

    def total(self) -> int:
        """Tokens of all that came."""
        if not self._held:
            return self._tokens + estimate(self._bytes)
        text = "".join(self._held).encode("utf-8", "replace").decode()
        return self._tokens + len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def estimate(size: int) -> int:
    """Tokens of so many bytes."""
    return -(-size // BYTES)


def _opened(file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file / "tokenizer.json" if file.is_dir() else file))
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(f"{file} is no tokenizer.json that can be read: {first_line(error)}") from None
