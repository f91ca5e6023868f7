"""From a base model and a recipe to what is trained: heads on an encoder, the adapter around it, and how many
parameters that makes."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moesaic.data.examples import Example
from moesaic.errors import ConfigError, MoesaicError, first_line
from moesaic.lora import targets
from moesaic.lora.stored import StoredExpert
from moesaic.models.embedded import LoadedModel, load_outline, resolve
from moesaic.models.encoder import HEADS, EncoderForTasks, Layout
from moesaic.runs.method import is_routed
from moesaic.runs.recipe import Recipe, adapter_config
from moesaic.runs.results import count_trainable
from moesaic.training import heads


@dataclass
class Base:
    """What PEFT wraps: a base model, with heads if it is an encoder.

    `tasks` gives a task its id by position; `defaults` are the adapter settings that follow from model and tasks;
    `experts` are the adapters that answer, where they are trained already.
    """

    model: Any
    tasks: tuple[str, ...]
    layout: Layout | None
    defaults: dict[str, Any]
    experts: tuple[StoredExpert, ...] = ()


def with_heads(base: LoadedModel, examples: Sequence[Example], recipe: Recipe, config: Any) -> Base:
    """Put heads on an encoder for the tasks of `examples`; a causal model stays as it is.

    Where experts are adapters that are trained already, their tasks' heads are those they were trained with.
    """
    tasks = tuple(sorted({e.task for e in examples}))
    stored = experts_of(config)
    if stored and not config.ignore_base:
        config.store.check_base(resolve(recipe.model))
    told = {}
    if stored and hasattr(config, "expert_texts") and not config.expert_texts():
        told = {"texts": heads.texts_of(stored, examples, seed=recipe.seed)}
    if base.kind == "encoder" and stored:
        layout = heads.united(stored, tasks)
        model = EncoderForTasks(base.model, layout)
        if not model.task_heads.weight.is_meta:
            heads.load(model, stored)
        own = {"num_tasks": len(layout.tasks), "task_of": _task_of(stored, layout.tasks, config)}
        return Base(model, layout.tasks, layout, {"modules_to_save": [HEADS], **own, **told}, stored)
    if stored:
        tasks = tuple(sorted({*tasks, *(task for expert in stored for task in heads.tasks_of(expert))}))
        own = {"num_tasks": len(tasks), "task_of": _task_of(stored, tasks, config)}
        return Base(base.model, tasks, None, {"task_type": "CAUSAL_LM", **own, **told}, stored)
    defaults = {"target_modules": targets.default(base.model), "num_tasks": len(tasks)}
    if base.kind == "causal":
        return Base(base.model, tasks, None, {**defaults, "task_type": "CAUSAL_LM"})
    layout = Layout.of(examples)
    return Base(EncoderForTasks(base.model, layout), tasks, layout, {**defaults, "modules_to_save": [HEADS]})


def _task_of(stored: Sequence[StoredExpert], tasks: Sequence[str], config: Any) -> list[int] | None:
    """Each expert's task. Raises ConfigError where the method needs it, and an expert has several."""
    ids = heads.task_ids(stored, tasks)
    if ids is None and config.task_of is None and (config.kind.needs_own_task or config.kind.needs_tasks):
        mixed = next(expert for expert in stored if len(heads.tasks_of(expert)) != 1)
        raise ConfigError(
            f"method {config.method} has an adapter for a task, and {mixed.name} was trained on "
            f"{', '.join(heads.tasks_of(mixed)) or 'none'}: name adapters of one task each"
        )
    return ids


def experts_of(config: Any) -> tuple[StoredExpert, ...]:
    """The adapters that are a config's experts, where they are trained already."""
    store = getattr(config, "store", None)
    return tuple(store.experts) if store else ()


def outline(recipe: Recipe, examples: Sequence[Example], config: Any) -> Base:
    """The same on the meta device: nothing is loaded but the model's configuration."""
    return with_heads(load_outline(recipe.model), examples, recipe, config)


def config_for(recipe: Recipe, tasks: Sequence[str]) -> Any:
    """The config of a recipe that is trained on `tasks`.

    Raises:
        ConfigError: the method gates by task id, and there is one task only, or one that no adapter is of.
    """
    config: Any = adapter_config(recipe, num_tasks=len(tasks))
    stored = experts_of(config)
    if stored and (config.kind.needs_own_task or config.kind.needs_tasks):
        own = {expert.name: heads.tasks_of(expert) for expert in stored}
        without = [task for task in tasks if not any(task in found for found in own.values())]
        idle = [name for name, found in own.items() if not set(found) & set(tasks)]
        if without or idle:
            what = f"no adapter is of task {without[0]!r}" if without else f"no row is of adapter {idle[0]!r}"
            raise ConfigError(
                f"method={recipe.method} takes each row by its own adapter, and {what}: name adapters as their tasks, "
                "'adapters={TASK: FOLDER, …}', and tasks=… picks the rows"
            )
        return config
    if is_routed(recipe.method) and config.kind.needs_tasks and len(tasks) < 2:
        raise ConfigError(
            f"method={recipe.method} gates by task id, but tasks={','.join(tasks)} is one task only: add another, or "
            "take another method"
        )
    return config


def check_teacher(config: Any) -> None:
    """Raise ConfigError or DataError where what the method learns its routing from, such as a topics file, is unfit."""
    if hasattr(config, "targets"):
        config.targets([])


def wrap(base: Base, recipe: Recipe, *, hollow: bool = False) -> Any:
    """The PEFT model of a recipe; `base.model` becomes part of it. `hollow`: its parameters get no storage.

    Raises:
        ConfigError: settings that the method refuses, or that do not fit the model.
    """
    from peft import get_peft_model

    config = with_meant_size(adapter_config(recipe, **base.defaults))
    try:
        wrapped = get_peft_model(base.model, config, low_cpu_mem_usage=hollow)
        for name, parameter in wrapped.named_parameters():
            if f".{HEADS}." in name and base.experts:
                parameter.requires_grad_(False)  # experts answer with the heads that they were trained with
        return wrapped
    except MoesaicError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, re.error) as error:
        wanted = recipe.adapter.get("target_modules")
        named = f" (target_modules={wanted}; by default {base.defaults['target_modules']})" if wanted else ""
        raise ConfigError(f"method {recipe.method} on model {recipe.model}{named}: {first_line(error)}") from None


def with_meant_size(config: Any) -> Any:
    """A config whose size a mixture is not to speak of when it is made: it was solved for, or a run tells it."""
    config.size_is_meant = True
    return config


def hollow(base: Base, recipe: Recipe) -> Any:
    """The PEFT model of a recipe without storage; `base` is not touched."""
    if "init_lora_weights" in recipe.adapter:  # some kinds read the base's weights; none changes a shape
        recipe = replace(recipe, adapter={**recipe.adapter, "init_lora_weights": True})
    return wrap(replace(base, model=_hollow(base.model)), recipe, hollow=True)


def count(base: Base, recipe: Recipe) -> tuple[int, dict[str, int]]:
    """Trainable parameters of a recipe, in all and in each adapted module by name; `base` is not touched."""
    wrapped = hollow(base, recipe)
    layers = {n: m for n, m in wrapped.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    return count_trainable(wrapped), {name: count_trainable(layer) for name, layer in layers.items()}


def trainable(model: nn.Module, config: Any) -> int:
    """Trainable parameters of a PEFT config on a model, which is not touched."""
    from peft import get_peft_model

    config = with_meant_size(copy.deepcopy(config))
    return count_trainable(get_peft_model(_hollow(model), config, low_cpu_mem_usage=True))


def _hollow(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters and buffers have shapes but no storage."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)
