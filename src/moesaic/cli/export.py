"""`moesaic export`: for stock PEFT an adapter out of a composed mixture, for stock Transformers a converted model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.cli.show import print_json
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError, path_of
from moesaic.runs.folder import atomic_folder, check_writable, read_json, writing

logger = logging.getLogger(__name__)


@dataclass
class ExportSettings:
    """Settings of `moesaic export`."""

    out: str = field(default="exported", metadata={"help": "folder to write"})
    expert: str = field(default="", metadata={"help": "the expert to write; all of a static mixture where left out"})
    rank: int | None = field(default=None, metadata={"help": "the largest rank of a collapsed mixture's modules"})
    top_k: int | None = field(
        default=None, metadata={"help": "of a converted model: experts a token; as it is if left out"}
    )


@verb(
    "export",
    "for those without moesaic: an adapter for PEFT, or a Mixtral for Transformers",
    group="adapters",
    place=80,
    settings=[Section(ExportSettings)],
    operands={"folder": "a folder of `moesaic compose`, or of `moesaic convert` or `train` with method smoe-dropout"},
    about=lambda: (
        "one expert, or a static mixture, becomes a plain LoRA adapter; a Llama or Mistral whose layers smoe-dropout\n"
        "parted becomes a MixtralForCausalLM of equal logits"
    ),
)
def run_export(folder: str, arguments: Sequence[str], *, as_json: bool = False) -> None:
    """Raises MoesaicError of the kind that fits; nothing is written then."""
    from moesaic.adapters.export import collapse, export_expert
    from moesaic.runs.recipe import parse_settings

    settings = parse_settings(ExportSettings, arguments)
    out = path_of(settings.out)
    check_writable(out, f"out={settings.out}")
    source = path_of(folder).resolve()
    if source == out.resolve() or source in out.resolve().parents:
        raise ConfigError(f"out={out} lies in {folder}, which is read: write somewhere else")
    if (model := _converted(source)) is not None:
        _as_mixtral(model, out, settings, as_json=as_json)
        return
    if settings.top_k is not None:
        raise ConfigError(f"top_k is of converted models, and {folder} holds none")
    layout = path_of(folder) / "layout.json"
    has_heads = layout.is_file() and "labels" in read_json(layout)
    if settings.expert and settings.rank is not None:
        raise ConfigError("expert and rank disagree: an expert is written as it came; rank is of a collapsed mixture")
    if settings.expert:
        pairs = export_expert(path_of(folder), settings.expert, out)
        facts: dict[str, Any] = {"folder": str(out), "modules": len(pairs)}
    else:
        errors = collapse(path_of(folder), out, rank=settings.rank)
        facts = {"folder": str(out), "modules": len(errors), "relative_error": errors}
    if as_json:
        print_json(facts)
        return
    if settings.rank is not None:
        lost = facts["relative_error"].values()
        print(
            f"left out at rank {settings.rank}: {sum(lost) / len(lost):.1%} of a module's change on average, "
            f"{max(lost):.1%} at most"
        )
    print(f"written: {out}, a LoRA adapter of {facts['modules']} modules for stock PEFT")
    if has_heads:
        logger.warning("the tasks' heads stay in %s: what is written is the LoRA of its encoder", folder)


def _converted(folder: Path) -> Path | None:
    """The folder itself, or the model of a run in it, where its feed-forward layers were converted."""
    from moesaic.ffn.stored import is_converted

    return next((place for place in (folder, folder / "model") if is_converted(place)), None)


def _as_mixtral(folder: Path, out: Path, settings: ExportSettings, *, as_json: bool) -> None:
    from moesaic.ffn.slimming import set_top_k
    from moesaic.ffn.stock import as_mixtral
    from moesaic.models.embedded import load_model

    if settings.expert or settings.rank is not None:
        raise ConfigError("expert and rank are of composed adapters: a converted model is exported whole")
    if out.exists():
        raise ConfigError(f"out={settings.out} is there already; name another folder")
    base = load_model(str(folder))
    model, tokenizer = base.model, base.tokenizer
    if settings.top_k is not None:
        set_top_k(model, settings.top_k)
    stock = as_mixtral(model)
    with writing(out), atomic_folder(out) as staging:
        stock.save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
    facts = {"folder": str(out), "experts": stock.config.num_local_experts, "top_k": stock.config.num_experts_per_tok}
    if as_json:
        print_json(facts)
        return
    print(f"written: {out}, a MixtralForCausalLM of {facts['experts']} experts, {facts['top_k']} a token")
