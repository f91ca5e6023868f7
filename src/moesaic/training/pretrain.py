"""From a recipe of `moesaic.runs.pretraining` to a run folder: a language model trained from nothing by HF Trainer."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moesaic import ffn
from moesaic.data.sampling import InterleavedSampler
from moesaic.errors import ConfigError, first_line, suggest
from moesaic.ffn.places import routed_layers
from moesaic.ffn.schedules import KSchedule, Schedule
from moesaic.ffn.slimming import check_top_k
from moesaic.models.embedded import resolve
from moesaic.models.nano.corpus import DOMAINS
from moesaic.report.domains import page
from moesaic.runs.folder import RunFolder, atomic_folder, write_json, write_text, writing
from moesaic.runs.pretraining import Pretraining, load_pretraining
from moesaic.runs.recipe import dump
from moesaic.runs.results import command_line, count_total, count_trainable, device_name, peak_memory, versions
from moesaic.training.conversion import method_with
from moesaic.training.domains import Domain, check_fit, digest, domains_of, figures, named, routing
from moesaic.training.place import check_place, plain
from moesaic.training.reporting import check_reports
from moesaic.training.run import fit
from moesaic.training.trainer import RunMixin, training_arguments

logger = logging.getLogger(__name__)


def pretrain(recipe: Pretraining, *, command: str | None = None, progress: bool | None = None) -> dict[str, Any]:
    """Run a recipe, or continue it where it was interrupted; returns what is written to results.json.

    Raises:
        MoesaicError: of the kind that fits; nothing already written is lost.
        KeyboardInterrupt: after a checkpoint, when interrupted.
    """
    command = command or command_line()
    check_reports(recipe.report_to)
    folder = RunFolder(recipe.run_folder(), load_pretraining)
    check_place(folder, overwrite=recipe.overwrite)
    tokenizer = AutoTokenizer.from_pretrained(resolve(recipe.tokenizer))
    model = built(recipe, tokenizer)
    schedule = _schedule(recipe, model)
    domains = _domains(recipe, tokenizer)
    check_fit(model, domains)
    rows = {name: len(domain.train) for name, domain in domains.items()}
    layout = {"domains": rows, "data_sha256": digest(domains)}
    with (
        folder.prepared(
            overwrite=recipe.overwrite, resume=recipe.resume, description=plain(recipe), layout=layout
        ) as step,
        writing(folder.path),
    ):
        write_json(folder.layout, layout)
        write_text(folder.recipe, dump(recipe))
        trainer = _trainer(recipe, model, domains, folder, progress=progress)
        if schedule is not None:
            trainer.add_callback(KSchedule(schedule))
        if step:
            logger.warning("%s: going on from step %d", folder.path, step)
        fit(trainer, folder, step)
        found = figures(model, domains)
        with atomic_folder(folder.model) as staging:
            model.save_pretrained(str(staging))
            tokenizer.save_pretrained(str(staging))
        results = {
            "name": recipe.name,
            "seed": recipe.seed,
            "steps": trainer.state.global_step,
            "resumed_from_step": step,
            "held_out": found,
            "top_k": max((layer.top_k for layer in routed_layers(model)), default=None),
            "mean_loss": sum(figure["loss"] for figure in found.values()) / len(found),
            "trainable_parameters": count_trainable(model),
            "total_parameters": count_total(model),
            **peak_memory(trainer.args.device),
            "train_seconds": round(trainer.seconds, 2),
            "tokens_per_second": round(trainer.tokens / trainer.seconds, 1),
            "bf16_autocast": bool(trainer.args.bf16),
            "device": device_name(trainer.args.device),
            "command": command,
            "versions": versions(),
        }
        write_text(folder.path / "report.html", _page(recipe, results, routing(model, domains), _curve(folder)))
        write_json(folder.results, results)
    return results


def _curve(folder: RunFolder, most: int = 60) -> list[tuple[float, float]]:
    """(step, loss), neighbouring steps averaged to at most so many points."""
    lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    size = -(-len(lines) // most)
    parts = [lines[i : i + size] for i in range(0, len(lines), size)]
    return [(part[-1]["step"], sum(line["loss"] for line in part) / len(part)) for part in parts]


def _page(recipe: Pretraining, results: dict[str, Any], routed: Any, curve: list[tuple[float, float]]) -> str:
    name = recipe.name or recipe.architecture
    facts = [
        ("architecture", recipe.architecture),
        ("method", recipe.method or "none"),
        ("parameters", f"{results['total_parameters']:,}"),
        *([("experts a token", f"{results['top_k']}")] if results["top_k"] else []),
        ("steps", f"{results['steps']:,} of {recipe.batch_size * recipe.accumulation} x {recipe.length} tokens"),
        ("seed", str(recipe.seed)),
        ("device", results["device"]),
        ("command", results["command"]),
    ]
    return page(
        "moesaic train", name, facts=facts, columns={"held out": results["held_out"]}, routing=routed, curve=curve,
        settings=asdict(recipe), versions=results["versions"],
    )  # fmt: skip


def built(recipe: Pretraining, tokenizer: Any) -> PreTrainedModel:
    """The untrained model of a recipe.

    Raises:
        ConfigError: an architecture that Transformers does not have, or settings that it or the method refuses.
    """
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if recipe.architecture not in known:
        raise ConfigError(f"architecture={recipe.architecture}; {suggest(recipe.architecture, known)[:200]}")
    ends = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if own := ends.keys() & recipe.config.keys():
        raise ConfigError(f"config.{min(own)} follows from the tokenizer: leave it out")
    torch.manual_seed(recipe.seed)
    method = method_with(recipe.method, recipe.experts) if recipe.method else None
    try:
        plain_config = transformers.AutoConfig.for_model(recipe.architecture)
        for key in recipe.config:
            if not hasattr(plain_config, key):
                near = suggest(key, [name for name in vars(plain_config) if not name.startswith("_")])
                raise ConfigError(f"architecture {recipe.architecture} has no setting config.{key}; {near}")
        config = transformers.AutoConfig.for_model(recipe.architecture, **{**ends, **recipe.config})
        if method is None:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        else:
            base: Any = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            model = ffn.fresh(base, config, method)
        _check_runs(model, recipe)
    except ConfigError:
        raise
    except Exception as error:  # whatever an architecture makes of sizes that cannot be
        raise ConfigError(f"architecture {recipe.architecture} cannot be made so: {first_line(error)}") from None
    return model


@torch.no_grad()
def _check_runs(model: PreTrainedModel, recipe: Pretraining) -> None:
    """Raise ConfigError for a model that sees what it is to predict, and whatever it raises on a row."""
    ids = torch.arange(8)[None] % model.config.vocab_size
    other = ids.clone()
    other[0, -1] = 0
    model.eval()
    one, two = (model(input_ids=row, use_cache=False).logits[0, 0] for row in (ids, other))
    model.train()
    if not torch.allclose(one, two, atol=1e-4):
        raise ConfigError(
            f"architecture {recipe.architecture} attends to what comes after a token: it predicts nothing"
        )


def _schedule(recipe: Pretraining, model: PreTrainedModel) -> Schedule | None:
    """Of k over the steps. Raises ConfigError for what the model cannot do, as for rows longer than it reads."""
    if recipe.experts and not recipe.method:
        raise ConfigError("experts are settings of a method, and there is none: method=smoe-dropout or rmoe")
    if not recipe.k_schedule and (recipe.k_min, recipe.k_max) != (1, 1):
        raise ConfigError("k_min and k_max are ends of a schedule, and there is none: k_schedule=linear")
    if recipe.k_schedule and recipe.experts.get("top_k") is not None:
        raise ConfigError("experts.top_k and k_schedule disagree: k follows the schedule, from k_min to k_max")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and recipe.length > longest:
        raise ConfigError(f"length={recipe.length} is above config.max_position_embeddings={longest}")
    if not recipe.k_schedule:
        return None
    kind: Any = recipe.k_schedule
    schedule = Schedule(kind, recipe.k_min, recipe.k_max, recipe.seed)
    check_top_k(model, recipe.k_max)
    return schedule


def _domains(recipe: Pretraining, tokenizer: Any) -> dict[str, Domain]:
    wanted = named(list(DOMAINS) if recipe.domains is None else recipe.domains)
    if not wanted:
        raise ConfigError("domains is empty: name sources of text, or leave it out for all that is generated")
    rows = -(-recipe.steps * recipe.batch_size * recipe.accumulation // len(wanted))
    return domains_of(wanted, tokenizer, length=recipe.length, train=rows, held=recipe.held_out, seed=recipe.seed)


def _trainer(
    recipe: Pretraining, model: PreTrainedModel, domains: dict[str, Domain], folder: RunFolder, *, progress: bool | None
) -> Any:
    args = transformers.TrainingArguments(**training_arguments(recipe, folder))
    rows = [row for domain in domains.values() for row in domain.train]
    length = recipe.steps * recipe.batch_size * recipe.accumulation * args.world_size
    of = [name for name, domain in domains.items() for _ in domain.train]
    trainer: Any = _PretrainingTrainer(model=model, args=args, train_dataset=rows, data_collator=_batch)
    trainer.attach(folder, InterleavedSampler(of, length, seed=recipe.seed), keep=recipe.keep, progress=progress)
    return trainer


class _PretrainingTrainer(RunMixin, transformers.Trainer):
    pass


def _batch(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
