"""Which modules a config means, and whether it can have them. Everything here runs before anything is changed."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from moesaic.errors import ConfigError
from moesaic.lora.block import FeedForward
from moesaic.lora.layer import MixtureLinear, features

if TYPE_CHECKING:
    from peft import PeftConfig

_READ_NOT_CALLED = {
    "mamba": {"dt_proj"},
    "falcon_mamba": {"dt_proj"},
    "jamba": {"dt_proj"},
}
"""Linears whose weight the model's code reads without calling them."""

_FEED_FORWARDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("lin1",), "lin2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
    (("ffn",), "ffn_output"),
    (("Wi",), "Wo"),
)
"""Linears of the FFNs that are known: those that read its input, and the one that makes its output."""


def place(model: nn.Module, name: str) -> tuple[int, int]:
    """(index, number) of the block that holds module `name`; (0, 1) outside any list of blocks.

    Counted within its own list: T5's encoder and decoder each start at 0.
    """
    module, parts = model, name.split(".")
    for index, part in enumerate(parts):
        if isinstance(module, nn.ModuleList):
            return int(part), len(module)
        if index < len(parts) - 1:
            module = getattr(module, part)
    return 0, 1


def default(model: nn.Module) -> str:
    """A pattern for every linear inside the model's blocks: no embeddings, heads or poolers.

    By the last part of a name, where all modules inside blocks that share it are linears; else by the whole name.
    """
    skip, blocks = never_called(model), re.compile(r"\.\d+\.")
    inside = {name: name.rpartition(".")[2] for name in own_modules(model) if blocks.search(name)}
    linears = {name: inside[name] for name in _linears(model) if name in inside and inside[name] not in skip}
    if not linears:
        raise ConfigError("this model has no linear layers inside a list of blocks: name them in target_modules")
    others = {leaf for name, leaf in inside.items() if name not in linears}
    leaves = sorted({*linears.values()} - others)
    parts = [rf".*\.\d+\.(?:.*\.)?(?:{'|'.join(leaves)})"] if leaves else []
    return "|".join(parts + [re.escape(name) for name, leaf in linears.items() if leaf in others])


def _linears(model: nn.Module) -> list[str]:
    """Names of all linears, those that another adapter already wraps by their own name."""
    return [
        name
        for name, module in own_modules(model).items()
        if isinstance(module, MixtureLinear) or features(module) is not None
    ]


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules, those that adapters wrap by their own name; nothing of the adapters."""
    modules = dict(model.named_modules())
    inner = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    return {name: module for name, module in modules.items() if not name.startswith(inner)}


def is_plain_lora(config: PeftConfig, key: str) -> bool:
    """Whether `lora_target_modules` names this module, in the layers and but for the modules that the config says."""
    if not getattr(config, "lora_target_modules", None):
        return False
    alone = copy.copy(config)
    alone.target_modules = config.lora_target_modules  # type: ignore[attr-defined]
    return bool(check_target_module_exists(alone, key))


def feed_forwards(model: nn.Module, config: Any) -> dict[str, FeedForward]:
    """The FFNs that are experts under this config, by the name of each of their linears.

    Raises:
        ConfigError: when there is none, or the targets hold a part of one only.
    """
    wanted, known = _experts(model, config), list(_known_feed_forwards(model))
    found: dict[str, FeedForward] = {}
    for name, first, last in known:
        linears = (*first, last)
        missing = [linear for linear in linears if linear not in wanted]
        if len(missing) == len(linears):
            continue
        if missing:
            raise ConfigError(
                f"the experts of {config.method} are whole FFNs, but target_modules leaves out {', '.join(missing)}: "
                "name all linears of an FFN, or none"
            )
        found |= dict.fromkeys(linears, FeedForward(name, first, last))
    if not found:
        leaves = dict.fromkeys(
            linear.removeprefix(f"{name}.") for name, first, last in known for linear in (*first, last)
        )
        none = (
            f"target_modules={config.target_modules!r} names none of this model's: add {', '.join(leaves)} "
            "(what else it names gets one plain LoRA each)"
            if known
            else f"this model has none that is known: known ones end in {_known_names()}"
        )
        raise ConfigError(
            f"the experts of {config.method} are whole FFNs, and {none}, or choose a method whose experts are linears"
        )
    return found


def _known_names() -> str:
    return ", ".join(dict.fromkeys(last for _, last in _FEED_FORWARDS))


def _experts(model: nn.Module, config: Any) -> set[str]:
    """Names of the linears that a config gives experts."""
    config = copy.copy(config)
    if config.target_modules in (None, "all-linear"):
        config.target_modules = default(model)
    return {n for n in _linears(model) if check_target_module_exists(config, n) and not is_plain_lora(config, n)}


def _known_feed_forwards(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(name, first linears, last linear), all by full name, of every FFN whose linears have known names and fit."""
    linears = set(_linears(model))
    taken: set[str] = set()
    for first, last in _FEED_FORWARDS:
        for end in sorted(linears):
            name = end.removesuffix(f".{last}")
            starts = tuple(f"{name}.{leaf}" for leaf in first)
            if name == end or not linears.issuperset(starts) or taken & {*starts, end}:
                continue
            mine = tuple(f"{linear}_" for linear in (*starts, end))
            if any(other.startswith(mine) for other in linears - {*starts, end}):
                continue  # it adds something of its own to one of them, token by token (Zamba2)
            sizes = [features(_base(model, linear)) for linear in (*starts, end)]
            if len(set(sizes[:-1])) == 1 and sizes[0] and sizes[-1] and sizes[0][0] == sizes[-1][1]:
                taken |= {*starts, end}
                yield name, starts, end


def _base(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return module.get_base_layer() if isinstance(module, MixtureLinear) else module


def check(model: nn.Module, config: Any) -> None:
    """Every target must be a linear that is really called, and every name or pattern must match one."""
    modules, linears = own_modules(model), set(_linears(model))
    by_default = config.target_modules in (None, "all-linear")
    for wanted in (None if by_default else config.target_modules, config.lora_target_modules):
        if isinstance(wanted, str):
            if wanted and not any(re.fullmatch(wanted, name) for name in modules):
                _raise_unmatched(model, config, wanted)
            continue
        for entry in wanted or ():
            if not any(name == entry or name.endswith(f".{entry}") for name in modules):
                _raise_unmatched(model, config, entry)
    for key in ("rank_pattern", "alpha_pattern"):
        for name in getattr(config, key, None) or ():
            if not any(f".{linear}".endswith(f".{name}") for linear in linears):
                raise ConfigError(f"{key}: {name!r} is neither the name nor the end of the name of a linear layer")
    _check_layers(config, linears)
    if config.lora_target_modules and not _experts(model, config):
        raise ConfigError("lora_target_modules takes all of target_modules: no module is left for experts")
    check_saved(model, config.modules_to_save)
    fused = _fused_parameters(model, config)
    if fused and (by_default or any(_means(config.target_modules, name) for name in fused)):
        warnings.warn(
            f"this model keeps experts of its own in fused 3-D parameters ({fused[0]}, ...), which a mixture of LoRA "
            "cannot wrap: only its linear layers are adapted",
            stacklevel=3,
        )
    for name, module in modules.items():
        if not is_plain_lora(config, name) and (by_default or not check_target_module_exists(config, name)):
            continue
        if name in linears:
            _check_called(model, name)
        else:
            raise ConfigError(
                f"target {name!r} is a {type(module).__name__}, not a linear layer: leave it out of target_modules"
            )


def check_tokens(model: nn.Module, config: Any) -> None:
    """Every entry of `trainable_token_indices` must be a row of the embeddings that it names."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return
    get_embeddings = getattr(model, "get_input_embeddings", None)
    named = wanted if isinstance(wanted, dict) else {"": wanted}
    for name, tokens in named.items():
        found = [m for n, m in own_modules(model).items() if n == name or n.endswith(f".{name}")] if name else []
        layer = found[0] if found else get_embeddings() if get_embeddings and not name else None
        rows = getattr(layer, "num_embeddings", None)
        where = f" of {name}" if name else ""
        if not tokens:
            raise ConfigError(f"trainable_token_indices{where} is empty: name the tokens to train, or leave it out")
        if name and not found:
            raise ConfigError(f"trainable_token_indices: {name!r} is no module of this model")
        for token in tokens:
            if token < 0 or (rows is not None and token >= rows):
                raise ConfigError(f"trainable_token_indices{where}: {token} is no token of {rows or 'its embeddings'}")


def _check_layers(config: Any, linears: set[str]) -> None:
    """Every layer of `layers_to_transform` must hold a target, as PEFT counts layers."""
    wanted = config.layers_to_transform
    for layer in [wanted] if isinstance(wanted, int) else wanted or ():
        alone = copy.copy(config)
        alone.layers_to_transform = [layer]
        if not any(check_target_module_exists(alone, name) for name in linears):
            raise ConfigError(f"layers_to_transform={wanted}: no target module of this model is in layer {layer}")


def check_saved(model: nn.Module, names: Collection[str] | None) -> None:
    """Every entry of `modules_to_save` must name a module, but for the heads PEFT adds by itself."""
    modules = list(own_modules(model))
    for entry in set(names or ()) - {"classifier", "score", "qa_outputs"}:
        if not any(name.endswith(entry) for name in modules):
            raise ConfigError(f"modules_to_save: {entry!r} matches no module of this model")


def _check_called(model: nn.Module, name: str) -> None:
    parent = model.get_submodule(name.rpartition(".")[0])
    if name.rpartition(".")[2] in never_called(model) or isinstance(parent, nn.MultiheadAttention):
        raise ConfigError(
            f"target {name!r} is never called: {type(parent).__name__} reads its weight directly, so experts there "
            "would train nothing. Leave it out of target_modules"
        )


def never_called(model: nn.Module) -> set[str]:
    """Names of linears whose weight this kind of model reads without calling them."""
    return _READ_NOT_CALLED.get(_model_type(model), set())


def _raise_unmatched(model: nn.Module, config: Any, entry: str) -> None:
    fused = _fused_parameters(model, config)
    if fused:
        raise ConfigError(
            f"target {entry!r} matches no module. This model keeps its experts in fused 3-D parameters ({fused[0]}, "
            "...), which a mixture of LoRA cannot wrap: target its attention linears instead"
        )
    leaves = sorted({name.rpartition(".")[2] for name in _linears(model)})
    raise ConfigError(f"target {entry!r} matches no module of this model; its linears are {', '.join(leaves)}")


def _fused_parameters(model: nn.Module, config: Any) -> list[str]:
    """Names of 3-D parameters: experts that some models keep in one tensor.

    Convolutions are not meant, nor what is trained and saved as a whole.
    """
    saved = config.modules_to_save or ()
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3
        and ".moe_lora_" not in name
        and not isinstance(_owner(model, name), nn.Conv1d)
        and not any(f".{module}." in f".{name}" for module in saved)
    ]


def _means(targets: Any, parameter: str) -> bool:
    """Whether targets name a fused parameter, or a linear that it was fused of."""
    parent, _, leaf = parameter.rpartition(".")
    parts = [leaf, *(f"{half}_proj" for half in leaf.removesuffix("_proj").split("_"))]
    names = [f"{parent}.{part}" for part in parts] + [f"{parent}.0.{part}" for part in parts]
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in names)
    return any(name.endswith(f".{entry}") for entry in targets or () for name in names)


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


def check_adapter_name(model: nn.Module, name: str, *, reserved: set[str]) -> None:
    """PEFT drops every tensor whose key has another adapter's name as a component: such names lose weights on save."""
    components = {part for module in dict(model.named_modules()) for part in module.split(".")} - {""}
    if not isinstance(name, str) or not name or "." in name or name in components | reserved or name.isdigit():
        raise ConfigError(
            f"adapter name {name!r} is also a part of the model's parameter names, so PEFT would drop weights on save: "
            "choose another name"
        )


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))
