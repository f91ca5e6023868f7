"""`moesaic inspect`: for one prompt, which experts answered where, and why."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from moesaic.cli.show import print_json
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError, UnknownSetting

if TYPE_CHECKING:
    from rich.console import RenderableType


T = TypeVar("T")

_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_black", "bright_cyan")
_BLOCKS = " ▁▂▃▄▅▆▇█"
_MOST_COLUMNS = 8
"""For layers."""
_AVERAGED = (
    "averages over {} modules, their experts put in one order by the tokens that they answer; "
    "layer=… and module=… show one by itself"
)


@dataclass
class InspectSettings:
    """Settings of `moesaic inspect`."""

    prompt: str = field(default="", metadata={"help": "the text to route"})
    task: str = field(default="", metadata={"help": "its task, for methods that are told"})
    model: str = field(default="", metadata={"help": "the base model, where a folder names none or it has moved"})
    prompts: str = field(default="", metadata={"help": "chat: in the tokenizer's chat template; plain: as written"})
    layer: int | None = field(default=None, metadata={"help": "the routers of one layer alone"})
    module: str = field(default="", metadata={"help": "those of modules of a name alone: q_proj, mlp, …"})
    answer: int = field(default=32, metadata={"help": "tokens that a language model answers; 0 for none"})


@verb(
    "inspect",
    "show which experts answer a prompt, and why",
    group="adapters",
    place=70,
    settings=[Section(InspectSettings)],
    operands={"folder": "of a run, or of an adapter that PEFT, Trainer or SFTTrainer saved"},
    takes="PROMPT | key=value",
)
def run(folder: str, arguments: Sequence[str], *, as_json: bool = False) -> None:
    """Show what the routers of a trained adapter do with a prompt. Raises MoesaicError of the kind that fits."""
    settings = with_prompt(InspectSettings, arguments)
    if not settings.prompt.strip():
        raise ConfigError("prompt is missing: prompt='…' is the text to route")
    try:
        settings.prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("prompt is no text in UTF-8") from None
    from moesaic.evaluation.opening import load, open_adapter
    from moesaic.evaluation.routed import explain

    if settings.answer < 0:
        raise ConfigError(f"answer={settings.answer} must be at least 0")
    opened = open_adapter(folder, model=settings.model, prompts=settings.prompts)
    chosen: dict[str, Any] = {"layer": settings.layer, "module": settings.module}
    found = explain(load(opened), settings.prompt, task=settings.task, answer=settings.answer, **chosen)
    if as_json:
        print_json(found)
        return
    show_routed(found)


def with_prompt(of: type[T], arguments: Sequence[str]) -> T:
    """Settings of which the first may be the prompt alone. Raises ConfigError for one that cannot be."""
    from moesaic.runs.recipe import parse_settings

    first, *others = arguments or [""]
    if first and not re.match(r"[\w.]+=", first):
        arguments = [f"prompt={first}", *others]
    try:
        return parse_settings(of, arguments)
    except UnknownSetting as error:
        if first.partition("=")[0] != error.key:
            raise
        raise UnknownSetting(f"{error}; if that is the prompt, write prompt='{first}'", error.key) from None


def show_routed(found: dict[str, Any]) -> None:
    """Print what `explain` or `routed` found."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    Console(highlight=False, width=None if terminal else 160).print(shown(found, named=not terminal))


def shown(found: dict[str, Any], *, named: bool = False) -> RenderableType:
    """What `explain` found, for a terminal; `named` where there are no colours to tell experts apart."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    told, added = found["global_scores"], found["weighted_global"]
    header = ["expert", "weight", "score"]
    header += ["local", "global", "cosine"] if added else ["cosine"] if told else []
    floors: list[float] = found.get("floors") or []
    header += ["asks for"] if floors else []
    spans = _spans(found["by_layer"])
    where = f" in {found['modules'][0]}" if len(found["modules"]) == 1 else ""
    table = Table(*header, *spans, title=f"{found['method']} routes the prompt{where}")
    total = sum(found["weights"])
    are_shares = min(found["weights"]) >= 0 and total < 1.01 and (total > 0 or bool(floors))
    for e, name in enumerate(found["experts"]):
        weight = found["weights"][e]
        far = bool(floors) and told is not None and told[e] < floors[e]
        row = [f"{weight:.0%}" if are_shares else f"{weight:+.2f}", "too far" if far else f"{found['logits'][e]:+.2f}"]
        if added and far:
            row += ["", ""]
        elif added:
            row += [f"{found['logits'][e] - added[e]:+.2f}", f"{added[e]:+.2f}"]
        if told:
            row.append(f"{told[e]:.2f}")
        if floors:
            row.append(f"{floors[e]:.2f}")
        shares = [layer[e] for layer in spans.values()]
        bars = [_bar(share) if are_shares else f"{share:+.2f}" for share in shares]
        table.add_row(Text(name, style=_colour(e)), *row, *bars)
    if floors:
        nobody = [max(0.0, 1 - sum(shares)) for shares in (found["weights"], *spans.values())]
        blank = [""] * (len(header) - 2)
        table.add_row("none of them", f"{nobody[0]:.0%}", *blank, *(_bar(share) for share in nobody[1:]))
    line, last = Text(), -2
    for token, row in zip(found["tokens"], found["by_token"], strict=True):
        best = max(range(len(row)), key=row.__getitem__) if any(row) or not floors else -1
        if named and best != last:
            line.append(f"[{found['experts'][best] if best >= 0 else 'none of them'}] ")
        line.append(token.replace("Ġ", " ").replace("▁", " ") + " ", style=_colour(best) if best >= 0 else "")
        last = best
    said = [] if found.get("answer") is None else [Text(f"answer: {found['answer'].strip()}")]
    averaged = [Text(_AVERAGED.format(len(found["modules"])), style="dim")] if found["aligned"] else []
    return Group(table, *averaged, Text("tokens by their first expert:"), line, *said)


def _spans(by_layer: dict[Any, list[float]]) -> dict[str, list[float]]:
    """Shares by layer under their headings; of a deep model means over neighbouring layers, to fit a terminal."""
    layers, size = list(by_layer), -(-len(by_layer) // _MOST_COLUMNS)
    if size <= 1:
        return {f"layer {layer}": shares for layer, shares in by_layer.items()}
    spans = [layers[start : start + size] for start in range(0, len(layers), size)]
    return {
        f"layers {span[0]}-{span[-1]}": [
            fmean(shares) for shares in zip(*(by_layer[layer] for layer in span), strict=True)
        ]
        for span in spans
    }


def _bar(share: float) -> str:
    return f"{_BLOCKS[round(min(max(share, 0), 1) * (len(_BLOCKS) - 1))]} {share:.0%}"


def _colour(expert: int) -> str:
    return _COLOURS[expert % len(_COLOURS)]
