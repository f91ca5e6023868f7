"""From a recipe to a run folder: HF Trainer for encoders, TRL's SFTTrainer for causal models."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moesaic.data import examples as data
from moesaic.data.sampling import InterleavedSampler
from moesaic.errors import MoesaicError, TrainingError, first_line
from moesaic.models.encoder import EncoderCollator
from moesaic.runs.folder import RunFolder, atomic_folder, write_json, write_text, writing
from moesaic.runs.process import is_memory
from moesaic.runs.recipe import Recipe, adapter_config, as_used, dump
from moesaic.runs.results import (
    command_line,
    count_total,
    count_trainable,
    device_name,
    model_card,
    peak_memory,
    versions,
)
from moesaic.training.held_out import BEST, Best, HeldOut, load_held_out
from moesaic.training.place import check_place, is_longer, plain, tell_longer
from moesaic.training.prepared import Prepared, load_examples, prepare, require_extras, size_told, training_rows
from moesaic.training.reporting import check_reports
from moesaic.training.trainer import RunMixin, training_arguments

logger = logging.getLogger(__name__)


def train(recipe: Recipe, *, command: str | None = None, progress: bool | None = None) -> dict[str, Any]:
    """Run a recipe, or continue it where it was interrupted; returns what is written to results.json.

    Args:
        command: recorded with the results; this process's where None.
        progress: a bar on stderr; where None, if that is a terminal, and else a line now and then.
    Raises:
        MoesaicError: of the kind that fits; nothing already written is lost.
        KeyboardInterrupt: after a checkpoint, when interrupted.
    """
    require_extras()
    command = command or command_line()
    adapter_config(recipe)  # a setting that cannot be is refused before anything is read
    check_reports(recipe.report_to)
    folder = RunFolder(recipe.run_folder())
    longer = is_longer(folder, recipe)
    check_place(folder, overwrite=recipe.overwrite, longer=longer)
    examples = load_examples(recipe)
    held_out = load_held_out(recipe, {e.task for e in examples}) if recipe.eval_every else []
    prepared = prepare(recipe, examples)
    recipe = as_used(prepared.recipe)
    stored: dict[str, Any] = {"tasks": list(prepared.tasks), "data_sha256": data.digest(examples)}
    stored |= {"held_out_sha256": data.digest(held_out)} if held_out else {}
    if prepared.layout is not None:
        stored["labels"] = {t: list(v) for t, v in prepared.layout.labels.items()}
        stored |= {"scorers": prepared.layout.scorers} if prepared.layout.scorers else {}
    rows = training_rows(prepared, examples)
    scored = training_rows(prepared, held_out) if held_out else []
    how: dict[str, Any] = {"overwrite": recipe.overwrite, "resume": recipe.resume, "description": plain(recipe)}
    if longer:
        how["longer"] = plain(replace(prepared.recipe, steps=folder.load(str(folder.recipe)).steps))
    with folder.prepared(**how, layout=stored) as step, writing(folder.path):
        write_json(folder.layout, stored)
        write_text(folder.next if longer else folder.recipe, dump(recipe))
        trainer = build_trainer(prepared, examples, rows, folder, held_out=scored, progress=progress)
        learns = count_trainable(prepared.model) > 0
        if longer:
            tell_longer(folder, recipe, step)
        elif step:
            logger.warning("%s: going on from step %d", folder.path, step)
        elif said := size_told(recipe, prepared.model):
            logger.warning("%s", said)
        if step:
            _take_up(trainer, recipe, step)
        found = ""
        if learns:
            fit(trainer, folder, step)
        else:
            found = _search(trainer, prepared)
        if not learns and not found:
            logger.warning("%s: method %s has nothing to train here: no step is made", folder.path, recipe.method)
        results = _results(trainer, prepared, step, command) | ({"found": found} if found else {})
        if trainer.best is not None:
            trainer.best.put_back(prepared.model)
            results["taken"] = {"step": trainer.best.step, "eval_loss": trainer.best.loss}
        folder.replaced(dump(recipe))
        with atomic_folder(folder.adapter) as staging:
            prepared.model.save_pretrained(str(staging))
            made = f"Seed {recipe.seed}, {recipe.steps} steps, learning rate {recipe.lr:g}."
            made += f" Taken after step {trainer.best.step}." if trainer.best is not None else ""
            card = model_card(recipe, command, f"Tasks: {', '.join(prepared.tasks)}. {made}")
            write_text(staging / "README.md", card)
        write_json(folder.results, results)
    return results


def build_trainer(
    prepared: Prepared,
    examples: list[data.Example],
    rows: list[Any],
    folder: RunFolder,
    *,
    held_out: Sequence[Any] = (),
    progress: bool | None,
) -> Any:
    """The trainer of a prepared model and its `training_rows`; `moesaic.host`'s mixin adds the auxiliary loss.

    Args:
        held_out: rows of the same kind, on which the recipe's `eval_every` has it scored.
    """
    recipe, tokenizer = prepared.recipe, prepared.base.tokenizer
    args = _arguments(prepared, folder)
    length = recipe.steps * recipe.batch_size * recipe.accumulation * args.world_size
    sampler = InterleavedSampler([e.task for e in examples], length, seed=recipe.seed, temperature=recipe.temperature)
    taught = taught_routing(prepared, examples, sampler)
    trainer: Any
    if prepared.layout is not None:
        from transformers import Trainer

        trainer = _class(Trainer, prepared.routed)(
            model=prepared.model,
            args=args,
            train_dataset=rows,
            data_collator=_collator(prepared, taught),
        )
    else:
        from datasets import Dataset
        from trl import SFTTrainer

        from moesaic.data.causal import question

        if taught is not None:
            rows = [{**row, "targets": taught.get(question(e))} for row, e in zip(rows, examples, strict=True)]
        trainer = _class(SFTTrainer, prepared.routed)(
            model=prepared.model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            data_collator=_collator(prepared),
        )
    trainer.attach(folder, sampler, keep=recipe.keep, progress=progress)
    if prepared.routed:
        from moesaic.host.callback import RoutingCallback

        trainer.add_callback(RoutingCallback(file=False, every=COUNTED))
    if held_out:
        by_token = prepared.layout is None
        scored = HeldOut(held_out, _collator(prepared), batch_size=recipe.batch_size, by_token=by_token)
        trainer.evaluates(scored, every=recipe.eval_every, takes_best=recipe.take == "best")
    return trainer


def _collator(prepared: Prepared, taught: dict[str, list[float]] | None = None) -> Any:
    """Of an encoder's rows, whose routing may be `taught`, or of a causal model's, which have that in them."""
    tokenizer, positions = prepared.base.tokenizer, prepared.base.positions
    if prepared.layout is None:
        from moesaic.data.causal import CausalCollator

        return CausalCollator(tokenizer.pad_token_id, task_ids=prepared.routed, positions=positions)
    return EncoderCollator(
        tokenizer,
        prepared.layout,
        max_length=prepared.max_length,
        task_ids=prepared.routed,
        targets=taught,
        positions=positions,
    )


def _take_up(trainer: Any, recipe: Recipe, step: int) -> None:
    """What a run knew at a checkpoint that Trainer does not restore."""
    place = trainer.folder.checkpoint(step)
    trainer.last_loss = trainer.folder.last_loss()
    if recipe.take == "best" and (step >= recipe.eval_every or (place / BEST).is_file()):
        try:
            trainer.best = Best.read(place)
        except Exception as error:
            raise trainer.folder.damaged(step, f"{BEST}: {first_line(error)}") from None


def _arguments(prepared: Prepared, folder: RunFolder) -> Any:
    """The arguments of HF Trainer, or of SFTTrainer for a causal model."""
    shared = training_arguments(prepared.recipe, folder)
    if prepared.layout is not None:
        from transformers import TrainingArguments

        return TrainingArguments(**shared)
    from trl import SFTConfig

    dataset = {"skip_prepare_dataset": True}
    return SFTConfig(**shared, max_length=prepared.max_length, dataset_kwargs=dataset)


def taught_routing(
    prepared: Prepared, examples: list[data.Example], sampler: InterleavedSampler
) -> dict[str, list[float]] | None:
    """By prompt, what its routing should be like: `MixtureConfig.targets`; None for a method without a teacher.

    Asked for the rows that a run draws, since a teacher may have to encode each.
    """
    config = prepared.model.peft_config["default"]
    if not prepared.routed or config.targets([]) is None:
        return None
    from moesaic.data.causal import question

    questions = list(dict.fromkeys(question(examples[i]) for i in sampler.drawn()))
    targets = config.targets(questions)
    shares = " ".join(f"{share:.2f}" for share in targets.mean(dim=0).tolist())
    logger.info("the teacher wants these shares of the experts: %s", shares)
    return dict(zip(questions, targets.tolist(), strict=True))


def _class(trainer: type, routed: bool) -> type:
    bases: tuple[type, ...] = (RunMixin, trainer)
    if routed:
        from moesaic.host import RoutedTrainerMixin

        bases = (RunMixin, RoutedTrainerMixin, trainer)
    return type(f"Run{trainer.__name__}", bases, {})


COUNTED = 10
"""Steps from one whose routing is counted to the next: to count every one takes some per cent of a small model's."""

_RESUMED_FROM = ("*model*.safetensors", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
"""Files of a checkpoint; where one is missing, HF Trainer would silently start that part anew."""


def fit(trainer: Any, folder: RunFolder, step: int) -> None:
    """Train, from the checkpoint of `step` on where that is not 0.

    Raises:
        TrainingError: memory runs out, a loss is not finite, or the checkpoint is damaged.
        KeyboardInterrupt: after a checkpoint.
    """
    lost = [f for f in _RESUMED_FROM if not any(folder.checkpoint(step).glob(f))] if step else []
    if lost:
        raise folder.damaged(step, f"no {lost[0]}")
    try:
        trainer.train(resume_from_checkpoint=str(folder.checkpoint(step)) if step else None)
    except MoesaicError:
        raise
    except Exception as error:
        if is_memory(error):
            steps = folder.steps()
            kept = f"; the checkpoint of step {steps[-1]} is kept" if steps else ""
            raise TrainingError(
                "out of memory: lower batch_size (and raise accumulation as much), or max_length, or give "
                f"checkpointing=true{kept} ({first_line(error)})"
            ) from None
        if not step or trainer.tokens:
            raise
        raise folder.damaged(step, first_line(error)) from None
    if trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved; "
            "the same command goes on from there"
        )


def _search(trainer: Any, prepared: Prepared) -> str:
    """Fit what has no gradients on the rows of the run's first step; what was found, empty where there is nothing."""
    config = prepared.model.peft_config["default"]
    if not prepared.routed:
        return ""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    def loss() -> float:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            return float(prepared.model(**batch).loss)

    prepared.model.eval()
    return str(config.fit(prepared.model, loss))


def _results(trainer: Any, prepared: Prepared, resumed: int, command: str) -> dict[str, Any]:
    seconds = trainer.seconds
    return {
        "method": prepared.recipe.method,
        "model": prepared.recipe.model,
        "tasks": list(prepared.tasks),
        "seed": prepared.recipe.seed,
        "steps": trainer.state.global_step,
        "resumed_from_step": resumed,
        "final_loss": None if math.isnan(trainer.last_loss) else trainer.last_loss,
        "trainable_parameters": count_trainable(prepared.model),
        "total_parameters": count_total(prepared.model),
        **peak_memory(trainer.args.device),
        "train_seconds": round(seconds, 2),
        "tokens_per_second": round(trainer.tokens / seconds, 1) if seconds else None,
        "bf16_autocast": bool(trainer.args.bf16),
        "device": device_name(trainer.args.device),
        "command": command,
        "versions": versions(),
    }
