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


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_in_bf16_have_logits_of_float32_and_gradients_of_autocast(
    dtype: torch.dtype, bias: bool, split: bool
) -> None:
    """split: maps and downs in a product each, as with dropout."""
    torch.manual_seed(0)
    x = torch.randn(3, 7, 32).to(dtype).requires_grad_()
    downs = [torch.randn(n, 32, requires_grad=True) for n in (8, 4)]
    maps = [(torch.randn(5, 32, requires_grad=True), torch.randn(5, requires_grad=True) if bias else None)
            for _ in range(2)]  # fmt: skip
    cotangents = [torch.randn(21, n) for n in (5, 5, 8, 4)]
    given = [t for own in maps for t in own if t is not None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = reading.products_in_bf16(x, x.float(), maps, [] if split else downs)
        found += reading.products_in_bf16(x, None, [], downs) if split else []
    assert [t.dtype for t in found] == [torch.float32] * 2 + [torch.bfloat16] * 2
    leaves = [x, *given, *downs]
    got = torch.autograd.grad(sum((own.float() * to).sum() for own, to in zip(found, cotangents, strict=True)), leaves)
    wide = x.detach().float().requires_grad_()
    flat = wide.reshape(-1, 32)
    exact = [nn.functional.linear(flat, w, b) for w, b in maps] + [flat @ A.t() for A in downs]
    for own, other in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(own, other)
    wanted = torch.autograd.grad(
        sum((own * to).sum() for own, to in zip(exact, cotangents, strict=True)), [wide, *given, *downs]
    )
    assert [grad.dtype for grad in got] == [leaf.dtype for leaf in leaves]
    for one, other in zip(got, wanted, strict=True):
        assert (one.float() - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["mola", "hotmoe"])
def test_under_autocast_they_are_read_together_too(name: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    products = reading.products_in_bf16

    def counting(x: Tensor, wide: Any, maps: Any, downs: Any) -> list[Tensor]:
        sizes.append((len(maps), len(downs)))
        return products(x, wide, maps, downs)

    monkeypatch.setattr(reading, "products_in_bf16", counting)
    config = tiny.small(name, target_modules=tiny.LINEARS, lora_dropout=dropout)
    model = tiny.wrap(tiny.llama(layers=1), config).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together = step(model, tiny.batch(model))
        made = list(sizes)
        find_host(model).neighbours = {}
        alone = step(model, tiny.batch(model))
    whole = [(3, 3), (1, 1), (2, 2), (1, 1)]
    late = name == "hotmoe"  # its MLP reads what dropout has left
    assert made == ([part for n, _ in whole for part in ((n, 0), (n if late else 0, n))] if dropout else whole)
    for name, grad in together.items():
        torch.testing.assert_close(grad, alone[name], atol=2e-3, rtol=5e-2)


def without_windows(model: nn.Module) -> None:
    """A second backward would count as the same step's."""
    for loss in find_host(model).losses["default"]:
        if hasattr(loss, "window"):
            loss.window = False


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
    without_windows(model)
    assert any(len(group) == 3 for group in host.neighbours.values())
    together = step(model, batch)
    host.neighbours = {}
    torch.testing.assert_close(together, step(model, batch), atol=1e-6, rtol=1e-4)


def test_q_k_and_v_are_a_product_and_gate_and_up(counted: list[int]) -> None:
    model = tiny.wrap(tiny.llama(layers=1), tiny.small("mola", target_modules=tiny.LINEARS)).train()
    batch = tiny.batch(model)
    step(model, batch)
    assert counted == [6, 2, 4, 2]
    counted.clear()
    find_host(model).neighbours = {}
    step(model, batch)
    assert counted == [2] * 7


@pytest.mark.parametrize(("name", "sizes"), [("mola", [3, 3, 1, 1, 2, 2, 1, 1]), ("hotmoe", [3, 6, 1, 2, 2, 4, 1, 2])])
def test_with_dropout_maps_and_downs_are_a_product_each(name: str, sizes: list[int], counted: list[int]) -> None:
    """HotMoE's token-expert MLP reads what dropout has left, with the A's."""
    config = tiny.small(name, target_modules=tiny.LINEARS, lora_dropout=0.3)
    model: Any = tiny.wrap(tiny.llama(layers=1), config).train()
    batch = tiny.batch(model)
    without_windows(model)
    together = step(model, batch)
    assert counted == sizes
    apart = copy.deepcopy(model)
    find_host(apart).neighbours = {}
    # The masks are the same: they are of inputs, not of linears.
    torch.testing.assert_close(step(apart, batch), together, atol=1e-6, rtol=1e-4)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    torch.testing.assert_close(step(model, batch), together, atol=1e-6, rtol=1e-4)


class Branching(nn.Module):
    """Two linears that read one tensor, or two, or of which one does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(6, 6), "k_proj": nn.Linear(6, 6)})])

    def forward(self, x: Tensor, how: str) -> Tensor:
        layer: Any = self.layers[0]
        first = layer["q_proj"](x)
        return first if how == "one" else first + layer["k_proj"](x if how == "same" else 2 * x)


def gradients(model: nn.Module, x: Tensor, how: str) -> tuple[Tensor, list[Tensor | None]]:
    out = model(x, how)
    out.square().sum().backward()
    return out, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("how", ["other", "one"])
def test_who_reads_another_tensor_reads_it_alone(how: str) -> None:
    model = tiny.wrap(Branching(), tiny.small("mola", target_modules=["q_proj", "k_proj"])).train()
    apart, x = copy.deepcopy(model), torch.randn(2, 3, 6)
    find_host(apart).neighbours = {}
    found, wanted = gradients(model, x, how), gradients(apart, x, how)
    torch.testing.assert_close(found[0], wanted[0])
    for own, other in zip(found[1], wanted[1], strict=True):
        if other is None:
            assert own is None or not own.any()
        else:
            torch.testing.assert_close(own, other)
    assert bool(find_host(model).neighbours) == (how == "one")  # those that were found to differ go apart from then on


def test_a_tensor_that_was_written_to_is_read_anew() -> None:
    class Writing(Branching):
        def forward(self, x: Tensor, how: str) -> Tensor:
            layer: Any = self.layers[0]
            first = layer["q_proj"](x)
            return first + layer["k_proj"](x.mul_(3))

    model = tiny.wrap(Writing(), tiny.small("mola", target_modules=["q_proj", "k_proj"])).train()
    apart, x = copy.deepcopy(model), torch.randn(2, 3, 6)
    find_host(apart).neighbours = {}
    torch.testing.assert_close(model(x.clone(), ""), apart(x.clone(), ""))


def test_who_drops_otherwise_reads_alone() -> None:
    model = tiny.wrap(Branching(), tiny.small("mola", target_modules=["q_proj", "k_proj"], lora_dropout=0.5)).train()
    layers: Any = tiny.mixtures(model)
    next(layer for name, layer in layers.items() if name.endswith("k_proj")).moe_lora_dropout["default"].p = 0.0
    apart, x = copy.deepcopy(model), torch.randn(2, 3, 6)
    find_host(apart).neighbours = {}
    found = []
    for one in (model, apart):
        torch.manual_seed(0)
        found.append(gradients(one, x, "same"))
    torch.testing.assert_close(found[0], found[1])


def test_names_tell_who_reads_together() -> None:
    def found(model: Any) -> list[set[str]]:
        names = {layer: name.rpartition("layers.0.")[2] or name for name, layer in tiny.mixtures(model).items()}
        groups = {id(group): {names[one] for one in group} for group in find_host(model).neighbours.values()}
        return sorted(groups.values(), key=sorted)

    llama = tiny.wrap(tiny.llama(layers=1), tiny.small("mola", target_modules=tiny.LINEARS))
    qkv = {f"self_attn.{part}_proj" for part in "qkv"}
    assert found(llama) == [{"mlp.gate_proj", "mlp.up_proj"}, qkv]
    assert found(copy.deepcopy(llama)) == found(llama)
    t5 = tiny.wrap(tiny.t5(layers=1), tiny.small("mola", target_modules=["q", "k", "v"]))
    sizes = {tuple(sorted(name.rpartition("block.0.")[2] for name in group)) for group in found(t5)}
    cross = "layer.1.EncDecAttention"
    own = tuple(f"layer.0.SelfAttention.{part}" for part in "kqv")
    assert sizes == {own, (f"{cross}.k", f"{cross}.v")}
