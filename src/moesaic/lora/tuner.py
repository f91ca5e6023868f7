"""MixtureModel: the PEFT tuner of all mixture methods."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn

from moesaic.errors import AdapterError, ConfigError, MissingRouterWeights, MoesaicError, first_line
from moesaic.host import Host, optimizer_steps
from moesaic.lora import targets
from moesaic.lora.factors import named_now
from moesaic.lora.layer import NOT_MERGED, MixtureLinear, features
from moesaic.lora.reading import neighbours
from moesaic.lora.size import tell_once
from moesaic.routing import Site


class MixtureModel(BaseTuner):
    """Wraps target linears in `MixtureLinear` and hooks the base model.

    Raises:
        ConfigError: for targets that match nothing, are no linear, are fused 3-D experts or are never called; and for
            adapter names that PEFT would strip from parameter names on save.
    """

    prefix = "moe_lora_"
    tuner_layer_cls = MixtureLinear
    target_module_mapping = {}  # noqa: RUF012

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        known = getattr(model, "peft_config", None)
        before = dict(known) if isinstance(known, dict) else {}
        if adapter_name in before:
            raise ConfigError(
                f"this model has an adapter {adapter_name!r} already: add_adapter(NAME, config) of its PeftModel puts "
                "another beside it, unload() takes it off"
            )
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except BaseException:
            if isinstance(known, dict):  # shared with the model's own tuner, and written to before anything is checked
                known.clear()
                known.update(before)
            raise

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        given: Any = self.peft_config[adapter_name]
        config = self.peft_config[adapter_name] = given.taken()
        targets.check_adapter_name(model, adapter_name, reserved=_reserved_names())
        targets.check(model, config)
        if config.store is not None and not config.ignore_base:
            config.store.check_base(str(getattr(getattr(model, "config", None), "_name_or_path", "") or ""))
        targets.check_tokens(model, config)
        self.blocks = targets.feed_forwards(model, config) if config.level == "block" else {}
        if "host" not in self.__dict__:
            self.host = _host_of(model) or Host()
        self._hidden: list[tuple[nn.Module, Any]] = []
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except MoesaicError:
            raise
        except ValueError as error:
            raise ConfigError(first_line(error)) from None
        finally:
            self._show_routers()
        found = [m.router(adapter_name) for m in model.modules() if isinstance(m, MixtureLinear)]
        config.connect([router for router in found if router is not None])
        self._attach(model)
        self.host.losses[adapter_name] = config.losses() if config.aux_weight > 0 else []
        self.host.names[adapter_name] = list(config.experts or ())
        reader = config.reader(model)
        if reader is not None:
            self.host.readers[adapter_name] = reader
        tell_once(model, config)

    def _attach(self, model: nn.Module) -> None:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, MixtureLinear)}
        stack_of = self.host.attach(model, set(layers))
        self.host.neighbours = neighbours(layers)
        for name, layer in layers.items():
            layer.stack = stack_of[name]
        adapters = Adapters(next(iter(layers.values())))
        self.host.step_of, self.host.active, self.host.differing = adapters.step, adapters.active, adapters.differing
        self.host.asks = adapters.ask

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """The last step before PEFT wraps what `modules_to_save` names, by the end of a name and over all modules.

        Parts of routers are none of the model's: they are out of sight meanwhile.
        """
        super()._mark_only_adapters_as_trainable(model)
        for layer in [m for m in model.modules() if isinstance(m, MixtureLinear)]:
            self._hidden.append((layer, layer._modules.pop("moe_lora_router")))

    def _show_routers(self) -> None:
        while self._hidden:
            layer, routers = self._hidden.pop()
            layer._modules["moe_lora_router"] = routers

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """With `ensure_weight_tying`: PEFT gives these modules the weight of the embeddings that are saved."""
        peft_config.modules_to_tie = tied_weight_keys

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        raise ConfigError(
            "ensure_weight_tying: experts beside a head cannot be tied to those of its embeddings, which have none: "
            "leave the head out of target_modules"
        )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> PeftConfig:
        every = peft_config.target_modules == "all-linear"
        if peft_config.target_modules is None or (every and targets.never_called(self.model)):
            peft_config.target_modules = targets.default(self.model)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)  # false may be of its own kind: excluded
        return found or targets.is_plain_lora(peft_config, key) or found

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, MixtureLinear) else target
        size = features(base)
        if size is None:
            raise ConfigError(
                f"target {current_key!r} is a {type(base).__name__}, not a linear layer: leave it out of target_modules"
            )
        layer, num_layers = targets.place(self.model, current_key)
        causal = bool(getattr(self.model, "can_generate", lambda: False)())
        site = Site(current_key, *size, layer=layer, num_layers=num_layers, causal=causal)
        block = self.blocks.get(current_key)
        whole = peft_config.level == "block"
        routed = block is not None if whole else not targets.is_plain_lora(peft_config, current_key)
        if isinstance(target, MixtureLinear):
            target.update_layer(adapter_name, peft_config.layer(site, routed=routed), block=block)
            return
        wrapped = MixtureLinear(target, self.host)
        wrapped._active_adapter = adapter_name
        wrapped.update_layer(adapter_name, peft_config.layer(site, routed=routed), block=block)
        if adapter_name not in self.active_adapters:
            wrapped.requires_grad_(False)
        self._replace_module(parent, target_name, wrapped, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As PEFT does, but that an outline's layer, on the meta device, does not take what the adapter holds along."""
        weight = getattr(child, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_meta:
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Experts in the base's dtype if autocast is refused, else in float32; routers in float32 either way."""
        for layer in (m for m in self.model.modules() if isinstance(m, MixtureLinear)):
            dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())[1]
            dtype = torch.float32 if autocast_adapter_dtype else dtype
            for factors in (layer.moe_lora_A, layer.moe_lora_B):
                if adapter_name in factors and dtype is not None and dtype.is_floating_point:
                    low = factors[adapter_name].dtype.itemsize < torch.float32.itemsize
                    if low or not autocast_adapter_dtype:
                        factors.move(adapter_name, dtype=dtype)
        trained = {name: p.requires_grad for name, p in self.model.named_parameters()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name, p in self.model.named_parameters():
            p.requires_grad_(trained[name])

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ConfigError("adapter_names: rows of one batch cannot have different mixtures; set_adapter picks one")
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(
            "add_weighted_adapter: experts belong to the router that they were trained with, so two mixtures have no "
            "sum: keep both (add_adapter, load_adapter) and take one with set_adapter"
        )

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.host.losses.pop(adapter_name, None)
        self.host.names.pop(adapter_name, None)
        self.host.readers.pop(adapter_name, None)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self, merge: bool = True, *args: Any, **kwargs: Any
    ) -> nn.Module:
        if merge:
            raise ConfigError(NOT_MERGED)
        self.host.detach()
        super()._unload_and_optionally_merge(False, *args, **kwargs)
        return self.model

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Router parameters are nested, so PEFT's own rule (last or last but one) would keep the adapter's name."""
        routed = f".moe_lora_router.{adapter_name}."
        if routed in key:
            return key.replace(routed, ".moe_lora_router.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """As PEFT does, then check that nothing of the mixture is missing or of another shape."""
        state_dict = {named_now(key): value for key, value in state_dict.items()}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = {
            key: value
            for key, value in model.state_dict().items()
            if re.search(rf"\.moe_lora_(A|B|scaling|router)\.{re.escape(adapter_name)}(\.|$)", key)
        }
        missing = [key for key in own if key not in remapped]
        if any(".moe_lora_router." in key for key in missing) and len(missing) < len(own):
            raise MissingRouterWeights(
                f"the checkpoint holds experts but not their routers ({len(missing)} tensors missing, first "
                f"{missing[0]}): it was written without them, so the mixture cannot be restored from it"
            )
        if missing:
            raise AdapterError(
                f"the checkpoint lacks {len(missing)} of the mixture's {len(own)} tensors (first {missing[0]}): it "
                "belongs to another method, base model or set of target modules"
            )
        for key, value in own.items():
            if remapped[key].shape != value.shape:
                raise AdapterError(
                    f"{key} is {tuple(remapped[key].shape)} in the checkpoint and {tuple(value.shape)} here: it "
                    "belongs to another base model, rank or number of experts"
                )
        return remapped


class Adapters:
    """What one layer knows of all adapters."""

    def __init__(self, layer: MixtureLinear) -> None:
        self.layer = layer

    def active(self) -> list[str]:
        """Those that answer."""
        return [] if self.layer.disable_adapters else list(self.layer.active_adapters)

    def differing(self) -> list[str]:
        """Of these, those that mix by another gate in evaluation than in training."""
        gates, others = self.layer.gates, self.layer.eval_gates
        return [name for name in self.active() if name in gates and gates[name] != others[name]]

    def ask(self, what: str) -> bool:
        """Whether a router of these goes `by_prompt` or `by_task`."""
        routers = [self.layer.router(name) for name in self.active()]
        return any(getattr(part, what, False) for r in routers if r is not None for part in r.modules())

    def step(self, adapter: str) -> Hashable:
        """The optimizer step's name, so that windows over accumulated micro-batches need no callback from the loop.

        By the count of optimizer steps, and by the version counters of the layer's parameters for those that change
        them without a `torch.optim.Optimizer`.
        """
        A, B = self.layer.moe_lora_A, self.layer.moe_lora_B
        return (optimizer_steps(), A[adapter]._version, B[adapter]._version) if adapter in A else None


def _host_of(model: nn.Module) -> Host | None:
    return next((m.host for m in model.modules() if isinstance(m, MixtureLinear)), None)


def _reserved_names() -> set[str]:
    return {"weight", "bias", *MixtureLinear.adapter_layer_names}
