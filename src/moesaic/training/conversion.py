"""From the settings of `moesaic convert` to a folder: the converted model, its tokenizer, its perplexities.

A conversion that is tuned keeps every round that is done in a hidden folder beside it, and goes on from there.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic import ffn
from moesaic.errors import AdapterError, ConfigError, suggest
from moesaic.models.embedded import load_model
from moesaic.models.precision import Numerics, numerics
from moesaic.report.domains import page
from moesaic.runs.conversion import Conversion
from moesaic.runs.folder import (
    atomic_folder,
    discard,
    write_json,
    write_text,
    writing,
)
from moesaic.runs.results import command_line, count_total, device_name, versions
from moesaic.runs.settings import names
from moesaic.training.domains import Domain, digest, domains_of, figures, mixed, named, routing
from moesaic.training.workplace import RESULTS, place_of, rounds_in, working

logger = logging.getLogger(__name__)


def convert(wanted: Conversion, *, command: str | None = None, progress: bool | None = None) -> dict[str, Any]:
    """Convert a model and write it; returns what is written to `conversion.json`.

    Raises:
        MoesaicError: of the kind that fits; nothing is written or replaced then.
        KeyboardInterrupt: rounds that are done are kept, and the same command goes on from them.
    """
    command = command or command_line()
    shown = sys.stderr.isatty() if progress is None else progress
    method, rounds = method_of(wanted), _rounds(wanted)
    out = place_of(wanted)
    plan = numerics(wanted.precision)
    base = load_model(wanted.model)
    if base.kind != "causal":
        raise ConfigError(f"model={wanted.model} is an encoder: `moesaic convert` takes language models")
    model: PreTrainedModel = base.model.to(plan.device)
    length = _length(wanted, model)
    sizes = {"length": length, "train": wanted.rows, "held": wanted.held_out, "seed": wanted.seed}
    domains = domains_of(named(wanted.domains), base.tokenizer, **sizes)
    before = figures(model, domains, batch_size=wanted.batch_size)
    rows = {name: domain.train for name, domain in domains.items()}
    dense = count_total(model)
    made_of = {f"the text of {name}": digest({name: domain}) for name, domain in domains.items()}
    if rounds is not None and rounds.steps:
        made_of[f"the weights of {wanted.model}"] = _weights(model)
    with working(out, wanted, made_of) as work:
        parts = method.parts(model, rows, batch_size=wanted.batch_size, seed=wanted.seed)
        if rounds is not None:
            _tune(method, model, parts, domains, wanted, rounds, plan, work, shown=shown)
        made = ffn.convert(model, method, **parts).to(getattr(torch, wanted.dtype))
        results = {
            "method": method.name,
            "model": wanted.model,
            "settings": made.config.moesaic,
            "domains": named(wanted.domains),
            "length": length,
            "held_out": wanted.held_out,
            "seed": wanted.seed,
            "parameters": {"before": dense, "after": count_total(made), "active": ffn.active_parameters(made)},
            "before": before,
            "after": figures(made, domains, batch_size=wanted.batch_size),
            "device": device_name(plan.device),
            "command": command,
            "versions": versions(),
        }
        routed = routing(made, domains, batch_size=wanted.batch_size)
        with writing(out), atomic_folder(out) as staging:
            made.save_pretrained(str(staging))
            base.tokenizer.save_pretrained(str(staging))
            method.written(staging, made)
            write_text(staging / "report.html", _page(wanted, results, routed))
            write_json(staging / RESULTS, results)
    return results


def _weights(model: PreTrainedModel) -> str:
    """A digest of a model's parameters."""
    found = hashlib.sha256()
    for values in model.parameters():
        found.update(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _shared_neurons(settings: dict[str, Any]) -> list[tuple[str, str]]:
    widths = settings.get("shared_widths")
    if not widths:
        return []
    return [("neurons that all experts share", f"{sum(widths) / len(widths) / settings['width']:.0%} of an expert's")]


def _page(wanted: Conversion, results: dict[str, Any], routed: Any) -> str:
    counts = results["parameters"]
    facts = [
        ("model", wanted.model),
        ("method", results["method"]),
        ("parameters before", f"{counts['before']:,}"),
        ("parameters after", f"{counts['after']:,}, of which a token uses {counts['active']:,}"),
        ("held out", f"{wanted.held_out} rows of {results['length']} tokens a domain, at most"),
        *_shared_neurons(results["settings"]),
        ("seed", str(wanted.seed)),
        ("device", results["device"]),
        ("command", results["command"]),
    ]
    return page(
        "moesaic convert", f"{wanted.method} on {wanted.model}", facts=facts,
        columns={key: results[key] for key in ("before", "after")}, routing=routed, curve=[],
        settings=wanted.describes(), versions=results["versions"],
    )  # fmt: skip


def method_of(wanted: Conversion) -> ffn.Method:
    """The method with its settings. Raises ConfigError for what it does not know or refuses."""
    domains = named(wanted.domains)
    kind = ffn.method_of(wanted.method)
    if kind.takes and not domains:
        raise ConfigError(
            f"method {wanted.method} reads text: domains=a.txt,src/ names files or folders, one a domain; stdlib and "
            "pydoc come with Python"
        )
    found = {"domains": list(domains)} if "domains" in names(kind) else {}
    return method_with(wanted.method, wanted.experts, text=True, **found)


def method_with(name: str, experts: Any, *, text: bool = False, **found: Any) -> ffn.Method:
    """A method of feed-forward layers with `experts.*` settings.

    Args:
        text: whether there is text to make it of.
    Raises:
        ConfigError: for settings that it does not know or refuses, or a method that needs text where there is none.
    """
    kind = ffn.method_of(name)
    if kind.takes and not text:
        raise ConfigError(f"method {name} is made of a trained model: `moesaic convert {name}`")
    known = [f.name for f in fields(kind) if "help" in f.metadata]  # the others follow from text and model
    for key in experts:
        if key not in known:
            raise ConfigError(f"method {name} has no setting experts.{key}; {suggest(key, known)}")
    try:
        return kind(**found, **experts)
    except ConfigError as error:
        raise ConfigError(f"experts settings of {name}: {error}") from None


def _rounds(wanted: Conversion) -> Any:
    """Settings of the method's training; None where it has none."""
    kind = ffn.method_of(wanted.method).training
    if kind is None:
        if wanted.tune:
            raise ConfigError(f"tune: {wanted.method} is not trained on conversion")
        return None
    for key in wanted.tune:
        if key not in names(kind):
            raise ConfigError(f"{wanted.method} has no setting tune.{key}; {suggest(key, names(kind))}")
    try:
        return kind(**wanted.tune)
    except ConfigError as error:
        raise ConfigError(f"tune settings: {error}") from None


def _length(wanted: Conversion, model: Any) -> int:
    longest = getattr(model.config, "max_position_embeddings", None)
    return wanted.length if longest is None else min(wanted.length, longest)


def _tune(
    method: ffn.Method,
    model: PreTrainedModel,
    parts: dict[str, Any],
    domains: dict[str, Domain],
    wanted: Conversion,
    rounds: Any,
    plan: Numerics,
    kept: Path,
    *,
    shown: bool,
) -> None:
    """The method's training, in place, each round kept as it is done; goes on behind those that are."""
    done = max(rounds_in(kept), default=0)
    if done:
        logger.warning("%s: going on from round %d", wanted.out, done + 1)
        _restore(kept / str(done), model, parts)
    used = done * rounds.steps // max(rounds.rounds, 1)
    batches = islice(mixed(domains, wanted.batch_size, wanted.seed), used, None)
    there = ({name: values.to(plan.device) for name, values in batch.items()} for batch in batches)
    with _bar(rounds.steps, used, shown=shown) as say:
        for number in method.tune(model, parts, there, rounds, say=say, first=done, around=plan.context):
            with writing(kept), atomic_folder(kept / str(number + 1)) as staging:
                save_file(_state(model, parts), staging / "state.safetensors")
            discard(kept / str(number))


def _state(model: PreTrainedModel, parts: dict[str, Any]) -> dict[str, Tensor]:
    found = {f"{part}.{name}": values for part in parts for name, values in _tensors(parts[part]).items()}
    found |= {f"model.{name}": values for name, values in model.named_parameters()}  # tied ones once
    return {name: values.detach().contiguous() for name, values in found.items()}


def _tensors(part: Any) -> dict[str, Tensor]:
    """Of a module, or of what is a dict of them."""
    found: dict[str, Tensor] = part.state_dict() if isinstance(part, nn.Module) else part
    return found


@torch.no_grad()
def _restore(folder: Path, model: PreTrainedModel, parts: dict[str, Any]) -> None:
    try:
        held = load_file(folder / "state.safetensors")
        for name, values in model.named_parameters():
            values.copy_(held[f"model.{name}"])
        for part in parts:
            for name, tensor in _tensors(parts[part]).items():
                tensor.copy_(held[f"{part}.{name}"])
    except Exception as error:  # whatever safetensors makes of damage
        raise AdapterError(
            f"{folder} is damaged ({type(error).__name__}): remove {folder.parent} to begin anew"
        ) from None


class _bar:
    """A progress bar over the steps of all rounds; a line every so often where it is not `shown`."""

    def __init__(self, total: int, used: int, *, shown: bool) -> None:
        self.total, self.used, self.shown = total, used, shown

    def __enter__(self) -> Callable[[str, int, float], None] | None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.total, initial=self.used, unit="step", file=sys.stderr, leave=False, disable=not self.shown
        )
        return self._say

    def _say(self, stage: str, step: int, loss: float) -> None:
        self.bar.set_postfix({stage: f"{loss:.3f}"}, refresh=False)
        self.bar.update()
        self.used += 1
        if not self.shown and self.used % 50 == 0:
            print(f"step {self.used} of {self.total}, {stage}: loss {loss:.3f}", file=sys.stderr, flush=True)

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
