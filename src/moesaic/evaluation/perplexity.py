"""Perplexity of held-out text by domain, of any language model, and of a mixture at several k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, DataError, path_of


@dataclass
class PerplexitySettings:
    """What is read, and how much of it."""

    domains: Any = field(
        default=None, metadata={"help": "sources of text, comma-separated, or {NAME: SOURCE}; a run's own if left out"}
    )
    top_k: list[int] | None = field(
        default=None, metadata={"help": "experts a token takes, several to compare: 1,2,4,8"}
    )
    length: int | None = field(
        default=None, metadata={"help": "tokens a row; 256, or as a folder was converted or trained with"}
    )
    held_out: int | None = field(
        default=None, metadata={"help": "most rows of a domain; 16, or as a folder was made with"}
    )
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

    from moesaic.ffn.slimming import top_k
    from moesaic.models.embedded import load_model
    from moesaic.models.precision import numerics
    from moesaic.training.domains import domains_of, figures, named

    if settings.precision not in ("bf16", "fp32"):
        raise ConfigError(f"precision={settings.precision}; known: bf16, fp32")
    for key, least in (("length", 8), ("held_out", 1)):
        if (given := getattr(settings, key)) is not None and given < least:
            raise ConfigError(f"{key}={given} must be at least {least}")
    if not 1 <= settings.batch_size <= 1_000_000:
        raise ConfigError(f"batch_size={settings.batch_size} must be between 1 and 1,000,000")
    device = numerics(settings.precision).device
    made: dict[str, dict[str, dict[str, float]]] = {}
    own = [_own(path_of(name)) for name in names]
    known: dict[str, Any] = next(filter(None, own), {})
    length, held = (getattr(settings, k) or known.get(k, d) for k, d in (("length", 256), ("held_out", 16)))
    for name, of in zip(names, own, strict=True):
        inner = path_of(name) / "model"  # of a pre-training's run
        is_run = (path_of(name) / "recipe.yaml").is_file()
        if is_run and not (inner / "config.json").is_file():
            raise ConfigError(f"{name} is an unfinished run: run its `moesaic train` command again to finish it")
        place = str(inner) if is_run else name
        wanted = named(settings.domains) or of.get("domains") or known.get("domains")
        if not wanted:
            raise ConfigError(f"domains is missing: {name} does not say what it was trained on; domains=a.txt,src/")
        base = load_model(place)
        if base.kind != "causal":
            raise ConfigError(f"{name} is an encoder: it has no perplexity")
        model = base.model.to(device, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
        longest = getattr(model.config, "max_position_embeddings", None) or length
        try:
            domains = domains_of(wanted, base.tokenizer, length=min(length, longest), train=1, held=held)
        except (ConfigError, DataError) as error:
            if settings.domains is not None:
                raise
            raise type(error)(f"{error} (so {name} was made; domains=… names its text from here)") from None
        how = {"batch_size": settings.batch_size}
        if not settings.top_k:
            made[name] = figures(model, domains, **how)
        for k in settings.top_k or ():
            with top_k(model, k):
                made[f"{name}, k={k}" if len(names) > 1 else f"k={k}"] = figures(model, domains, **how)
    return made


def _own(folder: Path) -> dict[str, Any]:
    """What a folder of ours says it was made with: `domains`, `length`, `held_out`; empty for any other."""
    from moesaic.runs.folder import read_json, reading
    from moesaic.training.domains import named

    if (file := folder / "conversion.json").is_file():
        with reading(file):
            found = read_json(file)
            return {**{key: int(found[key]) for key in ("length", "held_out")}, "domains": named(found["domains"])}
    if (folder / "recipe.yaml").is_file():
        from moesaic.models.nano.corpus import DOMAINS
        from moesaic.runs.pretraining import is_pretraining, load_pretraining

        if is_pretraining(str(folder)):
            stored = load_pretraining(str(folder))
            wanted = named(list(DOMAINS) if stored.domains is None else stored.domains)
            return {"domains": wanted, "length": stored.length, "held_out": stored.held_out}
    return {}
