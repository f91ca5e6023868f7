"""In training, linears that read one input are read in one product: with the gradients of each by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.host import find_host
from moesaic.lora import METHODS, reading
from tests import tiny

METHODS_ = [name for name, cls in METHODS.items() if cls.level == "linear" and not cls.kind.needs_adapters]
Gradients = dict[str, Tensor]


@pytest.mark.parametrize("biases", [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("leading", [(4,), (2, 3), ()])
def test_products_are_linear_maps(leading: tuple[int, ...], biases: tuple[bool, ...]) -> None:
    double: Any = {"dtype": torch.float64, "requires_grad": True}
    x, weights = torch.randn(*leading, 5, **double), [torch.randn(n, 5, **double) for n in (3, 6)]
    maps = [
        (weight, torch.randn(len(weight), **double) if has else None)
        for weight, has in zip(weights, biases, strict=True)
    ]
    for found, (weight, bias) in zip(reading.products(x, maps), maps, strict=True):
        torch.testing.assert_close(found, nn.functional.linear(x, weight, bias).reshape(-1, len(weight)))
    given = [t for own in maps for t in own if t is not None]

    def run(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        parts = iter(given)
        return tuple(
            reading.products(x, [(next(parts), next(parts) if bias is not None else None) for _, bias in maps])
        )

    assert torch.autograd.gradcheck(run, (x, *given))


def step(model: nn.Module, batch: dict[str, Tensor]) -> Gradients:
    torch.manual_seed(0)
    model(**batch).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices went into each product."""
    sizes: list[int] = []
    products = reading.products

    def counting(x: Tensor, parts: Any) -> list[Tensor]:
        sizes.append(len(parts))
        return products(x, parts)

    monkeypatch.setattr(reading, "products", counting)
    return sizes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", METHODS_)
def test_gradients_are_those_of_linears_by_themselves(name: str, checkpointing: bool) -> None:
    model: Any = tiny.wrap(tiny.llama(), tiny.small(name, target_modules=tiny.LINEARS, lora_dropout=0.0)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    batch, host = tiny.batch(model), find_host(model)
    for loss in host.losses["default"]:
        if hasattr(loss, "window"):
            loss.window = False  # a second backward would count as the same step's
    alone = step(model, batch)
    if any(len(group) > 1 for group in host.neighbours.values()):
        torch.testing.assert_close(step(model, batch), alone, atol=1e-6, rtol=1e-4)
    else:
        assert not any(layer.reads("default", x, x) for layer, x in _inputs(model, batch))


def _inputs(model: Any, batch: dict[str, Tensor]) -> list[tuple[Any, Tensor]]:
    """What the layers of a model were called with."""
    found: list[tuple[Any, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: found.append((layer, args[0])))
        for layer in tiny.mixtures(model).values()
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def test_q_k_and_v_are_a_product_and_gate_and_up(counted: list[int]) -> None:
    model = tiny.wrap(tiny.llama(layers=1), tiny.small("mola", target_modules=tiny.LINEARS)).train()
    batch = tiny.batch(model)
    step(model, batch)
    assert counted == [2] * 7
    counted.clear()
    step(model, batch)
    assert counted == [6, 2, 4, 2]


def test_with_dropout_maps_and_downs_are_a_product_each(counted: list[int]) -> None:
    config = tiny.small("mola", target_modules=tiny.LINEARS, lora_dropout=0.3)
    model: Any = tiny.wrap(tiny.llama(layers=1), config).train()
    batch = tiny.batch(model)
    alone = step(model, batch)
    counted.clear()
    together = step(model, batch)
    assert counted == [3, 3, 1, 1, 2, 2, 1, 1]
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)  # the masks are the same: of inputs, not linears
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    torch.testing.assert_close(step(model, batch), alone, atol=1e-6, rtol=1e-4)


class Branching(nn.Module):
    """Two linears that read one tensor, or two, or of which one does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"one": nn.Linear(6, 6), "two": nn.Linear(6, 6)})])

    def forward(self, x: Tensor, how: str) -> Tensor:
        layer: Any = self.layers[0]
        first = layer["one"](x)
        return first if how == "one" else first + layer["two"](x if how == "same" else 2 * x)


@pytest.mark.parametrize("how", ["other", "one"])
def test_who_reads_another_tensor_reads_it_alone(how: str) -> None:
    model = tiny.wrap(Branching(), tiny.small("mola", target_modules=["one", "two"])).train()
    x = torch.randn(2, 3, 6)
    fresh = copy.deepcopy(model)
    model(x, "same").sum().backward()
    model.zero_grad()
    assert any(len(group) > 1 for group in find_host(model).neighbours.values())
    found, wanted = model(x, how), fresh(x, how)
    torch.testing.assert_close(found, wanted)
    for out in (found, wanted):
        out.square().sum().backward()
    for (name, own), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        if other.grad is None:
            assert own.grad is None or not own.grad.any(), name
        else:
            torch.testing.assert_close(own.grad, other.grad)


def test_a_tensor_that_was_written_to_is_read_anew() -> None:
    class Writing(Branching):
        def forward(self, x: Tensor, how: str) -> Tensor:
            layer: Any = self.layers[0]
            first, x = layer["one"](x), x.mul_(3) if how == "write" else x
            return first + layer["two"](x)

    model = tiny.wrap(Writing(), tiny.small("mola", target_modules=["one", "two"])).train()
    fresh, x = copy.deepcopy(model), torch.randn(2, 3, 6)
    model(x, "same").sum().backward()
    torch.testing.assert_close(model(x.clone(), "write"), fresh(x.clone(), "write"))


def test_copies_begin_anew_and_a_new_adapter_too() -> None:
    model = tiny.wrap(tiny.llama(layers=1), tiny.small("mola")).train()
    step(model, tiny.batch(model))
    host = find_host(model)
    assert host.neighbours
    assert not find_host(copy.deepcopy(model)).neighbours
    model.add_adapter("other", tiny.small("mola"))
    assert not find_host(model).neighbours
