"""More tiny architectures than `tiny.MODELS`, each for what is odd in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    CLIPVisionConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from tests.tiny import MODELS, TOKENS, _seeded, llama

IMAGE = 60
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def mistral() -> Any:
    return _seeded(MistralForCausalLM, MistralConfig(**TOKENS, **SIZES, num_key_value_heads=1, sliding_window=4), 0)


def deepseek_v3() -> Any:
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    config = DeepseekV3Config(**TOKENS, **SIZES, **latent, **experts, num_key_value_heads=2, n_group=1, topk_group=1)
    return _seeded(DeepseekV3ForCausalLM, config, 0)


def qwen3_moe() -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3MoeConfig(**TOKENS, **SIZES, **experts, num_key_value_heads=1, head_dim=8)
    return _seeded(Qwen3MoeForCausalLM, config, 0)


def zamba2() -> Any:
    mamba = {"mamba_d_state": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "n_mamba_heads": 4, "num_mem_blocks": 1}
    sizes = {**SIZES, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    layers = {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "adapter_rank": 4}
    return _seeded(Zamba2ForCausalLM, Zamba2Config(**TOKENS, **sizes, **mamba, **layers), 0)


def albert(**sizes: int) -> Any:
    own = {"embedding_size": 8, "num_labels": 3, "classifier_dropout_prob": 0.0}
    config = AlbertConfig(**TOKENS, **{**SIZES, **sizes}, **own)
    return _seeded(AlbertForSequenceClassification, config, 0)


def modernbert() -> Any:
    own = {"cls_token_id": 1, "sep_token_id": 2, "num_labels": 3}
    return _seeded(ModernBertForSequenceClassification, ModernBertConfig(**TOKENS, **SIZES, **own), 0)


def llava(**vision: Any) -> Any:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**SIZES, **vision}, image_size=16, patch_size=8, projection_dim=16),
        text_config=llama().config,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return _seeded(LlavaForConditionalGeneration, config, 0)


ZOO: dict[str, Callable[..., PreTrainedModel]] = {
    **MODELS,
    "mistral": mistral,
    "deepseek_v3": deepseek_v3,
    "qwen3_moe": qwen3_moe,
    "zamba2": zamba2,
    "albert": albert,
    "modernbert": modernbert,
    "llava": llava,
}
"""By the name that Transformers calls the kind of model."""
