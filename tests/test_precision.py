"""Numbers: routers in float32 whatever the base and autocast are, and B = 0 is the base bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moesaic
from moesaic.lora import METHODS
from moesaic.routing import Router, no_autocast
from tests.tiny import MODELS, batch, llama, mixtures, small, wrap

TARGETS = ["q_proj", "o_proj", "down_proj"]


def targets_of(method: str) -> list[str] | None:
    return TARGETS if METHODS[method].level == "linear" else None


def routers(model: nn.Module) -> list[Router]:
    return [layer.router("default") for layer in mixtures(model).values() if layer.router("default")]


def watch_routers(model: nn.Module, seen: list[tuple[Tensor, list[torch.dtype]]]) -> None:
    """Note each router's logits and its parameters' dtypes inside its forward."""
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda m, args, out: seen.append((out, [p.dtype for p in m.parameters()])))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("watched", [False, True], ids=["fused", "watched"])
def test_routing_is_float32_under_autocast(base: torch.dtype, watched: bool, method: str) -> None:
    model = wrap(llama().to(base), small(method, target_modules=targets_of(method))).train()
    seen: list[tuple[Tensor, list[torch.dtype]]] = []
    if watched:
        watch_routers(model, seen)
    records: list[Any] = []
    host = next(iter(mixtures(model).values())).host
    host.record = lambda adapter, record: records.append(record.routing)  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype=torch.bfloat16), moesaic.trace(model):
        out = model(**batch(model, labels=False)).logits
    assert out.dtype == torch.bfloat16
    assert len(records) == len(routers(model)) > 0
    for routing in records:
        assert {t.dtype for t in (routing.logits, routing.probs, routing.weights)} == {torch.float32}
        rounded = routing.logits.bfloat16().float()
        if routing.logits.any():  # zero logits are what they are
            assert not torch.equal(rounded, routing.logits), "computed in bf16 and cast back"
    assert len(seen) == (len(records) if watched else 0)
    assert all(logits.dtype == torch.float32 and set(dtypes) <= {torch.float32} for logits, dtypes in seen)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_b_is_the_base_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    base = MODELS[name]().to(dtype)
    inputs = batch(base, labels=False)
    with torch.no_grad():
        expected = base(**inputs).logits
        model = wrap(base, small("hotmoe"), random_b=False)
        assert torch.equal(model(**inputs).logits, expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with_autocast = model(**inputs).logits
            with model.disable_adapter():
                assert torch.equal(with_autocast, model(**inputs).logits)


def test_adapters_are_float32_beside_a_bf16_base_unless_told_otherwise() -> None:
    base = llama().to(torch.bfloat16)
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = wrap(copy.deepcopy(base), small("hotmoe"), autocast_adapter_dtype=autocast)
        layer = next(iter(mixtures(model).values()))
        assert layer.moe_lora_A["default"].dtype == dtype
        out = model.train()(**batch(model))
        assert out.logits.dtype == torch.bfloat16
        out.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_routers_cast_to_bf16_still_compute_in_float32(method: str) -> None:
    model = wrap(llama(), small(method, target_modules=targets_of(method)))
    seen: list[tuple[Tensor, list[torch.dtype]]] = []
    watch_routers(model, seen)
    model.to(torch.bfloat16)
    model(**batch(model, labels=False))
    assert len(seen) == len(routers(model)) > 0
    for logits, _ in seen:
        assert logits.dtype == torch.float32
        static = METHODS[method].kind.is_static
        assert static or not logits.any() or not torch.equal(logits.bfloat16().float(), logits)


@pytest.mark.parametrize("method", [m for m in METHODS if small(m).losses()])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_auxiliary_loss_under_autocast_equals_float32_of_the_same_inputs(method: str, checkpointing: bool) -> None:
    """The losses of what the routers recorded under bf16 autocast, against the same records in float64."""
    config = small(method, target_modules=targets_of(method), aux_weight=1.0)
    model = wrap(llama(initializer_range=0.5), config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    host = next(iter(mixtures(model).values())).host
    inputs, frames, record = batch(model), [], host.record

    def keep(adapter: str, entry: Any) -> None:
        frames.append(entry)
        record(adapter, entry)

    host.record = keep  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        aux = model(**inputs).router_aux_loss
    assert aux.dtype == torch.float32
    assert len(frames) == len(routers(model)) > 0
    for entry in frames:
        for name in ("logits", "probs", "weights"):
            setattr(entry.routing, name, getattr(entry.routing, name).detach().double())
        entry.hidden = None if entry.hidden is None else entry.hidden.double()
    losses = METHODS[method].losses(model.peft_config["default"])
    expected = sum(loss.weight * loss(frames) for loss in losses)
    assert abs(aux.item() - float(expected)) <= 1e-5 * max(1.0, abs(float(expected)))


def test_pooled_hidden_states_are_float32_means_under_autocast() -> None:
    model = wrap(llama(), small("hotmoe", target_modules=TARGETS)).train()
    host = next(iter(mixtures(model).values())).host
    records: dict[str, Any] = {}
    inputs: dict[str, Tensor] = {}
    for name, layer in mixtures(model).items():
        layer.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0].detach()}))
    host.record = lambda adapter, entry: records.update({entry.site.name: entry})  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch(model))
    for name, x in inputs.items():
        hidden = records[name.removeprefix("base_model.model.")].hidden
        expected = x.double().mean(dim=1)
        assert (hidden - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_autocast_is_off_inside_and_as_it_was_after_also_when_something_raises() -> None:
    a = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with no_autocast("cpu"):
            assert (a @ a).dtype == torch.float32
            with no_autocast("cpu"):
                pass
            assert (a @ a).dtype == torch.float32
        with pytest.raises(ValueError, match="within"), no_autocast("cpu"):
            raise ValueError("within")
        assert (a @ a).dtype == torch.bfloat16
    with no_autocast("cpu"):
        pass
    assert not torch.is_autocast_enabled("cpu")
