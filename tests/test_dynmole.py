"""DynMoLE against its equations, written a second time in plain Python, and the facts its specification asks for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import moesaic
from moesaic.errors import ConfigError
from moesaic.lora.methods.dynmole import DynMoLEConfig, MassBalance, RouterEntropy
from moesaic.routing import (
    EntropyHybrid,
    Gate,
    Record,
    Routing,
    Site,
    Softmax,
    TopK,
    TopP,
    renyi,
    shannon,
    tsallis,
)
from tests import tiny

F64 = torch.float64
GOLDEN = [
    ((0.5, 0.3, 0.1, 0.04, 0.03, 0.01, 0.01, 0.01), 0.634, 2, 0.80),
    ((0.74, 0.2, 0.02, 0.01, 0.01, 0.01, 0.005, 0.005), 0.390, 2, 0.94),
    ((0.3, 0.25, 0.18, 0.1, 0.07, 0.05, 0.03, 0.02), 0.852, 3, 0.73),
]


# -- the equations, a second time ---------------------------------------------------------------------------------


def naive_entropy(kind: str, p: Tensor, q: float, *, eps: float = 0.0, normalize: bool = True) -> Tensor:
    """One row p (E,): the definitions, as they stand."""
    p = p + eps
    log_e = math.log(len(p))
    if q == 1:
        value, top = -sum(x * x.log() for x in p if x > 0), log_e
    elif kind == "tsallis":
        value, top = (1 - (p**q).sum()) / (q - 1), (1 - len(p) ** (1 - q)) / (q - 1)
    else:
        value, top = (p**q).sum().log() / (1 - q), log_e
    return torch.as_tensor(value / top if normalize else value)


def naive_weights(z: Tensor, gate: EntropyHybrid) -> Tensor:
    """Weights of one row of logits z (E,), expert by expert."""
    p = torch.softmax(z, dim=0)
    order = sorted(range(len(p)), key=lambda e: (-p[e].item(), e))
    kept, mass = [], 0.0
    for slot, e in enumerate(order):
        before, mass = mass, mass + p[e].item()
        within = before < gate.top_p if gate.include_crossing else mass <= gate.top_p
        if within or slot < gate.keep_top_k:
            kept.append(e)
    if gate.threshold < 1 and naive_entropy(gate.kind, p, gate.q, eps=gate.eps) > gate.threshold:
        kept = order
    return torch.stack([p[e] if e in kept else p[e] * 0 for e in range(len(p))])


def naive_losses(rows: list[tuple[Tensor, Tensor]], config: DynMoLEConfig) -> tuple[Tensor, Tensor]:
    """Entropy and balance of tokens that belong together, from (logits, weights) of each."""
    E, k = len(rows[0][0]), config.keep_top_k
    p = [torch.softmax(z, dim=0) for z, _ in rows]
    kind, q, eps = config.entropy_type, config.entropy_index, config.entropy_eps
    entropy = sum(naive_entropy(kind, row, q, eps=eps) for row in p) / len(p)
    balance = torch.zeros((), dtype=F64)
    for e in range(E):
        if config.f_mode == "mass":
            f = sum(w[e] for _, w in rows) / len(rows)
        else:
            f = sum(float(e in row.topk(k).indices) for row in p) / k / len(rows)
        balance = balance + E * f * sum(row[e] for row in p) / len(rows)
    return torch.as_tensor(entropy), balance


# -- entropies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("q", [0.5, 0.9, 1.0, 1.1, 1.5, 2.0])
@pytest.mark.parametrize("kind", ["tsallis", "renyi"])
@pytest.mark.parametrize("normalize", [True, False])
def test_entropies_equal_their_definitions_in_value_and_gradient(
    kind: str, q: float, eps: float, normalize: bool
) -> None:
    z = torch.randn(5, 7, dtype=F64, requires_grad=True)
    got = {"tsallis": tsallis, "renyi": renyi}[kind](torch.softmax(z, -1), q, eps=eps, normalize=normalize)
    wanted = torch.stack([naive_entropy(kind, row, q, eps=eps, normalize=normalize) for row in torch.softmax(z, -1)])
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    cotangent = torch.randn(5, dtype=F64)
    (got_grad,) = torch.autograd.grad((got * cotangent).sum(), z)
    (wanted_grad,) = torch.autograd.grad((wanted * cotangent).sum(), z)
    torch.testing.assert_close(got_grad, wanted_grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("q", "value"), [(1.1, 1.87748), (2.0, 0.875), (1.0, math.log(8))])
def test_tsallis_of_a_uniform_row_has_its_known_values(q: float, value: float) -> None:
    uniform = torch.full((8,), 1 / 8, dtype=F64)
    assert tsallis(uniform, q, normalize=False).item() == pytest.approx(value, abs=1e-5)
    assert tsallis(uniform, q).item() == pytest.approx(1.0, abs=1e-12)
    assert tsallis(uniform, q, eps=1e-5).item() == pytest.approx(1.0, abs=4e-4)
    assert renyi(uniform, q).item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("q", [0.5, 1.0, 1.1, 2.0])
def test_a_one_hot_row_has_no_entropy_and_a_finite_gradient(q: float) -> None:
    for of in (tsallis, renyi):
        p = torch.eye(8, dtype=F64)[:1].requires_grad_()
        assert of(p, q).item() == pytest.approx(0.0, abs=1e-12)
        z = torch.tensor([[1e4, 0.0, -1e4, 5.0]], requires_grad=True)
        of(torch.softmax(z, -1), q).sum().backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()


@pytest.mark.parametrize(("q", "value"), [(1.1, -1.8e-4), (0.5, 0.012)])
def test_the_authors_eps_moves_a_one_hot_row_to_either_side_of_zero(q: float, value: float) -> None:
    assert tsallis(torch.eye(8, dtype=F64)[0], q, eps=1e-5).item() == pytest.approx(value, rel=0.05)


@pytest.mark.parametrize("of", [tsallis, renyi])
def test_both_tend_to_shannons_entropy_as_the_index_tends_to_one(of: Any) -> None:
    p = torch.softmax(torch.randn(20, 8, dtype=F64), -1)
    wanted = torch.special.entr(p).sum(-1)
    torch.testing.assert_close(shannon(p), wanted, atol=1e-7, rtol=0)
    torch.testing.assert_close(of(p, 1.0, normalize=False), wanted, atol=1e-12, rtol=0)
    errors = [(of(p, 1 + d, normalize=False) - wanted).abs().max().item() for d in (1e-2, 1e-4, 1e-6)]
    assert errors[0] > 50 * errors[1] > 2500 * errors[2]
    assert errors[2] < 1e-5


@pytest.mark.parametrize("of", [tsallis, renyi])
def test_float32_keeps_its_digits_near_index_one(of: Any) -> None:
    p = torch.softmax(torch.randn(200, 8), -1)
    assert (of(p, 1.0001) - of(p.to(F64), 1.0001)).abs().max() < 1e-5
    plain = (1 - (p**1.0001).sum(-1)) / 1e-4 / math.log(8)
    assert (plain - tsallis(p.to(F64), 1.0001)).abs().max() > 1e-4, "the definition itself loses them"


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=9), st.sampled_from([0.5, 1.0, 1.1, 2.0]))
def test_normalised_entropies_lie_between_zero_and_one(z: list[float], q: float) -> None:
    p = torch.softmax(torch.tensor(z, dtype=F64), -1)
    for of in (tsallis, renyi):
        assert -1e-9 <= of(p, q).item() <= 1 + 1e-9


# -- the gate -----------------------------------------------------------------------------------------------------


def hybrids() -> list[EntropyHybrid]:
    return [
        EntropyHybrid(),
        EntropyHybrid(keep_top_k=1, top_p=0.5, threshold=0.6),
        EntropyHybrid(keep_top_k=3, top_p=0.9, threshold=0.75, include_crossing=True),
        EntropyHybrid(keep_top_k=1, top_p=0.6, threshold=1.0),
        EntropyHybrid(keep_top_k=1, top_p=0.6, threshold=1.0, include_crossing=True),
        EntropyHybrid(keep_top_k=1, threshold=0.7, q=1.0, eps=0.0),
        EntropyHybrid(keep_top_k=2, top_p=0.4, threshold=0.8, q=2.0, kind="renyi"),
        EntropyHybrid(keep_top_k=1, threshold=0.8, eps=0.02),
    ]


@pytest.mark.parametrize("gate", hybrids(), ids=str)
def test_gate_equals_the_equations_in_value_and_gradient(gate: EntropyHybrid) -> None:
    z = (torch.randn(4, 10, 6, dtype=F64) * torch.linspace(0.1, 3, 10, dtype=F64).unsqueeze(-1)).requires_grad_()
    routing = gate(z)
    wanted = torch.stack([naive_weights(row, gate) for row in z.flatten(0, 1)]).view_as(z)
    torch.testing.assert_close(routing.weights, wanted, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(routing.probs, torch.softmax(z, -1))
    sizes = (routing.weights > 0).sum(-1).unique()
    assert len(sizes) > 1, "the rows must not all be of one kind"
    cotangent = torch.randn_like(z)
    (got,) = torch.autograd.grad((routing.weights * cotangent).sum(), z)
    (grad,) = torch.autograd.grad((wanted * cotangent).sum(), z)
    torch.testing.assert_close(got, grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("row", "entropy", "active", "total"), GOLDEN)
def test_golden_rows(row: tuple[float, ...], entropy: float, active: int, total: float) -> None:
    p = torch.tensor(row, dtype=F64)
    weights = EntropyHybrid()(p.log()).weights
    assert tsallis(p, 1.1, eps=1e-5).item() == pytest.approx(entropy, abs=1e-3)
    assert int((weights > 0).sum()) == active
    assert weights.sum().item() == pytest.approx(total, abs=1e-9)
    torch.testing.assert_close(weights[:active], p[:active])
    everything = EntropyHybrid(threshold=entropy - 0.01)(p.log())
    torch.testing.assert_close(everything.weights, p)
    crossing = EntropyHybrid(include_crossing=True)(p.log()).weights
    assert int((crossing > 0).sum()) == (2 if active == 2 else 4), "0.73 falls short of 0.75, so the fourth is in"


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    rows, experts = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    row = st.lists(st.integers(-40, 40), min_size=experts, max_size=experts)
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=F64) / 8


@given(logits(), st.integers(1, 2), st.sampled_from([0.3, 0.75]), st.sampled_from([0.5, 0.9]))
def test_what_a_row_keeps(z: Tensor, k: int, top_p: float, threshold: float) -> None:
    gate = EntropyHybrid(k, top_p, threshold)
    routing = gate(z)
    assert torch.equal(routing.logits, z)
    assert not gate.sums_to_one
    for w, p in zip(routing.weights, routing.probs, strict=True):
        kept = w > 0
        assert torch.equal(w[kept], p[kept])
        if tsallis(p, 1.1, eps=1e-5) > threshold:
            assert kept.all()
            assert torch.equal(w, p)
        else:
            within = int((p.sort(descending=True).values.cumsum(0) <= top_p).sum())
            assert int(kept.sum()) == max(k, within)
            assert w.sum() <= 1 + 1e-9
            assert kept.all() or p[kept].min() >= p[~kept].max()


def test_ties_keep_exactly_as_many_as_asked() -> None:
    weights = EntropyHybrid(keep_top_k=2, top_p=0.0, threshold=1.0)(torch.zeros(3, 6)).weights
    assert ((weights > 0).sum(-1) == 2).all()


@pytest.mark.parametrize(("top_p", "within", "with_crossing"), [(0.5, 2, 2), (0.6, 2, 3), (0.2, 1, 1), (0.75, 3, 3)])
def test_the_mass_at_top_p_belongs_and_the_mass_across_it_does_not(
    top_p: float, within: int, with_crossing: int
) -> None:
    z = torch.zeros(4, dtype=F64)  # cumulative masses of exactly 1/4, 1/2, 3/4, 1
    for crossing, kept in ((False, within), (True, with_crossing)):
        gate = EntropyHybrid(1, top_p, threshold=1.0, include_crossing=crossing)
        assert int((gate(z).weights > 0).sum()) == kept


def test_limits_of_the_gate() -> None:
    z = 2 * torch.randn(50, 8, dtype=F64)
    dense = Softmax()(z).weights
    for gate in (EntropyHybrid(threshold=0.0), EntropyHybrid(keep_top_k=8)):
        assert torch.equal(gate(z).weights, dense), "LoRAMoE's gate"
    assert torch.equal(EntropyHybrid(2, top_p=0.0, threshold=1.0)(z).weights, TopK(2, normalize="none")(z).weights), (
        "unnormalised top-k"
    )
    union = EntropyHybrid(3, 0.6, threshold=1.0, include_crossing=True)(z).weights
    top_k, top_p = TopK(3, normalize="none")(z).weights, TopP(0.6, renormalize=False)(z).weights
    assert torch.equal(union, torch.maximum(top_k, top_p))
    assert torch.equal(EntropyHybrid(threshold=1.0)(z).weights, EntropyHybrid(threshold=7.0)(z).weights)
    above_one = EntropyHybrid(2, threshold=1.0, q=0.5)
    assert tsallis(torch.full((8,), 0.125, dtype=F64), 0.5, eps=above_one.eps) > 1, "by eps"
    assert int((above_one(z[0] * 0).weights > 0).sum()) == 6, "1/8 six times over is within 0.75"
    assert not torch.equal(EntropyHybrid(threshold=0.99)(z * 0).weights, EntropyHybrid(threshold=1.0)(z * 0).weights)


def test_every_gate_says_whether_its_rows_sum_to_one() -> None:
    z = 3 * torch.randn(50, 5)
    promises: list[tuple[Gate, bool]] = [
        (Softmax(), True),
        (TopK(2), True),
        (TopK(2, normalize="softmax", temperature=0.1), True),
        (TopK(2, normalize="none"), False),
        (TopP(0.7), True),
        (TopP(0.7, renormalize=False), False),
        (EntropyHybrid(), False),
    ]
    for gate, promise in promises:
        assert gate.sums_to_one is promise
        sums = gate(z).weights.sum(-1)
        assert bool(((sums - 1).abs() < 1e-5).all()) is promise
        assert ((sums > 0) & (sums <= 1 + 1e-5)).all()


def test_gate_and_losses_never_wait_for_a_value() -> None:
    """Tensors without data raise where a kernel's result is read on the host: `.item()`, boolean indexing, `if`."""
    z = torch.empty(2, 3, 6, device="meta", requires_grad=True)
    mask = torch.empty(2, 3, device="meta", dtype=torch.bool)
    gate = EntropyHybrid()
    for concat in (False, True):
        for mode in ("mass", "hard_topk"):
            record = Record(Site("layer", 3, 3), gate(z), mask=mask)
            balance = MassBalance(1.0, top_k=2, f_mode=mode, concat=concat)  # type: ignore[arg-type]
            (balance([record]) + RouterEntropy(1.0, gate, concat=concat)([record])).backward()


# -- losses -------------------------------------------------------------------------------------------------------


def record_of(
    weights: Tensor, probs: Tensor | None = None, *, name: str = "layer", mask: Tensor | None = None
) -> Record:
    probs = weights if probs is None else probs
    return Record(Site(name, 3, 3), Routing(weights, probs, probs.clamp(min=1e-30).log()), mask=mask)


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("f_mode", ["mass", "hard_topk"])
def test_balance_has_its_golden_values(f_mode: Any, concat: bool) -> None:
    loss = MassBalance(1.0, top_k=1, f_mode=f_mode, concat=concat)
    one_hot = torch.eye(8, dtype=F64)
    assert loss([record_of(torch.full((5, 8), 1 / 8, dtype=F64))]).item() == pytest.approx(1.0, abs=1e-6)
    assert loss([record_of(one_hot)]).item() == pytest.approx(1.0, abs=1e-6)
    assert loss([record_of(one_hot[:1].expand(6, 8))]).item() == pytest.approx(8.0, abs=1e-6)


def test_balance_of_mass_falls_below_one_where_weights_do() -> None:
    row = torch.tensor(GOLDEN[2][0], dtype=F64)
    routing = EntropyHybrid()(torch.stack([row.roll(i) for i in range(8)]).log())
    record = Record(Site("layer", 3, 3), routing)
    assert MassBalance(1.0, top_k=2)([record]).item() == pytest.approx(0.73, abs=1e-9)
    assert MassBalance(1.0, top_k=2, f_mode="hard_topk")([record]).item() == pytest.approx(1.0, abs=1e-9)


def test_concatenated_layers_balance_each_other_and_single_ones_do_not() -> None:
    collapsed = [record_of(torch.eye(4, dtype=F64)[e].expand(3, 4), name=f"layer{e}") for e in range(4)]
    assert MassBalance(1.0, top_k=1)(collapsed).item() == pytest.approx(4.0)
    assert MassBalance(1.0, top_k=1, concat=True)(collapsed).item() == pytest.approx(1.0)


def test_entropy_loss_rests_at_uniform_and_descent_lowers_it_elsewhere() -> None:
    gate = EntropyHybrid()
    loss = RouterEntropy(1.0, gate)

    def of(z: Tensor) -> Tensor:
        return loss([Record(Site("layer", 3, 3), gate(z))])

    z = torch.zeros(3, 8, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(of(z), z)
    assert grad.abs().max() < 1e-15
    z = torch.randn(3, 8, dtype=F64, requires_grad=True)
    before = of(z)
    (grad,) = torch.autograd.grad(before, z)
    assert of(z - 0.1 * grad / grad.norm()) < before - 1e-3


def test_legacy_concat_counts_padding_in_the_entropy_alone() -> None:
    gate = EntropyHybrid()
    p = torch.tensor([[[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]]], dtype=F64)
    record = record_of(p, mask=torch.tensor([[True, False]]))
    certain, uncertain = (tsallis(row, gate.q, eps=gate.eps).item() for row in p[0])
    assert RouterEntropy(1.0, gate)([record]).item() == pytest.approx(certain, abs=1e-12)
    assert RouterEntropy(1.0, gate, concat=True)([record]).item() == pytest.approx((certain + uncertain) / 2)
    for concat in (False, True):
        assert MassBalance(1.0, top_k=1, concat=concat)([record]).item() == pytest.approx(4.0, abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("legacy_concat", [False, True])
@pytest.mark.parametrize("settings", [{}, {"f_mode": "hard_topk"}, {"entropy_type": "renyi", "entropy_index": 0.7}])
def test_auxiliary_loss_equals_the_equations_in_value_and_gradient(
    name: str, legacy_concat: bool, settings: dict[str, Any]
) -> None:
    """T5's encoder and decoder have other numbers of tokens, and other masks."""
    config: Any = tiny.small(
        "dynmole", num_experts=3, entropy_coef=0.3, balance_coef=0.2, legacy_concat=legacy_concat, **settings
    )
    model = tiny.wrap(tiny.MODELS[name](layers=1), config).to(F64).train()
    inputs = tiny.batch(model, rows=2, tokens=5)
    inputs["attention_mask"][1, 3:] = 0
    records: list[Record] = []
    loss_of = model.base_model.host.losses["default"][0]
    plain = loss_of.per_router
    loss_of.per_router = lambda seen, step: (records.extend(seen), plain(seen, step))[1]
    output = model(**inputs)
    assert len(records) == (7 if name == "llama" else 6 + 4 + 6), "a record for each linear"

    routers: list[list[tuple[Tensor, Tensor]]] = []
    padded: list[list[tuple[Tensor, Tensor]]] = []
    for record in records:
        z, w = record.routing.logits.flatten(0, 1), record.routing.weights.flatten(0, 1)
        real = torch.ones(len(z), dtype=torch.bool) if record.mask is None else record.mask.flatten()
        padded.append([(z[t], w[t]) for t in range(len(z))])
        routers.append([(z[t], w[t]) for t in range(len(z)) if real[t]])
    assert sum(map(len, routers)) < sum(map(len, padded))
    if legacy_concat:
        entropy = naive_losses([row for rows in padded for row in rows], config)[0]
        balance = naive_losses([row for rows in routers for row in rows], config)[1]
    else:
        values = [naive_losses(rows, config) for rows in routers]
        entropy, balance = (torch.stack(part).mean() for part in zip(*values, strict=True))
    wanted = 0.3 * entropy + 0.2 * balance
    torch.testing.assert_close(output.router_aux_loss, wanted, atol=1e-8, rtol=0)
    parameters = list(tiny.router_parameters(model).values())
    got_grads = torch.autograd.grad(output.router_aux_loss, parameters, retain_graph=True)
    wanted_grads = torch.autograd.grad(wanted, parameters)
    torch.testing.assert_close(got_grads, wanted_grads, atol=1e-8, rtol=1e-6)


# -- the layer and its settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"entropy_threshold": 0.97, "keep_top_k": 1, "top_p": 0.5}])
def test_layer_equals_the_equations_in_value_and_gradient(settings: dict[str, Any]) -> None:
    config: Any = tiny.small("dynmole", **settings)
    model = tiny.wrap(tiny.llama(), config).to(F64)
    layer = tiny.mixtures(model)["base_model.model.model.layers.0.mlp.up_proj"]
    A, B = layer.moe_lora_A["default"].chunk(4), layer.moe_lora_B["default"].chunk(4)
    G = layer.moe_lora_router["default"].linear.weight
    x = torch.randn(12, 16, dtype=F64) * torch.linspace(0.1, 4, 12, dtype=F64).unsqueeze(-1)
    rows, active = [], set()
    for token in x:
        w = naive_weights(G @ token, config.gate())
        active.add(int((w > 0).sum()))
        y = layer.base_layer(token)
        for e in range(4):
            y = y + 8 / 4 * w[e] * (B[e].T @ (A[e] @ token))
        rows.append(y)
    assert len(active) > 1, "certain and uncertain tokens both"
    got, wanted = layer(x), torch.stack(rows)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    cotangent = torch.randn_like(got)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    got_grads = torch.autograd.grad((got * cotangent).sum(), parameters)
    wanted_grads = torch.autograd.grad((wanted * cotangent).sum(), parameters)
    torch.testing.assert_close(got_grads, wanted_grads, atol=1e-12, rtol=1e-9)


def test_training_and_evaluation_route_alike() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("dynmole"))
    inputs = tiny.batch(model)
    evaluated = model(**inputs).logits
    assert torch.equal(model.train()(**inputs).logits, evaluated)


def test_a_fresh_router_leaves_most_unit_variance_tokens_uncertain() -> None:
    """The specification's run of the authors' code: 85 % of tokens above 0.9, 7.3 active experts of 8."""
    config = DynMoLEConfig(num_experts=8)
    router = config.router(Site("layer", 512, 512))
    weights = config.gate()(router(torch.randn(4000, 512))).weights
    active = (weights > 0).sum(-1).float()
    assert (active == 8).float().mean().item() == pytest.approx(0.85, abs=0.05)
    assert active.mean().item() == pytest.approx(7.3, abs=0.25)


def test_defaults_are_the_authors() -> None:
    config = DynMoLEConfig()
    assert (config.num_experts, config.r, config.scaling, config.lora_dropout) == (6, 24, 2.0, 0.05)
    assert config.gate() == EntropyHybrid(2, 0.75, 0.9, 1.1, "tsallis", 1e-5, include_crossing=False)
    assert {type(loss): loss.weight for loss in config.losses()} == {RouterEntropy: 0.01, MassBalance: 0.001}


def test_each_loss_switches_off_alone() -> None:
    assert [type(loss) for loss in DynMoLEConfig(entropy_coef=0).losses()] == [MassBalance]
    assert [type(loss) for loss in DynMoLEConfig(balance_coef=0).losses()] == [RouterEntropy]
    assert [loss.weight for loss in DynMoLEConfig(aux_weight=10).losses()] == pytest.approx([0.1, 0.01])
    for off in ({"aux_weight": 0.0}, {"entropy_coef": 0, "balance_coef": 0}):
        model = tiny.wrap(tiny.llama(), tiny.small("dynmole", **off)).train()
        model(**tiny.batch(model))
        assert moesaic.router_aux_loss(model) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_top_k": 7}, "keep_top_k=7 must be between 1 and num_experts=6"),
        ({"keep_top_k": 0}, "keep_top_k=0 must be between 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be between 0 and 1"),
        ({"entropy_threshold": -0.1}, "entropy_threshold=-0.1 must be at least 0"),
        ({"entropy_index": 0.0}, "entropy_index=0.0 must be above 0 and at most 2"),
        ({"entropy_index": 2.5}, "entropy_index=2.5 must be above 0 and at most 2"),
        ({"entropy_type": "shannon"}, "entropy_type='shannon' must be one of tsallis, renyi"),
        ({"entropy_eps": -1.0}, "entropy_eps=-1.0 must be at least 0"),
        ({"entropy_coef": -1.0}, "entropy_coef=-1.0 must be at least 0"),
        ({"balance_coef": -1.0}, "balance_coef=-1.0 must be at least 0"),
        ({"f_mode": "soft"}, "f_mode='soft' must be one of mass, hard_topk"),
        ({"entropy_treshold": 0.5}, "did you mean 'entropy_threshold'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DynMoLEConfig(**settings)
