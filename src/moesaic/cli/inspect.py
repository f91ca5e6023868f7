"""`moesaic inspect`: for one prompt, which experts answered where, and why."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from moesaic.cli.show import print_json
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moesaic.training.prepared import Prepared

logger = logging.getLogger(__name__)

_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_black", "bright_cyan")
_BLOCKS = " ▁▂▃▄▅▆▇█"
_MOST_COLUMNS = 8
"""For layers."""


@dataclass
class InspectSettings:
    """Settings of `moesaic inspect`."""

    prompt: str = field(default="", metadata={"help": "the text to route"})
    task: str = field(default="", metadata={"help": "its task, for methods that are told"})
    model: str = field(default="", metadata={"help": "the base model, where a folder names none or it has moved"})
    prompts: str = field(default="", metadata={"help": "chat: in the tokenizer's chat template; plain: as written"})
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
    from moesaic.runs.recipe import parse_settings

    if arguments and not re.match(r"[\w.]+=", arguments[0]):
        arguments = [f"prompt={arguments[0]}", *arguments[1:]]
    settings = parse_settings(InspectSettings, arguments)
    if not settings.prompt.strip():
        raise ConfigError("prompt is missing: prompt='…' is the text to route")
    try:
        settings.prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("prompt is no text in UTF-8") from None
    from moesaic.evaluation.opening import load, open_adapter

    if settings.answer < 0:
        raise ConfigError(f"answer={settings.answer} must be at least 0")
    opened = open_adapter(folder, model=settings.model, prompts=settings.prompts)
    found = explain(load(opened), settings.prompt, task=settings.task, answer=settings.answer)
    if as_json:
        print_json(found)
        return
    from rich.console import Console

    terminal = sys.stdout.isatty()
    Console(highlight=False, width=None if terminal else 160).print(shown(found, named=not terminal))


def _read(prepared: Prepared, prompt: str, longest: int) -> Any:
    """The prompt as training and evaluation read it: a causal model's is cut at its beginning."""
    import torch
    from transformers import BatchEncoding

    from moesaic.data.causal import prompt_ids
    from moesaic.data.examples import Example

    tokenizer = prepared.base.tokenizer
    if prepared.layout is not None:
        inputs = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=longest)
        cut = inputs["input_ids"].shape[1] == longest
    else:
        (example,) = prepared.given([Example("", prompt)])
        ids = prompt_ids(example, tokenizer)
        cut = len(ids) > longest
        tensor = torch.tensor([ids[-longest:]])
        inputs = BatchEncoding({"input_ids": tensor, "attention_mask": torch.ones_like(tensor)})
    if cut:
        logger.warning("the prompt may be cut: there is room for %d tokens", longest)
    return inputs


def explain(prepared: Prepared, prompt: str, *, task: str = "", answer: int = 0) -> dict[str, Any]:
    """What a run's routers do with a prompt.

    Args:
        answer: tokens that a language model is let answer.

    Returns:
        answer: its text, without the prompt; None where it was not asked, or is no language model.
        experts: their names. tokens: the prompt's. weights: each expert's mean share over tokens and modules (E,).
        by_layer: layer -> the same. by_token: the same by token (T, E). logits: the routers' mean scores (E,).
        global_scores: what the prompt as a whole says (E,), and weighted_global what that adds to the logits; None
        for methods that do not ask.

    Raises:
        ConfigError: the run has no routers, or no such task.
    """
    import torch

    from moesaic.evaluation.answers import check_known
    from moesaic.host import find_host, routing_scores, routing_tasks

    if not prepared.routed:
        raise ConfigError(f"method {prepared.recipe.method} has no routers: there is nothing to inspect")
    config = prepared.model.peft_config["default"]
    device = next(prepared.model.parameters()).device
    longest = prepared.max_length
    positions = prepared.base.positions
    if positions is not None:
        answer = min(answer, positions // 2)
        longest = min(longest, positions - answer)
    inputs = _read(prepared, prompt, longest).to(device)
    scores = config.scores([prompt])
    seen = _Collector()
    host = find_host(prepared.model)
    check_known(prepared, [task] if task else [])
    with ExitStack() as stack, torch.no_grad():
        if task:
            if task not in prepared.tasks:
                raise ConfigError(f"no task '{task}' in this run; known: {', '.join(prepared.tasks)}")
            stack.enter_context(routing_tasks(prepared.model, task_ids=[prepared.tasks.index(task)]))
        if scores is not None:
            stack.enter_context(routing_scores(prepared.model, scores.to(device)))
        text = None
        if answer and prepared.layout is None:
            written = prepared.model.generate(**inputs, max_new_tokens=answer, do_sample=False)
            text = prepared.base.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        traces: list[Any] = host.traces
        traces.append(seen)
        stack.callback(traces.remove, seen)
        model = prepared.model.base_model.model
        (model.encoder if prepared.layout is not None else model)(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )
    number = config.num_experts
    records = [r for r in seen.records if r.routing.weights.shape[-1] == number]
    if not records:
        raise ConfigError("the routers of this run have differing numbers of experts: they share no table")
    weights = torch.stack([r.routing.weights.reshape(-1, number) for r in records])
    logits = torch.stack([r.routing.logits.reshape(-1, number) for r in records])
    layers = sorted({r.site.layer for r in records})
    by_layer = {
        str(layer): weights[[i for i, r in enumerate(records) if r.site.layer == layer]].mean(dim=(0, 1)).tolist()
        for layer in layers
    }
    weighed = getattr(records[0].router, "weighed", None)
    return {
        "prompt": prompt,
        "answer": text,
        "method": config.method,
        "experts": list(config.experts or map(str, range(number))),
        "tokens": prepared.base.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist()),
        "weights": weights.mean(dim=(0, 1)).tolist(),
        "logits": logits.mean(dim=(0, 1)).tolist(),
        "global_scores": None if scores is None else scores[0].tolist(),
        "weighted_global": None if scores is None or weighed is None else weighed(scores)[0].tolist(),
        "by_layer": by_layer,
        "by_token": weights.mean(dim=0).tolist(),
    }


class _Collector:
    """Stands where a trace does, and keeps the records as they are."""

    keep_weights = False

    def __init__(self) -> None:
        self.records: list[Any] = []

    def update(self, records: Sequence[Any]) -> None:
        self.records += records


def shown(found: dict[str, Any], *, named: bool = False) -> RenderableType:
    """What `explain` found, for a terminal; `named` where there are no colours to tell experts apart."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    told, added = found["global_scores"], found["weighted_global"]
    header = ["expert", "weight", "score"]
    header += ["local", "global", "cosine"] if added else ["cosine"] if told else []
    spans = _spans(found["by_layer"])
    table = Table(*header, *spans, title=f"{found['method']} routes the prompt")
    are_shares = min(found["weights"]) >= 0 and 0 < sum(found["weights"]) < 1.01
    for e, name in enumerate(found["experts"]):
        weight = found["weights"][e]
        row = [f"{weight:.0%}" if are_shares else f"{weight:+.2f}", f"{found['logits'][e]:+.2f}"]
        if added:
            row += [f"{found['logits'][e] - added[e]:+.2f}", f"{added[e]:+.2f}"]
        if told:
            row.append(f"{told[e]:.2f}")
        shares = [layer[e] for layer in spans.values()]
        bars = [_bar(share) if are_shares else f"{share:+.2f}" for share in shares]
        table.add_row(Text(name, style=_colour(e)), *row, *bars)
    line, last = Text(), None
    for token, row in zip(found["tokens"], found["by_token"], strict=True):
        best = max(range(len(row)), key=row.__getitem__)
        if named and best != last:
            line.append(f"[{found['experts'][best]}] ")
        line.append(token.replace("Ġ", " ").replace("▁", " ") + " ", style=_colour(best))
        last = best
    said = [] if found["answer"] is None else [Text(f"answer: {found['answer'].strip()}")]
    return Group(table, Text("tokens by their first expert:"), line, *said)


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
