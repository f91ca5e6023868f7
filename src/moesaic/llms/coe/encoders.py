"""Encoders of prompts: texts in, unit rows (N, f) float32 out; a row of zeros for a text of which nothing is known.

tfidf       words, pairs of words and 3- and 4-grams of letters, weighted by rarity and folded to 256 directions (latent
            semantic analysis): fitted to the prompts at hand, needs no weights; case and white space do not matter
minilm      all-MiniLM-L6-v2 from its package: mean over the tokens
other       a sentence-transformers model by folder or hub id, pooled as it says itself
A+B         both, side by side: tfidf+minilm tells more than either
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, DataError, MissingDependency, first_line, path_of

Rows = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]

HEAD, TAIL = 600, 200
"""Characters of a long prompt's beginning and end that n-grams are taken from."""
VOCABULARY = 20_000
DIRECTIONS = 256
MAX_TOKENS = 32
"""Of a prompt, for MiniLM: what it is about shows early, and time grows with length."""
BATCH = 16
PROBE = "A short text, to tell one encoder from another."
_KNOWN = "known: tfidf, minilm, or a folder or hub id of a sentence-transformers model"
_WORD = re.compile(r"\w+|[^\w\s]")


class Encoder(Protocol):
    """What turns prompts into rows. `state` is what `restored` needs to make it again: arrays, and plain values."""

    name: str

    def __call__(self, prompts: Sequence[str]) -> Rows: ...

    def state(self) -> tuple[Arrays, dict[str, Any]]: ...


def fitted(name: str, prompts: Sequence[str], seed: int = 0) -> Encoder:
    """An encoder by name, made ready for prompts. Raises ConfigError or MissingDependency where there is none."""
    if not all(one.strip() for one in name.split("+")):
        raise ConfigError(f"encoder={name} names none; {_KNOWN}")
    if "+" in name:
        return Joined([fitted(one.strip(), prompts, seed) for one in name.split("+")])
    return Tfidf.fit(prompts, seed=seed) if name == "tfidf" else Sentences(name)


def restored(arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> Encoder:
    """Of what `state` gave. Raises ConfigError where a model of that name gives other rows than it did."""
    if "parts" in values:
        return Joined([restored(part(arrays, f"{i}."), held) for i, held in enumerate(values["parts"])])
    if values["name"] == "tfidf":
        return Tfidf(list(values["grams"]), np.asarray(arrays["rarity"]), np.asarray(arrays["directions"]))
    made = Sentences(values["name"])
    if not np.allclose(made([PROBE])[0], arrays["probe"], atol=1e-3):
        raise ConfigError(f"encoder {made.name} is another model than this router was fitted with: fit it again")
    return made


def part(arrays: Mapping[str, NDArray[Any]], prefix: str) -> Arrays:
    """Those whose names begin with it, without it."""
    return {name.removeprefix(prefix): held for name, held in arrays.items() if name.startswith(prefix)}


def grams(prompt: str) -> list[str]:
    """Runs of 3 and 4 letters, and words and pairs of words, which begin with a tab."""
    if len(prompt) > HEAD + TAIL:
        prompt = f"{prompt[:HEAD]} {prompt[-TAIL:]}"
    text = " ".join(prompt.lower().split())
    words = ["\t" + word for word in _WORD.findall(text)]
    marked = f" {text} "
    found = [marked[i : i + 3] for i in range(len(marked) - 2)]
    found += [marked[i : i + 4] for i in range(len(marked) - 3)]
    return [*found, *words, *map("".join, pairwise(words))]


class Tfidf:
    """Latent semantic analysis of n-grams (Deerwester et al. 1990).

        w_g = (1 + log count_g) · (1 + log (1 + N)/(1 + N_g)),  row = normalise(normalise(w) V)

    V (G, f) are the first right singular vectors of the prompts' rows.
    """

    name = "tfidf"

    def __init__(self, vocabulary: list[str], rarity: Rows, directions: Rows) -> None:
        if rarity.shape != (len(vocabulary),) or directions.shape[:1] != rarity.shape or directions.ndim != 2:
            raise ValueError("n-grams, their rarity and directions do not fit")
        self.grams, self.rarity, self.directions = vocabulary, rarity, directions
        self._number = {gram: i for i, gram in enumerate(vocabulary)}

    @classmethod
    def fit(cls, prompts: Sequence[str], *, seed: int = 0) -> Tfidf:
        """Raises DataError where the prompts hold nothing to tell them by; MissingDependency without scikit-learn."""
        needed()
        from scipy.sparse import csr_array
        from sklearn.utils.extmath import randomized_svd

        among = Counter(gram for prompt in prompts for gram in {*grams(prompt)})
        least = min(3, max(1, len(prompts) // 50))
        kept = sorted((gram for gram, n in among.items() if n >= least), key=lambda gram: (-among[gram], gram))
        kept = kept[:VOCABULARY]
        if not kept:
            raise DataError("the prompts are empty: there is nothing to tell them by")
        rarity = np.array([1 + math.log((1 + len(prompts)) / (1 + among[gram])) for gram in kept], np.float32)
        bare = cls(kept, rarity, np.zeros((len(kept), 1), np.float32))
        rows = [bare._weights(prompt) for prompt in prompts]
        ends = np.cumsum([0, *(len(at) for at, _ in rows)])
        held = np.concatenate([w for _, w in rows]), np.concatenate([at for at, _ in rows]), ends
        size = min(DIRECTIONS, len(prompts), len(kept))
        _, _, found = randomized_svd(csr_array(held, shape=(len(rows), len(kept))), size, random_state=seed)
        return cls(kept, rarity, np.ascontiguousarray(found.T, np.float32))

    def __call__(self, prompts: Sequence[str]) -> Rows:
        rows = np.empty((len(prompts), self.directions.shape[1]), np.float32)
        for row, prompt in zip(rows, prompts, strict=True):
            at, weights = self._weights(prompt)
            row[:] = weights @ self.directions[at]
            row /= max(math.sqrt(row @ row), 1e-9)
        return rows

    def _weights(self, prompt: str) -> tuple[NDArray[np.int64], Rows]:
        """The numbers of its n-grams, ascending, and their weights as a unit row."""
        known = [i for i in map(self._number.get, grams(prompt)) if i is not None]
        at, counts = np.unique(np.array(known, np.int64), return_counts=True)
        weights = ((1 + np.log(counts)) * self.rarity[at]).astype(np.float32)
        return at, weights / max(math.sqrt(weights @ weights), 1e-9)

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        return {"rarity": self.rarity, "directions": self.directions}, {"name": self.name, "grams": self.grams}


class Sentences:
    """A sentence encoder that is kept by name: its weights stay where they are.

    Raises:
        ConfigError: there is none of that name. MissingDependency: sentence-transformers is not installed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._rows = _minilm() if name == "minilm" else _sentence_transformer(name)

    def __call__(self, prompts: Sequence[str]) -> Rows:
        from tqdm import tqdm

        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # rows of like length share a batch
        found: list[Rows] = [np.empty(0, np.float32)] * len(prompts)
        quiet = not sys.stderr.isatty()
        with tqdm(total=len(prompts), desc="encoding", unit="prompt", delay=2, leave=False, disable=quiet) as bar:
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                for i, row in zip(chosen, self._rows([prompts[i] for i in chosen]), strict=True):
                    found[i] = row
                bar.update(len(chosen))
        return np.stack(found)

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        return {"probe": self([PROBE])[0]}, {"name": self.name}


class Joined:
    """Rows of several encoders side by side, each with the same share in a cosine."""

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        self.name, self.encoders = "+".join(encoder.name for encoder in encoders), encoders

    def __call__(self, prompts: Sequence[str]) -> Rows:
        rows = np.hstack([encoder(prompts) for encoder in self.encoders])
        return np.asarray(rows / math.sqrt(len(self.encoders)), np.float32)

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        states = [encoder.state() for encoder in self.encoders]
        arrays = {f"{i}.{name}": held for i, (own, _) in enumerate(states) for name, held in own.items()}
        return arrays, {"name": self.name, "parts": [values for _, values in states]}


def _minilm() -> Any:
    import torch

    from moesaic.models.embedded import load_model

    loaded = load_model("minilm")
    model, tokenizer = loaded.model.eval(), loaded.tokenizer

    @contextmanager
    def threads(many: bool) -> Iterator[None]:
        """One where a prompt comes alone: more would wait for each other, and for whatever else the cores do."""
        known = torch.get_num_threads()
        torch.set_num_threads(known if many else 1)
        try:
            yield
        finally:
            torch.set_num_threads(known)

    @torch.inference_mode()
    def rows(prompts: list[str]) -> Rows:
        with threads(many=len(prompts) > 1):
            return of(prompts)

    def of(prompts: list[str]) -> Rows:
        inputs = tokenizer(prompts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        states = model(**inputs).last_hidden_state
        real = inputs["attention_mask"].unsqueeze(-1)
        found: Rows = torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1).numpy()
        return found

    return rows


def _sentence_transformer(name: str) -> Any:
    from moesaic.models.embedded import fetched_only, resolve

    near = get_close_matches(name, ("tfidf", "minilm"), n=1)
    if near and "/" not in name and not path_of(name).exists():  # before a hub is asked, which takes its time
        raise ConfigError(f"encoder={name}: did you mean '{near[0]}'? {_KNOWN}")
    place = resolve(name)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise MissingDependency("sentence-transformers", "llms") from None
    try:
        model = SentenceTransformer(place, local_files_only=fetched_only(place), trust_remote_code=False)
    except Exception as error:  # whatever the hub, configurations and weights make of it
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"encoder={name} cannot be loaded; {hint}{_KNOWN}: {first_line(error)}") from None

    def rows(prompts: list[str]) -> Rows:
        return np.asarray(model.encode(prompts, normalize_embeddings=True, show_progress_bar=False), np.float32)

    return rows


def needed() -> None:
    """Raise MissingDependency where what routers are fitted with is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise MissingDependency("scikit-learn", "llms") from None
