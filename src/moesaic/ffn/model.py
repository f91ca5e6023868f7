"""Stock models whose feed-forward layers are made of experts, as ordinary Transformers models.

`convert(model, method)` changes a model in place; `save_pretrained` writes it, `load(folder)` of `stored.py` reads it,
and trainers and `generate` take it as any other: its class is the model's own with the method's layers put in, its
config the model's own with the method's settings under `moesaic`.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import output_capturing

from moesaic.errors import ConfigError
from moesaic.ffn.layer import NAME, ExpertLayer
from moesaic.ffn.method import Method, method_of, methods
from moesaic.ffn.split import check_plain
from moesaic.ffn.watching import check_reads_text
from moesaic.host import Host

PREFIX = "moesaic_"
"""In front of the base's model_type."""


def convert(model: PreTrainedModel, method: Method, **parts: Any) -> PreTrainedModel:
    """Give a model the method's feed-forward layers, in place; returns it.

    Raises:
        ConfigError: for models without feed-forward layers of a known kind, settings or parts that do not fit them, and
            models that have been converted before. Nothing is changed then.
    """
    if not isinstance(method, Method):
        known = ", ".join(kind.__name__ for kind in methods().values())
        raise ConfigError(f"{method!r} is no method: moesaic.ffn has {known}")
    if parts.keys() != {*method.takes}:
        wants = "takes **method.parts(model, text)" if method.takes else f"takes no {', '.join(parts)}"
        raise ConfigError(f"convert with {method.name} {wants}")
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"{type(model).__name__} is no Transformers model: only those are converted")
    if isinstance(model, _Routed):
        raise ConfigError(f"this model has the layers of {model.config.moesaic['method']} already")
    if method.dense:
        check_plain(model)
    if method.takes:
        check_reads_text(model)
    host, was, method = Host(), type(model), copy.copy(method)
    implementation = model.config._experts_implementation if was._can_set_experts_implementation() else None
    method.convert(model, host, **parts)
    _own_config(model)
    _describe(model.config, method)
    model.__class__ = routed_class(was)  # type: ignore[arg-type]
    own: Any = model
    own._weight_conversions = []  # a file that was read in another layout is not written back in it
    _forget_captures(own)
    _attach(cast(_Routed, model), host, implementation)
    method.attached(model)
    return model


def _forget_captures(model: Any) -> None:
    """Let Transformers install its hooks for hidden states, attentions and router logits anew when they are asked for.

    Those on modules that are gone went with them, and those that are left would capture twice.
    """
    output_capturing._CAN_RECORD_REGISTRY[model] = model._can_record_outputs  # by class, which is another now
    for module in model.modules():
        for number, hook in [*module._forward_hooks.items()]:
            if getattr(hook, "__module__", "") == output_capturing.__name__:
                del module._forward_hooks[number]
        if hasattr(module, "_output_capturing_hooks_installed"):
            module._output_capturing_hooks_installed = False


def fresh(base: type[PreTrainedModel], config: Any, method: Method) -> PreTrainedModel:
    """An untrained model of a Transformers class with the method's layers, initialised as that class does its own.

    Raises:
        ConfigError: for methods that are made of a trained model and text.
    """
    if method.takes:
        raise ConfigError(f"{method.name} is made of a trained model: `moesaic convert {method.name}`")
    config = copy.deepcopy(config)
    _describe(config, method)
    return routed_class(base)(config)  # type: ignore[arg-type]


def _own_config(model: PreTrainedModel) -> None:
    """A copy of its config, for it and its parts: others may be made of the same."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        if id(getattr(module, "config", None)) in copies:
            module.config = copies[id(module.config)]


def _describe(config: Any, method: Method) -> None:
    config.__class__ = routed_config(type(config))  # type: ignore[arg-type]
    config.moesaic = {"method": method.name, **dataclasses.asdict(method)}


def hosted(model: Any) -> list[nn.Module]:
    """The modules that a method put into a model, in the model's order."""
    return [module for module in model.modules() if module is not model and getattr(module, "host", None) is model.host]


class _Routed:
    """In front of a Transformers class: its `__init__`, and then the method's layers."""

    config: Any
    host: Host

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        wanted, config._experts_implementation_internal = config._experts_implementation, "eager"
        own = type(config)
        config.__class__ = own.__mro__[1]  # classifiers look up the base model of their config
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            config.__class__ = own
        settings = dict(config.moesaic)
        host = Host()
        kind = method_of(str(settings.pop("method", None)))
        if unknown := settings.keys() - {f.name for f in dataclasses.fields(kind)}:
            raise ConfigError(f"{kind.name} has no setting {', '.join(sorted(unknown))}")
        method = kind(**settings)
        method.install(cast(PreTrainedModel, self), host)
        _attach(self, host, wanted)
        for module in (inner for layer in hosted(self) for inner in layer.modules()):
            self._init_weights(module)
        for module in cast(PreTrainedModel, self).modules():
            if any(isinstance(child, ExpertLayer) for child in module.children()):
                module._is_hf_initialized = True  # type: ignore[assignment]  # GPT-2's would look for a matrix
        method.attached(self)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Until the layers are there it is the base that is made, whose parts know of no such thing."""
        known = super().get_correct_experts_implementation(requested_experts)  # type: ignore[misc]
        return cast(str, known) if "host" in vars(self) else "eager"

    @classmethod
    def is_custom_code(cls) -> bool:
        """No more than its base: what inner modules keep no weights of is then made as theirs is."""
        base: Any = cls.__mro__[cls.__mro__.index(_Routed) + 1]
        return cast(bool, base.is_custom_code())

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        resized = super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]
        method_of(self.config.moesaic["method"]).resized(cast(PreTrainedModel, self))
        return resized

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, ExpertLayer):
            std = getattr(self.config, "initializer_range", 0.02)
            banks = [module.experts] if module.shared is None else [module.experts, module.shared]
            for name, values in (found for bank in banks for found in bank.named_parameters()):
                torch.nn.init.zeros_(values) if name.endswith("bias") else torch.nn.init.normal_(values, std=std)


def _attach(model: _Routed, host: Host, implementation: str | None = None) -> None:
    model.host = host
    whole = cast(PreTrainedModel, model)
    layers: dict[str, Any] = {name: m for name, m in whole.named_modules() if getattr(m, "host", None) is host}
    layers.pop("")
    stack_of = host.attach(whole, set(layers))
    for name, layer in layers.items():
        layer.stack = stack_of[name]
    host.active = _active
    if layers:
        whole.config._experts_implementation_internal = whole.get_correct_experts_implementation(implementation)


def _active() -> list[str]:
    return [NAME]


@cache
def routed_config(base: type) -> type:
    made = type(f"Moesaic{base.__name__}", (base,), {"model_type": PREFIX + base.model_type, "__module__": __name__})  # type: ignore[attr-defined]
    transformers.AutoConfig.register(made.model_type, made)  # type: ignore[attr-defined]
    return made


@cache
def routed_class(base: type) -> type[PreTrainedModel]:
    config = routed_config(base.config_class)  # type: ignore[attr-defined]
    inside = {
        "config_class": config,
        "__module__": __name__,
        "_can_set_experts_implementation_cached_value": True,
    }
    made = cast(type[PreTrainedModel], type(f"Moesaic{base.__name__}", (_Routed, base), inside))
    for auto in _autos(base):
        auto.register(config, made)
    return made


def __getattr__(name: str) -> type:
    """Classes that were made here by their names, as whoever unpickles a model or a config asks for them."""
    base: Any = getattr(transformers, name.removeprefix("Moesaic"), None) if name.startswith("Moesaic") else None
    if not isinstance(base, type) or not issubclass(base, (PreTrainedModel, PretrainedConfig)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made: Any = routed_class if issubclass(base, PreTrainedModel) else routed_config
    return cast(type, made(base))


def _autos(base: type) -> list[Any]:
    """Transformers' Auto classes that know `base`."""
    every = [getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModel")]
    known = [auto for auto in every if getattr(auto, "_model_mapping", None) is not None]
    return [auto for auto in known if auto._model_mapping.get(base.config_class, None) is base]  # type: ignore[attr-defined]
