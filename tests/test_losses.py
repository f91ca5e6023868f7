"""Auxiliary losses: golden values, bounds, and what must not matter (padding, numbering, stacking)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.routing import (
    AuxiliaryLoss,
    MutualInformation,
    Record,
    Routing,
    Similarity,
    Site,
    SwitchBalance,
    TopK,
    ZLoss,
    pool,
)


def site(name: str = "layer") -> Site:
    return Site(name, d_in=3, d_out=3)


def of_weights(weights: Any, *, name: str = "layer", **fields: Any) -> Record:
    """A record whose weights and probabilities are given and whose logits are their logarithms."""
    w = torch.as_tensor(weights, dtype=torch.float64)
    return Record(site(name), Routing(w, w, w.clamp(min=1e-30).log()), **fields)


def of_logits(logits: Tensor, *, k: int | None = None, name: str = "layer", **fields: Any) -> Record:
    routing = TopK(k or logits.shape[-1])(logits)
    return Record(site(name), routing, **fields)


def drawn(seed: int, *, rows: int = 3, tokens: int = 5, experts: int = 4, name: str = "layer", k: int = 2) -> Record:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, tokens, experts, generator=g, dtype=torch.float64)
    hidden = torch.randn(rows, 3, generator=g, dtype=torch.float64)
    return of_logits(logits, k=k, name=name, hidden=hidden)


def every_loss() -> list[AuxiliaryLoss]:
    return [
        SwitchBalance(1.0),
        ZLoss(1.0),
        MutualInformation(1.0),
        MutualInformation(1.0, source="weights"),
        Similarity(1.0, window=False),
        Similarity(1.0, window=False, center_hidden=True),
    ]


def name_of(loss: AuxiliaryLoss) -> str:
    return type(loss).__name__ + "".join(f"-{v}" for v in vars(loss).values() if isinstance(v, str))


# -- golden values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "value"),
    [
        (torch.eye(4), 0.0),
        (torch.full((6, 4), 0.25), 1.0),
        ([[1.0, 0, 0, 0]] * 5, 1.0),
        ([[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5], [0.5, 0, 0, 0.5]], 0.5),
    ],
    ids=["balanced-one-hot", "uniform", "collapsed", "balanced-top-2-of-4"],
)
def test_mutual_information_has_its_golden_values(weights: Any, value: float) -> None:
    for source in ("probs", "weights"):
        loss = MutualInformation(1.0, source=source)([of_weights(weights)])  # type: ignore[arg-type]
        assert loss.item() == pytest.approx(value, abs=1e-7)


def test_mutual_information_of_a_single_expert_is_zero() -> None:
    assert MutualInformation(1.0)([of_weights([[1.0], [1.0]])]).item() == pytest.approx(0.0, abs=1e-7)


def test_mutual_information_reads_the_source_it_was_given() -> None:
    one_hot, uniform = torch.eye(4, dtype=torch.float64), torch.full((4, 4), 0.25, dtype=torch.float64)
    record = Record(site(), Routing(weights=one_hot, probs=uniform, logits=uniform))
    assert MutualInformation(1.0, source="weights")([record]).item() == pytest.approx(0.0, abs=1e-7)
    assert MutualInformation(1.0, source="probs")([record]).item() == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_switch_balance_is_one_at_perfect_balance_for_any_k(k: int) -> None:
    logits = torch.stack([torch.arange(4.0).roll(i) for i in range(4)])
    assert SwitchBalance(1.0)([of_logits(logits, k=k)]).item() == pytest.approx(1.0, abs=1e-6)


def test_switch_balance_of_a_collapsed_router_is_the_number_of_experts() -> None:
    assert SwitchBalance(1.0)([of_weights([[0, 1.0, 0, 0, 0]] * 7)]).item() == pytest.approx(5.0)


def test_switch_balance_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.2, 0.6, 0.2]]).log()
    # shares of top-1: (2/3, 1/3, 0); mean probabilities (0.4, 0.4, 0.2)
    assert SwitchBalance(1.0)([of_logits(logits, k=1)]).item() == pytest.approx(3 * (2 / 3 * 0.4 + 1 / 3 * 0.4))


def test_switch_balance_has_gradient_through_probabilities_alone() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    record = of_logits(logits, k=2)
    (got,) = torch.autograd.grad(SwitchBalance(1.0)([record]), logits)
    share = (record.routing.weights > 0).double().mean(0) / 2
    (wanted,) = torch.autograd.grad(4 * (share * torch.softmax(logits, -1).mean(0)).sum(), logits)
    torch.testing.assert_close(got, wanted)


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]], dtype=torch.float64)
    wanted = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert ZLoss(1.0)([of_logits(logits)]).item() == pytest.approx(wanted)


def cosine_pair(angle_x: float, angle_r: float) -> Record:
    """Two sequences of one token whose hidden states and weights have the given cosines."""

    def pair(cosine: float) -> Tensor:
        return torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)

    routes, hidden = pair(angle_r).unsqueeze(1), pair(angle_x)
    return Record(site(), Routing(routes, routes, routes), hidden=hidden)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_similarity_is_zero_when_states_and_routes_agree(value: float) -> None:
    assert Similarity(1.0)([cosine_pair(value, value)]).item() == pytest.approx(0.0, abs=1e-7)


def test_similarity_by_hand() -> None:
    s_x, s_r = 0.8, 0.3
    off_diagonal = 1.0 * (1 - s_r) * s_x + 1.5 * s_r * (1 - s_x)
    assert Similarity(1.0)([cosine_pair(s_x, s_r)]).item() == pytest.approx(2 * off_diagonal / 4)


@pytest.mark.parametrize(("s_x", "sign"), [(0.7, -1), (0.61, -1), (0.59, 1), (0.2, 1)])
def test_similarity_pulls_above_six_tenths_and_pushes_below(s_x: float, sign: int) -> None:
    low, high = (Similarity(1.0)([cosine_pair(s_x, s_r)]).item() for s_r in (0.3, 0.6))
    assert math.copysign(1, high - low) == sign


def test_similarity_threshold_follows_the_betas() -> None:
    loss = Similarity(1.0, beta_similar=3.0, beta_different=1.0)  # threshold 1/4
    low, high = (loss([cosine_pair(0.4, s_r)]).item() for s_r in (0.3, 0.6))
    assert high < low


def test_similarity_sends_no_gradient_to_hidden_states() -> None:
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    routes = torch.rand(3, 2, 5, dtype=torch.float64, requires_grad=True)
    loss = Similarity(1.0)([Record(site(), Routing(routes, routes, routes), hidden=hidden)])
    loss.backward()
    assert hidden.grad is None
    assert routes.grad is not None
    assert routes.grad.abs().sum() > 0


def test_centred_similarity_tells_states_apart_that_share_a_direction() -> None:
    hidden = torch.tensor([[10.0, 1.0], [10.0, -1.0]], dtype=torch.float64)
    routes = torch.eye(2, dtype=torch.float64).unsqueeze(1)
    record = Record(site(), Routing(routes, routes, routes), hidden=hidden)
    assert Similarity(1.0)([record]).item() > 0.4  # nearly parallel states: orthogonal routes are wrong
    # centred, the states are opposite: S_x = -1 off the diagonal, S_r = 0, so the mean is (1 - 0) * -1 * 2 / 4
    assert Similarity(1.0, center_hidden=True)([record]).item() == pytest.approx(-0.5)


# -- what must not matter ----------------------------------------------------------------------------------------

seeds = st.integers(0, 10_000)


@given(seeds, st.integers(1, 5), st.integers(1, 3))
def test_mutual_information_stays_between_zero_and_one(seed: int, experts: int, scale: int) -> None:
    g = torch.Generator().manual_seed(seed)
    record = of_logits(torch.randn(2, 4, experts, generator=g, dtype=torch.float64) * 4**scale)
    for source in ("probs", "weights"):
        value = MutualInformation(1.0, source=source)([record]).item()  # type: ignore[arg-type]
        assert -1e-7 <= value <= 1 + 1e-7


@given(seeds)
def test_switch_balance_is_at_least_one_at_k_1_when_probabilities_follow_the_choice(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    one_hot = torch.nn.functional.one_hot(torch.randint(0, 4, (9,), generator=g), 4).double()
    value = SwitchBalance(1.0)([of_weights(one_hot)]).item()
    share = one_hot.mean(dim=0)
    assert value == pytest.approx(4 * float((share**2).sum()))
    assert value >= 1 - 1e-9


@pytest.mark.parametrize("loss", every_loss(), ids=name_of)
@given(seed=seeds, left=st.integers(0, 2), right=st.integers(0, 3))
def test_padding_never_counts(loss: AuxiliaryLoss, seed: int, left: int, right: int) -> None:
    record = drawn(seed)
    g = torch.Generator().manual_seed(seed + 1)
    junk = torch.randn(3, left + right, 4, generator=g, dtype=torch.float64) * 10
    wide = torch.cat([junk[:, :left], record.routing.logits, junk[:, left:]], dim=1)
    mask = torch.zeros(wide.shape[:2], dtype=torch.bool)
    mask[:, left : left + 5] = True
    padded = of_logits(wide, k=2, mask=mask, hidden=record.hidden)
    torch.testing.assert_close(loss([padded]), loss([record]))


@pytest.mark.parametrize("loss", every_loss(), ids=name_of)
def test_padding_gets_no_gradient(loss: AuxiliaryLoss) -> None:
    record = drawn(0)
    logits = record.routing.logits.clone().requires_grad_()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = mask[1, :2] = False
    loss([of_logits(logits, k=2, mask=mask, hidden=record.hidden)]).backward()
    assert logits.grad is not None
    assert not logits.grad[~mask].any()
    assert logits.grad[mask].any()


@pytest.mark.parametrize("loss", every_loss(), ids=name_of)
@given(seed=seeds, order=st.permutations(range(4)))
def test_the_numbering_of_experts_does_not_matter(loss: AuxiliaryLoss, seed: int, order: list[int]) -> None:
    record = drawn(seed)
    permuted = of_logits(record.routing.logits[..., order], k=2, hidden=record.hidden)
    torch.testing.assert_close(loss([permuted]), loss([record]))


@pytest.mark.parametrize("loss", every_loss(), ids=name_of)
@given(seed=seeds, order=st.permutations(range(3)))
def test_the_order_of_sequences_does_not_matter(loss: AuxiliaryLoss, seed: int, order: list[int]) -> None:
    record = drawn(seed)
    assert record.hidden is not None
    permuted = of_logits(record.routing.logits[order], k=2, hidden=record.hidden[order])
    torch.testing.assert_close(loss([permuted]), loss([record]))


@pytest.mark.parametrize("make", [lambda r: [loss.__class__(1.0, reduce=r) for loss in every_loss()[:3]]])
def test_reduce_names_sum_or_mean_over_routers(make: Any) -> None:
    records = [drawn(i, name=f"layer{i}") for i in range(4)]
    for summed, mean in zip(make("sum"), make("mean"), strict=True):
        torch.testing.assert_close(summed(records), 4 * mean(records))


@pytest.mark.parametrize("loss", every_loss(), ids=name_of)
def test_stacked_routers_equal_one_by_one(loss: AuxiliaryLoss) -> None:
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[2, 3:] = False
    records = [drawn(i, name=f"a{i}") for i in range(3)]
    records += [drawn(9 + i, name=f"b{i}", experts=6) for i in range(2)]  # another number of experts
    records += [drawn(20 + i, name=f"c{i}") for i in range(2)]
    for record in records[-2:]:
        record.mask = mask
    torch.testing.assert_close(loss(records), torch.stack([loss([r]) for r in records]).sum())


# -- the window over accumulated micro-batches -------------------------------------------------------------------


def halves(record: Record) -> list[Record]:
    assert record.hidden is not None
    parts = ((record.routing.logits[i : i + 2], record.hidden[i : i + 2]) for i in (0, 2))
    return [of_logits(z, k=2, hidden=h) for z, h in parts]


def test_the_last_micro_batch_of_a_step_has_the_large_batchs_similarity() -> None:
    whole = drawn(3, rows=4)
    first, last = halves(whole)
    loss = Similarity(1.0)
    torch.testing.assert_close(loss([first], step=7), Similarity(1.0)([first]))
    torch.testing.assert_close(loss([last], step=7), Similarity(1.0)([whole]))


def test_the_window_closes_with_the_step() -> None:
    first, last = halves(drawn(3, rows=4))
    loss = Similarity(1.0)
    loss([first], step=7)
    torch.testing.assert_close(loss([last], step=8), Similarity(1.0)([last]))


def test_without_a_step_or_a_window_micro_batches_stay_apart() -> None:
    first, last = halves(drawn(3, rows=4))
    for loss, step in ((Similarity(1.0), None), (Similarity(1.0, window=False), 7)):
        loss([first], step)
        torch.testing.assert_close(loss([last], step), Similarity(1.0)([last]))


def test_earlier_micro_batches_get_no_gradient_from_later_ones() -> None:
    whole = drawn(3, rows=4)
    early = whole.routing.logits[:2].clone().requires_grad_()
    late = whole.routing.logits[2:].clone().requires_grad_()
    assert whole.hidden is not None
    loss = Similarity(1.0)
    loss([of_logits(early, k=2, hidden=whole.hidden[:2])], step=1)
    loss([of_logits(late, k=2, hidden=whole.hidden[2:])], step=1).backward()
    assert early.grad is None
    assert late.grad is not None
    assert late.grad.abs().sum() > 0


def test_routers_have_windows_of_their_own() -> None:
    a, b = drawn(1, name="a"), drawn(2, name="b")
    loss = Similarity(1.0)
    loss([a], step=1)
    torch.testing.assert_close(loss([b], step=1), Similarity(1.0)([b]))


@pytest.mark.parametrize("center_hidden", [False, True])
def test_similarity_of_many_routers_is_that_of_each_alone(center_hidden: bool) -> None:
    """Some share an input, some read one of another width; over two micro-batches of a step."""

    def forward(seed: int) -> list[Record]:
        query, key, up, down = (drawn(seed + i, name=name) for i, name in enumerate("qkud"))
        key.hidden = query.hidden
        down.hidden = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return [query, down, key, up]

    together = Similarity(1.0, center_hidden=center_hidden)
    alone = [Similarity(1.0, center_hidden=center_hidden) for _ in range(4)]
    for records in (forward(10), forward(20)):
        each = [loss([record], step=1) for loss, record in zip(alone, records, strict=True)]
        torch.testing.assert_close(together(records, step=1), torch.stack(each).sum())


# -- means over sequences ----------------------------------------------------------------------------------------


def test_pool_is_the_mean_over_real_tokens() -> None:
    values = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[True, True, False], [False, False, True]])
    torch.testing.assert_close(pool(values, mask, None), torch.tensor([[1.0, 2.0], [10.0, 11.0]]))
    torch.testing.assert_close(pool(values, None, None), values.mean(1))


def test_pool_of_rows_without_a_token_axis_is_the_rows() -> None:
    values = torch.randn(4, 3)
    assert torch.equal(pool(values, None, None), values)


@given(seeds, st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_pool_of_a_packed_row_equals_its_sequences_one_by_one(seed: int, lengths: list[int]) -> None:
    g = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 3, generator=g, dtype=torch.float64) for n in lengths]
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    packed = pool(torch.cat(parts).unsqueeze(0), None, index.unsqueeze(0))
    torch.testing.assert_close(packed, torch.stack([p.mean(0) for p in parts]))


def test_pool_of_a_packed_row_leaves_padding_out() -> None:
    values = torch.tensor([[[1.0], [3.0], [50.0], [4.0]]])
    mask, index = torch.tensor([[True, True, False, True]]), torch.tensor([[0, 0, 1, 1]])
    torch.testing.assert_close(pool(values, mask, index), torch.tensor([[2.0], [4.0]]))


def test_pool_of_a_row_of_padding_is_zero_not_nan() -> None:
    pooled = pool(torch.randn(2, 3, 4), torch.tensor([[True, True, True], [False, False, False]]), None)
    assert torch.equal(pooled[1], torch.zeros(4))
