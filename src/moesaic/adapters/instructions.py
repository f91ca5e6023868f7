"""One sentence that says what a task is, written by a language model behind an OpenAI-compatible endpoint (GLIDER).

Where the endpoint does not answer, the examples' own text stands in for the sentence, and a warning says so: the
encoder then compares prompts with prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from moesaic.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"
"""Environment variable that holds the endpoint's key, where it asks for one. It is sent, and neither kept nor shown."""
_ANSWERS: dict[str, str] = {}
"""Of this process, by digest: a config may be built more than once."""
EXAMPLES = 3
MAX_TOKENS = 64
LONGEST_SENTENCE = 1000
LONGEST = 2**20
"""Bytes of an answer."""
_ASKED = (
    "Below are up to three examples of one task, or a single input of it. Say in one sentence, in the imperative, what "
    "the task is in general: what is given, what is to be made of it, and the skill that this takes. Name nothing that "
    "is particular to the examples. Answer with that sentence alone."
)


def question(examples: Sequence[str]) -> str:
    """What a language model is asked of a task's examples."""
    return f"{_ASKED}\n\n" + "\n\n".join(f"Example {i}:\n{text}" for i, text in enumerate(examples, 1))


class _NoRedirects(HTTPRedirectHandler):
    """A redirect would take the key to somebody else: it is an error."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _read(response: Any, until: float) -> bytes:
    """A body that is no larger than `LONGEST` and there in time. Raises OSError otherwise."""
    found = b""
    while part := response.read1():
        found += part
        if len(found) > LONGEST or time.monotonic() > until:
            raise OSError("its answer is too long, or takes too long")
    return found


@dataclass
class Instructor:
    """Texts of a task to one sentence on it.

    Args:
        base_url: of the endpoint, such as http://127.0.0.1:8000/v1.
        model: its name there.
        cache: a folder where answers are kept, by a digest of all that was asked.
        retries: further tries after a failed one; the waits between them double, from `wait` seconds.
        timeout: seconds that a try may take.
    """

    base_url: str
    model: str
    cache: Path | None = None
    retries: int = 2
    timeout: float = 30.0
    wait: float = 0.5

    def __post_init__(self) -> None:
        try:
            host = urlsplit(self.base_url).hostname if self.base_url.startswith(("http://", "https://")) else None
        except ValueError:
            host = None
        if not host or any(character.isspace() for character in self.base_url):
            raise ConfigError(f"instruct_url={self.base_url} must be an address such as http://127.0.0.1:8000/v1")
        if self.cache is not None and self.cache.exists() and not self.cache.is_dir():
            raise ConfigError(f"instruct_cache={self.cache} is no folder")
        if not self.model:
            raise ConfigError("instruct_model is missing: the model's name at the endpoint")

    def __call__(self, groups: Sequence[Sequence[str]]) -> list[str]:
        """A sentence for each group of examples; where the endpoint fails, the group's first text, with one warning."""
        found, failure = [], ""
        for group in groups:
            examples = [text for text in group if text.strip()][:EXAMPLES]
            if not examples:
                raise ConfigError("an instruction needs at least one example that is not empty")
            sentence = None
            if not failure:
                try:
                    sentence = self.ask(examples)
                except OSError as error:
                    failure = first_line(error)
            found.append(sentence or examples[0])
        if failure:
            where = urlsplit(self.base_url)
            logger.warning(
                "%s://%s did not answer (%s): the examples' own text stands in for instructions",
                where.scheme,
                where.netloc.rpartition("@")[2],
                failure,
            )
        return found

    def ask(self, examples: Sequence[str]) -> str:
        """The sentence, from the cache or the endpoint. Raises OSError after the last try."""
        asked = question(examples)
        digest = hashlib.sha256("\0".join((self.base_url, self.model, asked)).encode()).hexdigest()
        kept = self.cache / f"{digest}.txt" if self.cache else None
        if kept is not None and kept.is_file():
            with suppress(UnicodeDecodeError):
                return kept.read_text(encoding="utf-8")
        if digest in _ANSWERS:
            return _ANSWERS[digest]
        for tried in range(self.retries + 1):
            try:
                sentence = self._complete(asked)
                break
            except OSError:
                if tried == self.retries:
                    raise
                time.sleep(self.wait * 2**tried)
        _ANSWERS[digest] = sentence
        if kept is not None:
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                part = kept.with_suffix(".part")
                part.write_text(sentence, encoding="utf-8")
                part.replace(kept)
            except OSError as error:
                raise ConfigError(f"instruct_cache={self.cache} cannot be written: {first_line(error)}") from None
        return sentence

    def _complete(self, asked: str) -> str:
        """One answer in one line. Raises OSError, of whatever kind the failure was."""
        asks = {"role": "user", "content": asked}
        body = {"model": self.model, "messages": [asks], "temperature": 0, "max_tokens": MAX_TOKENS}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get(KEY) or 'none'}"}
        request = Request(f"{self.base_url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with build_opener(_NoRedirects).open(request, timeout=self.timeout) as response:
                answer = json.loads(_read(response, time.monotonic() + self.timeout))
            sentence = " ".join((answer["choices"][0]["message"]["content"] or "").split())
            sentence.encode()
        except (HTTPException, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise OSError(f"its answer cannot be read: {first_line(error)}") from None
        if not sentence or len(sentence) > LONGEST_SENTENCE:
            raise OSError(f"its answer of {len(sentence)} characters is no sentence")
        return sentence
