"""Which modules can be adapted: wrong, fused and never-called targets are told, not skipped."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moesaic.errors import ConfigError
from tests.tiny import TOKENS, batch, gpt2, llama, mamba, mixtures, small, t5, wrap

SIZES: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)).eval()


def qwen3_moe() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
    return Qwen3MoeForCausalLM(config).eval()


def refused(model: nn.Module, **settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        get_peft_model(model, small("hotmoe", **settings))  # type: ignore[arg-type]
    assert not mixtures(model), "nothing is wrapped when something is wrong"
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("targets", [["nothing"], ["q_proj", "nothing"], r".*\.nothing"])
def test_target_that_matches_nothing_is_refused(targets: Any) -> None:
    message = refused(llama(), target_modules=targets)
    assert "nothing" in message
    assert "q_proj" in message


@pytest.mark.parametrize("targets", [["embed_tokens"], ["input_layernorm"], ["q_proj", "mlp"]])
def test_target_that_is_no_linear_is_refused(targets: list[str]) -> None:
    assert "not a linear" in refused(llama(), target_modules=targets)


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj"], r".*q_proj"])
@pytest.mark.parametrize("plain", [["nothing"], ["v_proj", "nothing"], r".*nothing"])
def test_plain_lora_target_that_matches_nothing_is_refused(targets: Any, plain: Any) -> None:
    assert "nothing" in refused(llama(), target_modules=targets, lora_target_modules=plain)


# -- linears that are read but never called ------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["dt_proj"], ["in_proj", "dt_proj"], r".*mixer\.dt_proj"])
def test_mamba_dt_proj_is_refused(targets: Any) -> None:
    message = refused(mamba(), target_modules=targets)
    assert "dt_proj" in message
    assert "never called" in message


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_mamba_without_names_leaves_dt_proj_out(targets: Any) -> None:
    model = wrap(mamba(), small("hotmoe", target_modules=targets))
    assert {name.rpartition(".")[2] for name in mixtures(model)} == {"in_proj", "x_proj", "out_proj"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch(model, labels=False))


class Blocks(nn.Module):
    """Two blocks around torch's own attention, which reads out_proj.weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)}) for _ in range(2))
        self.ends = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block, end in zip(self.blocks, self.ends, strict=True):
            x = end(block["attention"](x, x, x)[0])  # type: ignore[index, operator]
        return x


def test_out_proj_of_torch_attention_is_refused() -> None:
    message = refused(Blocks(), target_modules=["out_proj"])
    assert "out_proj" in message
    assert "MultiheadAttention" in message


class ReadsOne(LlamaForCausalLM):
    """A Llama with a linear whose weight a "kernel" reads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers[1].side = nn.Linear(16, 16)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + self.model.layers[1].side.weight.sum()
        return output


@pytest.mark.parametrize("training", [False, True])
def test_module_that_is_never_called_is_named_once(training: bool) -> None:
    model = wrap(ReadsOne(llama().config).eval(), small("hotmoe", target_modules=["q_proj", "side"])).train(training)
    inputs = batch(model)
    with pytest.warns(UserWarning, match=r"never called in \w+: model\.layers\.1\.side") as seen:
        model(**inputs)
    assert "training" in str(seen[0].message) if training else "evaluation" in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)


@pytest.mark.parametrize("build", [llama, gpt2, t5])
def test_no_warning_while_every_module_is_called(build: Any) -> None:
    """Nor for a stack called on its own, nor for T5's cross-attention, which rests while decoding."""
    model = wrap(build(), small("hotmoe"))
    inputs = batch(model, labels=False)
    prompt = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never called.*")
        model.generate(**prompt, max_new_tokens=3, do_sample=False)
        model(**inputs)
        model.train()(**batch(model))
        model.generate(**prompt, max_new_tokens=3, do_sample=False)


# -- fused experts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (mixtral, ["w1", "w2"]),
        (mixtral, ["gate_up_proj"]),
        (qwen3_moe, ["gate_proj", "up_proj"]),
        (qwen3_moe, ["down_proj"]),
    ],
)
def test_fused_experts_by_name_are_refused(build: Any, names: list[str]) -> None:
    for targets in (names, ["q_proj", *names]):
        assert "fused 3-D" in refused(build(), target_modules=targets)


@pytest.mark.parametrize("targets", ["all-linear", None])
@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_fused_experts_left_out_are_told(build: Any, targets: Any) -> None:
    with pytest.warns(UserWarning, match="fused 3-D parameters"):
        model = wrap(build(), small("hotmoe", target_modules=targets))
    assert {name.rpartition(".")[2] for name in mixtures(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    out = model.train()(**batch(model))
    out.loss.backward()
    assert out.router_aux_loss.item() > 0


def test_models_own_router_loss_is_left_alone() -> None:
    """Mixtral has an aux_loss of its own in its output: ours stands beside it."""
    base: PreTrainedModel = mixtral()
    inputs = batch(base)
    expected = base.train()(**inputs, output_router_logits=True).aux_loss
    with pytest.warns(UserWarning, match="fused 3-D"):
        model = wrap(base, small("hotmoe"), random_b=False).train()
    output = model(**inputs, output_router_logits=True)
    assert torch.equal(output.aux_loss, expected)
    assert not torch.equal(output.router_aux_loss, expected)


def test_headless_model_can_be_adapted() -> None:
    """A bare stack is its own base model and its own stack."""
    model = wrap(LlamaModel(llama().config).eval(), small("hotmoe"))
    ids = torch.randint(3, 60, (2, 5))
    assert model(input_ids=ids).last_hidden_state.shape == (2, 5, 16)
