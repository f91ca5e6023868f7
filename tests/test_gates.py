"""Gates: what each promises of a row of weights, for any logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing import Gate, Softmax, TopK, TopP


@st.composite
def logits(draw: st.DrawFn, *, distinct: bool = False) -> Tensor:
    """(rows, E) float32, in steps of 1/8: ties are common, and the order is never a matter of rounding."""
    rows, experts = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    step = st.integers(-64, 64)
    row = st.lists(step, min_size=experts, max_size=experts, unique=distinct)
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.float32) / 8


def gates(experts: int) -> list[Gate]:
    ks = range(1, experts + 1)
    topk = [TopK(k, normalize=n, temperature=t) for k in ks for n, t in (("sum", 1.0), ("softmax", 0.1), ("none", 1.0))]  # type: ignore[arg-type]
    return [Softmax(), Softmax(temperature=0.5), *topk, TopP(0.3), TopP(0.9), TopP(1.0), TopP(0.6, renormalize=False)]


@given(logits())
def test_weights_are_finite_and_never_negative_and_probs_are_the_softmax(z: Tensor) -> None:
    for gate in gates(z.shape[-1]):
        routing = gate(z)
        assert routing.weights.shape == routing.probs.shape == z.shape
        assert routing.weights.isfinite().all()
        assert (routing.weights >= 0).all()
        temperature = gate.temperature if isinstance(gate, Softmax) else 1.0
        torch.testing.assert_close(routing.probs, torch.softmax(z / temperature, -1))
        assert torch.equal(routing.logits, z)


@given(logits())
def test_rows_sum_as_the_gate_says(z: Tensor) -> None:
    for gate in gates(z.shape[-1]):
        sums = gate(z).weights.sum(-1)
        if isinstance(gate, TopK) and gate.normalize == "none":
            assert (sums <= 1 + 1e-6).all()
            assert (sums >= gate.k / z.shape[-1] - 1e-6).all(), "the k largest of E hold at least k/E"
        elif isinstance(gate, TopP) and not gate.renormalize:
            assert (sums >= gate.p - 1e-6).all()
        else:
            torch.testing.assert_close(sums, torch.ones_like(sums))


@given(logits(), st.data())
def test_top_k_keeps_exactly_k_even_on_ties(z: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, z.shape[-1]))
    for normalize in ("sum", "none"):
        gate = TopK(k, normalize=normalize)  # type: ignore[arg-type]
        routing = gate(z)
        assert ((routing.weights > 0).sum(-1) == k).all()
        assert gate.top_k == k
        kept = routing.weights > 0
        least_kept = z.masked_fill(~kept, math.inf).min(-1).values
        most_left = z.masked_fill(kept, -math.inf).max(-1).values
        assert (least_kept >= most_left).all()


@given(logits(), st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_top_p_keeps_the_smallest_leading_set(z: Tensor, p: float) -> None:
    routing = TopP(p, renormalize=False)(z)
    for weights, probs in zip(routing.weights, routing.probs, strict=True):
        kept = weights > 0
        assert torch.equal(weights[kept], probs[kept])
        assert kept.any()
        mass = probs[kept].sum()
        assert mass >= p - 1e-6
        assert mass - probs[kept].min() < p + 1e-6, "without its last member the set would fall short"
        assert not (~kept).any() or probs[kept].min() >= probs[~kept].max()


@given(logits(distinct=True), st.randoms(use_true_random=False))
def test_gates_do_not_care_how_experts_are_numbered(z: Tensor, random_) -> None:  # type: ignore[no-untyped-def]
    order = torch.tensor(random_.sample(range(z.shape[-1]), z.shape[-1]))
    for gate in gates(z.shape[-1]):
        if isinstance(gate, TopP):
            continue  # a cumulative sum near p may round to either side
        torch.testing.assert_close(gate(z[..., order]).weights, gate(z).weights[..., order])


@given(logits(), st.integers(-4, 4))
def test_a_constant_added_to_all_logits_changes_nothing(z: Tensor, shift: int) -> None:
    for gate in gates(z.shape[-1]):
        if isinstance(gate, TopP):
            continue  # as above
        torch.testing.assert_close(gate(z + shift).weights, gate(z).weights)


@pytest.mark.parametrize("gate", gates(5), ids=str)
def test_gradients_of_weights_hold_in_float64(gate: Gate) -> None:
    z = torch.tensor(
        [[0.3, -1.0, 0.9, 0.1, -0.4], [2.0, 1.0, 0.0, -1.0, -2.0]], dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(lambda t: gate(t).weights, [z])


@given(logits(), st.data())
def test_the_written_out_gradient_of_top_k_is_that_of_its_steps(z: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, z.shape[-1]))
    for normalize, temperature in (("sum", 1.0), ("softmax", 0.1), ("none", 1.0)):
        gate = TopK(k, normalize=normalize, temperature=temperature)  # type: ignore[arg-type]
        ours, theirs = (z.double().requires_grad_() for _ in range(2))
        routing, (weights, probs) = gate(ours), gate.weigh(theirs)
        assert torch.equal(routing.weights, weights)
        to_weights, to_probs = torch.randn_like(weights), torch.randn_like(probs)
        for a, b in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
            got, wanted = (
                torch.autograd.grad((a * to_weights * w + b * to_probs * p).sum(), leaf, retain_graph=True)[0]
                for w, p, leaf in ((routing.weights, routing.probs, ours), (weights, probs, theirs))
            )
            torch.testing.assert_close(got, wanted, atol=1e-13, rtol=1e-9)
        alone = torch.autograd.grad(gate(ours).probs.square().sum(), ours)[0]
        torch.testing.assert_close(alone, torch.autograd.grad(probs.square().sum(), theirs)[0], atol=1e-13, rtol=1e-9)


@pytest.mark.parametrize("gate", gates(4), ids=str)
def test_huge_logits_give_no_nan_in_weights_or_gradient(gate: Gate) -> None:
    z = torch.tensor([[1e4, -1e4, 0.0, 5e3], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    weights = gate(z).weights
    (weights * torch.arange(4.0)).sum().backward()
    assert weights.isfinite().all()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_known_values() -> None:
    z = torch.tensor([0.5, 0.15, 0.3, 0.05]).log()
    expected = {
        Softmax(): [0.5, 0.15, 0.3, 0.05],
        TopK(2): [0.625, 0.0, 0.375, 0.0],
        TopK(2, normalize="none"): [0.5, 0.0, 0.3, 0.0],
        TopK(2, normalize="softmax"): [1 / (1 + math.exp(-0.2)), 0.0, 1 / (1 + math.exp(0.2)), 0.0],
        TopK(2, normalize="softmax", temperature=0.1): [1 / (1 + math.exp(-2)), 0.0, 1 / (1 + math.exp(2)), 0.0],
        TopP(0.7): [0.625, 0.0, 0.375, 0.0],
        TopP(0.9): [0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95, 0.0],
        TopP(0.9, renormalize=False): [0.5, 0.15, 0.3, 0.0],
    }
    for gate, weights in expected.items():
        torch.testing.assert_close(gate(z).weights, torch.tensor(weights))


def test_softmax_over_kept_probabilities_is_not_the_identity_at_k_equal_to_e() -> None:
    z = torch.tensor([[1.0, 0.0, -1.0]])
    sharpened = TopK(3, normalize="softmax", temperature=0.1)(z).weights
    assert (sharpened - torch.softmax(z, -1)).abs().max() > 0.1
    torch.testing.assert_close(TopK(3)(z).weights, torch.softmax(z, -1))


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (TopK(5), "top_k=5 must be between 1 and num_experts=4"),
        (TopK(0), "top_k=0 must be between 1"),
        (TopK(2, normalize="softmax", temperature=0.0), "temperature must be above 0"),
        (TopP(0.0), "top_p=0.0 must be above 0"),
        (TopP(1.5), "top_p=1.5 must be above 0 and at most 1"),
    ],
)
def test_impossible_settings_are_refused(gate: Gate, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gate.check(4)


def test_possible_settings_pass_the_check() -> None:
    for gate in (Softmax(), TopK(1), TopK(4), TopP(1.0), TopP(0.01)):
        gate.check(4)
