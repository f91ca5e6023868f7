"""LoRAMoE against its equations, and what its localized balance loss asks of the two types of tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.errors import ConfigError
from moesaic.lora.methods.loramoe import LocalizedBalance, LoRAMoEConfig
from moesaic.routing import Record, Routing, Site, Softmax
from tests import tiny

F64 = torch.float64


def record_of(weights: Tensor, **fields: Any) -> Record:
    return Record(Site("layer", 3, 3), Routing(weights, weights, weights.log()), **fields)


def naive_loss(
    weights: Tensor, mask: Tensor, tasks: list[int] | None, knowledge: list[int] | None, delta: float
) -> Tensor:
    """Weights (rows, tokens, E): Z entry by entry, then its variance over its squared mean."""
    rows, _, E = weights.shape
    z = []
    for s in range(rows):
        if not mask[s].any():
            continue
        for e in range(E):
            q = weights[s, mask[s], e].sum()
            if tasks is not None and knowledge is not None:
                same = (tasks[s] in knowledge) == (e < E // 2)
                q = q * (1 + delta if same else 1 - delta)
            z.append(q)
    mean = sum(z) / len(z)
    return torch.as_tensor(sum((x - mean) ** 2 for x in z) / (len(z) - 1) / (mean**2 + 1e-10))


@pytest.mark.parametrize("E", [4, 5])
@pytest.mark.parametrize(
    ("tasks", "knowledge", "delta"),
    [
        ([0, 7, 2, 0], [0, 2], 0.3),
        ([0, 7, 2, 0], [], 1.0),
        ([1, 1, 1, 1], [1], 0.1),
        (None, [0], 0.3),
        ([0, 1, 0, 1], None, 0.3),
    ],
)
def test_loss_equals_the_equations_in_value_and_gradient(
    E: int, tasks: list[int] | None, knowledge: list[int] | None, delta: float
) -> None:
    z = torch.randn(3, 4, 6, E, dtype=F64, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([6, 2, 0, 5])[:, None]
    ids = None if tasks is None else torch.tensor(tasks)
    records = [record_of(w, mask=mask, task_ids=ids) for w in torch.softmax(z, -1)]
    got = LocalizedBalance(1.0, delta=delta, knowledge_tasks=knowledge)(records)
    wanted = sum(naive_loss(w, mask, tasks, knowledge, delta) for w in torch.softmax(z, -1))
    assert isinstance(wanted, Tensor)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    (got_grad,) = torch.autograd.grad(got, z)
    (wanted_grad,) = torch.autograd.grad(wanted, z)
    torch.testing.assert_close(got_grad, wanted_grad, atol=1e-12, rtol=1e-9)
    assert not got_grad[:, ~mask].any(), "padding gets no gradient"


def test_golden_values() -> None:
    loss = LocalizedBalance(1.0)
    uniform = torch.full((3, 5, 4), 0.25, dtype=F64)
    assert loss([record_of(uniform)]).item() == pytest.approx(0.0, abs=1e-12)
    collapsed = torch.eye(4, dtype=F64)[0].expand(3, 5, 4)
    # 3 of 12 entries are 5, the rest 0: mean 1.25, squares 3 * 3.75^2 + 9 * 1.25^2 = 56.25, over 11
    assert loss([record_of(collapsed)]).item() == pytest.approx(56.25 / 11 / 1.25**2)
    assert loss([record_of(collapsed), record_of(uniform)]).item() == pytest.approx(56.25 / 11 / 1.25**2)


@pytest.mark.parametrize("delta", [0.1, 0.5])
def test_the_least_loss_parts_the_types_by_one_plus_over_one_minus_delta(delta: float) -> None:
    """As paper and code have it, each type's tokens come to lean on the half of the other type."""
    loss = LocalizedBalance(1.0, delta=delta, knowledge_tasks=[3])
    z = torch.zeros(2, 1, 4, dtype=F64, requires_grad=True)
    ids = torch.tensor([3, 8])
    optimizer = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss([record_of(torch.softmax(z, -1), task_ids=ids)])
        value.backward()
        return value

    assert closure() > 1e-3
    optimizer.step(closure)
    assert closure() < 1e-9
    w = torch.softmax(z.detach(), -1)[:, 0]
    assert (w[0, 2:] / w[0, :2]).tolist() == pytest.approx([(1 + delta) / (1 - delta)] * 2, rel=1e-3)
    assert (w[1, :2] / w[1, 2:]).tolist() == pytest.approx([(1 + delta) / (1 - delta)] * 2, rel=1e-3)


def test_loss_does_not_change_with_the_length_of_all_sequences() -> None:
    loss = LocalizedBalance(1.0, delta=0.3, knowledge_tasks=[0])
    w, ids = torch.softmax(torch.randn(3, 4, 6, dtype=F64), -1), torch.tensor([0, 1, 0])
    once, twice = (loss([record_of(x, task_ids=ids)]) for x in (w, torch.cat([w, w], dim=1)))
    torch.testing.assert_close(once, twice, atol=1e-9, rtol=0)


def test_loss_of_a_batch_of_padding_and_of_one_expert_is_zero_and_finite() -> None:
    loss = LocalizedBalance(1.0)
    w = torch.softmax(torch.randn(2, 3, 4, dtype=F64), -1).requires_grad_()
    value = loss([record_of(w, mask=torch.zeros(2, 3, dtype=torch.bool))])
    value.backward()
    assert value.item() == 0
    assert w.grad is not None
    assert not w.grad.any()
    assert loss([record_of(torch.ones(1, 3, 1, dtype=F64))]).item() == 0


def test_loss_never_waits_for_a_value() -> None:
    """Tensors without data raise where a kernel's result is read on the host."""
    z = torch.empty(2, 3, 6, device="meta", requires_grad=True)
    mask = torch.empty(2, 3, device="meta", dtype=torch.bool)
    ids = torch.empty(2, device="meta", dtype=torch.long)
    loss = LocalizedBalance(1.0, delta=0.2, knowledge_tasks=[0, 4])
    loss([Record(Site("layer", 3, 3), Softmax()(z), mask=mask, task_ids=ids)]).backward()


def test_layer_equals_the_equations_in_value_and_gradient() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("loramoe")).to(F64)
    layer = tiny.mixtures(model)["base_model.model.model.layers.0.mlp.up_proj"]
    A, B = layer.moe_lora_A["default"].chunk(4), layer.moe_lora_B["default"].chunk(4)
    W = layer.moe_lora_router["default"].linear.weight
    x = torch.randn(6, 16, dtype=F64)
    rows = []
    for token in x:
        p = torch.softmax(W @ token, dim=0)
        y = layer.base_layer(token)
        for e in range(4):
            y = y + 8 / 4 * p[e] * (B[e].T @ (A[e] @ token))
        rows.append(y)
    got, wanted = layer(x), torch.stack(rows)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    cotangent = torch.randn_like(got)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    got_grads = torch.autograd.grad((got * cotangent).sum(), parameters)
    wanted_grads = torch.autograd.grad((wanted * cotangent).sum(), parameters)
    torch.testing.assert_close(got_grads, wanted_grads, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("tasks", [None, [0, 1, 2]])
@pytest.mark.parametrize("how", ["batch key", "context"])
def test_auxiliary_loss_of_a_model_sees_masks_and_tasks(tasks: list[int] | None, how: str) -> None:
    config = tiny.small("loramoe", aux_weight=0.5, knowledge_tasks=[1], balance_delta=0.4)
    model = tiny.wrap(tiny.llama(), config).to(F64).train()
    inputs = tiny.batch(model)
    inputs["attention_mask"][2, 4:] = 0
    mask = inputs["attention_mask"].bool()
    with moesaic.trace(model, keep_weights=True) as trace:
        if tasks is None:
            got = model(**inputs).router_aux_loss
        elif how == "batch key":
            got = model(**inputs, routing_task_ids=torch.tensor(tasks)).router_aux_loss
        else:
            with moesaic.routing_tasks(model, task_ids=tasks):
                got = model(**inputs).router_aux_loss
    assert len(trace.modules) == 14
    values = [naive_loss(trace.weights(name)[0], mask, tasks, [1], 0.4) for name in trace.modules]
    torch.testing.assert_close(got, 0.5 * torch.stack(values).sum(), atol=1e-9, rtol=0)


def test_defaults_are_the_authors_with_the_loss_on() -> None:
    config = LoRAMoEConfig()
    assert (config.num_experts, config.r, config.scaling, config.lora_dropout) == (8, 4, 8.0, 0.05)
    assert config.knowledge_tasks is None
    assert config.gate() == config.eval_gate() == Softmax()
    model = tiny.wrap(tiny.llama(), tiny.small("loramoe", aux_weight=0.0)).train()
    assert getattr(model(**tiny.batch(model)), "router_aux_loss", None) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance_delta": 1.5}, "balance_delta=1.5 must be between 0 and 1"),
        ({"balance_delta": -0.1}, "balance_delta=-0.1 must be between 0 and 1"),
        ({"knowledge_tasks": ["a"]}, "knowledge_tasks=.* must be a list of whole numbers or null"),
        ({"knowledge_tasks": [0], "num_experts": 1}, "knowledge_tasks=.*num_experts=1 must be at least 2"),
        ({"knowledge_task": [0]}, "did you mean 'knowledge_tasks'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRAMoEConfig(**settings)
