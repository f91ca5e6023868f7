"""Control arms, MOELoRA and HydraLoRA against their equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import moesaic
from moesaic.errors import ConfigError
from moesaic.lora import METHODS
from tests import tiny

F64 = torch.float64
UP = "base_model.model.model.layers.0.mlp.up_proj"


def layer_of(model: Any, name: str = UP) -> Any:
    return tiny.mixtures(model)[name]


def by_hand(layer: Any, x: Tensor, weights: Tensor, scaling: float) -> Tensor:
    """One layer's output for x (N, d_in) and weights (N, E), an expert at a time."""
    A, B = layer.moe_lora_A["default"], layer.moe_lora_B["default"]
    r = len(B) // weights.shape[-1]
    y = layer.base_layer(x)
    for e in range(weights.shape[-1]):
        down = A if len(A) == r else A[e * r : (e + 1) * r]
        y = y + scaling * weights[:, e : e + 1] * (x @ down.T @ B[e * r : (e + 1) * r])
    return y


def assert_same(got: Tensor, wanted: Tensor, parameters: list[Tensor]) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    cotangent = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad((got * cotangent).sum(), parameters),
        torch.autograd.grad((wanted * cotangent).sum(), parameters),
        atol=1e-12,
        rtol=1e-9,
    )


# -- HydraLoRA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["rank", "reference"])
def test_hydralora_shares_one_down_projection(backend: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("hydralora", backend=backend)).to(F64)
    layer = layer_of(model)
    assert layer.moe_lora_A["default"].shape == (4, 16)
    assert layer.moe_lora_B["default"].shape == (16, 24)
    x = torch.randn(6, 16, dtype=F64)
    weights = torch.softmax(x @ layer.router("default").linear.weight.T, dim=-1)
    assert_same(layer(x), by_hand(layer, x, weights, 8 / 4), [p for p in layer.parameters() if p.requires_grad])


def test_hydralora_with_one_head_is_plain_lora() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("hydralora", num_experts=1))
    layer = layer_of(model)
    x = torch.randn(6, 16)
    wanted = layer.base_layer(x) + 2 * x @ layer.moe_lora_A["default"].T @ layer.moe_lora_B["default"]
    torch.testing.assert_close(layer(x), wanted)


# -- tasks --------------------------------------------------------------------------------------------------------


def test_moelora_weighs_experts_by_the_sequences_task() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("moelora")).to(F64)
    layer, ids = layer_of(model), torch.tensor([2, 0, 2])
    router, x = layer.router("default"), torch.randn(3, 5, 16, dtype=F64)
    gate = torch.softmax(router.embedding.weight[ids] @ router.linear.weight.T, dim=-1)
    weights = gate.repeat_interleave(5, dim=0)
    with moesaic.routing_tasks(model, task_ids=ids):
        got = layer(x)
    wanted = by_hand(layer, x.flatten(0, 1), weights, 8 / 4 / 4).view(3, 5, -1)
    assert_same(got, wanted, [p for p in layer.parameters() if p.requires_grad])


@pytest.mark.parametrize("backend", ["rank", "grouped", "reference"])
def test_oracle_is_a_plain_lora_for_each_task(backend: str) -> None:
    """One run of the oracle is E runs of plain LoRA: the expert of task t, and its gradient, are that LoRA's."""
    base = tiny.llama()
    model = tiny.wrap(base, tiny.small("oracle", backend=backend))
    plain = get_peft_model(tiny.llama(), LoraConfig(r=4, lora_alpha=8, target_modules=tiny.LINEARS)).train()
    inputs = tiny.batch(model, rows=2)
    task = 3
    for name, layer in tiny.mixtures(model).items():
        twin: Any = plain.get_submodule(name)
        twin.lora_A["default"].weight.data = layer.moe_lora_A["default"].data.chunk(4)[task].clone()
        twin.lora_B["default"].weight.data = layer.moe_lora_B["default"].data.chunk(4)[task].T.clone()
    with moesaic.routing_tasks(model, task_ids=[task]):
        loss = model.train()(**inputs).loss
    wanted = plain(**inputs).loss
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    for name, layer in tiny.mixtures(model).items():
        parts = layer.moe_lora_A["default"].grad.chunk(4)
        twin = plain.get_submodule(name)
        torch.testing.assert_close(parts[task], twin.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-6)
        assert all(not part.any() for e, part in enumerate(parts) if e != task), "other tasks' experts must not move"


@pytest.mark.parametrize("method", ["oracle", "moelora"])
def test_a_batch_of_several_tasks_equals_each_alone(method: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(method))
    inputs = tiny.batch(model, rows=3, labels=False)
    together = model(**inputs, routing_task_ids=torch.tensor([3, 0, 1])).logits
    for row, task in enumerate([3, 0, 1]):
        alone = model(**{k: v[row : row + 1] for k, v in inputs.items()}, routing_task_ids=torch.tensor([task])).logits
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", sorted(m for m in METHODS if tiny.small(m).kind.needs_tasks))
@pytest.mark.parametrize(
    ("ids", "message"), [(None, "give routing_task_ids in the batch"), ([99], "task id 99 is not below num_")]
)
def test_task_gates_say_what_they_lack(method: str, ids: Any, message: str) -> None:
    model = get_peft_model(tiny.llama(), tiny.small(method))
    inputs = tiny.batch(model, rows=1)
    if ids is not None:
        inputs["routing_task_ids"] = torch.tensor(ids)
    with pytest.raises(ConfigError, match=message):
        model(**inputs)


def test_oracle_has_an_expert_for_each_task() -> None:
    config = METHODS["oracle"](num_tasks=5)  # type: ignore[call-arg]
    assert config.num_experts == 5
    assert METHODS["oracle"]().num_experts == METHODS["mola"]().num_experts
    with pytest.raises(ConfigError, match="num_experts=3, but there are 5 tasks"):
        METHODS["oracle"](num_tasks=5, num_experts=3)  # type: ignore[call-arg]


# -- the rest -----------------------------------------------------------------------------------------------------


def test_uniform_is_one_plain_lora() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("uniform")).to(F64)
    layer, x = layer_of(model), torch.randn(6, 16, dtype=F64)
    wanted = layer.base_layer(x) + 2 / 4 * x @ layer.moe_lora_A["default"].T @ layer.moe_lora_B["default"]
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    assert not list(layer.router("default").parameters())


def test_dense_mixes_by_the_softmax_of_a_linear_router() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("dense")).to(F64)
    layer, x = layer_of(model), torch.randn(6, 16, dtype=F64)
    weights = torch.softmax(x @ layer.router("default").linear.weight.T, dim=-1)
    assert_same(layer(x), by_hand(layer, x, weights, 2.0), [p for p in layer.parameters() if p.requires_grad])


def test_a_random_router_is_saved_but_never_trained() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("random")).train()
    router = layer_of(model).router("default")
    before = router.weight.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(**tiny.batch(model)).loss.backward()
    optimizer.step()
    assert torch.equal(router.weight, before)
    from peft import get_peft_model_state_dict

    saved = [key for key in get_peft_model_state_dict(model) if "moe_lora_router" in key]
    assert len(saved) == len(tiny.mixtures(model))
    other = layer_of(model, UP.replace("up_proj", "gate_proj")).router("default")
    assert not torch.equal(router.weight, other.weight), "each layer draws its own"
