"""MoLA against its equations, and its allocation of experts to layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.errors import ConfigError
from moesaic.lora.methods.mola import MoLAConfig
from moesaic.routing import Site
from tests import tiny

F64 = torch.float64


def by_hand(layer: Any, x: Tensor, *, k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Output and probabilities of one layer for x (N, d_in), token by token."""
    A, B = layer.moe_lora_A["default"], layer.moe_lora_B["default"]
    W = layer.moe_lora_router["default"].linear.weight
    r = len(A) // len(W)
    rows, probs = [], []
    for token in x:
        p = torch.softmax(W @ token, dim=0)
        chosen = sorted(range(len(W)), key=lambda e: -p[e].item())[:k]
        total = sum(p[e] for e in chosen)
        y = layer.base_layer(token)
        for e in chosen:
            y = y + scaling * p[e] / total * (B[e * r : (e + 1) * r].T @ (A[e * r : (e + 1) * r] @ token))
        rows.append(y)
        probs.append(p)
    return torch.stack(rows), torch.stack(probs)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_layer_equals_the_equations_in_value_and_gradient(k: int) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("mola", top_k=k)).to(F64)
    layer = tiny.mixtures(model)["base_model.model.model.layers.0.mlp.up_proj"]
    parameters = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(6, 16, dtype=F64)
    got, (wanted, _) = layer(x), by_hand(layer, x, k=k, scaling=8 / 4)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    cotangent = torch.randn_like(got)
    got_grads = torch.autograd.grad((got * cotangent).sum(), parameters)
    wanted_grads = torch.autograd.grad((wanted * cotangent).sum(), parameters)
    torch.testing.assert_close(got_grads, wanted_grads, atol=1e-12, rtol=1e-9)


def test_auxiliary_loss_is_the_switch_loss_summed_over_layers() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("mola", aux_weight=0.5)).to(F64).train()
    inputs = tiny.batch(model)
    inputs["attention_mask"][2, 4:] = 0
    real = inputs["attention_mask"].bool()
    with moesaic.trace(model, keep_weights=True) as trace:
        got = model(**inputs).router_aux_loss
    probs: dict[str, Tensor] = {}
    hooks = [
        router.register_forward_hook(lambda m, a, out, name=name: probs.__setitem__(name, torch.softmax(out, -1)))
        for name, layer in model.get_base_model().named_modules()
        if name in trace.modules
        for router in layer.moe_lora_router.values()
    ]
    assert len(hooks) == 14
    model(**inputs)
    total = torch.zeros((), dtype=F64)
    for name in trace.modules:
        chosen = trace.weights(name)[0][real] > 0
        total = total + 4 * (chosen.to(F64).mean(0) / 2 * probs[name][real].mean(0)).sum()
    torch.testing.assert_close(got, 0.5 * total)


@pytest.mark.parametrize(
    ("groups", "num_layers", "experts"),
    [
        ([2, 4, 6, 8], 8, [2, 2, 4, 4, 6, 6, 8, 8]),
        ([2, 4, 6, 8], 32, [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8),
        ([2, 4], 5, [2, 2, 2, 4, 4]),
        ([3], 4, [3, 3, 3, 3]),
        (None, 3, [8, 8, 8]),
    ],
)
def test_layers_get_the_experts_of_their_group(groups: Any, num_layers: int, experts: list[int]) -> None:
    config = MoLAConfig(experts_per_layer=groups)
    sites = [Site("x", 4, 4, layer=i, num_layers=num_layers) for i in range(num_layers)]
    assert [config.experts_at(site) for site in sites] == experts
    assert [config.router(site).num_experts for site in sites] == experts


def test_a_model_whose_layers_differ_trains_and_traces() -> None:
    model = tiny.wrap(tiny.llama(layers=4), tiny.small("mola", experts_per_layer=[2, 5])).train()
    with moesaic.trace(model) as trace:
        output = model(**tiny.batch(model))
    output.loss.backward()
    assert [len(row) for row in trace.by_layer().values()] == [2, 2, 5, 5]
    for name, layer in tiny.mixtures(model).items():
        experts = layer.moe_lora_router["default"].num_experts
        assert layer.moe_lora_A["default"].shape[0] == 4 * experts, name
        assert layer.moe_lora_router["default"].linear.weight.grad.abs().sum() > 0


def test_defaults_and_switches() -> None:
    config = MoLAConfig()
    assert (config.num_experts, config.top_k, config.r, config.scaling) == (8, 2, 8, 2.0)
    assert config.experts_per_layer is None
    model = tiny.wrap(tiny.llama(), tiny.small("mola", aux_weight=0.0)).train()
    assert moesaic.router_aux_loss(model) is None
    output = model(**tiny.batch(model))
    assert getattr(output, "router_aux_loss", None) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 9}, "top_k=9 must be between 1 and num_experts=8"),
        ({"experts_per_layer": [4, 1]}, "top_k=2 must be between 1 and num_experts=1"),
        ({"experts_per_layer": []}, "experts_per_layer needs at least one number"),
        ({"num_experts": 0}, "num_experts=0 must be a whole number of at least 1"),
        ({"experts_per_layers": [2]}, "did you mean 'experts_per_layer'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoLAConfig(**settings)
