"""Converted models as Transformers' own, for whoever has no moesaic.

SMoE-Dropout's softmax over the kept logits is Mixtral's router, and its experts are Mixtral's: a Llama or Mistral so
converted, with k fixed, is a Mixtral. No stock model has weights of 1, a router before the model or states over depth.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaForCausalLM, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from moesaic.errors import ConfigError
from moesaic.ffn.layer import ExpertLayer
from moesaic.ffn.places import expert_layers


def as_mixtral(model: PreTrainedModel) -> MixtralForCausalLM:
    """The same model as a `MixtralForCausalLM`, at the k that it has now; the two share their weights.

    Logits are equal in float32. Mixtral's routers read in the weights' precision, where ours read in float32 always:
    in bfloat16 some tokens take other experts.

    Raises:
        ConfigError: for methods and bases that Mixtral's layout does not hold, with the reason.
    """
    settings = getattr(model.config, "moesaic", {})
    config: Any = model.config
    reasons = {
        f"method {settings.get('method')} is none that Mixtral has": settings.get("method") != "smoe-dropout",
        "combine=sum gives every expert the weight 1": settings.get("combine") == "sum",
        f"{config.model_type.removeprefix('moesaic_')} is no Llama or Mistral": config.model_type
        not in ("moesaic_llama", "moesaic_mistral"),
        f"{type(model).__name__} is no causal language model": not isinstance(
            model, (LlamaForCausalLM, MistralForCausalLM)
        ),
        "its attention has biases": bool(getattr(config, "attention_bias", False)),
        "its layers have biases": any(layer.bias is not None for layer in expert_layers(model).values()),
        "its layers differ in k": len({layer.top_k for layer in expert_layers(model).values()}) > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"this model has no stock layout: {reason}")
    layers: list[ExpertLayer] = [*expert_layers(model).values()]
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
            "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")  # fmt: skip
    made = MixtralConfig(
        **{name: getattr(config, name) for name in same if hasattr(config, name)},
        intermediate_size=layers[0].experts.width,
        num_local_experts=layers[0].experts.num_experts,
        num_experts_per_tok=layers[0].top_k,
        sliding_window=getattr(config, "sliding_window", None),
        router_aux_loss_coef=0.0,
    )
    with torch.device("meta"):
        stock = MixtralForCausalLM(made)
    held = {name.replace(".gate.linear.weight", ".gate.weight"): values for name, values in model.state_dict().items()}
    stock.load_state_dict(held, strict=True, assign=True)
    stock.model.rotary_emb = type(stock.model.rotary_emb)(made)
    stock.tie_weights()
    stock.generation_config = model.generation_config
    return stock.train(model.training)
