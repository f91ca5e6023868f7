"""RMoE in the place of the routers of stock mixture models: the facts that its specification asks for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import moesaic
from moesaic import ffn
from moesaic.errors import ConfigError
from moesaic.ffn.recurrent import CosineHead, RecurrentGate, RMoE, gates
from moesaic.routing import RoutingContext
from tests.test_ffn import IDS
from tests.test_ffn import made as dense

P, N, D, L = 8, 4, 32, 3
SHAPE = {
    "vocab_size": 50, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "router_aux_loss_coef": 0.01,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, intermediate_size=16, num_local_experts=N)),
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, head_dim=16, intermediate_size=16, moe_intermediate_size=16, num_experts=N)
    ),
    "qwen3-renormalised": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SHAPE, head_dim=16, intermediate_size=16, moe_intermediate_size=16, num_experts=N, norm_topk_prob=True
        )
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SHAPE, intermediate_size=16, num_experts=N)),
}


def made(kind: str = "mixtral", **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = ffn.convert(FAMILIES[kind]().eval(), RMoE(state_dim=P, **settings))
    with torch.no_grad():  # P and G start small: make the routes matter
        for module in model.modules():
            if isinstance(module, RecurrentGate) and isinstance(module.recurrent.head, nn.Linear):
                module.recurrent.head.weight.normal_()
                module.recurrent.projector.weight.normal_(std=0.3)
    return model


def placed(model: nn.Module) -> list[RecurrentGate]:
    return [module for module in model.modules() if isinstance(module, RecurrentGate)]


def run(model: PreTrainedModel, ids: Tensor = IDS, **how: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, output_router_logits=True, **how)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_done_with_logits_is_what_the_models_own_router_does(kind: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[kind]()
    own = [copy.deepcopy(gate) for _, gate in gates(model)]
    ffn.convert(model, RMoE(state_dim=P))
    for gate, before in zip(placed(model), own, strict=True):
        assert isinstance(gate, type(before))
        nn.init.normal_(before.weight)
        gate.recurrent.forward = lambda x, context, w=before.weight: x @ w.t()  # type: ignore[method-assign]
        x = torch.randn(9, D)
        for got, wanted in zip(gate(x), before(x), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", FAMILIES)
def test_router_logits_the_balance_loss_and_gradients_go_on(kind: str) -> None:
    model = made(kind).train()
    out = model(input_ids=IDS, labels=IDS, output_router_logits=True)
    assert [logits.shape for logits in out.router_logits] == [(14, N)] * L
    assert out.aux_loss > 0
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    with moesaic.trace(model) as trace:
        run(model)
    assert repr(trace).startswith(f"RoutingTrace({L} routers, 14 tokens")


def chain(model: PreTrainedModel, xs: list[Tensor], alpha: float = 0.0) -> list[Tensor]:
    """The equations, layer by layer, with PyTorch's own GRU cell."""
    found, cell = [], placed(model)[0].recurrent.cell
    state = torch.zeros(len(xs[0]), P)
    for gate, x in zip(placed(model), xs, strict=True):
        state = torch.nn.GRUCell.forward(cell, x @ gate.recurrent.projector.weight.t(), state)
        head = gate.recurrent.head
        if isinstance(head, CosineHead):
            view = state @ head.down.weight.t()
            cosines = [F.cosine_similarity(view, embedding[None], dim=-1) for embedding in head.embeddings]
            logits = torch.stack(cosines, dim=-1) / head.temperature
        else:
            logits = state @ head.weight.t()
        found.append(logits + alpha * found[-1] if found else logits)
    return found


@pytest.mark.parametrize("settings", [{}, {"residual_alpha": 0.5}, {"head": "cosine", "cosine_dim": 5}])
def test_the_routers_are_a_gru_over_depth(settings: dict[str, Any]) -> None:
    model, xs = made(**settings), []
    for gate in placed(model):
        gate.register_forward_pre_hook(lambda m, args: xs.append(args[0]))
        assert gate.weight.shape == (N, settings.get("cosine_dim", P))
        assert isinstance(gate.recurrent.head, CosineHead) == ("head" in settings)
    got = run(model).router_logits
    for own, wanted in zip(got, chain(model, xs, settings.get("residual_alpha", 0.0)), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "crosses"),
    [
        ({"recurrence": "full"}, True),
        ({"recurrence": "detach"}, False),
        ({"recurrence": "none"}, False),
        ({"recurrence": "none", "residual_alpha": 0.5}, True),
        ({"recurrence": "none", "residual_alpha": 0.5, "residual_detach": True}, False),
    ],
)
def test_gradients_cross_layers_only_where_the_settings_let_them(settings: dict[str, Any], crosses: bool) -> None:
    model = made(**settings)
    for layer in model.model.layers:  # what the next layer reads no longer depends on this one's routes
        layer.mlp.experts.register_forward_hook(lambda m, args, out: out.detach())
    last = model(input_ids=IDS, output_router_logits=True).router_logits[-1]
    own, first = placed(model)[-1].recurrent, placed(model)[0].recurrent
    to_own, to_first = torch.autograd.grad(
        last.square().sum(), [own.projector.weight, first.projector.weight], allow_unused=True
    )
    assert to_own.abs().sum() > 0
    assert (to_first is not None and bool(to_first.abs().sum() > 0)) == crosses


def test_without_recurrence_a_layers_logits_are_its_own_inputs() -> None:
    xs = [torch.randn(5, D) for _ in range(L)]
    for recurrence, crosses in (("none", False), ("full", True)):
        model = made(recurrence=recurrence)
        changed = [torch.randn(5, D), *xs[1:]]
        found = []
        for inputs in (xs, changed):
            context = RoutingContext()
            found.append([g.recurrent(x, context) for g, x in zip(placed(model), inputs, strict=True)][-1])
        assert torch.equal(*found) != crosses


def test_an_update_gate_held_at_one_keeps_the_zero_state() -> None:
    model = made()
    cell = placed(model)[0].recurrent.cell
    with torch.no_grad():
        cell.bias_ih[P : 2 * P] = 50.0
    assert all(logits.abs().max() < 1e-6 for logits in run(model).router_logits)


def test_tokens_and_rows_do_not_see_each_others_states() -> None:
    model = made()
    whole = run(model).router_logits
    swapped = run(model, IDS.flip(0)).router_logits
    alone = run(model, IDS[:1]).router_logits
    prefix = run(model, IDS[:, :4]).router_logits
    for a, b, c, d in zip(whole, swapped, alone, prefix, strict=True):
        torch.testing.assert_close(a.view(2, 7, N), b.view(2, 7, N).flip(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.view(2, 7, N)[:1], c.view(1, 7, N), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.view(2, 7, N)[:, :4], d.view(2, 4, N), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(model).router_logits, strict=True)), "nothing is kept"


@pytest.mark.parametrize("kind", FAMILIES)
def test_decoding_with_the_cache_is_decoding_without(kind: str) -> None:
    model = made(kind)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **how), model.generate(IDS, **how, use_cache=False))


def test_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        model = made().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS, output_router_logits=True, use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({}, 0),
        ({"shared_projector": True}, -(L - 1) * P * D),
        ({"shared_head": True}, -(L - 1) * N * P),
        ({"cell": "rnn"}, -2 * 2 * (P * P + P)),
        ({"cell": "lstm"}, 2 * (P * P + P)),
    ],
)
def test_parameters_follow_the_formula(settings: dict[str, Any], more: int) -> None:
    before = sum(p.numel() for p in FAMILIES["mixtral"]().parameters())
    after = sum(p.numel() for p in made(**settings).parameters())
    wanted = L * (P * D + N * P) + 3 * 2 * (P * P + P) - L * N * D
    assert after - before == wanted + more


def test_a_token_uses_the_experts_that_it_takes_and_all_else() -> None:
    shape = SHAPE | {"num_experts_per_tok": 1}
    model = ffn.convert(
        MixtralForCausalLM(MixtralConfig(**shape, intermediate_size=16, num_local_experts=N)), RMoE(state_dim=P)
    )
    attention, norms, expert = 2 * D * D + 2 * D * (D // 2), 2 * D, 3 * 16 * D
    routers = L * (P * D + N * P) + 3 * 2 * (P * P + P)
    by_hand = 2 * 50 * D + L * (attention + norms + expert) + D + routers
    assert ffn.active_parameters(model) == by_hand
    assert sum(p.numel() for p in model.parameters()) == by_hand + L * (N - 1) * expert


def test_dense_layers_between_hand_the_state_on() -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SHAPE | {"num_hidden_layers": 4}, head_dim=16, intermediate_size=16, moe_intermediate_size=16, num_experts=N,
        decoder_sparse_step=2,
    )  # fmt: skip
    model, xs = ffn.convert(Qwen3MoeForCausalLM(config).eval(), RMoE(state_dim=P)), []
    assert len(placed(model)) == 2
    for gate in placed(model):
        gate.register_forward_pre_hook(lambda m, args: xs.append(args[0]))
    got = run(model).router_logits
    for own, wanted in zip(got, chain(model, xs), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"shared_projector": True}, {"head": "cosine"}, {"cell": "lstm"}])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "olmoe"])
def test_a_folder_gives_the_model_back_on_every_backend(kind: str, settings: Any, tmp_path: Path) -> None:
    model = made(kind, **settings)
    model.save_pretrained(tmp_path)
    again = ffn.load(tmp_path).eval()
    assert torch.equal(run(again).logits, run(model).logits)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(again)
    for backend in ("eager", "batched_mm"):
        again.set_experts_implementation(backend)
        torch.testing.assert_close(run(again).logits, run(model).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "olmoe"])
def test_a_trained_mixture_that_was_read_and_run_keeps_its_experts(kind: str, tmp_path: Path) -> None:
    FAMILIES[kind]().save_pretrained(tmp_path / "stock")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    stock = {name: p.clone() for name, p in model.named_parameters() if "gate.weight" not in name}
    assert len(run(model).router_logits) == L, "hooks that record logits are on the routers now"
    ffn.convert(model, RMoE(state_dim=P))
    assert len(run(model).router_logits) == L
    model.save_pretrained(tmp_path / "linked")
    again = ffn.load(tmp_path / "linked")
    assert torch.equal(run(again).logits, run(model).logits)
    assert all(torch.equal(dict(again.named_parameters())[name], p) for name, p in stock.items())


def test_routers_learn_alone_beside_a_frozen_model() -> None:
    model = FAMILIES["mixtral"]()
    model.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ffn.convert(model, RMoE(state_dim=P)).train()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in learning} == {id(p) for gate in placed(model) for p in gate.parameters()}
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_bad_input_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no routers to link: RMoE goes on models that are"):
        ffn.convert(dense("llama"), RMoE())
    with pytest.raises(ConfigError, match="state_dim=0"):
        RMoE(state_dim=0)


class ScaledTopKRouter(MixtralTopKRouter):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = super().forward(hidden_states)
        return logits, 2 * weights, index


class MaskedTopKRouter(MixtralTopKRouter):
    def forward(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward(hidden_states * mask)


@pytest.mark.parametrize("other", [ScaledTopKRouter, MaskedTopKRouter])
def test_a_router_that_does_more_than_top_k_is_refused(other: Any) -> None:
    model = FAMILIES["mixtral"]()
    model.model.layers[1].mlp.gate.__class__ = other
    with pytest.raises(ConfigError, match=f"{other.__name__} is no plain top-k router"):
        ffn.convert(model, RMoE(state_dim=P))
    assert type(model) is MixtralForCausalLM
    assert not placed(model)
