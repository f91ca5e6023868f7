"""Which modules are wrapped: names of a router's parts mean nothing to PEFT, and what cannot be adapted is said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

import moesaic
from moesaic.errors import ConfigError
from moesaic.lora import METHODS, targets
from tests import tiny, zoo

ALL = sorted(METHODS.keys() - {"custom"})


class Net(nn.Module):
    """A linear to adapt, and heads with any name."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.embedding, self.fc, self.names = nn.Embedding(20, 8), nn.Linear(8, 8), names
        for name in names:
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(self.embedding(x)).relu()
        for name in self.names:
            h = getattr(self, name)(h)
        return h


def of_nets(method: str, **settings: Any) -> Any:
    """A config over `Net.fc`, without what a method would have to know of the data or of adapters."""
    sizes = {"num_experts": 4, "r": 2} if method not in ("lora", "dora", "rslora") else {"r": 2}
    return METHODS[method](target_modules=["fc"], **sizes, **settings)


TRAINED = sorted(
    m for m in ALL if not METHODS[m].kind.needs_adapters and not METHODS[m].kind.needs_tasks and m != "mixlora"
)


def parts_of_routers() -> list[str]:
    """The last names of all that routers are made of."""
    found: set[str] = set()
    for method in ALL:
        model = tiny.wrap(tiny.llama(), tiny.small(method))
        for name, module in model.named_modules():
            if ".moe_lora_router.default." in name and list(module.parameters(recurse=False)):
                found.add(name.rpartition(".")[2])
    return sorted(found)


@pytest.mark.parametrize("method", [
    name if name in ("hotmoe", "mixlora", "moelora", "rmoe") else pytest.param(name, marks=pytest.mark.slow)
    for name in TRAINED
])  # fmt: skip
def test_modules_to_save_are_the_models_own(method: str, tmp_path: Path) -> None:
    """Whatever they are called: like a part of some router, here all of them."""
    names = [name for name in parts_of_routers() if name.isidentifier() and name != "embedding"]
    torch.manual_seed(0)
    base = Net(*names)
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    config = of_nets(method, modules_to_save=names, trainable_token_indices={"embedding": [1, 2]})
    model = get_peft_model(base, config)
    saved = {n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    assert saved == {f"base_model.model.{name}" for name in names}
    assert [n for n, m in model.named_modules() if isinstance(m, TrainableTokensWrapper)] == [
        "base_model.model.embedding"
    ]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(".moe_lora_A." in name for name in trained)
    x = torch.randint(0, 20, (4, 3))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    wanted = model.eval()(x)
    model.save_pretrained(str(tmp_path))
    fresh = Net(*names)
    fresh.load_state_dict(weights)
    torch.testing.assert_close(PeftModel.from_pretrained(fresh, str(tmp_path)).eval()(x), wanted)


@pytest.mark.parametrize("method", ALL)
def test_a_second_adapter_does_not_see_the_firsts_parts(method: str, tmp_path: Path) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(method))
    model.save_pretrained(str(tmp_path))
    model.add_adapter("second", tiny.small(method))
    model.load_adapter(str(tmp_path), "again")
    layers = tiny.mixtures(model)
    assert all(set(layer.moe_lora_A) == {"default", "second", "again"} for layer in layers.values())
    assert len(layers) == len(tiny.mixtures(tiny.wrap(tiny.llama(), tiny.small(method))))


@pytest.mark.parametrize("method", TRAINED)
def test_a_pattern_that_ends_openly_twice(method: str) -> None:
    config = of_nets(method)
    config.target_modules = "fc.*"
    model = get_peft_model(Net(), config)
    model.add_adapter("second", config)
    assert len(tiny.mixtures(model)) == 1


def test_default_targets_are_linears_also_where_names_are_shared() -> None:
    base = zoo.zamba2()
    linears = {n for n, m in base.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{n}"}
    model = get_peft_model(base, moesaic.MoLAConfig(r=2, num_experts=4, task_type="CAUSAL_LM"))
    found = {name.removeprefix("base_model.model.") for name in tiny.mixtures(model)}
    assert found == linears
    assert any(name.endswith(".0") for name in found), "a name that other modules share"


@pytest.mark.parametrize(
    "wanted",
    [r".*\.(q_proj|gate_proj|up_proj)", r".*\.(q_proj|down_proj)", r".*(q_proj|experts.*)", ["q_proj", "gate"], None],
)
def test_targets_that_mean_fused_experts_are_told(wanted: Any) -> None:
    config = moesaic.MoLAConfig(num_experts=4, r=2, target_modules=wanted)
    if isinstance(wanted, list) or "experts" in (wanted or ""):
        with pytest.raises(ConfigError, match="not a linear layer"):
            get_peft_model(zoo.qwen3_moe(), config)
        return
    with pytest.warns(UserWarning, match="only its linear layers are adapted"):
        get_peft_model(zoo.qwen3_moe(), config)


def test_targets_beside_fused_experts_are_not_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(zoo.qwen3_moe(), moesaic.MoLAConfig(num_experts=4, r=2, target_modules=r".*\.(q_proj|v_proj)"))
    assert targets._means(["down_proj"], "model.layers.0.mlp.experts.down_proj")
    assert targets._means(["up_proj"], "model.layers.0.mlp.experts.gate_up_proj")
    assert not targets._means(["o_proj"], "model.layers.0.mlp.experts.down_proj")


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "first", "last"),
    [(zoo.albert, "ffn", "ffn_output"), (zoo.modernbert, "Wi", "Wo")],
)
def test_one_expert_of_more_kinds_of_ffn_is_a_merged_lora(build: Any, first: str, last: str) -> None:
    torch.manual_seed(0)
    base = build().eval()
    model = get_peft_model(
        base, moesaic.MixLoRAConfig(num_experts=1, top_k=1, r=2, lora_alpha=4, target_modules=[first, last])
    )
    tiny.randomize_b(model.eval())
    ids = torch.randint(3, tiny.VOCAB, (2, 7))
    got = model(input_ids=ids).logits
    deltas = {
        name: 2 * layer.moe_lora_B["default"].T @ layer.moe_lora_A["default"]
        for name, layer in tiny.mixtures(model).items()
    }
    assert deltas
    assert not torch.allclose(got, model.unload()(input_ids=ids).logits, atol=1e-4)
    for name, delta in deltas.items():
        base.get_submodule(name.removeprefix("base_model.model.")).weight += delta
    torch.testing.assert_close(base(input_ids=ids).logits, got, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("stack", [False, True])
def test_a_fused_encoder_layer_runs_its_experts_in_evaluation(stack: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    base = (nn.TransformerEncoder(layer, 2) if stack else nn.Sequential(layer)).eval()
    x = torch.randn(2, 5, 16)
    wanted = base(x)
    model = get_peft_model(base, moesaic.UniformConfig(target_modules=["linear1", "linear2"], num_experts=2, r=4))
    for m in tiny.mixtures(model).values():
        m.moe_lora_B["default"].normal_()
    trained = model.train()(x)
    torch.testing.assert_close(model.eval()(x), trained)
    assert not torch.allclose(trained, wanted, atol=1e-3)
    torch.testing.assert_close(model.unload()(x), wanted)
    assert all(m.activation_relu_or_gelu for m in base.modules() if isinstance(m, nn.TransformerEncoderLayer))


def test_a_model_none_of_whose_experts_run_is_told() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.fc.weight

    model = get_peft_model(Reads(), moesaic.UniformConfig(target_modules=["fc"], num_experts=2, r=4))
    with pytest.warns(UserWarning, match="never called in training"):
        model(torch.randn(2, 8))
