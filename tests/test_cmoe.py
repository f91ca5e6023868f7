"""A split without training: shared neurons, balanced clusters, and a router of their representatives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic import ffn
from moesaic.errors import ConfigError
from moesaic.ffn.cmoe import AnalyticRouter, CMoE, group, markers
from moesaic.ffn.slimming import top_k
from moesaic.ffn.split import read, seats
from tests.test_ffn import IDS, WIDE, logits, made

BATCHES = [{"input_ids": IDS, "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}]


def converted(kind: str, *, shared: int = 2, k: int = 2) -> Any:
    model = made(kind)
    groups = {name: group(marks, 8, shared) for name, marks in markers(model, BATCHES).items()}
    return ffn.convert(model, CMoE(8, shared, k), groups=groups)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "opt"])
def test_all_experts_and_the_shared_ones_are_the_dense_model(kind: str) -> None:
    wanted = logits(made(kind))
    for shared in (0, 2):
        model = converted(kind, shared=shared)
        assert not torch.allclose(logits(model), wanted, atol=1e-5) or kind == "opt"
        with top_k(model, 8 - shared):
            torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_marks_are_the_largest_of_each_real_token(kind: str) -> None:
    """Of unit rows on unit inputs, one neuron after the other."""
    model, read_by = made(kind), []
    for seat in seats(model):
        first = model.get_submodule(f"{seat.name}.{seat.first[0]}")
        first.register_forward_pre_hook(lambda m, args: read_by.append(args[0].detach()))
    found = markers(model, BATCHES, active=5)
    for seat, x in zip(seats(model), read_by, strict=True):
        dense, marks = read(model, seat), found[seat.name]
        assert marks.shape == (11, WIDE)
        for token, marked in zip(x[BATCHES[0]["attention_mask"].bool()], marks, strict=True):
            size = []
            for n in range(WIDE):
                h = token @ dense.up[n] / (token.norm() * dense.up[n].norm())
                if dense.gate is None:
                    h = dense.activation(h + dense.up_bias[n])
                else:
                    h = h * dense.activation(token @ dense.gate[n] / (token.norm() * dense.gate[n].norm()))
                size.append(abs(h.item()))
            assert {*marked.nonzero().flatten().tolist()} == {*sorted(range(WIDE), key=lambda n: -size[n])[:5]}
    assert markers(model, BATCHES * 3, tokens=13)[next(iter(found))].shape == (13, WIDE)


def test_domains_are_read_a_row_in_turn_and_a_longer_one_to_its_end() -> None:
    model, seen = made("llama"), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    long, short = torch.randint(3, 50, (64, 7)), torch.randint(3, 50, (1, 7))
    groups = CMoE(8, 2, 2).parts(model, {"long": long, "short": short})["groups"]
    rows = torch.cat([long[:1], short, long[1:]])
    assert torch.equal(torch.cat(seen), rows)
    for name, marks in markers(model, [{"input_ids": row[None]} for row in rows]).items():
        found, wanted = groups[name], group(marks, 8, 2)
        assert torch.equal(found.shared, wanted.shared)
        assert torch.equal(found.experts, wanted.experts)
        assert torch.equal(found.representatives, wanted.representatives)


def test_neurons_that_fire_together_are_one_expert() -> None:
    """Four bands of neurons that fire by turns, and one that always does."""
    torch.manual_seed(0)
    marks = torch.zeros(40, 40, dtype=torch.bool)
    marks[:, :8] = True
    for t in range(40):
        band = 8 + 8 * (t % 4)
        marks[t, band : band + 8] = True
    shuffled = torch.randperm(40)
    found = group(marks[:, shuffled], 5, 1, iterations=5)
    assert set(shuffled[found.shared].tolist()) == set(range(8))
    bands = [{(n - 8) // 8 for n in shuffled[row].tolist()} for row in found.experts]
    assert sorted(map(len, bands)) == [1] * 4
    assert set.union(*bands) == set(range(4))
    assert all(int(found.representatives[i]) in found.experts[i].tolist() for i in range(4))


def test_the_router_scores_by_its_representatives() -> None:
    model = made("llama")
    seat = seats(model)[0]
    dense = read(model, seat)
    router = AnalyticRouter(seat.d_model, 3, dense.activation, gated=True)
    router.take(dense, torch.tensor([5, 0, 9]))
    x = torch.randn(4, seat.d_model)
    g, u = (w / w.norm(dim=1, keepdim=True) for w in (dense.gate[[5, 0, 9]], dense.up[[5, 0, 9]]))
    torch.testing.assert_close(router(x), (torch.nn.functional.silu(x @ g.t()) * (x @ u.t())).abs())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_folder_gives_the_model_back(kind: str, tmp_path: Path) -> None:
    model = converted(kind)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(ffn.load(tmp_path).eval()), logits(model))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda: CMoE(8, 8, 1), "top_k of the experts that are not shared"),
        (lambda: group(torch.ones(3, 10).bool(), 3, 1), "d_ff=10 cannot be cut into num_experts=3"),
        (lambda: markers(made("llama"), []), "there is no token to calibrate on"),
    ],
)
def test_bad_input_is_one_clear_line(asked: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked()
