"""`mix` against its definition: every backend, every gradient, over a grid of shapes, odd ones included.

Tolerances are relative to the largest entry of the exact tensor, computed in float64 from the same (rounded) inputs:
1e-5 in fp32, and 2^-6 in bf16 (8 bits of mantissa, three roundings on the way and a sum over experts).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.lora import crossover
from moesaic.lora.crossover import LIMITS, runs_grouped
from moesaic.lora.mix import choose, mix, weigh_and_expand

BACKENDS = ["reference", "rank", "grouped"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}


@dataclass(frozen=True)
class Case:
    leading: tuple[int, ...]
    d_in: int
    d_out: int
    experts: int
    r: int
    k: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.leading))}-{self.d_in}-{self.d_out}-E{self.experts}-r{self.r}-k{self.k}"


CASES = [
    Case((600,), 100, 600, 8, 8, 2),
    Case((2, 50), 600, 100, 5, 3, 2),
    Case((1,), 16, 16, 4, 1, 1),
    Case((1, 1), 100, 7, 3, 2, 3),
    Case((3, 5), 17, 33, 6, 1, 2),
    Case((2, 3, 4), 8, 24, 2, 4, 1),
    Case((64,), 32, 64, 1, 16, 1),
    Case((9,), 100, 100, 64, 2, 2),
]


@dataclass
class Problem:
    x: Tensor
    A: Tensor
    B: Tensor
    weights: Tensor
    base: Tensor
    cotangent: Tensor

    NAMES = ("x", "A", "B", "weights", "base")

    def leaves(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.NAMES]

    def to(self, dtype: torch.dtype, weights: torch.dtype | None = None) -> Problem:
        """A copy whose leaves ask for gradients; weights may keep a dtype of their own, as a gate's do."""
        parts = {n: getattr(self, n).detach().to(dtype) for n in (*self.NAMES, "cotangent")}
        parts["weights"] = self.weights.detach().to(weights or dtype)
        return Problem(**{n: t if n == "cotangent" else t.clone().requires_grad_() for n, t in parts.items()})


def problem(case: Case, dtype: torch.dtype) -> Problem:
    """Random tensors rounded to `dtype`, and k weights a row that sum to 1."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = case.experts * case.r
    scores = torch.rand(*case.leading, case.experts, generator=generator) + 0.1
    top, index = scores.topk(case.k, dim=-1)
    weights = torch.zeros_like(scores).scatter(-1, index, top / top.sum(-1, keepdim=True)).to(dtype)
    return Problem(
        x=draw(*case.leading, case.d_in),
        A=draw(rows, case.d_in) / case.d_in**0.5,
        B=draw(rows, case.d_out) / case.r**0.5,
        weights=weights,
        base=draw(*case.leading, case.d_out),
        cotangent=draw(*case.leading, case.d_out),
    )


def naive(p: Problem) -> Tensor:
    """y = base + sum_e w_e B_e A_e x, by a loop over tokens and experts."""
    experts = p.weights.shape[-1]
    r = len(p.A) // experts
    x, w = p.x.reshape(-1, p.x.shape[-1]), p.weights.reshape(-1, experts)
    rows = []
    for t, base in enumerate(p.base.reshape(-1, p.base.shape[-1])):
        row = base
        for e in range(experts):
            a, b = p.A[e * r : (e + 1) * r], p.B[e * r : (e + 1) * r]
            row = row + w[t, e] * (b.t() @ (a @ x[t]))
        rows.append(row)
    return torch.stack(rows).view_as(p.base)


def gradients(out: Tensor, p: Problem) -> dict[str, Tensor]:
    return dict(zip(p.NAMES, torch.autograd.grad((out * p.cotangent).sum(), p.leaves()), strict=True))


def assert_close(got: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    error = (got.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"{what}: relative error {error:.2e} above {tolerance:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backends_equal_the_naive_loop(case: Case, dtype: torch.dtype) -> None:
    drawn = problem(case, dtype)
    exact = drawn.to(torch.float64)
    expected = naive(exact)
    expected_grads = gradients(expected, exact)
    for backend in BACKENDS:
        p = drawn.to(dtype, weights=torch.float32)
        out = mix(p.x, p.A, p.B, p.weights, base=p.base, backend=backend)  # type: ignore[arg-type]
        assert out.dtype == dtype
        assert out.shape == p.base.shape
        assert_close(out, expected, TOLERANCE[dtype], f"{backend} output")
        for name, grad in gradients(out, p).items():
            wanted = expected_grads[name]
            if name == "weights" and backend == "grouped":
                assert not grad[p.weights == 0].any(), "experts that were skipped have no gradient"
                wanted = wanted * (p.weights > 0)
            assert_close(grad, wanted, TOLERANCE[dtype], f"{backend} gradient of {name}")


@pytest.mark.parametrize("backend", ["reference", "rank"])
def test_gradients_hold_in_float64(backend: str) -> None:
    p = problem(Case((2, 3), 5, 4, 3, 2, 2), torch.float32).to(torch.float64)

    def run(*leaves: Tensor) -> Tensor:
        x, A, B, weights, base = leaves
        return mix(x, A, B, weights, base=base, backend=backend)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(run, p.leaves())


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_base_only_the_experts_answer(backend: str) -> None:
    drawn = problem(CASES[1], torch.float32)
    drawn.base.zero_()
    exact, p = drawn.to(torch.float64), drawn.to(torch.float32)
    out = mix(p.x, p.A, p.B, p.weights, backend=backend)  # type: ignore[arg-type]
    assert_close(out, naive(exact), 1e-5, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_summed_output_can_be_differentiated(backend: str) -> None:
    """The gradient of a sum has stride 0, which grouped_mm refuses when it is handed on as it is."""
    p = problem(CASES[0], torch.float32).to(torch.float32)
    mix(p.x, p.A, p.B, p.weights, base=p.base, backend=backend).sum().backward()  # type: ignore[arg-type]
    assert p.A.grad is not None
    assert p.A.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_base_is_not_modified(backend: str) -> None:
    p = problem(CASES[0], torch.float32)
    before = p.base.clone()
    mix(p.x, p.A, p.B, p.weights, base=p.base, backend=backend)  # type: ignore[arg-type]
    assert torch.equal(p.base, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_b_returns_the_base_bit_for_bit(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        p = problem(CASES[0], dtype)
        out = mix(p.x, p.A, torch.zeros_like(p.B), p.weights, base=p.base, backend=backend)  # type: ignore[arg-type]
        assert torch.equal(out, p.base)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_no_rows(backend: str) -> None:
    x, A, B = torch.zeros(0, 8), torch.randn(12, 8), torch.randn(12, 4)
    out = mix(x, A, B, torch.zeros(0, 3), base=torch.zeros(0, 4), backend=backend)  # type: ignore[arg-type]
    assert out.shape == (0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_nobody_chose_cost_nothing_and_get_no_gradient(backend: str) -> None:
    p = problem(Case((6,), 8, 12, 4, 4, 1), torch.float32).to(torch.float32)
    with torch.no_grad():
        p.weights.zero_()
        p.weights[:, 2] = 1.0
    out = mix(p.x, p.A, p.B, p.weights, base=p.base, backend=backend)  # type: ignore[arg-type]
    expected = p.base + (p.x @ p.A[8:12].t()) @ p.B[8:12]
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    for m in (p.A, p.B):
        assert m.grad is not None
        per_expert = m.grad.unflatten(0, (4, 4)).abs().sum(dim=(1, 2))
        assert per_expert.nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_autocast_computes_in_bf16_and_returns_fp32_gradients(backend: str) -> None:
    drawn = problem(CASES[0], torch.bfloat16)
    exact = drawn.to(torch.float64)
    p = drawn.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = p.base.bfloat16()  # what the frozen linear hands over under autocast
        out = mix(p.x, p.A, p.B, p.weights, base=base, backend=backend)  # type: ignore[arg-type]
    assert out.dtype == torch.bfloat16
    expected = naive(exact)
    assert_close(out, expected, TOLERANCE[torch.bfloat16], backend)
    expected_grads = gradients(expected, exact)
    for name, grad in gradients(out, p).items():
        assert grad.dtype == torch.float32
        wanted = expected_grads[name]
        if name == "weights" and backend == "grouped":
            wanted = wanted * (exact.weights > 0)
        assert_close(grad, wanted, TOLERANCE[torch.bfloat16], f"{backend} gradient of {name}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_experts_on_a_bf16_base_answer_in_bf16(backend: str) -> None:
    p = problem(CASES[0], torch.float32)
    base = p.base.bfloat16()
    out = mix(p.x, p.A, p.B, p.weights, base=base, backend=backend)  # type: ignore[arg-type]
    assert out.dtype == torch.bfloat16
    p.base = base.double()
    for name in ("x", "A", "B", "weights"):
        setattr(p, name, getattr(p, name).double())
    assert_close(out, naive(p), TOLERANCE[torch.bfloat16], backend)


def test_no_weights_mean_plain_lora() -> None:
    x, A, B = torch.randn(3, 5, 8), torch.randn(4, 8), torch.randn(4, 6)
    torch.testing.assert_close(mix(x, A, B), x @ A.t() @ B)


def test_where_grouped_products_do_not_run_all_experts_are_computed_and_that_is_said_once() -> None:
    p = problem(CASES[0], torch.float32).to(torch.float64)
    runs_grouped.cache_clear()
    with pytest.warns(UserWarning, match=r"grouped products do not run on cpu in float64 .*backend='rank'"):
        out = mix(p.x, p.A, p.B, p.weights, backend="grouped")
    torch.testing.assert_close(out, mix(p.x, p.A, p.B, p.weights, backend="reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mix(p.x, p.A, p.B, p.weights, backend="grouped")


def test_auto_takes_all_experts_where_grouped_products_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **settings: object) -> None:
        raise NotImplementedError("no such kernel")

    p = problem(Case((40,), 32, 48, 16, 8, 2), torch.float32)
    wanted = mix(p.x, p.A, p.B, p.weights, base=p.base, backend="rank")
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", fails)
    runs_grouped.cache_clear()
    with pytest.warns(UserWarning, match="no such kernel"):
        found = mix(p.x, p.A, p.B, p.weights, base=p.base, top_k=2)
    runs_grouped.cache_clear()
    assert torch.equal(found, wanted)


def test_rows_that_do_not_divide_by_the_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"E\*r rows"):
        mix(torch.randn(2, 4), torch.randn(7, 4), torch.randn(7, 4), torch.rand(2, 3))
    with pytest.raises(ConfigError, match=r"E\*r rows"):
        mix(torch.randn(2, 4), torch.randn(6, 4), torch.randn(9, 4), torch.rand(2, 3))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown backend 'fast'.*rank"):
        mix(torch.randn(2, 4), torch.randn(6, 4), torch.randn(6, 4), torch.rand(2, 3), backend="fast")  # type: ignore[arg-type]


def test_auto_takes_grouped_only_for_many_sparse_ranks() -> None:
    limit = LIMITS["cpu"]
    x = torch.randn(2, 4)
    few, many = torch.randn(limit, 4), torch.randn(2 * limit, 4)
    assert choose(x, few, 8, 2) == "rank"
    assert choose(x, many, 8, 2) == "grouped"
    assert choose(x, many, 8, None) == "rank"
    assert choose(x, many, 8, 5) == "rank"
    assert choose(x.double(), many.double(), 8, 2) == "rank"
    assert choose(x, many, 32, 2) == "grouped"
    with torch.no_grad():
        assert choose(x, many, 32, 2) == "gathered"
        assert choose(x, many, 31, 2) == "grouped"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_few_pairs_read_their_own_experts(shared: bool, autocast: bool) -> None:
    torch.manual_seed(0)
    x, base = torch.randn(2, 3, 20), torch.randn(2, 3, 12)
    A, B = torch.randn(2 if shared else 192, 20), torch.randn(192, 12)
    weights = torch.zeros(2, 3, 96)
    weights.scatter_(-1, torch.rand(2, 3, 96).topk(2).indices, torch.tensor([[[0.7, -0.4]]]).expand(2, 3, 2))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert choose(x, B, 96, 2) == "gathered"
        found = mix(x, A, B, weights, base=base, top_k=2)
    tolerance = 2e-2 if autocast else 1e-5
    wanted = mix(x, A, B, weights, base=base, backend="reference")
    torch.testing.assert_close(found, wanted, atol=tolerance * wanted.abs().max().item(), rtol=tolerance)


def test_a_measured_crossover_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(crossover, "file", lambda: tmp_path / "crossover.json")
    monkeypatch.setattr(crossover, "_kept", {})
    monkeypatch.setattr(crossover, "_asked", set())
    crossover.keep("cpu", "float32", 128)
    crossover.keep("cpu", "bfloat16", 32)
    assert crossover.read("cpu") == {"float32": 128, "bfloat16": 32}
    x, B = torch.randn(2, 4), torch.randn(96, 4)
    assert choose(x, B, 8, 2) == "rank"
    assert choose(x.bfloat16(), B.bfloat16(), 8, 2) == "grouped"
    with torch.autocast("cpu", torch.bfloat16):
        assert choose(x, B, 8, 2) == "grouped"


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"%s": 3}', '{"%s": {"float32": "many", "int7": 3, "bfloat16": -1}}']
)
def test_a_damaged_crossover_is_as_none(text: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(crossover, "file", lambda: tmp_path / "crossover.json")
    if text is not None:
        (tmp_path / "crossover.json").write_text(text.replace("%s", crossover.device_name("cpu")))
    assert crossover.read("cpu") == {}
    monkeypatch.setattr(crossover, "_asked", set())
    monkeypatch.setattr(crossover, "_kept", {})
    assert crossover.limit("cpu", torch.float32) == LIMITS["cpu"]
    crossover.keep("cpu", "float32", 128)  # and is mended
    assert crossover.read("cpu") == {"float32": 128}


def test_auto_answers_as_the_backend_it_chose() -> None:
    p = problem(Case((40,), 32, 48, 16, 8, 2), torch.float32)
    auto = mix(p.x, p.A, p.B, p.weights, base=p.base, top_k=2)
    assert torch.equal(auto, mix(p.x, p.A, p.B, p.weights, base=p.base, backend="grouped"))


@pytest.mark.parametrize("backend", ["rank", "grouped", "reference"])
@pytest.mark.parametrize(
    ("x", "weights", "base"),
    [
        ((3, 4), (3, 4), None),
        ((3, 5), (1, 4), None),
        ((3, 5), (6, 4), None),
        ((3, 5), (4,), None),
        ((3, 5), (3, 4), (1, 6)),
        ((3, 5), (3, 4), (3, 5)),
        ((3, 5), (3, 0), None),
        ((), (4,), None),
    ],
)
def test_shapes_that_would_broadcast_or_not_fit_are_refused(backend, x, weights, base):
    A, B = torch.randn(8, 5), torch.randn(8, 6)
    with pytest.raises(ConfigError, match="must be"):
        mix(
            torch.randn(x), A, B, torch.rand(weights), base=None if base is None else torch.zeros(base), backend=backend
        )


@pytest.mark.parametrize("shared", [False, True])
def test_the_scaling_is_on_what_is_added_and_on_every_gradient(shared: bool) -> None:
    sizes = [(6, 2 if shared else 6), (6, 4), (2, 3, 3), (2, 3, 4)]
    z, B, weights, base = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    twice = weigh_and_expand(z, B, weights, base, scaling=2.0) - base
    torch.testing.assert_close(twice, 2 * (weigh_and_expand(z, B, weights, base) - base))
    assert torch.autograd.gradcheck(lambda *t: weigh_and_expand(*t, scaling=2.0), (z, B, weights, base))
