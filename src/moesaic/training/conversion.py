"""From the settings of `moesaic convert` to a folder: the converted model, its tokenizer, its perplexities.

A conversion that is tuned keeps every round that is done in `<out>/rounds`, and goes on from there.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.errors import AdapterError, ConfigError, suggest
from moesaic.ffn import model as ffn
from moesaic.ffn.read_me import ReadMe
from moesaic.ffn.serving.files import write_checksums
from moesaic.ffn.tune import Rounds, tune
from moesaic.models.embedded import load_model, resolve
from moesaic.models.precision import Numerics, numerics
from moesaic.report.domains import page
from moesaic.runs.conversion import Conversion
from moesaic.runs.folder import (
    atomic_folder,
    check_writable,
    discard,
    locked,
    read_json,
    write_json,
    write_text,
    writing,
)
from moesaic.runs.results import command_line, count_total, device_name, versions
from moesaic.runs.settings import differences, names
from moesaic.training.domains import Domain, domains_of, figures, mixed, named, routing

logger = logging.getLogger(__name__)

RESULTS, SETTINGS = "conversion.json", "settings.json"


def convert(wanted: Conversion, *, command: str | None = None, progress: bool | None = None) -> dict[str, Any]:
    """Convert a model and write it; returns what is written to `conversion.json`.

    Raises:
        MoesaicError: of the kind that fits; nothing is written then but rounds that are done.
        KeyboardInterrupt: rounds that are done are kept, and the same command goes on from them.
    """
    command = command or command_line()
    shown = sys.stderr.isatty() if progress is None else progress
    method = method_of(wanted)
    out = _place(wanted)
    rounds = _rounds(wanted)
    plan = numerics(wanted.precision)
    base = load_any(wanted.model)
    if base.kind != "causal":
        raise ConfigError(f"model={wanted.model} is an encoder: `moesaic convert` takes language models")
    model: PreTrainedModel = base.model.to(plan.device)
    domains = domains_of(
        named(wanted.domains),
        base.tokenizer,
        length=_length(wanted, model),
        train=wanted.rows,
        held=wanted.held_out,
        seed=wanted.seed,
    )
    before = figures(model, domains, batch_size=wanted.batch_size)
    rows = {name: domain.train for name, domain in domains.items()}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        _check_same(out, wanted)
        parts = method.parts(model, rows, batch_size=wanted.batch_size, seed=wanted.seed)
        if rounds is not None:
            _tune(model, parts, domains, wanted, rounds, plan, out, shown=shown)
        dense = count_total(model)
        made = ffn.convert(model, method, **parts).to(getattr(torch, wanted.dtype))
        results = {
            "method": method.name,
            "model": wanted.model,
            "settings": made.config.moesaic,
            "domains": named(wanted.domains),
            "seed": wanted.seed,
            "parameters": {"before": dense, "after": count_total(made)},
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
            if isinstance(method, ReadMe):
                write_checksums(staging, [f"{name}.experts" for name in ffn.expert_layers(made)])
            write_text(staging / "report.html", _page(wanted, results, routed))
            write_json(staging / RESULTS, results)
    return results


def _page(wanted: Conversion, results: dict[str, Any], routed: Any) -> str:
    counts = results["parameters"]
    facts = [
        ("model", wanted.model),
        ("method", results["method"]),
        ("parameters before", f"{counts['before']:,}"),
        ("parameters after", f"{counts['after']:,}"),
        ("seed", str(wanted.seed)),
        ("device", results["device"]),
        ("command", results["command"]),
    ]
    return page(
        "moesaic convert", f"{wanted.method} on {wanted.model}", facts=facts,
        columns={key: results[key] for key in ("before", "after")}, routing=routed, curve=[],
        settings=wanted.describes(), versions=results["versions"],
    )  # fmt: skip


def load_any(name: str) -> Any:
    """A base model as `load_model` has it, also one that was converted before."""
    with suppress(AdapterError):
        ffn.class_of(resolve(name))  # makes Transformers know its kind
    return load_model(name)


def method_of(wanted: Conversion) -> ffn.Method:
    """The method with its settings. Raises ConfigError for what it does not know or refuses."""
    kind = ffn.method_of(wanted.method)
    known = [f.name for f in fields(kind) if f.name not in _FOUND]
    for key in wanted.experts:
        if key not in known:
            raise ConfigError(f"method {wanted.method} has no setting experts.{key}; {suggest(key, known)}")
    domains = named(wanted.domains)
    if kind.needs_text and not domains:
        raise ConfigError(
            f"method {wanted.method} reads text: domains=a.txt,src/ names files or folders, one a domain; stdlib and "
            "pydoc come with Python"
        )
    found = {"domains": list(domains)} if "domains" in names(kind) else {}
    try:
        return kind(**found, **wanted.experts)
    except TypeError as error:
        raise ConfigError(f"experts settings of {wanted.method}: {error}") from None


_FOUND = ("domains", "shared_widths")
"""Settings that follow from the text and the model."""


def _rounds(wanted: Conversion) -> Rounds | None:
    if wanted.method != ReadMe.name:
        if wanted.tune:
            raise ConfigError(f"tune belongs to read-me: {wanted.method} is not trained on conversion")
        return None
    for key in wanted.tune:
        if key not in names(Rounds):
            raise ConfigError(f"read-me has no setting tune.{key}; {suggest(key, names(Rounds))}")
    try:
        return Rounds(**{"rounds": 2, **wanted.tune})
    except TypeError as error:
        raise ConfigError(f"tune settings: {error}") from None


def _length(wanted: Conversion, model: Any) -> int:
    longest = getattr(model.config, "max_position_embeddings", None)
    return wanted.length if longest is None else min(wanted.length, longest)


def _place(wanted: Conversion) -> Path:
    out = Path(wanted.out).expanduser()
    check_writable(out, f"out={wanted.out}")
    if out.is_file():
        raise ConfigError(f"out={wanted.out} is a file; name a folder")
    if out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        unfinished = (out / "rounds").is_dir() and not (out / RESULTS).is_file()
        ours = (out / RESULTS).is_file() or unfinished
        if not ours:
            raise ConfigError(f"out={wanted.out} holds files that are not a conversion's; name another folder")
        if wanted.overwrite:
            discard(out)
        elif not unfinished:
            raise ConfigError(f"{wanted.out} holds a converted model; overwrite=true replaces it, out=… goes elsewhere")
    return out


def _check_same(out: Path, wanted: Conversion) -> None:
    file = out / "rounds" / SETTINGS
    if file.is_file() and (changed := differences(read_json(file), wanted.describes())):
        raise ConfigError(
            f"{out} holds an unfinished conversion with {changed}: set it back to go on, or overwrite=true, or another "
            "out="
        )


def _tune(
    model: PreTrainedModel,
    parts: dict[str, Any],
    domains: dict[str, Domain],
    wanted: Conversion,
    rounds: Rounds,
    plan: Numerics,
    out: Path,
    *,
    shown: bool,
) -> None:
    """Read-ME's rounds, in place, each kept as it is done; goes on behind those that are."""
    kept = out / "rounds"
    done = max((int(folder.name) for folder in kept.glob("[0-9]*")), default=0)
    if done:
        logger.warning("%s: going on from round %d", out, done + 1)
        _restore(kept / str(done), model, parts)
    else:
        with writing(kept):
            kept.mkdir(exist_ok=True)
        write_json(kept / SETTINGS, wanted.describes())
    used = done * (rounds.router_steps + rounds.expert_steps)
    batches = islice(mixed(domains, wanted.batch_size, wanted.seed), used, None)
    there = ({name: values.to(plan.device) for name, values in batch.items()} for batch in batches)
    with _bar(rounds, used, shown=shown) as say:
        pre_gate, found = parts["pre_gate"], parts["masks"]
        for number in tune(model, pre_gate, found, there, rounds, say=say, first=done, around=plan.context):
            with atomic_folder(kept / str(number + 1)) as staging:
                save_file(_state(model, parts), staging / "state.safetensors")
            discard(kept / str(number))


def _state(model: PreTrainedModel, parts: dict[str, Any]) -> dict[str, Tensor]:
    found = {f"pre_gate.{name}": values for name, values in parts["pre_gate"].state_dict().items()}
    found |= {f"masks.{name}": values for name, values in parts["masks"].items()}
    found |= {f"model.{name}": values for name, values in model.named_parameters()}  # tied ones once
    return {name: values.detach().contiguous() for name, values in found.items()}


@torch.no_grad()
def _restore(folder: Path, model: PreTrainedModel, parts: dict[str, Any]) -> None:
    try:
        held = load_file(folder / "state.safetensors")
        for name, values in model.named_parameters():
            values.copy_(held[f"model.{name}"])
        for name, values in parts["pre_gate"].state_dict().items():
            values.copy_(held[f"pre_gate.{name}"])
        parts["masks"] = {name: held[f"masks.{name}"] for name in parts["masks"]}
    except Exception as error:  # whatever safetensors makes of damage
        raise AdapterError(f"{folder} is damaged ({type(error).__name__}): overwrite=true begins anew") from None


class _bar:
    """A progress bar over the steps of all rounds."""

    def __init__(self, rounds: Rounds, used: int, *, shown: bool) -> None:
        self.total, self.used, self.shown = rounds.rounds * (rounds.router_steps + rounds.expert_steps), used, shown

    def __enter__(self) -> Callable[[str, int, float], None] | None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.total, initial=self.used, unit="step", file=sys.stderr, leave=False, disable=not self.shown
        )
        return self._say

    def _say(self, stage: str, step: int, loss: float) -> None:
        self.bar.set_postfix({stage: f"{loss:.3f}"}, refresh=False)
        self.bar.update()

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
