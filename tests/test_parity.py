"""Where a method was compared with its authors' code, line by line: what must agree does, what differs is named.

The right values were worked out from the authors' repositories; their code is not here.
"""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional as F

import moesaic
from moesaic.adapters.lora_flow import FlowRouter
from moesaic.adapters.smear import SMEARRouter
from moesaic.lora import METHODS
from moesaic.routing import (
    AsTheyAre,
    EntropyHybrid,
    MutualInformation,
    Record,
    Records,
    Routing,
    RoutingContext,
    Site,
    SwitchBalance,
    TopK,
    TopP,
)
from tests import tiny

F64 = torch.float64


def test_every_method_names_its_departures() -> None:
    lacking = []
    for name, config in METHODS.items():
        docstring = inspect.getdoc(sys.modules[config.__module__]) or ""
        paragraphs = docstring.split("\n\n")
        if not any(paragraph.startswith("Departures") and len(paragraph) > 30 for paragraph in paragraphs):
            lacking.append(name)
    assert not lacking


# -- mended ------------------------------------------------------------------------------------------------------------


def test_lora_flow_adds_its_bias_behind_the_softmax() -> None:
    router = FlowRouter(Site("model.layers.0.self_attn.q_proj", 2, 2, layer=0), 2).double()
    with torch.no_grad():
        router.linear.weight.copy_(torch.eye(2))
        assert not router.linear.bias.any(), "every adapter alike at first"
        router.linear.bias.copy_(torch.tensor([-0.5, 0.5]))
    for h, wanted in (([0.0, 0.0], [0.0, 1.0]), ([0.0, 2.0], None), ([2.0, 0.0], None)):
        x = torch.tensor([[h]], dtype=F64)
        weights = AsTheyAre()(router(x, RoutingContext())).weights[0, 0]
        by_hand = [math.exp(v) / (math.exp(h[0]) + math.exp(h[1])) + b for v, b in zip(h, (-0.5, 0.5), strict=True)]
        assert weights.tolist() == pytest.approx(wanted or by_hand)
    router.linear.bias.data.copy_(torch.tensor([-2.0, 1.0]))
    weights = AsTheyAre()(router(torch.zeros(1, 1, 2, dtype=F64), RoutingContext())).weights
    assert weights.sum().item() == pytest.approx(0.0), "of any sign and sum"


def test_a_lora_flow_mixture_is_traced_with_weights_of_any_sign() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("lora-flow"))
    with torch.no_grad():
        for parameter in tiny.router_parameters(model).values():
            parameter.normal_()
    with moesaic.trace(model) as trace, torch.no_grad():
        model(**tiny.batch(model))
    for share in trace.utilisation().values():
        assert (share >= 0).all()
        assert share.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_mixlora_dynamic_leaves_its_probabilities_as_they_are() -> None:
    p = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=F64)
    gate = moesaic.MixLoRAConfig(num_experts=4, routing="top_p", top_p=0.7).gate()
    assert gate(p.log()).weights[0].tolist() == pytest.approx([0.5, 0.25, 0.0, 0.0])
    assert not gate.sums_to_one


def test_mixlora_dynamic_scales_the_base_by_the_mass_that_is_kept() -> None:
    """With B at zero, an FFN is its base's times the sum of the weights."""
    model = get_peft_model(tiny.llama(layers=1), moesaic.MixLoRAConfig(num_experts=4, r=2, routing="top_p", top_p=0.5))
    ffn = model.base_model.model.model.layers[0].mlp
    found: dict[str, Tensor] = {}
    ffn.register_forward_hook(lambda _, __, out: found.update(y=out))
    with moesaic.trace(model.eval(), keep_weights=True) as trace, torch.no_grad():
        model(**tiny.batch(model))
    routed = found["y"]
    (name,) = trace.modules
    mass = trace.weights(name)[0].sum(-1, keepdim=True)
    assert ((mass > 0.4) & (mass < 0.999)).all()
    with model.disable_adapter(), torch.no_grad():
        model(**tiny.batch(model))
    torch.testing.assert_close(routed, found["y"] * mass, atol=1e-6, rtol=1e-4)


def smear_by_hand(router: SMEARRouter, h: Tensor, real: Tensor | None = None) -> Tensor:
    """Probabilities of one sequence (T, d), written out."""
    mean = (h if real is None else h[real]).mean(dim=0)
    centred = mean - mean.mean()
    asked = centred / (centred.square().mean() + 1e-5).sqrt() * router.input_norm.weight
    scores = []
    for row in router.linear.weight:
        row = row - row.mean()
        scores.append(asked @ (row / (row.square().mean() + 1e-5).sqrt() * router.weight_norm.weight))
    return torch.stack(scores).softmax(dim=-1)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_smear_norms_its_mean_and_its_rows(scale: float) -> None:
    torch.manual_seed(0)
    router = SMEARRouter(8, 3, causal=False).double()
    torch.nn.init.normal_(router.linear.weight, std=scale)
    torch.nn.init.uniform_(router.input_norm.weight, 0.5, 2.0)
    x = torch.randn(2, 5, 8, dtype=F64) * scale
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]]).bool()
    got = router(x, RoutingContext(mask=mask)).softmax(dim=-1)
    for b in range(2):
        wanted = smear_by_hand(router, x[b], mask[b])
        torch.testing.assert_close(got[b], wanted.expand(5, 3), atol=1e-9, rtol=1e-6)
    causal = SMEARRouter(8, 3, causal=True).double()
    causal.load_state_dict(router.state_dict())
    read = causal(x, RoutingContext()).softmax(dim=-1)
    for t in range(5):
        torch.testing.assert_close(read[0, t], smear_by_hand(router, x[0, : t + 1]), atol=1e-9, rtol=1e-6)


def test_smear_has_no_bias_and_starts_small() -> None:
    router = SMEARRouter(8, 3, causal=False)
    assert sorted(dict(router.named_parameters())) == ["input_norm.weight", "linear.weight", "weight_norm.weight"]
    assert router.weight_norm.weight.tolist() == pytest.approx([0.01] * 8)


def test_smear_drops_experts_by_sequence_and_in_training_alone() -> None:
    torch.manual_seed(0)
    router = SMEARRouter(8, 4, causal=False, expert_dropout=0.5)
    h = torch.randn(400, 3, 8)
    probs = router.train()(h, RoutingContext()).softmax(dim=-1)
    gone = probs == 0
    assert (gone == gone[:, :1]).all(), "for all tokens of a sequence alike"
    assert 0.4 < gone.float().mean() < 0.52, "one always stays"
    assert not gone.all(dim=-1).any()
    assert torch.allclose(probs.sum(dim=-1), torch.ones(400, 3))
    assert not (router.eval()(h, RoutingContext()).softmax(dim=-1) == 0).any()
    assert moesaic.SMEARConfig.expert_dropout == 0.1
    with pytest.raises(ValueError, match="expert_dropout"):
        moesaic.SMEARConfig(adapters=tiny.adapters("llama"), expert_dropout=1.0)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_moelora_has_one_embedding_and_one_gate(layers: int) -> None:
    config = moesaic.MOELoRAConfig(r=2, num_experts=4, num_tasks=3, task_dim=6)
    model = tiny.wrap(tiny.llama(layers=layers), config).train()
    found = tiny.router_parameters(model)
    assert sum(p.numel() for p in found.values()) == 3 * 6 + 4 * 6
    inputs = tiny.batch(model)
    tasks = torch.tensor([0, 1, 2])
    with moesaic.trace(model, keep_weights=True) as trace:
        model(**inputs, routing_task_ids=tasks).loss.backward()
    shares = [trace.weights(name)[0] for name in trace.modules]
    assert all(torch.equal(share, shares[0]) for share in shares)
    embedding, gate = (next(p for n, p in found.items() if f".{part}." in n) for part in ("embedding", "linear"))
    torch.testing.assert_close(shares[0][:, 0], (embedding @ gate.T).softmax(dim=-1).detach())
    assert embedding.grad is not None
    assert gate.grad is not None
    assert gate.grad.abs().sum() > 0


def a_record(p: Tensor, mask: Tensor | None = None) -> Records:
    return Records([Record(Site("x", 4, 4), Routing(p[None], p[None], p[None].log()), mask=mask)])


def information(p: Tensor) -> float:
    """The term over all rows of p, written out."""

    def entropy(q: Tensor) -> Tensor:
        return -(q * (q + 1e-9).log()).sum(-1)

    log_e = math.log(p.shape[-1])
    return float(torch.relu(log_e - (entropy(p.mean(0)) - entropy(p).mean()))) / log_e


def test_hotmoes_information_is_over_the_step_so_far() -> None:
    """A micro-batch of one task may go to one expert, as long as the step is balanced: 1.000, then 0.081."""
    one, two = torch.tensor([[0.99, 0.01]] * 4), torch.tensor([[0.01, 0.99]] * 4)
    loss = next(item for item in moesaic.HotMoEConfig(num_experts=2, similarity=False).losses())
    assert isinstance(loss, MutualInformation)
    assert float(loss(a_record(one), 0)) == pytest.approx(information(one), abs=1e-6)
    assert float(loss(a_record(two), 0)) == pytest.approx(information(torch.cat([one, two])), abs=1e-6)
    assert float(loss(a_record(two), 0)) == pytest.approx(information(torch.cat([one, two, two])), abs=1e-6)
    assert information(torch.cat([one, two])) == pytest.approx(0.081, abs=5e-4)
    assert float(loss(a_record(two), 1)) == pytest.approx(information(two), abs=1e-6), "another step"
    assert float(loss(a_record(one), None)) == pytest.approx(information(one), abs=1e-6), "no step is told"


def test_the_steps_information_weighs_tokens_and_has_the_gradient_of_its_own_micro_batch() -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(n, 3, dtype=F64).softmax(-1) for n in (5, 2))
    mask = torch.tensor([[True, True, True, False, False]])
    loss = MutualInformation(1.0, window=True)
    loss(a_record(first, mask), 7)
    leaf = second.clone().requires_grad_()
    got = loss(a_record(leaf), 7)
    whole = leaf.detach().clone().requires_grad_()
    p = torch.cat([first[:3], whole])
    entropy = -(p * (p + 1e-9).log()).sum(-1).mean()
    overall = -(p.mean(0) * (p.mean(0) + 1e-9).log()).sum()
    wanted = torch.relu(math.log(3) - (overall - entropy)) / math.log(3)
    assert float(got) == pytest.approx(float(wanted), rel=1e-6)
    torch.testing.assert_close(*torch.autograd.grad(got, leaf), *torch.autograd.grad(wanted, whole))
    padding = torch.zeros(1, 2, dtype=torch.bool)
    assert math.isfinite(float(MutualInformation(1.0, window=True)(a_record(second, padding), 0)))


def test_a_mass_of_one_keeps_every_expert_whatever_rounding_makes_of_it() -> None:
    torch.manual_seed(0)
    logits = torch.randn(10000, 8) * 3
    assert EntropyHybrid(2, 1.0, 1.0).keep(logits.softmax(-1)).all()
    assert (TopP(1.0)(logits).weights > 0).all()
    assert (TopP(1.0)(torch.tensor([[60.0, 0.0]])).weights[0, 0] == 1.0).all()


# -- named: what the files say of the difference is true ---------------------------------------------------------------


def pooled(x: list[Tensor], k: int) -> float:
    """E * sum f P over the tokens of all routers together, f as tokens per expert: k when balanced."""
    p = torch.cat([t.flatten(0, -2) for t in x]).softmax(-1)
    f = torch.zeros_like(p).scatter(-1, p.topk(k, -1).indices, 1.0).mean(0)
    return float(p.shape[-1] * (f * p.mean(0)).sum())


def balance(x: list[Tensor], gate: Any) -> float:
    records = Records([Record(Site(str(i), 4, 4), gate(t)) for i, t in enumerate(x)])
    return float(SwitchBalance(1.0)(records))


def test_a_balance_a_router_is_a_sum_and_one_when_balanced() -> None:
    """Against one over the tokens of all, k when balanced: about L/k times as large (MoLA, MixLoRA, RMoE)."""
    torch.manual_seed(0)
    for routers, k in ((7, 2), (32, 2), (8, 1)):
        x = [torch.randn(2, 200, 4, dtype=F64) for _ in range(routers)]
        assert balance(x, TopK(k)) == pytest.approx(routers / k * pooled(x, k), rel=0.03)
        even = [torch.zeros(1, 4, 4, dtype=F64) + 1e-3 * torch.eye(4, dtype=F64) for _ in range(routers)]
        assert balance(even, TopK(1)) == pytest.approx(routers, rel=1e-3)
        assert pooled(even, 1) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("routing", ["top_k", "top_p", "switch"])
def test_padding_counts_in_no_balance_of_mixlora(routing: str) -> None:
    x = torch.tensor([[[2.0, 0, 0], [0, 2.0, 0], [0, 0, 5.0], [0, 0, 5.0]]], dtype=F64)
    mask = torch.tensor([[True, True, False, False]])
    config = moesaic.MixLoRAConfig(num_experts=3, routing=routing, top_k=2)
    for loss in config.losses():
        padded = loss(Records([Record(Site("a", 4, 4), config.gate()(x), mask=mask)]))
        alone = loss(Records([Record(Site("a", 4, 4), config.gate()(x[:, :2]))]))
        torch.testing.assert_close(padded, alone)


def test_one_dropout_mask_is_shared_by_all_experts() -> None:
    """Eight equal heads, weights 1/8: a mask each would average out, one mask does not."""
    torch.manual_seed(0)
    config = moesaic.HydraLoRAConfig(r=2, num_experts=8, lora_dropout=0.5, target_modules=["up_proj"])
    model = get_peft_model(tiny.llama(layers=1), config).train()
    layer: Any = model.base_model.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.router("default").linear.weight.zero_()
        layer.moe_lora_B["default"].copy_(torch.randn(2, 24).repeat(8, 1))
        h = torch.ones(4000, 1, 16)
        spread = (layer(h) - layer.base_layer(h)).std(dim=0).mean()
        low = F.dropout(h.expand(4000, 8, 16), 0.5) @ layer.moe_lora_A["default"].T
        apart = (low @ layer.moe_lora_B["default"][:2] * layer.scaling["default"]).mean(dim=1).std(dim=0).mean()
    assert spread / apart == pytest.approx(math.sqrt(8), rel=0.1)
    for method in ("hydralora", "mola", "moelora", "mixlora", "loramoe", "dynmole"):
        docstring = " ".join((inspect.getdoc(sys.modules[METHODS[method].__module__]) or "").split())
        assert "share one dropout mask" in docstring, method


def test_auxiliary_losses_count_once_a_step_however_it_is_accumulated() -> None:
    """Theirs (HotMoE): in full for each micro-batch, so five times with an accumulation of five."""
    model = tiny.wrap(tiny.llama(), tiny.small("hotmoe", aux_weight=1.0, step_window=False)).train()
    batch = tiny.batch(model)
    number = 5 * batch["labels"][:, 1:].numel()
    routers = [p for p in tiny.router_parameters(model).values() if p.requires_grad]
    counted, full = torch.zeros(2)
    for _ in range(5):
        out = model(**batch, num_items_in_batch=number)
        task = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        for total, loss in ((counted, out.loss - task / number), (full, out.router_aux_loss)):
            total += torch.autograd.grad(loss, routers, retain_graph=True)[0].norm()
    assert float(full / counted) == pytest.approx(5, rel=1e-3)
