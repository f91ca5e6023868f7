"""HotMoE against a naive restatement of its equations, and the ten facts its specification asks for."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.errors import ConfigError
from moesaic.host import find_host
from moesaic.lora.methods.hotmoe import ExpertExpertRouter, HotMoEConfig, HotMoERouter, TokenExpertRouter
from moesaic.lora.methods.hotmoe_kernels import TokenAttention
from moesaic.routing import LinearRouter, MutualInformation, Record, Routing, RoutingContext, Similarity, Site
from tests import naive_hotmoe as naive
from tests import tiny

F64 = torch.float64
KINDS = [ExpertExpertRouter, TokenExpertRouter]


def router_of(kind: type[HotMoERouter], *, H: int = 12, E: int = 5, d: int = 6, a: int = 6) -> Any:
    """A float64 router whose norm, too, is off its initial values."""
    router = kind(H, E, expert_dim=d, attention_dim=a).to(F64).eval()
    with torch.no_grad():
        router.norm.weight.uniform_(0.5, 1.5)
        router.norm.bias.normal_()
    return router


def hotmoe(**overrides: Any) -> Any:
    """A wrapped float64 Llama of four layers: expert-expert in 0 and 1, token-expert in 2 and 3; in training mode."""
    model = tiny.wrap(tiny.llama(layers=4), tiny.small("hotmoe", **overrides)).to(F64)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for name, parameter in tiny.router_parameters(model).items():
            if ".norm." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.train()


def padded_batch(model: Any) -> dict[str, Tensor]:
    inputs = tiny.batch(model, rows=4)
    for row, length in enumerate((7, 4, 6, 5)):
        inputs["attention_mask"][row, length:] = 0
        inputs["labels"][row, length:] = -100
    return inputs


# -- exact agreement with the equations ---------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_router_equals_the_literal_equations_in_value_and_gradient(kind: type[HotMoERouter], k: int | None) -> None:
    router = router_of(kind)
    literal = naive.restate_router(router, k=k)
    gate = tiny.small("hotmoe", num_experts=5, top_k=k).gate()
    h = torch.randn(2, 3, 12, dtype=F64)
    ours, theirs = h.clone().requires_grad_(), h.clone().requires_grad_()
    routing, (logits, p, w) = gate(router(ours)), literal(theirs)
    for got, wanted in ((routing.logits, logits), (routing.probs, p), (routing.weights, w)):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    cotangent = torch.randn_like(w)
    (routing.weights * cotangent).sum().backward()
    (w * cotangent).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=1e-10)
    layer = naive.NaiveLayer(torch.nn.Identity(), literal, torch.zeros(1, 1), torch.zeros(1, 1), r=1, alpha=1)
    layer.A.grad = layer.Bm.grad = torch.zeros(1, 1)
    wanted_grads = naive.grads_in_package_layout(layer)
    for name, parameter in router.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted_grads[name], atol=1e-12, rtol=1e-10, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_router_at_the_default_sizes_stays_near_the_literal_equations(kind: type[HotMoERouter]) -> None:
    router = kind(64, 8, expert_dim=256, attention_dim=32).eval()
    h = torch.randn(50, 64)
    wanted = naive.restate_router(router, k=None).logits(h.to(F64))
    with torch.no_grad():
        error = (router(h).to(F64) - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("top_k", [2, None])
@pytest.mark.parametrize(("mutual_information", "similarity"), [(True, True), (True, False), (False, True)])
def test_model_equals_the_literal_equations_in_every_loss_and_gradient(
    top_k: int | None, mutual_information: bool, similarity: bool
) -> None:
    switches = {"mutual_information": mutual_information, "similarity": similarity}
    model = hotmoe(top_k=top_k, aux_weight=0.3, **switches)
    inputs = padded_batch(model)
    literal = naive.restate_model(model, k=top_k)
    with moesaic.trace(model, keep_weights=True) as trace:
        output = model(**inputs)
    theirs = literal(**inputs)
    aux = 0.3 * naive.auxiliary_loss(literal, inputs["attention_mask"], **switches)
    torch.testing.assert_close(output.logits, theirs.logits, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(output.router_aux_loss, aux, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(output.loss, theirs.loss, atol=1e-9, rtol=1e-9)

    output.loss.backward()
    (theirs.loss + aux).backward()
    restated = naive.layers(literal)
    mixtures = {name: m for name, m in model.get_base_model().named_modules() if name in restated}
    assert len(mixtures) == 4 * 7
    for name, layer in mixtures.items():
        seen = restated[name].seen
        assert seen is not None
        torch.testing.assert_close(trace.weights(name)[0], seen[3].detach(), atol=1e-9, rtol=1e-9)
        wanted = naive.grads_in_package_layout(restated[name])
        got = {"A": layer.moe_lora_A["default"], "B": layer.moe_lora_B["default"]}
        got |= dict(layer.moe_lora_router["default"].named_parameters())
        assert got.keys() == wanted.keys()
        for part, parameter in got.items():
            torch.testing.assert_close(parameter.grad, wanted[part], atol=1e-9, rtol=1e-6, msg=f"{name}: {part}")


# -- the ten facts ------------------------------------------------------------------------------------------------


def fix_attention(router: Any, sharpness: float) -> None:
    """Make S the softmax of `sharpness` times the identity: the norm ignores its input, queries equal keys."""
    with torch.no_grad():
        router.norm.weight.zero_()
        router.norm.bias.copy_(torch.eye(*router.norm.bias.shape))
        for projection in (router.query, router.key):
            projection.weight.copy_(torch.eye(*projection.weight.shape) * math.sqrt(sharpness))


@pytest.mark.parametrize("kind", KINDS)
def test_1_identity_attention_is_the_linear_router_and_selects_as_it_does(kind: type[HotMoERouter]) -> None:
    router = router_of(kind)
    fix_attention(router, 1e5)
    h = torch.randn(40, 12, dtype=F64)
    linear = LinearRouter(12, 5, bias=True).to(F64)
    linear.linear.load_state_dict(router.value.state_dict())
    torch.testing.assert_close(router(h), linear(h), atol=1e-13, rtol=1e-13)
    gate = HotMoEConfig(num_experts=5).gate()
    assert torch.equal(gate(router(h)).weights > 0, gate(linear(h)).weights > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_2_uniform_attention_routes_uniformly(kind: type[HotMoERouter]) -> None:
    router = router_of(kind)
    with torch.no_grad():
        router.query.weight.zero_()
    probs = torch.softmax(router(torch.randn(20, 12, dtype=F64)), -1)
    torch.testing.assert_close(probs, torch.full_like(probs, 1 / 5), atol=1e-13, rtol=1e-13)


def test_3_expert_expert_is_a_linear_router_and_caching_changes_nothing() -> None:
    router = router_of(ExpertExpertRouter)
    G = router.norm(router.embedding)
    S = torch.softmax(router.query(G) @ router.key(G).T / math.sqrt(6), -1)
    linear = LinearRouter(12, 5, bias=True).to(F64)
    with torch.no_grad():
        linear.linear.weight.copy_(S @ router.value.weight)
        linear.linear.bias.copy_(S @ router.value.bias)
    h = torch.randn(9, 12, dtype=F64)
    torch.testing.assert_close(router(h), linear(h), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_3_folds_are_made_once_for_a_kv_cache_and_anew_for_every_other_forward(kind: type[HotMoERouter]) -> None:
    router = router_of(kind)
    h, folds = torch.randn(9, 12, dtype=F64), []
    fold = router.fold
    router.fold = lambda: folds.append(1) or fold()
    with torch.no_grad():
        wanted, decoding = router(h), RoutingContext(memory={})
        folds.clear()
        assert torch.equal(router(h, decoding), wanted)
        assert torch.equal(router(h, decoding), wanted)
        assert len(folds) == 1
        for parameter in router.parameters():
            before = router(h)
            parameter.data.add_(0.1 * torch.randn_like(parameter))
            assert not torch.equal(router(h), before)
    router.train()
    folds.clear()
    with torch.no_grad():
        router(h, decoding), router(h, decoding)
    assert len(folds) == 2, "in training nothing is kept"


def test_3_a_model_in_evaluation_follows_its_parameters_however_they_are_written() -> None:
    model = hotmoe().eval()
    inputs = {k: v for k, v in tiny.batch(model).items() if k != "labels"}
    with torch.no_grad():
        model(**inputs)
        for parameter in tiny.router_parameters(model).values():
            parameter.data.mul_(-1.5)
        found = model(**inputs).logits
        torch.testing.assert_close(found, copy.deepcopy(model)(**inputs).logits, rtol=0, atol=0)
    torch.testing.assert_close(found, model(**inputs).logits.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 7)])
def test_3_evaluation_without_gradients_gives_the_same_logits(kind: type[HotMoERouter], shape: tuple[int, int]) -> None:
    router, h = router_of(kind), torch.randn(*shape, 12, dtype=F64)
    with torch.no_grad():
        got = router(h)
    assert got.shape == (*shape, 5)
    torch.testing.assert_close(got, router(h).detach(), rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(router.float()(h.float()), got.float(), rtol=1e-4, atol=1e-5)


def test_4_zero_b_is_the_base_and_only_the_mixture_learns() -> None:
    base = tiny.llama(layers=4)
    inputs = tiny.batch(base)
    expected = base(**inputs).logits
    model = tiny.wrap(base, tiny.small("hotmoe", aux_weight=0.0), random_b=False).train()
    output = model(**inputs)
    assert torch.equal(output.logits, expected)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if ".moe_lora_B." in name:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0, name
        elif ".moe_lora_" in name:
            assert parameter.grad is not None
            assert not parameter.grad.any(), f"{name}: behind a zero B nothing learns from the task yet"
        else:
            assert not parameter.requires_grad
            assert parameter.grad is None


def test_5_top_k_support_is_exact_and_k_equal_to_e_is_not_the_identity() -> None:
    logits = torch.randn(200, 6)
    for k in range(1, 7):
        weights = HotMoEConfig(num_experts=6, top_k=k).gate()(logits).weights
        assert ((weights > 0).sum(-1) == k).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(200))
    assert (weights - torch.softmax(logits, -1)).abs().max() > 0.1


def loss_of(config: HotMoEConfig, kind: type, weights: Any, hidden: Tensor | None = None) -> float:
    w = torch.as_tensor(weights, dtype=F64)
    loss = next(loss for loss in config.losses() if isinstance(loss, kind))
    return loss([Record(Site("x", 2, 2), Routing(w, w, w), hidden=hidden)]).item()


@pytest.mark.parametrize(
    ("weights", "value"),
    [
        (torch.eye(4), 0.0),
        (torch.full((4, 4), 0.25), 1.0),
        ([[1.0, 0, 0, 0]] * 4, 1.0),
        ([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], 0.5),
    ],
    ids=["balanced-one-hot", "uniform", "collapsed", "balanced-top-2-of-4"],
)
def test_6_the_balance_and_certainty_term(weights: Any, value: float) -> None:
    assert loss_of(HotMoEConfig(num_experts=4), MutualInformation, weights) == pytest.approx(value, abs=1e-7)


def test_7_the_similarity_term_is_zero_where_states_and_routes_agree_and_turns_at_six_tenths() -> None:
    def value(s_x: float, s_r: float) -> float:
        hidden, routes = (torch.tensor([[1.0, 0.0], [s, math.sqrt(1 - s * s)]], dtype=F64) for s in (s_x, s_r))
        return loss_of(HotMoEConfig(), Similarity, routes.unsqueeze(1), hidden)

    assert value(0, 0) == pytest.approx(0, abs=1e-7)
    assert value(1, 1) == pytest.approx(0, abs=1e-7)
    assert value(0.6, 0.2) == pytest.approx(value(0.6, 0.9))
    assert value(0.65, 0.9) < value(0.65, 0.2)
    assert value(0.55, 0.9) > value(0.55, 0.2)


def test_7_no_gradient_reaches_hidden_states_through_the_sequence_means() -> None:
    model = hotmoe(mutual_information=False, similarity=True, aux_weight=1.0, target_modules=["gate_proj"])
    with torch.no_grad():
        for name, parameter in tiny.router_parameters(model).items():
            if name.endswith(("value.weight", "hidden.weight")):
                parameter.zero_()  # routing no longer depends on the input, so only the means could carry a gradient
    embeds = model.get_input_embeddings()(tiny.batch(model)["input_ids"]).detach().requires_grad_()
    with pytest.warns(UserWarning, match="computed from logits"):
        output = model(inputs_embeds=embeds)
    aux = moesaic.router_aux_loss(model)
    assert aux is not None
    assert output.logits.requires_grad
    aux.backward()
    assert embeds.grad is None or not embeds.grad.any()


@pytest.mark.parametrize(
    ("num_layers", "fraction", "lower"),
    [(28, 0.5, range(14)), (5, 0.5, [0, 1]), (4, 0.0, []), (4, 1.0, range(4)), (1, 0.5, []), (10, 0.3, range(3))],
)
def test_8_lower_layers_attend_among_experts(num_layers: int, fraction: float, lower: Any) -> None:
    config = HotMoEConfig(ee_fraction=fraction)
    sites = [Site("x", 4, 4, layer=layer, num_layers=num_layers) for layer in range(num_layers)]
    assert [s.layer for s in sites if config.is_expert_expert(s)] == list(lower)
    assert [type(config.router(s)) is ExpertExpertRouter for s in sites] == [s.layer in lower for s in sites]


def test_8_an_explicit_list_of_layers_wins_over_the_fraction() -> None:
    model = tiny.wrap(tiny.llama(layers=4), tiny.small("hotmoe", ee_layers=[1, 3]))
    kinds = {
        layer.sites["default"].layer: type(layer.moe_lora_router["default"]) for layer in tiny.mixtures(model).values()
    }
    assert kinds == {0: TokenExpertRouter, 1: ExpertExpertRouter, 2: TokenExpertRouter, 3: ExpertExpertRouter}


@pytest.mark.parametrize(("left", "right"), [(0, 3), (3, 0), (2, 2)])
def test_8_padding_changes_neither_outputs_nor_losses(left: int, right: int) -> None:
    model = hotmoe(step_window=False)
    inputs = tiny.batch(model)
    plain, wide = model(**inputs), model(**tiny.padded(inputs, left=left, right=right))
    torch.testing.assert_close(wide.logits[:, left : left + 7], plain.logits, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(wide.router_aux_loss, plain.router_aux_loss, atol=1e-7, rtol=1e-7)


def test_9_expert_expert_routers_own_no_mlp_and_every_token_expert_parameter_learns() -> None:
    ee, te = (router_of(kind) for kind in KINDS)
    names = {name.split(".")[0] for name, _ in ee.named_parameters()}
    assert names == {"value", "embedding", "norm", "query", "key"}
    torch.softmax(te(torch.randn(30, 12, dtype=F64)), -1)[:, 0].sum().backward()
    assert {name.split(".")[0] for name, _ in te.named_parameters()} == names | {"hidden", "expand"}
    for name, parameter in te.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, name


def test_10_the_last_micro_batch_of_a_window_has_the_large_batchs_similarity() -> None:
    model = hotmoe(mutual_information=False)
    host, inputs = find_host(model), padded_batch(model)

    def similarity(rows: slice) -> float:
        model(**{name: value[rows] for name, value in inputs.items()}).loss.backward()
        return host.loss_values["Similarity"].item()

    def next_step() -> None:
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0).step()
        model.zero_grad()

    whole = similarity(slice(0, 4))
    next_step()
    first, last = similarity(slice(0, 2)), similarity(slice(2, 4))
    assert last == pytest.approx(whole, rel=1e-6)
    assert first != pytest.approx(whole, rel=1e-3)
    next_step()
    assert similarity(slice(0, 2)) == pytest.approx(first, rel=1e-6), "an optimiser step closes the window"


# -- one fold for all routers -------------------------------------------------------------------------------------


def group_of(kind: type[HotMoERouter]) -> list[Any]:
    """Three connected routers, of two widths."""
    routers: list[Any] = [router_of(kind, H=width).train() for width in (12, 7, 12)]
    HotMoEConfig(num_experts=5).connect(routers)
    return routers


@pytest.mark.parametrize("kind", KINDS)
def test_routers_fold_together_as_each_does_alone(kind: type[HotMoERouter]) -> None:
    routers = group_of(kind)
    context = RoutingContext(whole=True)
    inputs = [torch.randn(4, router.value.in_features, dtype=F64) for router in routers]
    together = [router(h, context) for router, h in zip(routers, inputs, strict=True)]
    alone = [router(h) for router, h in zip(routers, inputs, strict=True)]
    torch.testing.assert_close(together, alone, atol=1e-13, rtol=1e-12)
    parameters = [p for router in routers for p in router.parameters()]
    cotangents = [torch.randn_like(logits) for logits in alone]
    got, wanted = (torch.autograd.grad(logits, parameters, cotangents) for logits in (together, alone))
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_that_is_not_used_or_is_frozen_gets_no_gradient(kind: type[HotMoERouter]) -> None:
    first, unused, frozen = group_of(kind)
    frozen.key.requires_grad_(False)
    context = RoutingContext(whole=True)
    for router in (first, frozen):
        router(torch.randn(4, 12, dtype=F64), context).square().sum().backward(retain_graph=True)
    assert all(p.grad is not None for p in first.parameters())
    assert all(p.grad is None for p in unused.parameters())
    assert [name for name, p in frozen.named_parameters() if p.grad is None] == ["key.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_folds_without_gradients_does_not_stand_in_for_what_needs_them(kind: type[HotMoERouter]) -> None:
    first, _, second = group_of(kind)
    context, h = RoutingContext(whole=True), torch.randn(4, 12, dtype=F64)
    with torch.no_grad():
        first(h, context)
    second(h, context).sum().backward()
    assert all(p.grad is not None for p in second.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_whose_parameters_are_elsewhere_folds_alone(kind: type[HotMoERouter]) -> None:
    first, second, third = group_of(kind)
    second.float()
    context = RoutingContext(whole=True)
    logits = third(torch.randn(4, 12, dtype=F64), context)
    assert {key[1] for key in context.state} == {first, third}
    second(torch.randn(4, 7), context)
    assert logits.dtype == F64
    assert {key[1] for key in context.state} == {first, second, third}


def test_a_forward_folds_once_for_each_kind_and_a_copy_folds_its_own_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hotmoe()
    twin = copy.deepcopy(model)
    folded: list[list[HotMoERouter]] = []
    fold_group = HotMoERouter.fold_group
    monkeypatch.setattr(HotMoERouter, "fold_group", lambda r, state: (folded.append(r.group), fold_group(r, state)))
    for copied in (model, twin):
        folded.clear()
        copied.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        copied(**tiny.batch(copied), use_cache=False).loss.backward()
        own = {layer.moe_lora_router["default"] for layer in tiny.mixtures(copied).values()}
        assert len(folded) == 2, "the recomputed layers find what the forward has folded"
        assert {router for group in folded for router in group} == own


def test_token_attentions_written_out_gradient() -> None:
    router = router_of(TokenExpertRouter)
    read = torch.randn(2, 3, 9, dtype=F64, requires_grad=True)
    to_logits, to_variance = (t.detach().requires_grad_() for t in router.fold())
    assert torch.autograd.gradcheck(TokenAttention.apply, (read, to_logits, to_variance))


# -- the window, the settings, the sizes --------------------------------------------------------------------------


def test_evaluation_and_recomputation_leave_the_window_alone() -> None:
    losses = []
    for checkpointing in (False, True):
        model = hotmoe(mutual_information=False)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inputs = padded_batch(model)
        parts = [{name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 2), slice(2, 4))]
        model(**parts[0]).loss.backward()
        model.eval()
        with torch.no_grad():
            model(**inputs)
        model.train()
        model(**parts[1]).loss.backward()
        losses.append(find_host(model).loss_values["Similarity"].item())
    assert losses[0] == losses[1]


def test_the_two_losses_switch_independently_and_the_balance_term_reads_what_the_authors_feed_it() -> None:
    def kinds(**switches: bool) -> list[str]:
        return [type(loss).__name__ for loss in HotMoEConfig(**switches).losses()]

    assert kinds() == ["MutualInformation", "Similarity"]
    assert kinds(similarity=False) == ["MutualInformation"]
    assert kinds(mutual_information=False) == ["Similarity"]
    assert kinds(mutual_information=False, similarity=False) == []
    for similarity, source in ((True, "weights"), (False, "probs")):
        loss = HotMoEConfig(similarity=similarity).losses()[0]
        assert isinstance(loss, MutualInformation)
        assert loss.source == source


def test_losses_are_summed_over_routers_or_averaged() -> None:
    summed, mean = (hotmoe(aux_reduce=reduce, step_window=False) for reduce in ("sum", "mean"))
    inputs = tiny.batch(summed)
    a, b = (model(**inputs).router_aux_loss for model in (summed, mean))
    torch.testing.assert_close(a, b * 28)


def test_defaults_are_the_authors() -> None:
    config = HotMoEConfig()
    assert (config.num_experts, config.r, config.lora_alpha, config.lora_dropout) == (8, 8, 16, 0.1)
    assert (config.expert_dim, config.attention_dim, config.top_k, config.gate_temperature) == (256, 32, 2, 0.1)
    assert (config.beta_similar, config.beta_different, config.aux_weight) == (1.0, 1.5, 0.01)
    assert (config.ee_fraction, config.aux_reduce) == (0.5, "sum")
    assert config.scaling == pytest.approx(16 / math.sqrt(8))


def test_parameter_counts_follow_the_formula() -> None:
    E, r, d, a = 4, 4, 8, 8
    for layer in tiny.mixtures(tiny.wrap(tiny.llama(layers=4), tiny.small("hotmoe"))).values():
        site = layer.sites["default"]
        H, O = site.d_in, site.d_out
        expected = E * r * (H + O) + 3 * E * d + E * (H + 1) + 2 * d * a
        if isinstance(layer.moe_lora_router["default"], TokenExpertRouter):
            expected += 4 * (H + 1) + 4 * E * d + E * d
        assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == expected


def test_dropout_reaches_the_token_expert_mlp_in_training_only() -> None:
    router = TokenExpertRouter(12, 5, expert_dim=6, attention_dim=6, dropout=0.5)
    h = torch.randn(30, 12)
    with torch.no_grad():
        assert not torch.equal(router(h), router(h))
        router.eval()
        assert torch.equal(router(h), router(h))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ee_fraction": 1.5}, "ee_fraction=1.5 must be between 0 and 1"),
        ({"aux_reduce": "max"}, "aux_reduce='max' must be one of sum, mean"),
        ({"top_k": 9}, "top_k=9 must be between 1 and num_experts=8"),
        ({"gate_temperature": 0.0}, "temperature must be above 0"),
        ({"ee_fractoin": 0.3}, "did you mean 'ee_fraction'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HotMoEConfig(**settings)
