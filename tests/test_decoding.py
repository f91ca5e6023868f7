"""A step of decoding: few kernels beside plain LoRA's, and the results of the linears computed one by one."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import DynamicCache

import moesaic
from moesaic.bench import measure
from moesaic.lora import METHODS
from moesaic.lora import layer as layers
from moesaic.lora.methods.topiclora import PrototypeRouter
from moesaic.lora.together import Group, Stacked
from moesaic.routing import AsTheyAre, EntropyHybrid, Gate, Joint, RoutingContext, Seen, Softmax, TopK, TopP
from moesaic.routing.entropy import EntropyType, exceeds, generalised_entropy
from tests import tiny

LINEAR = sorted(name for name, cls in METHODS.items() if cls.level == "linear")
KERNELS = {"dynmole": 1.7, "glider": 2.2, "hotmoe": 1.35, "oracle": 1.65, "phatgoose": 1.6, "rmoe": 1.5, "smear": 1.8}
"""At most this often LoRA's; 1.3 where not said. A GRU, a sort with an entropy, a layer norm have their price."""

Step = Callable[[Tensor], Tensor]


@torch.no_grad()
def decoding(model: nn.Module, *, rows: int = 1, left: int = 0) -> Step:
    """What takes tokens (rows,) to the logits (rows, V) behind them, after a prompt of 6 tokens."""
    ids = tokens_of(rows, 6)
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    cache = DynamicCache(config=cast(Any, model).config)
    model(input_ids=ids, attention_mask=mask, past_key_values=cache)

    @torch.no_grad()
    def step(tokens: Tensor) -> Tensor:
        nonlocal mask
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
        return cast(Tensor, model(input_ids=tokens[:, None], attention_mask=mask, past_key_values=cache).logits[:, -1])

    return step


def tokens_of(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def decoded(model: nn.Module, *, rows: int = 3, left: int = 2, steps: int = 3) -> Tensor:
    """Logits (steps, rows, V)."""
    step = decoding(model, rows=rows, left=left)
    return torch.stack([step(tokens) for tokens in tokens_of(steps, rows, seed=1)])


@contextmanager
def apart() -> Iterator[None]:
    """Every linear computed by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "low_rank", lambda *args: None)
        yield


def decoded_apart(model: nn.Module) -> Tensor:
    with apart():
        return decoded(model)


def mixture(method: str, *, dtype: torch.dtype = torch.float32, base: Any = tiny.llama, **overrides: Any) -> PeftModel:
    """With routers that matter."""
    model = tiny.wrap(base().to(dtype), tiny.small(method, **overrides))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for parameter in tiny.router_parameters(model).values():
            parameter.normal_(std=0.5)
    return model


def kernels(model: nn.Module) -> int:
    step, tokens = decoding(model), torch.tensor([5])
    return measure.kernels(lambda: step(tokens))["kernels"]


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often matrices were stacked, by how many linears went together."""
    counted: Counter[int] = Counter()
    stack = Group._stack

    def counting(group: Group, x: Tensor) -> Stacked | None:
        counted[len(group.linears)] += 1
        return stack(group, x)

    monkeypatch.setattr(Group, "_stack", counting)
    return counted


# -- what it costs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_lora() -> dict[torch.dtype, int]:
    config = LoraConfig(r=16, target_modules=tiny.LINEARS)
    dtypes = torch.float32, torch.bfloat16
    return {dtype: kernels(get_peft_model(tiny.llama().to(dtype), config).eval()) for dtype in dtypes}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in LINEAR if name != "custom"])
def test_a_step_takes_few_kernels_beside_lora(name: str, dtype: torch.dtype, of_lora: dict[torch.dtype, int]) -> None:
    assert kernels(mixture(name, dtype=dtype)) <= KERNELS.get(name, 1.3) * of_lora[dtype]


def test_linears_that_read_one_input_are_stacked_once_a_cache(stacked: Counter[int]) -> None:
    model = mixture("mola")
    decoded(model, steps=4)
    assert stacked == {3: 2, 2: 2, 1: 4}  # of each of two layers: q, k and v; gate and up; o; down
    decoded(model, steps=4)
    assert stacked == {3: 4, 2: 4, 1: 8}


def test_only_linears_that_are_alike_go_together(stacked: Counter[int]) -> None:
    model = mixture("mola", rank_pattern={"k_proj": 2})
    torch.testing.assert_close(decoded(model), decoded_apart(model), rtol=1e-5, atol=2e-6)
    assert stacked == {2: 4, 1: 6}  # q and v; k


# -- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LINEAR, *tiny.COMBINATIONS])
def test_decoding_together_equals_decoding_apart(name: str) -> None:
    model = mixture(name)
    torch.testing.assert_close(decoded(model), decoded_apart(model), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("name", [name for name in LINEAR if name != "custom"])
def test_in_bf16_too(name: str) -> None:
    """A bf16 base has its linears' outputs rounded: what differs is a last bit of these."""
    model = mixture(name, dtype=torch.bfloat16)
    torch.testing.assert_close(decoded(model), decoded_apart(model), rtol=2e-2, atol=5e-3)


def test_under_autocast_too() -> None:
    model = mixture("hotmoe")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(decoded(model), decoded_apart(model), rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "mamba", "gpt2", "t5"])
@pytest.mark.parametrize("method", ["mola"])
def test_other_architectures_generate_the_same(method: str, name: str) -> None:
    from tests.zoo import ZOO

    model = tiny.wrap(ZOO[name](), tiny.small(method, model=name))
    how: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "output_logits": True, "num_beams": 2}
    how |= {"return_dict_in_generate": True, "do_sample": False}
    ids = tokens_of(2, 5)
    together = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    with apart():
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    assert torch.equal(together.sequences, alone.sequences)
    torch.testing.assert_close(torch.stack(together.logits), torch.stack(alone.logits), rtol=1e-4, atol=1e-5)


# -- what is kept -----------------------------------------------------------------------------------------------------


def added(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(0.05)


def stepped(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.05).step()


def loaded(model: nn.Module, *, assign: bool = False) -> None:
    state = {name: value + 0.05 for name, value in model.state_dict().items() if value.is_floating_point()}
    model.load_state_dict(state, strict=False, assign=assign)


def assigned(model: nn.Module) -> None:
    loaded(model, assign=True)


def replaced(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.05


CHANGES = [added, stepped, loaded, assigned, replaced]


def agree(model: PeftModel, twin: PeftModel, *, change: Callable[[PeftModel], Any]) -> None:
    """`change` both between two steps, of which the twin computes every linear by itself."""
    step, other, tokens = decoding(model), decoding(twin), torch.tensor([5])
    for _ in range(2):
        step(tokens)
        with apart():
            other(tokens)
    with torch.no_grad():
        change(model)
        change(twin)
    with apart():
        wanted = other(tokens)
    torch.testing.assert_close(step(tokens), wanted, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["mola", "hotmoe", "rmoe", "topiclora", "arrow", next(iter(tiny.COMBINATIONS))])
def test_parameters_that_change_between_two_steps_count_at_once(name: str, change: Callable[[PeftModel], Any]) -> None:
    agree(mixture(name), mixture(name), change=change)


def doubled(model: PeftModel) -> None:
    for layer in tiny.mixtures(model).values():
        layer.scaling["default"] *= 2


def gated(model: PeftModel) -> None:
    for layer in tiny.mixtures(model).values():
        layer.eval_gates["default"] = TopK(3)


def trained_in_part(model: PeftModel) -> None:
    for name, layer in tiny.mixtures(model).items():
        layer.train("k_proj" in name)
        layer.gates["default"] = Softmax()


def hooked(model: PeftModel) -> None:
    for name, layer in tiny.mixtures(model).items():
        if "v_proj" in name:
            router = layer.router("default")
            assert router is not None
            router.register_forward_hook(lambda module, args, logits: -logits)


def disabled(model: PeftModel) -> None:
    for name, layer in tiny.mixtures(model).items():
        layer.enable_adapters("q_proj" not in name)


def joined(model: PeftModel) -> None:
    model.add_adapter("other", tiny.small("mola", num_experts=3))
    model.base_model.set_adapter(["default", "other"])
    tiny.randomize_b(model)


def in_double(model: PeftModel) -> None:
    model.double()


@pytest.mark.parametrize(
    "change", [doubled, gated, trained_in_part, hooked, disabled, in_double], ids=lambda c: c.__name__
)
def test_all_else_that_changes_counts_at_once(change: Callable[[PeftModel], Any]) -> None:
    agree(mixture("mola"), mixture("mola"), change=change)


def disabled_in_part(model: PeftModel) -> None:
    for name, layer in tiny.mixtures(model).items():
        layer.enable_adapters("layers.0.self_attn.k_proj" not in name)


def doubled_before(model: PeftModel) -> None:
    for name, layer in tiny.mixtures(model).items():
        if "k_proj" in name:
            layer.register_forward_pre_hook(lambda module, args: (2 * args[0] + 1,))


def written_before(model: PeftModel) -> None:
    for name, layer in tiny.mixtures(model).items():
        if "k_proj" in name:
            layer.register_forward_pre_hook(lambda module, args: (args[0].add_(1),))


@pytest.mark.parametrize("change", [disabled_in_part, doubled_before, written_before], ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", ["mola", "rmoe", "sequence"])
def test_routers_of_linears_that_do_not_read_the_same_do_not_run(name: str, change: Callable[[PeftModel], Any]) -> None:
    """What a router hands on, or sums up, would be of a tensor that its linear never read."""
    agree(mixture(name), mixture(name), change=change)


def test_what_is_written_between_two_linears_counts_without_versions() -> None:
    model, twin = mixture("mola"), mixture("mola")
    with torch.inference_mode():
        agree(model, twin, change=written_before)


def test_a_place_that_is_used_again_is_not_taken_for_the_same_tensor() -> None:
    def moved(model: PeftModel) -> None:
        for layer in tiny.mixtures(model).values():
            A = layer.moe_lora_A["default"]
            place = A.data_ptr()
            for _ in range(8):
                A.data = A.data * 0.9
                if A.data_ptr() == place:
                    break

    agree(mixture("mola"), mixture("mola"), change=moved)


def other_gates(model: PeftModel) -> None:
    for layer in tiny.mixtures(model).values():
        layer.eval_gates = {"default": TopK(3)}


def routed_otherwise(model: PeftModel) -> None:
    for layer in tiny.mixtures(model).values():
        router: Any = layer.router("default")
        router.forward = lambda h, context=None, own=router.forward: -own(h, context)


@pytest.mark.parametrize("change", [other_gates, routed_otherwise], ids=lambda c: c.__name__)
def test_what_is_put_in_place_of_a_layers_parts_counts_at_once(change: Callable[[PeftModel], Any]) -> None:
    agree(mixture("mola"), mixture("mola"), change=change)


def test_a_routers_settings_count_at_once() -> None:
    def sharper(model: PeftModel) -> None:
        for layer in tiny.mixtures(model).values():
            cast(PrototypeRouter, layer.router("default")).temperature = 1.0

    agree(mixture("topiclora"), mixture("topiclora"), change=sharper)


@pytest.mark.parametrize("name", ["mola", "hotmoe", "rmoe"])
def test_a_linear_that_runs_twice_on_one_input_decodes(name: str) -> None:
    def again(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        return out + layers.MixtureLinear.forward(cast(layers.MixtureLinear, module), args[0])

    model = mixture(name)
    for key, layer in tiny.mixtures(model).items():
        if "q_proj" in key:
            layer.register_forward_hook(again)
    torch.testing.assert_close(decoded(model), decoded_apart(model), rtol=1e-5, atol=3e-6)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_a_computed_factor_is_computed_anew() -> None:
    def mixed() -> PeftModel:
        model = mixture("mola")
        for layer in tiny.mixtures(model).values():
            register_parametrization(layer.moe_lora_B.get_submodule("default"), "weight", Halved())
        return model

    def less(model: PeftModel) -> None:
        for name, parameter in model.named_parameters():
            if "moe_lora_B" in name:
                parameter.mul_(0.9)

    agree(mixed(), mixed(), change=less)


@pytest.mark.parametrize("name", ["mola", "hotmoe", "rmoe"])
def test_copies_of_one_cache_decode_in_threads(name: str) -> None:
    """Each sees that parameters have changed, at the same time."""
    model = mixture(name)
    cache = DynamicCache(config=cast(Any, model).config)
    ids = tokens_of(1, 6)

    @torch.no_grad()
    def step(own: DynamicCache) -> Tensor:
        return cast(Tensor, model(input_ids=ids[:, :1], past_key_values=own).logits)

    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    step(copy.deepcopy(cache))
    every = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(5):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.97)
            with apart():
                wanted = step(copy.deepcopy(cache))
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(lambda own: step(own), [copy.deepcopy(cache) for _ in range(4)]))
            for logits in found:
                torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=3e-6)
    finally:
        sys.setswitchinterval(every)


def test_an_adapter_that_joins_and_leaves_counts_at_once() -> None:
    model, twin = mixture("mola"), mixture("mola")

    def join(one: PeftModel) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            joined(one)

    agree(model, twin, change=join)
    agree(model, twin, change=lambda one: one.delete_adapter("default"))


@pytest.mark.parametrize("name", ["mola", "hotmoe"])
def test_what_is_written_through_data_counts_from_the_next_cache_on(name: str) -> None:
    model = mixture(name)
    decoded(model)
    for parameter in model.parameters():
        parameter.data.add_(0.05)
    torch.testing.assert_close(decoded(model), decoded_apart(model), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("name", ["mola", "hotmoe", "rmoe", "sequence", "uniform"])
def test_who_records_sees_every_linear_and_changes_nothing(name: str) -> None:
    model = mixture(name)
    wanted = decoded(model)
    with moesaic.trace(model, keep_weights=True) as together:
        assert torch.equal(decoded(model), wanted)
    with apart(), moesaic.trace(model, keep_weights=True) as alone:
        decoded(model)
    assert together.modules.keys() == alone.modules.keys()
    for module in alone.modules:
        torch.testing.assert_close(together.weights(module), alone.weights(module), rtol=1e-5, atol=1e-6)


def test_linears_that_read_the_same_no_longer_are_computed_for_what_they_read() -> None:
    """K is seen to read what Q reads, and then reads another tensor of the same shape."""
    model, twin = mixture("mola"), mixture("mola")

    def part(one: PeftModel) -> None:
        for name, layer in tiny.mixtures(one).items():
            if "k_proj" in name:
                layer.register_forward_pre_hook(lambda module, args: (2 * args[0] + 1,))

    agree(model, twin, change=part)


def test_an_input_that_is_written_to_is_read_again() -> None:
    model, twin = mixture("mola"), mixture("mola")

    def write(one: PeftModel) -> None:
        for name, layer in tiny.mixtures(one).items():
            if "k_proj" in name:
                layer.register_forward_pre_hook(lambda module, args: (args[0].add_(1),))

    agree(model, twin, change=write)


def test_without_a_cache_nothing_is_kept(stacked: Counter[int]) -> None:
    model, ids = mixture("mola"), tokens_of(1, 4)
    with torch.no_grad():
        for _ in range(3):
            model(input_ids=ids, use_cache=False)
    assert not stacked


def test_with_gradients_every_linear_is_computed_by_itself(stacked: Counter[int]) -> None:
    model = mixture("mola")
    cache = model(input_ids=tokens_of(1, 4)).past_key_values
    model(input_ids=tokens_of(1, 1), past_key_values=cache).logits.sum().backward()
    assert not stacked
    assert all(p.grad is not None for p in tiny.router_parameters(model).values())


# -- parts ------------------------------------------------------------------------------------------------------------


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)
        self.register_buffer("kept", torch.ones(2))
        self.plain = torch.ones(2)
        self.lent: nn.Module
        object.__setattr__(self, "lent", nn.Linear(2, 2))


def written(held: Held) -> None:
    with torch.no_grad():
        held.inner.weight.add_(0)


def in_a_buffer(held: Held) -> None:
    cast(Tensor, held.kept).mul_(1)


def beside_the_parameters(held: Held) -> None:
    held.plain.mul_(1)


def in_what_is_lent(held: Held) -> None:
    with torch.no_grad():
        held.lent.weight.add_(0)  # type: ignore[operator]


def moved(held: Held) -> None:
    held.inner.weight.data = held.inner.weight.data.clone()


def another_parameter(held: Held) -> None:
    held.inner.weight = nn.Parameter(held.inner.weight.detach().clone())


def another_module(held: Held) -> None:
    held.inner = nn.Linear(2, 3)


def no_parameter(held: Held) -> None:
    del held.inner.bias


def in_training(held: Held) -> None:
    held.train()


def heard(held: Held) -> None:
    held.register_forward_hook(lambda *args: None)


SEEN = [
    written,
    in_a_buffer,
    beside_the_parameters,
    in_what_is_lent,
    moved,
    another_parameter,
    another_module,
    no_parameter,
    in_training,
    heard,
]


@pytest.mark.parametrize("change", SEEN, ids=lambda change: change.__name__)
def test_what_was_seen_holds_until_a_tensor_a_mode_or_a_hook_changes(change: Callable[[Held], None]) -> None:
    held, seen = Held().eval(), Seen()
    seen.module({"held": held}, "held")
    assert seen.holds()
    change(held)
    assert not seen.holds()


def test_what_nobody_can_tell_never_holds() -> None:
    with torch.inference_mode():
        held = Held()
    seen = Seen()
    seen.inside(held)
    assert not seen.holds()


def test_what_need_not_be_unwritten_counts_by_identity() -> None:
    held, seen = Held(), Seen()
    seen.inside(held, written=False)
    written(held)
    assert seen.holds()
    another_parameter(held)
    assert not seen.holds()


def test_a_router_that_goes_its_own_way_does_not_inherit_how_others_go_together() -> None:
    class Turned(PrototypeRouter):
        def from_projection(self, read: Tensor, context: RoutingContext | None = None) -> Tensor:
            return -super().from_projection(read, context)

    torch.manual_seed(0)
    prototypes, read = torch.eye(4), torch.randn(3, 2, 4)
    turned, plain = ([cls(5, prototypes) for _ in range(2)] for cls in (Turned, PrototypeRouter))
    joint = [Joint(lambda: [RoutingContext()] * 2) for _ in range(2)]
    wanted = PrototypeRouter.from_projections(plain, read, joint[0])
    torch.testing.assert_close(Turned.from_projections(turned, read, joint[1]), -wanted)


GATES: list[Gate] = [
    Softmax(),
    TopK(2),
    TopK(4, normalize="none"),
    TopK(3, normalize="softmax", temperature=0.1),
    TopP(0.7),
    AsTheyAre(),
    EntropyHybrid(),
    EntropyHybrid(include_crossing=True, top_p=0.5, q=0.7),
    EntropyHybrid(kind="renyi", threshold=0.6, eps=0.0),
    EntropyHybrid(threshold=1.0, keep_top_k=1),
]


@pytest.mark.parametrize("gate", GATES, ids=repr)
def test_weights_alone_are_those_of_the_gate(gate: Gate) -> None:
    logits = 3 * torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    torch.testing.assert_close(gate.weights(logits), gate(logits).weights, rtol=1e-6, atol=1e-7)
    assert torch.equal(logits, before)


@given(
    st.sampled_from(["tsallis", "renyi"]), st.integers(1, 6), st.sampled_from([0.3, 0.99, 1.0, 1.1, 2.0]),
    st.floats(0, 1), st.sampled_from([0.0, 1e-5]), st.integers(0, 99),
)  # fmt: skip
def test_exceeding_is_told_as_by_the_entropy(
    kind: EntropyType, num_experts: int, q: float, threshold: float, eps: float, seed: int
) -> None:
    p = torch.randn(50, num_experts, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)
    entropy = generalised_entropy(kind, p.double(), q, eps=eps)
    clear = (entropy - threshold).abs() > 1e-5
    assert torch.equal(exceeds(kind, p, q, threshold, eps=eps)[clear], (entropy > threshold)[clear])
