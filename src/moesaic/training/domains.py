"""Domains of text for a model: rows to learn from and held-out rows, and what a model makes of the latter."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.data import text
from moesaic.data.sampling import interleave
from moesaic.errors import ConfigError, path_of, suggest
from moesaic.models.nano.corpus import DOMAINS as GENERATED
from moesaic.models.nano.corpus import lines

MOST = 1_000_000
"""Tokens of a row, and rows of a part: generated text has no end."""
HELD_OUT_SEED = 1_000_003
"""Of generated text that is held out; short lines may come in both."""


@dataclass(frozen=True)
class Domain:
    """One domain's rows: `train` (n, length) and `held` (m, length), and the bytes that a held-out token stands for."""

    name: str
    train: Tensor
    held: Tensor
    bytes_per_token: float


def named(domains: Any) -> dict[str, str]:
    """Name -> source, of `domains=…` as people write it; a source that is given no name has its last part as one.

    Raises:
        ConfigError: it is no such thing, or two have one name.
    """
    if isinstance(domains, dict):
        if not all(isinstance(source, str) and source.strip() for source in domains.values()):
            raise ConfigError("domains must name a source of text for each: 'domains={NAME: SOURCE, …}'")
        return {str(name): source for name, source in domains.items()}
    listed = [domains] if isinstance(domains, str) else [] if domains is None else domains
    if not isinstance(listed, list) or not all(isinstance(entry, str) and entry.strip() for entry in listed):
        raise ConfigError(
            f"domains={domains!r} must be sources of text, comma-separated, or 'domains={{NAME: SOURCE}}'"
        )
    found = [source if _is_known(source) else _last(source) for source in listed]
    doubled = next((name for name in found if found.count(name) > 1), None)
    if doubled:
        raise ConfigError(f"two domains are called {doubled!r}: give them names, 'domains={{NAME: SOURCE, …}}'")
    return dict(zip(found, listed, strict=True))


def _last(source: str) -> str:
    """The last part of a path that is no pattern, without its suffix."""
    parts = [part for part in Path(source).parts if not any(sign in part for sign in "*?[")]
    return Path(parts[-1]).stem if parts else source


def _is_known(source: str) -> bool:
    return source in GENERATED or source in text.BUILT_IN


def domains_of(
    wanted: Mapping[str, str], tokenizer: Any, *, length: int, train: int, held: int, seed: int = 0
) -> dict[str, Domain]:
    """Rows of each domain.

    Args:
        wanted: by name, a source: see `data.text`, or a kind of line that is generated (lists, arithmetic, table …).
        train, held: most rows of each part.
        seed: of generated text.
    Raises:
        ConfigError: a domain holds too little text for a row of each part, or more is asked for than `MOST`.
        DataError: a source cannot be read.
    """
    for key, value in (("length", length), ("rows", train), ("held_out", held)):
        if not 1 <= value <= MOST:
            raise ConfigError(f"{key}={value} must be between 1 and {MOST:,}")
    made = {}
    for name, source in wanted.items():
        parts: Any
        if source in GENERATED:
            parts = _generated(source, seed), _generated(source, HELD_OUT_SEED)
        else:
            if not path_of(source).exists() and source.isidentifier() and not _is_known(source):
                known = suggest(source, [*GENERATED, *text.BUILT_IN])
                raise ConfigError(f"there is no domain {source!r}: {known}; or a file, a folder or a pattern of text")
            parts = tuple(map(iter, text.parted(text.documents(source))))
        learned, kept = (
            text.rows(tokenizer, *part) for part in zip(parts, (length, length), (train, held), strict=True)
        )
        if not len(learned) or not len(kept):
            raise ConfigError(
                f"the domain {name!r} has too little text: {len(learned)} rows of {length} tokens to learn from and "
                f"{len(kept)} held out; give it more, or a smaller length"
            )
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        written = sum(len(t.encode()) for t in tokenizer.batch_decode(kept, **plain))
        if not written:
            raise ConfigError(f"the held-out text of the domain {name!r} is special tokens alone: give it more")
        made[name] = Domain(name, learned, kept, written / kept.numel())
    return made


def _generated(kind: str, seed: int) -> Iterator[str]:
    return (line.text for line in lines(seed, domain=kind))


def digest(domains: Mapping[str, Domain]) -> str:
    """Of all rows."""
    found = hashlib.sha256()
    for name, domain in domains.items():
        found.update(name.encode())
        for rows in (domain.train, domain.held):
            found.update(rows.numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def loss(model: Any, rows: Tensor, *, batch_size: int = 8, tick: Callable[[], None] | None = None) -> float:
    """Mean loss of the next token on rows (n, length), nats a token; in evaluation mode."""
    was, total, count = model.training, 0.0, 0
    model.eval()
    try:
        for batch in rows.split(batch_size):
            ids = batch.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            total, count = total + float(each), count + ids[:, 1:].numel()
            if tick is not None:
                tick()
    finally:
        model.train(was)
    return total / count


def check_fit(model: Any, domains: Mapping[str, Domain]) -> None:
    """Raise ConfigError where rows hold tokens that the model does not have."""
    known = model.get_input_embeddings().num_embeddings
    for name, domain in domains.items():
        most = max(int(domain.train.max()), int(domain.held.max()))
        if most >= known:
            raise ConfigError(
                f"the tokenizer makes token {most} of the domain {name!r}, and the model embeds {known}: give the one "
                "that belongs to it, or resize the model's embeddings (resize_token_embeddings) and save it anew"
            )


def figures(model: Any, domains: Mapping[str, Domain], **how: Any) -> dict[str, dict[str, float]]:
    """By domain: `loss` (nats a token), `perplexity`, `bits_per_byte` of the held-out rows.

    Raises:
        ConfigError: the rows hold tokens that the model does not have.
    """
    made = {}
    check_fit(model, domains)
    for name, domain in domains.items():
        nats = loss(model, domain.held, **how)
        made[name] = {
            "loss": nats,
            "perplexity": math.exp(min(nats, 700)),
            "bits_per_byte": nats / math.log(2) / domain.bytes_per_token,
        }
    return made


def mixed(domains: Mapping[str, Domain], batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches without end, the domains in turn in each, rows in an order of the seed's."""
    every = torch.cat([domain.train for domain in domains.values()])
    ends = list(accumulate(len(domain.train) for domain in domains.values()))
    groups = [range(start, end) for start, end in pairwise([0, *ends])]
    order = interleave(groups, 2**62, seed=seed)
    while True:
        yield {"input_ids": every[list(islice(order, batch_size))]}


def routing(model: Any, domains: Mapping[str, Domain], *, batch_size: int = 8) -> dict[str, Any] | None:
    """What a converted model's routers do on held-out rows; None for a model without any of ours.

    Returns:
        `by_layer`, layer -> domain -> each expert's share of the weight; `entropy`, domain -> layer -> 0 to 1.
    """
    if not domains or getattr(model, "host", None) is None:
        return None
    from moesaic.host import trace

    by_layer: dict[str, dict[str, list[float]]] = {}
    entropy = {}
    for name, domain in domains.items():
        with trace(model) as found:
            loss(model, domain.held, batch_size=batch_size)
        entropy[name] = {str(layer): value for layer, value in found.entropy_by_layer().items()}
        for layer, shares in found.by_layer().items():
            by_layer.setdefault(str(layer), {})[name] = [round(share, 4) for share in shares.tolist()]
    return {"by_layer": by_layer, "entropy": entropy}
