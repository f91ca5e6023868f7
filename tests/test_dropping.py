"""Dropout of what experts read: how often, how much of the rest, and that neighbours share a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.lora import dropping
from moesaic.lora.dropping import drop, drop_once
from tests import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_each_element_is_dropped_by_chance_and_the_rest_made_larger(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    found = drop(torch.ones(1003, 301, dtype=dtype), p)  # no multiple of four
    share = (found == 0).double().mean().item()
    assert share == pytest.approx(p, abs=4 * (p * (1 - p) / found.numel()) ** 0.5)
    left = found[found != 0].double()
    assert left.max() == left.min() == pytest.approx(1 / (1 - p), rel=4e-3)
    assert found.double().mean().item() == pytest.approx(1, abs=0.03)


def test_neighbours_are_dropped_independently() -> None:
    """Four elements come of one number: no two of the four places go together, nor do rows."""
    torch.manual_seed(0)
    gone = (drop(torch.ones(40_000, 8), 0.3) == 0).double()
    correlated = torch.corrcoef(gone.T) - torch.eye(8, dtype=torch.double)
    assert correlated.abs().max() < 0.025


def test_the_gradient_goes_through_what_was_kept() -> None:
    z = torch.randn(6, 7, dtype=torch.double, requires_grad=True)
    found = drop(z, 0.4)
    grad = torch.randn_like(found)
    found.backward(grad)
    scale = 1 / (1 - round(0.4 * 2**16) / 2**16)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.where(found == 0, 0.0, grad * scale))


def test_the_seed_decides() -> None:
    def drawn() -> Tensor:
        torch.manual_seed(3)
        return drop(torch.ones(50), 0.5)

    assert torch.equal(drawn(), drawn())
    assert not torch.equal(drawn(), drop(torch.ones(50), 0.5))


@pytest.mark.parametrize("p", [1e-7, 1 - 1e-7])
def test_what_sixteen_bits_cannot_say_is_torchs(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def spied(z: Tensor, p: float, *, training: bool) -> Tensor:
        asked.append(p)
        return z

    monkeypatch.setattr(dropping.F, "dropout", spied)
    drop(torch.ones(3), p)
    assert asked == [p]


def test_one_draw_serves_all_that_read_a_tensor_and_no_other() -> None:
    x, passed = torch.ones(64, 64), {}  # type: ignore[var-annotated]
    first = drop_once(x, 0.5, x, passed)
    assert drop_once(x, 0.5, x, passed) is first
    assert not torch.equal(drop_once(x.clone(), 0.5, x.clone(), passed), first)
    again = drop_once(x, 0.5, x, passed)
    x.mul_(2)
    assert drop_once(x, 0.5, x, passed).max() == 2 * again.max()
    assert drop_once(x, 0.5, x, None) is not drop_once(x, 0.5, x, None)


def test_q_k_and_v_share_a_mask_and_o_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    kept = dropping.kept

    def counted(shape: Any, level: int) -> Tensor:
        shapes.append(tuple(shape))
        return kept(shape, level)

    monkeypatch.setattr(dropping, "kept", counted)
    model = tiny.wrap(tiny.llama(layers=1), tiny.small("mola", lora_dropout=0.2, target_modules=tiny.LINEARS)).train()
    model(**tiny.batch(model)).loss.backward()
    assert len(shapes) == 4  # q, k and v; o; gate and up; down
