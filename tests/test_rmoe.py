"""RMoE against its equations, the paths its state may and may not take, and the one cell that all routers share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import moesaic
from moesaic.errors import ConfigError
from moesaic.lora.methods.rmoe import RMoEConfig
from moesaic.routing import RoutingContext, Site
from moesaic.routing.recurrent import RecurrentRouter, _GRUStep, chain_of, joined
from tests import tiny

F64 = torch.float64
D, P, E = 6, 5, 4


def naive_step(kind: str, cell: Any, x: Tensor, before: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The cell for one token (p,), written out gate by gate; (h, c), where c means something for an LSTM alone."""
    h, c = before
    parts = {"gru": 3, "rnn": 1, "lstm": 4}[kind]
    reads = [W @ x + b for W, b in zip(cell.weight_ih.chunk(parts), cell.bias_ih.chunk(parts), strict=True)]
    keeps = [U @ h + b for U, b in zip(cell.weight_hh.chunk(parts), cell.bias_hh.chunk(parts), strict=True)]
    if kind == "gru":
        s, z = (1 / (1 + torch.exp(-(a + b))) for a, b in zip(reads[:2], keeps[:2], strict=True))
        n = torch.tanh(reads[2] + s * keeps[2])
        return (1 - z) * n + z * h, c
    if kind == "rnn":
        return torch.tanh(reads[0] + keeps[0]), c
    i, f, g, o = (a + b for a, b in zip(reads, keeps, strict=True))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def naive_chain(routers: list[Any], inputs: list[Tensor]) -> list[Tensor]:
    """Logits of each layer of a chain for inputs (N, d), token by token."""
    first = routers[0]
    columns: list[list[Tensor]] = [[] for _ in routers]
    for token in range(len(inputs[0])):
        zero = torch.zeros(first.cell.hidden_size, dtype=F64)
        state, g = (zero, zero), torch.zeros(first.num_experts, dtype=F64)
        for i, router in enumerate(routers):
            if first.recurrence == "none":
                state = (zero, zero)
            if first.recurrence == "detach":
                state = (state[0].detach(), state[1].detach())
            state = naive_step(first.kind, first.cell, router.projector.weight @ inputs[i][token], state)
            below = g.detach() if first.residual_detach else g
            g = router.head.weight @ state[0] + first.residual_alpha * below
            columns[i].append(g)
    return [torch.stack(rows) for rows in columns]


def chain(layers: int = 3, **settings: Any) -> list[RecurrentRouter]:
    """Routers of one chain, float64, sharing a cell, with weights large enough to matter."""
    sites = [Site(f"layers.{i}.up", D, D, layer=i, num_layers=layers) for i in range(layers)]
    config = RMoEConfig(num_experts=E, state_dim=P, **settings)
    routers: list[Any] = [config.router(site).to(F64) for site in sites]
    config.connect(routers)
    louder(*routers)
    return routers


@torch.no_grad()
def louder(*routers: Any) -> None:
    for router in routers:
        router.projector.weight.normal_(std=0.7)
        router.head.weight.normal_()


def run(routers: list[RecurrentRouter], inputs: list[Tensor]) -> list[Tensor]:
    context = RoutingContext()
    return [router(x, context) for router, x in zip(routers, inputs, strict=True)]


def inputs_for(layers: int = 3, *leading: int) -> list[Tensor]:
    return [torch.randn(*(leading or (4,)), D, dtype=F64) for _ in range(layers)]


def rmoe(model: nn.Module | None = None, *, layers: int = 3, dtype: torch.dtype = F64, **settings: Any) -> Any:
    """A wrapped model with loud routers."""
    wrapped = tiny.wrap(model or tiny.llama(layers=layers), tiny.small("rmoe", **settings)).to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        louder(*(layer.moe_lora_router["default"] for layer in tiny.mixtures(wrapped).values()))
    return wrapped


def cells(model: Any, adapter: str = "default") -> set[int]:
    return {id(layer.moe_lora_router[adapter].cell) for layer in tiny.mixtures(model).values()}


# -- exact agreement with the equations ---------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {},
    {"cell": "rnn"},
    {"cell": "lstm"},
    {"cell": "lstm", "recurrence": "detach"},
    {"recurrence": "detach"},
    {"recurrence": "none"},
    {"residual_alpha": 0.5},
    {"recurrence": "none", "residual_alpha": 1.0},
    {"recurrence": "none", "residual_alpha": 1.0, "residual_detach": True},
    {"shared_projector": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_chain_equals_the_equations_in_value_and_gradient(settings: dict[str, Any]) -> None:
    routers = chain(**settings)
    parameters = list({id(p): p for router in routers for p in router.parameters()}.values())
    inputs = [x.requires_grad_() for x in inputs_for()]
    got, wanted = run(routers, inputs), naive_chain(routers, inputs)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    cotangents = [torch.randn_like(g) for g in got]
    grads = [
        torch.autograd.grad(
            sum((a * b).sum() for a, b in zip(logits, cotangents, strict=True)),
            [*parameters, *inputs],
            allow_unused=True,
            materialize_grads=True,
        )
        for logits in (got, wanted)
    ]
    assert all(g.abs().sum() > 0 for g in grads[0][len(parameters) :])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-12, rtol=1e-9)


def test_the_cell_is_pytorchs_gru_cell() -> None:
    routers = chain()
    x = inputs_for()
    h = torch.zeros(4, P, dtype=F64)
    for router, x_i, logits in zip(routers, x, run(routers, x), strict=True):
        h = routers[0].cell(x_i @ router.projector.weight.T, h)
        torch.testing.assert_close(logits, h @ router.head.weight.T, atol=1e-14, rtol=1e-12)


def test_the_written_out_step_equals_pytorchs_in_value_and_every_gradient() -> None:
    cell = nn.GRUCell(P, P).to(F64)
    x, h = (torch.randn(7, P, dtype=F64, requires_grad=True) for _ in range(2))
    got, wanted = _GRUStep.apply(x, h, *joined(cell)), cell(x, h)
    torch.testing.assert_close(got, wanted, atol=1e-14, rtol=1e-12)
    leaves, cotangent = [x, h, *cell.parameters()], torch.randn_like(wanted)
    grads = (torch.autograd.grad(out, leaves, cotangent) for out in (got, wanted))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-11)
    weight, bias = (t.detach().requires_grad_() for t in joined(cell))
    assert torch.autograd.gradcheck(_GRUStep.apply, (x, h, weight, bias))


@pytest.mark.parametrize("adapted", [[0, 1, 2], [0, 2]])
def test_in_a_model_each_kind_of_module_runs_its_own_chain_past_dense_layers(adapted: list[int]) -> None:
    model = rmoe(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], layers_to_transform=adapted)
    seen: dict[str, Tensor] = {}
    for name, layer in tiny.mixtures(model).items():
        layer.register_forward_pre_hook(lambda m, a, name=name: seen.__setitem__(name, a[0].flatten(0, 1)))
    with torch.no_grad(), moesaic.trace(model, keep_weights=True) as trace:
        model(**tiny.batch(model))
    layers = tiny.mixtures(model)
    for leaf in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
        names = [f"base_model.model.model.layers.{i}.{leaf}" for i in adapted]
        routers = [layers[name].moe_lora_router["default"] for name in names]
        for name, logits in zip(names, naive_chain(routers, [seen[name] for name in names]), strict=True):
            top, index = torch.softmax(logits, dim=-1).topk(2)
            wanted = torch.zeros_like(logits).scatter(-1, index, top / top.sum(dim=-1, keepdim=True))
            (weights,) = trace.weights(name.removeprefix("base_model.model."))
            torch.testing.assert_close(weights.flatten(0, 1), wanted, atol=1e-10, rtol=1e-10)


# -- where the state goes -----------------------------------------------------------------------------------------


def test_logits_depend_on_lower_layers_unless_the_recurrence_is_off() -> None:
    for recurrence, depends in (("full", True), ("detach", True), ("none", False)):
        routers = chain(recurrence=recurrence)
        below, other, own = inputs_for()
        logits = [run(routers[:2], [x, own])[1] for x in (below, other)]
        assert torch.equal(logits[0], logits[1]) is not depends, recurrence


@pytest.mark.parametrize(("recurrence", "reaches"), [("full", True), ("detach", False), ("none", False)])
def test_gradients_reach_the_projectors_below_through_the_cell_alone(recurrence: Any, reaches: bool) -> None:
    routers = chain(recurrence=recurrence)
    logits = run(routers, inputs_for())
    weights = [router.projector.weight for router in routers]
    lowest, middle, own = torch.autograd.grad(
        logits[2].square().sum(), weights, allow_unused=True, materialize_grads=True
    )
    assert own.abs().sum() > 0
    assert bool(lowest.abs().sum() > 0) is reaches
    assert bool(middle.abs().sum() > 0) is reaches


def test_an_update_gate_that_never_opens_leaves_routing_uniform() -> None:
    routers = chain()
    with torch.no_grad():
        routers[0].cell.bias_ih[P : 2 * P] = 50.0
    for logits in run(routers, inputs_for()):
        torch.testing.assert_close(torch.softmax(logits, -1), torch.full_like(logits, 1 / E), atol=1e-15, rtol=0)


def test_tokens_do_not_see_each_other() -> None:
    routers, inputs = chain(), inputs_for(3, 3, 4)
    wanted = run(routers, inputs)
    rows, columns = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    shuffled = run(routers, [x[rows][:, columns] for x in inputs])
    for got, logits in zip(shuffled, wanted, strict=True):
        torch.testing.assert_close(got, logits[rows][:, columns], atol=1e-14, rtol=1e-12)
    disturbed = [x.clone() for x in inputs]
    for x in disturbed:
        x[1, 2] += 1.0
    for got, logits in zip(run(routers, disturbed), wanted, strict=True):
        same = torch.ones(3, 4, dtype=torch.bool)
        same[1, 2] = False
        torch.testing.assert_close(got[same], logits[same], atol=1e-14, rtol=1e-12)
        assert (got[1, 2] - logits[1, 2]).abs().max() > 1e-3


@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_and_nothing_stays_between_forwards() -> None:
    model = rmoe()
    inputs = tiny.batch(model, tokens=8, labels=False)
    full = model(**inputs).logits
    assert torch.equal(model(**inputs).logits, full)
    step = model(input_ids=inputs["input_ids"][:, :5], use_cache=True)
    torch.testing.assert_close(step.logits, full[:, :5], atol=1e-10, rtol=1e-10)
    for t in range(5, 8):
        step = model(input_ids=inputs["input_ids"][:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
        torch.testing.assert_close(step.logits[:, 0], full[:, t], atol=1e-10, rtol=1e-10)


def test_a_recomputed_layer_sees_the_state_of_its_own_forward() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = rmoe().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        first, second = (tiny.batch(model, seed=seed) for seed in (0, 1))
        (model(**first, use_cache=False).loss + model(**second, use_cache=False).loss).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert any(name.endswith("cell.weight_hh") for name in plain)
    torch.testing.assert_close(recomputed, plain, atol=1e-14, rtol=1e-10)


def test_a_layer_called_alone_starts_at_zero() -> None:
    model = rmoe()
    layer = tiny.mixtures(model)["base_model.model.model.layers.2.mlp.up_proj"]
    router = layer.moe_lora_router["default"]
    x = torch.randn(2, 3, 16, dtype=F64)
    assert torch.equal(layer(x), layer(x))
    (wanted,) = naive_chain([router], [x.flatten(0, 1)])
    torch.testing.assert_close(router(x).flatten(0, 1), wanted, atol=1e-12, rtol=1e-12)


def test_tokens_of_another_shape_start_at_zero() -> None:
    routers, (below, own) = chain(2), inputs_for(2, 3, 4)
    assert torch.equal(run(routers, [below[:, :2], own])[1], routers[1](own))
    assert not torch.equal(run(routers, [below, own])[1], routers[1](own))


def test_tokens_dealt_to_a_models_own_experts_start_at_zero() -> None:
    sites = [Site(f"layers.{i}.mlp.experts.3.w1", D, D, layer=i, num_layers=2) for i in range(2)]
    config = RMoEConfig(num_experts=E, state_dim=P)
    routers: list[Any] = [config.router(site).to(F64) for site in sites]
    config.connect(routers)
    below, own = inputs_for(2)
    assert torch.equal(run(routers, [below, own])[1], routers[1](own))


def test_two_active_adapters_keep_their_states_apart() -> None:
    model = rmoe()
    inputs = tiny.batch(model)
    with moesaic.trace(model, keep_weights=True) as alone:
        model(**inputs)
    model.add_adapter("second", tiny.small("rmoe", num_experts=4))
    louder(*(layer.moe_lora_router["second"] for layer in tiny.mixtures(model).values()))
    model.to(F64).base_model.set_adapter(["second", "default"])  # B of the second is zero: the inputs stay the same
    with moesaic.trace(model, keep_weights=True) as together:
        model(**inputs)
    for name in alone.modules:
        assert torch.equal(together.weights(name)[-1], alone.weights(name)[0])


def test_encoder_decoder_and_cross_attention_have_chains_of_their_own() -> None:
    model = rmoe(tiny.t5())
    chains = {layer.moe_lora_router["default"].chain for layer in tiny.mixtures(model).values()}
    assert {
        "encoder.block.*.layer.0.SelfAttention.q",
        "decoder.block.*.layer.0.SelfAttention.q",
        "decoder.block.*.layer.1.EncDecAttention.k",
    } <= chains
    inputs = {"input_ids": torch.randint(3, 64, (2, 5))}
    beams = model.generate(**inputs, num_beams=2, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    uncached = model.generate(
        **inputs, num_beams=2, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False
    )
    assert torch.equal(beams, uncached)


@pytest.mark.parametrize(
    ("name", "chain"),
    [
        ("model.layers.12.self_attn.q_proj", "model.layers.*.self_attn.q_proj"),
        ("h.3.mlp.c_fc", "h.*.mlp.c_fc"),
        ("decoder.block.2.layer.1.EncDecAttention.k", "decoder.block.*.layer.1.EncDecAttention.k"),
        ("pooler.dense", "pooler.dense"),
        ("mlp2.0", "mlp2.*"),
    ],
)
def test_a_chain_is_the_name_without_the_layer(name: str, chain: str) -> None:
    assert chain_of(Site(name, 1, 1)) == chain


# -- the one cell -------------------------------------------------------------------------------------------------


def test_the_cell_is_stored_and_counted_once() -> None:
    model = tiny.wrap(tiny.llama(layers=3), tiny.small("rmoe"))
    stored = [name for name in model.state_dict() if ".cell." in name]
    assert len(cells(model)) == 1
    assert len(stored) == 4
    assert all(".layers.0.self_attn.q_proj.moe_lora_router.default.cell." in name for name in stored)
    p, experts = 8, 4
    sites = [layer.sites["default"] for layer in tiny.mixtures(model).values()]
    expected = 2 * (3 * p) * p + 2 * 3 * p + sum(p * site.d_in + experts * p for site in sites)
    assert sum(q.numel() for q in tiny.router_parameters(model).values()) == expected


@pytest.mark.parametrize(("layers", "h", "N", "p", "wanted"), [(8, 352, 16, 128, 0.431), (24, 1280, 16, 128, 3.59)])
def test_the_papers_models_get_as_many_parameters_more(layers: int, h: int, N: int, p: int, wanted: float) -> None:
    config = RMoEConfig(num_experts=N, state_dim=p)
    routers = [config.router(Site(f"layers.{i}.ffn", h, h, layer=i, num_layers=layers)) for i in range(layers)]
    config.connect(routers)
    added = sum(q.numel() for router in routers for q in router.parameters()) - layers * N * h
    assert added / 1e6 == pytest.approx(wanted, abs=0.005)


def test_a_shared_projector_is_one_for_each_chain() -> None:
    model = tiny.wrap(tiny.llama(layers=3), tiny.small("rmoe", shared_projector=True))
    owned = [name for name in model.state_dict() if name.endswith("projector.weight")]
    assert len(owned) == 7
    assert all(".layers.0." in name for name in owned)
    routers = [layer.moe_lora_router["default"] for layer in tiny.mixtures(model).values()]
    assert len({id(router.projector) for router in routers}) == 7


def test_a_deep_copy_shares_a_cell_of_its_own() -> None:
    model = rmoe()
    twin = copy.deepcopy(model)
    inputs = tiny.batch(model)
    assert len(cells(twin)) == 1
    assert not cells(twin) & cells(model)
    wanted = model(**inputs).logits
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".cell." in name:
                parameter.normal_()
    assert torch.equal(model(**inputs).logits, wanted)
    assert (twin(**inputs).logits - wanted).abs().max() > 1e-6


def test_saved_and_loaded_the_cell_is_one_again(tmp_path: Path) -> None:
    model = rmoe(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(tiny.llama(layers=3), str(tmp_path), low_cpu_mem_usage=low_memory).eval()
        assert len(cells(loaded)) == 1
        assert torch.equal(loaded(**tiny.batch(model)).logits, model(**tiny.batch(model)).logits)


def test_each_adapter_has_its_cell_and_trains_it_while_active() -> None:
    model = rmoe()
    model.add_adapter("second", tiny.small("rmoe", num_experts=3, cell="lstm"))
    assert not cells(model, "default") & cells(model, "second")
    for active, other in (("second", "default"), ("default", "second")):
        model.set_adapter(active)
        trained = {name: p.requires_grad for name, p in model.named_parameters() if ".cell." in name}
        assert all(on is (f".{active}." in name) for name, on in trained.items())
        assert any(f".{other}." in name for name in trained)


def test_the_cell_moves_with_the_model_and_stays_float32_over_a_bf16_base() -> None:
    model = tiny.wrap(tiny.llama().to(torch.bfloat16), tiny.small("rmoe"))
    (cell,) = {layer.moe_lora_router["default"].cell for layer in tiny.mixtures(model).values()}
    assert {p.dtype for p in cell.parameters()} == {torch.float32}
    assert model(**tiny.batch(model)).logits.isfinite().all()
    model.to(F64)
    assert {p.dtype for p in cell.parameters()} == {F64}


def test_one_step_moves_the_cell_of_every_layer() -> None:
    model = rmoe(dtype=torch.float32).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = [p.detach().clone() for n, p in model.named_parameters() if ".cell." in n]
    model(**tiny.batch(model)).loss.backward()
    optimizer.step()
    for layer in tiny.mixtures(model).values():
        for was, now in zip(before, layer.moe_lora_router["default"].cell.parameters(), strict=True):
            assert not torch.equal(was, now)


# -- settings -----------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    config = RMoEConfig()
    assert (config.num_experts, config.top_k, config.state_dim, config.aux_weight) == (8, 2, 32, 0.01)
    assert (config.cell, config.recurrence, config.residual_alpha) == ("gru", "full", 0.0)
    router: Any = config.router(Site("layers.0.up", 512, 8))
    for weight in (router.projector.weight, router.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cell": "gruu"}, "cell='gruu' must be one of gru, rnn, lstm"),
        ({"recurrence": "np"}, "recurrence='np' must be one of full, detach, none"),
        ({"state_dim": 0}, "state_dim=0 must be at least 1"),
        ({"top_k": 9}, "top_k=9 must be between 1 and num_experts=8"),
        ({"state_dims": 3}, "did you mean 'state_dim'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RMoEConfig(**settings)
