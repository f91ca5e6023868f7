"""Perplexity of held-out text by domain, of any language model, and of a mixture at several k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError


@dataclass
class PerplexitySettings:
    """What is read, and how much of it."""

    domains: Any = field(
        default=None, metadata={"help": "sources of text, comma-separated, or {NAME: SOURCE}; a run's own if left out"}
    )
    top_k: list[int] | None = field(
        default=None, metadata={"help": "experts a token takes, several to compare: 1,2,4,8"}
    )
    length: int = field(default=256, metadata={"help": "tokens a row"})
    held_out: int = field(default=16, metadata={"help": "most rows of a domain"})
    batch_size: int = field(default=8, metadata={"help": "rows in a forward"})
    precision: str = field(default="fp32", metadata={"help": "of the weights: bf16 or fp32"})


def perplexities(names: Sequence[str], settings: PerplexitySettings) -> dict[str, dict[str, dict[str, float]]]:
    """By model (and k, where several are asked for), by domain: `loss`, `perplexity`, `bits_per_byte`.

    Args:
        names: base models, converted folders, or run folders of `moesaic train pretrain/…`.
    Raises:
        ConfigError, DataError: no such model or text, or a k that it does not have.
    """
    import torch

    from moesaic.ffn.smoe_dropout import top_k
    from moesaic.training.conversion import load_any
    from moesaic.training.domains import domains_of, figures, named

    if settings.precision not in ("bf16", "fp32"):
        raise ConfigError(f"precision={settings.precision}; known: bf16, fp32")
    made: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        inner = Path(name).expanduser() / "model"  # of a pre-training's run
        place = str(inner) if (inner / "config.json").is_file() else name
        wanted = named(settings.domains) or _own(Path(name).expanduser())
        if not wanted:
            raise ConfigError(f"domains is missing: {name} does not say what it was trained on; domains=a.txt,src/")
        base = load_any(place)
        if base.kind != "causal":
            raise ConfigError(f"{name} is an encoder: it has no perplexity")
        model = base.model.to(torch.bfloat16 if settings.precision == "bf16" else torch.float32)
        longest = getattr(model.config, "max_position_embeddings", None) or settings.length
        domains = domains_of(
            wanted, base.tokenizer, length=min(settings.length, longest), train=1, held=settings.held_out
        )
        how = {"batch_size": settings.batch_size}
        if not settings.top_k:
            made[name] = figures(model, domains, **how)
        for k in settings.top_k or ():
            with top_k(model, k):
                made[f"{name}, k={k}" if len(names) > 1 else f"k={k}"] = figures(model, domains, **how)
    return made


def _own(folder: Path) -> dict[str, str]:
    """The domains that a folder of ours says it was made with."""
    from moesaic.runs.folder import read_json
    from moesaic.training.domains import named

    if (folder / "conversion.json").is_file():
        return dict(read_json(folder / "conversion.json")["domains"])
    if (folder / "recipe.yaml").is_file():
        from moesaic.models.nano.corpus import DOMAINS
        from moesaic.runs.pretraining import load_pretraining

        stored = load_pretraining(str(folder)).domains
        return named(list(DOMAINS) if stored is None else stored)
    return {}
