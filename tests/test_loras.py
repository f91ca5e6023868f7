"""A config that was LoRA's yesterday: what it asks of a mixture is done, or refused by its name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import moesaic
from moesaic.errors import ConfigError
from moesaic.lora import METHODS
from tests import tiny

ALL = sorted(METHODS.keys() - {"custom"})
OF_LORA: dict[str, Any] = {
    f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
    for f in dataclasses.fields(LoraConfig)
    if f.init and (f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING)
}


@pytest.mark.parametrize("method", [name for name in ALL if not METHODS[name].kind.needs_adapters])
def test_every_setting_of_lora_at_its_default_is_taken(method: str) -> None:
    own = {f.name for f in dataclasses.fields(METHODS[method])}
    strange = {key: value for key, value in OF_LORA.items() if key not in own}
    assert len(strange) > 15
    assert METHODS[method](**strange).to_dict() == METHODS[method]().to_dict()
    config = METHODS[method](**{key: value for key, value in OF_LORA.items() if key != "peft_type"})
    assert (config.r, config.lora_dropout) == (8, 0.0), "what both have is as it was given"


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("use_dora", True, "method dora"),
        ("target_parameters", ["experts.gate_up_proj"], "fused 3-D parameters"),
        ("init_lora_weights", "pissa", "A drawn at random"),
        ("init_lora_weights", False, "A drawn at random"),
        ("loftq_config", {"loftq_bits": 4}, "quantise the base"),
        ("layer_replication", [(0, 2), (1, 3)], "before it is wrapped"),
        ("lora_bias", True, "Leave it out"),
        ("use_qalora", True, "Leave it out"),
        ("alora_invocation_tokens", [5], "Leave it out"),
        ("megatron_core", "mine", "Leave it out"),
    ],
)
def test_what_a_mixture_has_not_is_refused_by_name(key: str, value: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}=.*a setting of LoRA that no mixture has.*{why}"):
        moesaic.MoLAConfig(**{key: value})


def test_a_setting_that_is_nobodys_is_still_unknown() -> None:
    with pytest.raises(ConfigError, match="did you mean 'lora_alpha'"):
        moesaic.MoLAConfig(lora_alhpa=3)
    assert moesaic.MoLAConfig(fan_in_fan_out=True).to_dict() == moesaic.MoLAConfig().to_dict()


@torch.no_grad()
def test_alpha_may_differ_by_module() -> None:
    settings = {"r": 2, "num_experts": 2, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 8}
    model = get_peft_model(tiny.llama(), moesaic.UniformConfig(**settings, alpha_pattern={"1.self_attn.q_proj": 4.0}))
    found = {name.partition("layers.")[2]: m.scaling["default"] for name, m in tiny.mixtures(model).items()}
    assert found == {
        "0.self_attn.q_proj": 4.0,
        "0.self_attn.v_proj": 4.0,
        "1.self_attn.q_proj": 2.0,
        "1.self_attn.v_proj": 4.0,
    }
    for name in (".*q_proj", r"layers\.1\..*", "nonsense"):
        with pytest.raises(ConfigError, match=r"alpha_pattern: .* is neither the name nor the end of the name"):
            get_peft_model(tiny.llama(), moesaic.UniformConfig(**settings, alpha_pattern={name: 1.0}))
    for key in ("alpha_pattern", "rank_pattern"):
        with pytest.raises(ConfigError, match=f"adapters and {key} disagree"):
            moesaic.UniformConfig(adapters=tiny.adapters("llama"), **{key: {"q_proj": 2}})
    for bad in ({"q_proj": 0.0}, {"q_proj": "a"}, {3: 1.0}, [1.0]):
        with pytest.raises(ConfigError, match="alpha_pattern"):
            moesaic.UniformConfig(**settings, alpha_pattern=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["mola", "hotmoe", "sequence"])
def test_tied_embeddings_stay_tied(method: str, tmp_path: Path) -> None:
    """With PEFT's own LoRA as the control: what it does to a saved embedding and its head, a mixture does."""
    models = {}
    for name in ("lora", method):
        base = tiny.llama(tie_word_embeddings=True)
        own = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "target_modules": ["q_proj"]}
        config = LoraConfig(r=2, **own) if name == "lora" else tiny.small(method, **own)
        models[name] = get_peft_model(base, config)
    for model in models.values():
        inner = model.base_model.model
        table, head = inner.model.embed_tokens.modules_to_save["default"], inner.lm_head
        assert head.modules_to_save["default"].weight is table.weight
    model = models[method]
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.modules_to_save["default"].weight.normal_()
    batch = tiny.batch(model, labels=False)
    wanted = model.eval()(**batch).logits
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny.llama(tie_word_embeddings=True), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(**batch).logits, wanted)
    inner = loaded.base_model.model
    assert inner.lm_head.modules_to_save["default"].weight is inner.model.embed_tokens.modules_to_save["default"].weight


def test_a_head_with_experts_cannot_be_tied() -> None:
    base = tiny.llama(tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="leave the head out of target_modules"):
        get_peft_model(base, tiny.small("mola", target_modules=["q_proj", "lm_head"], ensure_weight_tying=True))
