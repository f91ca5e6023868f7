"""Rows of routed pairs: their order, and every product over them against a loop by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moesaic.lora.pairs import Kernel, Pairs, down, spread, weighted_sum

F64 = torch.float64


def drawn(counts: str, *, tokens: int = 9, num_experts: int = 5, seed: int = 0) -> tuple[Tensor, int | None]:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(tokens, num_experts, generator=generator, dtype=F64)
    if counts == "some":
        keep = torch.rand(tokens, num_experts, generator=generator) < 0.4
        keep[torch.arange(tokens), torch.randint(num_experts, (tokens,), generator=generator)] = True
        keep[:, 3] = False
        keep[:, 0] |= ~keep.any(dim=-1)
        return probs * keep / (probs * keep).sum(-1, keepdim=True), None
    top, index = probs.topk(int(counts), dim=-1)
    return torch.zeros_like(probs).scatter(-1, index, top / top.sum(-1, keepdim=True)), int(counts)


@pytest.mark.parametrize("counts", ["1", "2", "5", "some"])
def test_pairs_are_the_nonzero_weights_sorted_by_expert(counts: str) -> None:
    weights, k = drawn(counts)
    pairs, chosen = Pairs.of(weights, k)
    expert, token = weights.t().nonzero(as_tuple=True)
    assert torch.equal(pairs.expert, expert)
    assert torch.equal(pairs.token, token)
    assert pairs.ends.tolist() == torch.bincount(expert, minlength=5).cumsum(0).tolist()
    assert torch.equal(pairs.by_row(chosen), weights[token, expert])
    assert torch.equal(pairs.cell, token * 5 + expert)
    rows = torch.randn(len(pairs), 3, dtype=F64)
    torch.testing.assert_close(pairs.collect(rows), torch.zeros(9, 3, dtype=F64).index_add(0, token, rows))


@pytest.mark.parametrize("counts", ["1", "2", "5", "some"])
@pytest.mark.parametrize(("kernel", "looped"), [("grouped", True), ("grouped", False), ("masked", True)])
@pytest.mark.parametrize(("rank", "width"), [(4, 8), (3, 7)])
def test_every_kernel_equals_a_loop_over_pairs(
    counts: str, kernel: Kernel, looped: bool, rank: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not looped:  # what a GPU runs
        monkeypatch.setattr("moesaic.lora.pairs._loops", lambda rows: False)
    weights, k = drawn(counts)
    dtype = torch.float32 if kernel == "grouped" else F64
    pairs, chosen = Pairs.of(weights, k)
    torch.manual_seed(0)
    sizes = {"base": (9, width), "z": (len(pairs), rank), "m": (5, rank, width), "rows": (len(pairs), width)}
    t = SimpleNamespace(**{n: torch.randn(*s, dtype=dtype, requires_grad=True) for n, s in sizes.items()})
    w = chosen.to(dtype).requires_grad_()
    own = t.m[pairs.expert]
    by_hand = {
        "spread": (t.base[pairs.token] + (t.z[:, :, None] * own).sum(1), [t.base, t.z, t.m]),
        "alone": ((t.z[:, :, None] * own).sum(1), [t.z, t.m]),
        "down": ((t.rows[:, None, :] * own).sum(2), [t.rows, t.m]),
        "sum": (
            torch.zeros(9, width, dtype=dtype).index_add(0, pairs.token, t.rows * pairs.by_row(w)[:, None]),
            [t.rows, w],
        ),
    }
    got = {
        "spread": spread(t.base, t.z, t.m, pairs, kernel),
        "alone": spread(None, t.z, t.m, pairs, kernel),
        "down": down(t.rows, t.m, pairs, kernel),
        "sum": weighted_sum(t.rows, w, pairs),
    }
    tight = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-10}
    for name, (wanted, leaves) in by_hand.items():
        torch.testing.assert_close(got[name], wanted, **tight, msg=name)
        cotangent = torch.randn_like(wanted)
        pair = (torch.autograd.grad((out * cotangent).sum(), leaves, retain_graph=True) for out in (got[name], wanted))
        for a, b in zip(*pair, strict=True):
            torch.testing.assert_close(a, b, **tight, msg=name)


@pytest.mark.parametrize("counts", ["2", "5", "some"])
def test_equal_rows_sum_to_themselves_bit_for_bit(counts: str) -> None:
    weights, k = drawn(counts)
    pairs, chosen = Pairs.of(weights.float(), k)
    base = torch.randn(9, 64)
    assert torch.equal(weighted_sum(base[pairs.token], chosen, pairs), base)
