"""`moesaic export`: out of a composed mixture again, an adapter for stock PEFT."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moesaic.cli.show import print_json
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError, path_of
from moesaic.runs.folder import check_writable, read_json

logger = logging.getLogger(__name__)


@dataclass
class ExportSettings:
    """Settings of `moesaic export`."""

    out: str = field(default="exported", metadata={"help": "folder to write"})
    expert: str = field(default="", metadata={"help": "the expert to write; all of a static mixture where left out"})
    rank: int | None = field(default=None, metadata={"help": "the largest rank of a collapsed mixture's modules"})


@verb(
    "export",
    "write one expert, or a static mixture, as a plain LoRA adapter",
    group="adapters",
    place=80,
    settings=[Section(ExportSettings)],
    operands={"folder": "a folder of `moesaic compose`"},
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
