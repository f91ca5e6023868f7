"""`moesaic compose`: adapters to one routed mixture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli.show import print_json
from moesaic.cli.verbs import Section, verb
from moesaic.data.examples import has_split
from moesaic.errors import AdapterError, ConfigError, path_of
from moesaic.models.embedded import load_outline, resolve
from moesaic.runs.folder import (
    RunFolder,
    atomic_folder,
    check_writable,
    read_json,
    run_path,
    write_json,
    write_text,
)
from moesaic.runs.method import adapter_settings, all_adapter_settings, check_follows, is_routed
from moesaic.runs.recipe import Recipe, adapter_config, dump, load_recipe
from moesaic.runs.results import command_line, model_card
from moesaic.runs.settings import build, check_keys, lists, names, parse_overrides, texts
from moesaic.runs.sources import base_of, folders_of

if TYPE_CHECKING:
    from moesaic.lora.stored import StoredExpert

logger = logging.getLogger(__name__)


@dataclass
class ComposeSettings:
    """Settings of `moesaic compose`; the method's own go under `adapter.`."""

    adapters: Any = field(
        default=None,
        metadata={"help": "folders or hub ids of LoRA adapters, comma-separated; {NAME: FOLDER} names them"},
    )
    method: str = field(
        default="", metadata={"help": "how they are routed (see `moesaic methods`); retrieval with data, arrow without"}
    )
    model: str = field(default="", metadata={"help": "the base model; the one that the adapters name where left out"})
    data: str = field(default="", metadata={"help": "rows of the adapters' tasks, for methods that compare prompts"})
    tasks: list[str] | None = field(default=None, metadata={"help": "which tasks of data, comma-separated"})
    extend: str = field(
        default="",
        metadata={"help": "a composed folder to start from: adapters come in, or replace those of their name"},
    )
    drop: list[str] | None = field(default=None, metadata={"help": "experts of extend to leave out, comma-separated"})
    out: str = field(default="composed", metadata={"help": "folder to write"})
    overwrite: bool = field(default=False, metadata={"help": "replace it if it is there"})
    adapter: dict[str, Any] = field(default_factory=dict, metadata={"help": "the method's settings: adapter.top_k=2 …"})


@verb(
    "compose",
    "route LoRA adapters that are trained already",
    group="adapters",
    place=60,
    settings=[Section(ComposeSettings)],
)
def run_compose(arguments: Sequence[str], *, as_json: bool = False) -> None:
    """Write a run folder of adapters and a router over them, which was trained for no step.

    Raises:
        MoesaicError: of the kind that fits; nothing is written then, and the adapters are only ever read.
    """
    given = parse_overrides(arguments, lists=lists(ComposeSettings), texts=texts(ComposeSettings))
    check_keys("settings", given, names(ComposeSettings), of_adapters=all_adapter_settings)
    settings = build(ComposeSettings, given)
    settings.method = settings.method or ("retrieval" if settings.data else "arrow")
    folders = folders_of(settings.adapters)
    kept: list[str] = []
    before = Recipe()
    if settings.extend:
        before = load_recipe(str(run_path(path_of(settings.extend)).recipe))
        settings, folders, kept = _extended(settings, before, given, folders)
    elif settings.drop:
        raise ConfigError("drop leaves experts out of a composed folder: extend=FOLDER names it")
    if not folders:
        raise ConfigError("adapters is missing: adapters=a/,b/ names the folders of at least one LoRA adapter")
    _check_kinds(settings.adapter)
    if settings.adapter.get("instruct_url") and not settings.data and not settings.adapter.get("texts"):
        raise ConfigError("adapter.instruct_url writes instructions from rows of each task: data=… names them")
    out = _place(settings, folders)
    adapter = {**settings.adapter, "adapters": folders}
    recipe = replace(
        before,
        method=settings.method,
        model=settings.model,
        data=settings.data,
        tasks=settings.tasks if settings.tasks or given.get("data") else before.tasks,
        adapter=adapter,
    )
    if not is_routed(settings.method):
        raise ConfigError(f"method={settings.method} routes nothing: name a mixture (see `moesaic methods`)")
    config: Any = adapter_config(recipe)
    from moesaic.adapters.edit import carry_over
    from moesaic.adapters.export import adapter_of
    from moesaic.lora.loading import check_folder
    from moesaic.training.heads import tasks_of
    from moesaic.training.prepared import load_examples
    from moesaic.training.wrapping import with_heads, wrap

    experts = config.store.experts
    recipe = replace(recipe, model=settings.model or base_of(experts))
    if not recipe.model:
        raise ConfigError("model is missing: the adapters do not say which base model they are for")
    by_task = config.kind.needs_tasks or config.kind.needs_own_task or "texts" in adapter_settings(recipe.method)
    if by_task and before.tasks and recipe.tasks is before.tasks:
        recipe = replace(recipe, tasks=sorted({task for expert in experts for task in tasks_of(expert)}))
    examples = load_examples(recipe) if recipe.data else []
    base = with_heads(load_outline(recipe.model), examples, recipe, config)
    model = wrap(base, recipe)
    model.peft_config["default"].base_model_name_or_path = resolve(recipe.model)
    fresh = [expert.name for expert in experts]
    if kept:
        source = adapter_of(path_of(settings.extend))
        stored, positions = check_folder(source), {fresh.index(name): name for name in kept}
        again = stored.method == recipe.method
        if carry_over(source, model, stored.experts or [], positions, whole=again):
            fresh = [name for name in fresh if name not in kept]
    rows = [_row(expert) for expert in experts]
    with atomic_folder(out) as staging:
        run = RunFolder(staging)
        model.save_pretrained(str(run.adapter), save_embedding_layers=False)
        kept_settings = {k: v for k, v in recipe.adapter.items() if not k.startswith("instruct_")}
        told = command_line(but="adapter.instruct_")
        how = f"Experts: {', '.join(expert.name for expert in experts)}, put together and not trained any further."
        write_text(run.adapter / "README.md", model_card(recipe, told, how))
        write_text(run.recipe, dump({key: getattr(recipe, key) for key in _KEPT} | {"adapter": kept_settings}))
        layout = {} if base.layout is None else base.layout.to_dict()
        write_json(run.layout, {"tasks": list(base.tasks), **layout})
    if as_json:
        facts = {"folder": str(out), "method": recipe.method, "model": recipe.model, "experts": rows}
        print_json(facts)
        return
    from rich.console import Console
    from rich.table import Column, Table

    from moesaic.cli.report import of_adapter
    from moesaic.evaluation.opening import open_adapter

    columns = [Column(name, overflow="fold") for name in rows[0]]
    table = Table(*columns, title=f"{recipe.method} on {recipe.model}")
    for row in rows:
        table.add_row(*(_span(value) if isinstance(value, list) else str(value) for value in row.values()))
    console = Console(highlight=False)
    console.print(table)
    if (config.kind.learns_routing or config.kind.weights == "searched") and fresh:
        logger.warning(
            "the routing of %s is as it was drawn: `moesaic train %s adapter.adapters=… data=…` trains it",
            ", ".join(fresh),
            recipe.method,
        )
    if getattr(config, "none_below", "") is None and recipe.data:
        console.print("adapter.none_below=own would let the base answer prompts that none of them knows")
    loads = f'import moesaic; PeftModel.from_pretrained(model, "{out}/adapter")'
    console.print(f"written: {out}; `{loads}` loads it", soft_wrap=True)
    console.print(f"what it is made of: {of_adapter(open_adapter(out))}", soft_wrap=True)
    held_out = recipe.data and has_split(recipe.data, "validation", recipe.tasks)
    console.print(f"next: moesaic eval {out}{'' if held_out else ' data=HELD_OUT_ROWS'}", soft_wrap=True)


_KEPT = ("method", "model", "data", "tasks", "max_length", "seed", "precision", "on_bad_lines")
"""Settings of a recipe that are of use without training."""


def _check_kinds(adapter: dict[str, Any]) -> None:
    """Raise ConfigError for settings of the method that compose finds itself."""
    if "adapters" in adapter:
        raise ConfigError("adapter.adapters follows from adapters=…: leave it out")
    check_follows(adapter)
    for key in ("modules_to_save", "trainable_token_indices"):
        if key in adapter:
            raise ConfigError(f"adapter.{key} names what is trained, and compose trains nothing: `moesaic train` does")


def _place(settings: ComposeSettings, folders: dict[str, str]) -> Path:
    """Where to write. Raises ConfigError where that would touch what is read, or is not a run's to replace."""
    out = path_of(settings.out)
    check_writable(out, f"out={settings.out}")
    if out.is_symlink():
        raise ConfigError(f"out={out} is a link: name the folder itself")
    if out.exists() and not settings.overwrite:
        raise ConfigError(f"out={out} is already there; overwrite=true replaces it")
    if out.exists() and not ((out / "recipe.yaml").is_file() and (out / "adapter").is_dir()):
        raise ConfigError(f"out={out} is not a run's folder, so it is not replaced: name another")
    general = settings.adapter.get("subtract") or []
    general = [general] if isinstance(general, str) else general
    for read in (*folders.values(), *map(str, general), settings.data, settings.extend):
        source = path_of(read).resolve() if read else None
        if source is None or not source.exists():
            continue
        target = out.resolve()
        if target == source or target in source.parents or source in target.parents:
            raise ConfigError(f"out={out} and {read}, which is read, lie in each other: write somewhere else")
    return out


def _extended(
    settings: ComposeSettings, recipe: Recipe, given: dict[str, Any], new: dict[str, str]
) -> tuple[ComposeSettings, dict[str, str], list[str]]:
    """The settings of the folder that is started from, all experts' folders, and the names of those that stay."""
    from moesaic.adapters.edit import experts_after
    from moesaic.adapters.export import adapter_of
    from moesaic.lora.loading import check_folder

    path = path_of(settings.extend)
    before: Any = check_folder(adapter_of(path))
    if before.experts is None:
        raise ConfigError(
            f"extend={settings.extend} holds a mixture that was trained as one: its experts are no adapters"
        )
    method = given.get("method", recipe.method)
    stored = dict(recipe.adapter)
    sources = folders_of(stored.pop("adapters", None))
    if list(sources) != before.experts or len(sources) != before.num_experts:
        raise AdapterError(f"{path} is damaged: its recipe names other adapters than its adapter has experts")
    if "subtract" in settings.adapter and settings.adapter["subtract"] != stored.get("subtract"):
        raise ConfigError("subtract changes every expert, so that none could stay as it is: compose anew")
    if method != recipe.method:
        stored = {key: stored[key] for key in ("subtract", "ignore_base") if key in stored}
    names_after = experts_after(before.experts, list(new), settings.drop or [])
    kept = [name for name in before.experts if name in names_after and name not in new]
    for name in kept:
        if "/" in sources[name] and not path_of(sources[name]).is_dir():
            if (path / "layout.json").is_file() and "labels" in read_json(path / "layout.json"):
                raise ConfigError(
                    f"the folder of expert {name}, {sources[name]}, is gone, and with it its task's head: restore it"
                )
            raise ConfigError(
                f"the folder of expert {name}, {sources[name]}, is gone: `moesaic export {settings.extend} "
                f"expert={name} out=NEW` writes it anew; name NEW in its place in {path / 'recipe.yaml'}"
            )
    asked = dict(settings.adapter)
    stored["instructions"] = getattr(before, "instructions", None)
    for key in ("instructions", "texts"):  # of experts that stay, and those that are given
        own = stored.pop(key, None) or {}
        if key in asked and not isinstance(asked[key], dict):
            continue
        now = asked.pop(key, {})
        told = {name: text for name, text in own.items() if name in kept} | now
        if told and (now or key in adapter_settings(method)):
            stored[key] = told
    changed = replace(
        settings,
        method=method,
        model=settings.model or recipe.model,
        data=settings.data or recipe.data,
        adapter={**stored, **asked},
    )
    return changed, {name: new.get(name, sources.get(name, "")) for name in names_after}, kept


def _row(expert: StoredExpert) -> dict[str, Any]:
    ranks, scalings = ([getattr(f, key) for f in expert.factors.values()] for key in ("rank", "scaling"))
    return {
        "expert": expert.name,
        "rank": [min(ranks), max(ranks)],
        "scaling": [min(scalings), max(scalings)],
        "modules": len(expert.factors),
        "folder": str(expert.folder),
    }


def _span(span: Sequence[float]) -> str:
    low, high = span
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
