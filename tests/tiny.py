"""Tiny random stock Transformers models, and a small config for every registered method.

All models are seeded, float32, without dropout, in eval mode, with a vocabulary of 64 and 0 as the padding token.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from moesaic.host import TARGETS, find_host
from moesaic.lora import METHODS, MixtureConfig, MixtureLinear
from moesaic.lora import targets as lora_targets

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCAB = 64
PAD, BOS, EOS = 0, 1, 2
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def llama(*, layers: int = 2, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = LlamaConfig(**TOKENS, num_hidden_layers=layers, max_position_embeddings=64, **{**sizes, **overrides})
    return _seeded(LlamaForCausalLM, config, seed)


def qwen3(*, layers: int = 2, seed: int = 0, **overrides: Any) -> Qwen3ForCausalLM:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = Qwen3Config(
        **TOKENS, num_hidden_layers=layers, head_dim=8, max_position_embeddings=64, **{**sizes, **overrides}
    )
    return _seeded(Qwen3ForCausalLM, config, seed)


def gpt2(*, layers: int = 2, seed: int = 0, **overrides: Any) -> GPT2LMHeadModel:
    off: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**TOKENS, n_embd=16, n_head=2, n_layer=layers, n_positions=64, **{**off, **overrides})
    return _seeded(GPT2LMHeadModel, config, seed)


def bert(*, layers: int = 2, seed: int = 0, **overrides: Any) -> BertForSequenceClassification:
    off: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_labels": 3}
    config = BertConfig(**TOKENS, num_hidden_layers=layers, max_position_embeddings=64, **{**off, **sizes, **overrides})
    return _seeded(BertForSequenceClassification, config, seed)


def t5(*, layers: int = 2, seed: int = 0, **overrides: Any) -> T5ForConditionalGeneration:
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "dropout_rate": 0.0}
    sizes["decoder_start_token_id"] = PAD
    config = T5Config(
        vocab_size=VOCAB,
        pad_token_id=PAD,
        eos_token_id=EOS,
        num_layers=layers,
        **{**sizes, **overrides},
    )
    return _seeded(T5ForConditionalGeneration, config, seed)


def mamba(*, layers: int = 2, seed: int = 0, **overrides: Any) -> MambaForCausalLM:
    sizes: dict[str, Any] = {"hidden_size": 16, "state_size": 4, "time_step_rank": 4}
    config = MambaConfig(**TOKENS, num_hidden_layers=layers, **{**sizes, **overrides})
    return _seeded(MambaForCausalLM, config, seed)


MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": llama,
    "qwen3": qwen3,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "mamba": mamba,
}


def _seeded(cls: type[Any], config: Any, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(config).eval()


COMBINATIONS: dict[str, dict[str, Any]] = {
    "hotmoe router, dynmole gate": {
        "router_of": "hotmoe",
        "gate_of": "dynmole",
        "settings": {"hotmoe": {"expert_dim": 8, "attention_dim": 8}},
    },
    "linear and recurrent logits": {"router_of": ["mola", "rmoe"], "settings": {"rmoe": {"state_dim": 8}}},
    "task and token logits": {"router_of": ["moelora", "dense"], "gate_of": "random", "losses_of": ["mola", "dynmole"]},
    "whole FFNs, unrouted": {"router_of": "uniform", "level": "block", "top_k": None},
}
"""A sample of what `custom` can recombine, that goes through the contract suite beside the methods."""


def config_class(method: str) -> type[MixtureConfig]:
    return METHODS["custom" if method in COMBINATIONS else method]


def small(method: str, *, model: str = "llama", **overrides: Any) -> MixtureConfig:
    """A config of `method` with E=4, r=4 (top-2 where the method has a top_k), no dropout and sizes of 8.

    Knows no method by name: a setting that ends in `_dim` is shrunk, one that ends in `_dropout` is 0. Also takes names
    of `COMBINATIONS`. A method that needs adapters has trained ones of `model`.
    """
    cls = config_class(method)
    overrides = {**COMBINATIONS.get(method, {}), **overrides}
    if cls.kind.needs_adapters:
        number, targets = overrides.get("num_experts", 4), overrides.pop("target_modules", None)
        overrides["adapters"] = adapters(model, number, r=overrides.get("r", 4), targets=targets)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    sizes: dict[str, Any] = {"r": 4, "num_experts": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    if "top_k" in fields:
        sizes["top_k"] = 2
    if "weights" in fields:
        number = len(overrides["adapters"])
        sizes["weights"] = [2 * (i + 1) / (number * (number + 1)) for i in range(number)]
    if "texts" in fields:
        names = overrides["adapters"]
        sizes |= {"encoder": "hashing", "texts": {name: [f"{name} one", f"{name} two"] for name in names}}
    sizes |= dict.fromkeys([name for name in fields if name.endswith("_dropout")], 0.0)
    sizes |= {name: 8 for name, f in fields.items() if name.endswith("_dim") and isinstance(f.default, int)}
    return cls(**{**sizes, **overrides})


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp())


FROM_SCRATCH = sorted(name for name, cls in METHODS.items() if not cls.kind.needs_adapters)
"""Methods whose experts are trained with their router."""


def adapters(model: str, number: int = 4, *, r: int = 4, targets: Any = None) -> dict[str, str]:
    """Folders of LoRA adapters of a kind of model with random factors, by name; written once a process."""
    from tests.zoo import ZOO

    build = ZOO[model]
    fused = ["q_proj", "o_proj"]  # PEFT's LoRA takes fused experts where a name is theirs
    known = {"mamba": ["in_proj", "x_proj"], "deepseek_v3": ["kv_b_proj", "o_proj"], "qwen3_moe": fused}
    if targets in (None, "all-linear"):
        targets = known.get(model) or lora_targets.default(build())
    key = zlib.crc32(repr((model, number, r, sorted(targets))).encode())
    found = {f"skill_{n}": _folder() / f"{model}-{key}-{n}" for n in range(number)}
    for n, folder in enumerate(found.values()):
        if not folder.exists():
            with torch.random.fork_rng():
                torch.manual_seed(n)
                config = LoraConfig(r=r, lora_alpha=8, target_modules=targets, init_lora_weights=False)
                get_peft_model(build(), config).save_pretrained(str(folder))
    return {name: str(folder) for name, folder in found.items()}


def wrap(model: nn.Module, config: MixtureConfig, *, seed: int = 1, random_b: bool = True, **kwargs: Any) -> PeftModel:
    """`get_peft_model`, seeded, with B drawn at random so that experts and routers matter; in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config, **kwargs)
        if random_b:
            randomize_b(wrapped)
        if config.kind.needs_adapters:
            for parameter in router_parameters(wrapped).values():
                nn.init.normal_(parameter)
    return pin_task(wrapped).eval()


def pin_task(model: PeftModel) -> PeftModel:
    """Every sequence is of task 1, for methods that cannot route without; a batch's own ids are preferred to it."""
    config = model.peft_config["default"]
    if isinstance(config, MixtureConfig) and (config.kind.needs_tasks or config.kind.needs_adapters):
        find_host(model).pinned_tasks = torch.tensor([1])
    if isinstance(config, MixtureConfig) and config.kind.needs_adapters:
        find_host(model).pinned_scores = torch.linspace(0.5, 0.1, config.num_experts).unsqueeze(0)
    return model


@torch.no_grad()
def randomize_b(model: nn.Module, *, scale: float = 0.2) -> None:
    """Draw every expert's up projection from N(0, scale^2), from torch's global generator."""
    for layer in mixtures(model).values():
        for B in layer.moe_lora_B.values():
            B.normal_(std=scale)


def mixtures(model: nn.Module) -> dict[str, MixtureLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureLinear)}


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that are trained: what a router only keeps (`Router.keep`) is left out."""
    kept = {id(getattr(m, name)) for m in model.modules() for name in getattr(m, "kept", ())}
    return {n: p for n, p in model.named_parameters() if ".moe_lora_router." in n and id(p) not in kept}


def batch(model: nn.Module, *, rows: int = 3, tokens: int = 7, seed: int = 0, labels: bool = True) -> dict[str, Tensor]:
    """Random inputs without padding, fit for the model's kind, with labels unless told otherwise."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config: Any = model.config
    adapter = getattr(model, "peft_config", {}).get("default")
    if isinstance(adapter, MixtureConfig) and adapter.kind.needs_targets:
        inputs[TARGETS] = torch.randn(rows, adapter.num_experts, generator=generator).softmax(dim=-1)
    if config.is_encoder_decoder:
        targets = torch.randint(3, VOCAB, (rows, tokens - 2), generator=generator)
        return inputs | ({"labels": targets} if labels else {"decoder_input_ids": targets})
    if not labels:
        return inputs
    if config.model_type == "bert":
        return inputs | {"labels": torch.randint(0, config.num_labels, (rows,), generator=generator)}
    return inputs | {"labels": ids.clone()}


def padded(inputs: dict[str, Tensor], *, left: int = 0, right: int = 0) -> dict[str, Tensor]:
    """The same batch with columns of padding on either side: mask 0, label -100. Sequence-level labels stay."""
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    width = inputs["input_ids"].shape[-1]
    return {
        name: nn.functional.pad(value, (left, right), value=fill[name]) if value.shape[-1:] == (width,) else value
        for name, value in inputs.items()
    }
