"""Answers behind a shared cache have the log-likelihoods that they have behind a prompt of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PretrainedConfig,
    RobertaConfig,
)

from moesaic.data.examples import Example
from moesaic.errors import DataError, TrainingError
from moesaic.evaluation import answers, likelihood
from moesaic.lora import METHODS
from moesaic.models.embedded import LoadedModel
from moesaic.runs.recipe import load_recipe
from moesaic.training.prepared import Prepared
from tests.tiny_folders import tokenizer

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SHAPE, intermediate_size=48, initializer_range=0.3)
MODELS: dict[str, tuple[PretrainedConfig, bool]] = {
    "llama": (LLAMA, True),
    "gpt2": (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=24, initializer_range=0.3), True),
    "opt": (OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=24, init_std=0.3), True),
    "gemma2": (Gemma2Config(**SHAPE, intermediate_size=48, num_key_value_heads=2, sliding_window=4), False),
    "bloom": (BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3), False),
    "gpt_neo": (
        GPTNeoConfig(
            **{k: v for k, v in SHAPE.items() if k != "num_hidden_layers"}, num_layers=2, window_size=3,
            attention_types=[[["global", "local"], 1]], initializer_range=0.3,
        ),
        False,
    ),
    "roberta": (RobertaConfig(**SHAPE, intermediate_size=48, is_decoder=True, initializer_range=0.3), False),
    "openai-gpt": (OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3), False),
    "mamba": (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4), False),
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
ANSWERS = [[[20, 21, 1], [22, 1]], [[23, 24, 25, 1], [26, 1], [27, 28, 1]], [[29, 1]]]
ROWS = [Example("t", f"row {i}") for i in range(3)]


def prepared(config: PretrainedConfig, method: str = "lora") -> Prepared:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    loaded = LoadedModel(model, tokenizer(encoder=False), "causal")
    if method == "lora":
        targets = ["in_proj"] if config.model_type == "mamba" else "all-linear"
        adapter: Any = LoraConfig(r=2, init_lora_weights=False, target_modules=targets)
    else:
        adapter = METHODS[method](r=2, num_experts=3)
    wrapped = get_peft_model(model, adapter).eval()
    for name, weight in wrapped.named_parameters():
        if "moe_lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    return Prepared(wrapped, loaded, ("t",), None, load_recipe(method, []))


def both(made: Prepared) -> tuple[torch.Tensor, torch.Tensor | None]:
    owners = torch.tensor([0, 0, 1, 1, 1, 2])
    flat = [answer for found in ANSWERS for answer in found]
    with torch.no_grad():
        alone = likelihood._each_alone(made, ROWS, PROMPTS, flat, owners)
        return alone, likelihood._behind_caches(made, ROWS, PROMPTS, flat, owners)


@pytest.mark.parametrize("name", MODELS)
def test_answers_share_a_prompt_where_the_model_can(name: str) -> None:
    config, shares = MODELS[name]
    alone, shared = both(prepared(config))
    assert (shared is not None) == shares
    if shared is not None:
        torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)
    assert alone.std() > 0.1


@pytest.mark.parametrize("method", ["mola", "hotmoe", "rmoe", "dynmole", "mixlora", "sequence", "uniform"])
def test_mixtures_route_alike_behind_a_shared_prompt(method: str) -> None:
    made = prepared(LLAMA, method)
    alone, shared = both(made)
    assert shared is not None
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)
    with made.model.disable_adapter():
        assert not torch.allclose(both(made)[0], alone, atol=1e-2)


def test_rows_that_are_cut_are_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepared(LLAMA)
    whole = likelihood.likelihoods(made, ROWS, PROMPTS, ANSWERS)
    assert [len(found) for found in whole] == [2, 3, 1]
    monkeypatch.setattr(likelihood, "_behind_caches", lambda *a: pytest.fail("shared"))
    made.recipe.max_length = 9
    cut = likelihood.likelihoods(made, ROWS, PROMPTS, ANSWERS)
    assert cut[1] == pytest.approx(whole[1], abs=1e-4)
    assert cut[0][0] != pytest.approx(whole[0][0], abs=1e-4)
    assert cut[0][1] == pytest.approx(whole[0][1], abs=1e-4)


def test_choices_of_the_same_tokens_are_told_and_so_is_what_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepared(LLAMA)
    row = Example("t", "q", choices=("a", "b", " a"), answer=1, where="rows.jsonl:3")
    with pytest.raises(DataError, match=r"rows.jsonl:3: the choices 'a' and ' a' are the same tokens"):
        list(answers._likelihood_choices(made, [row], 0))
    monkeypatch.setattr(answers, "likelihoods", lambda *a: [[0.0, float("nan")]])
    with pytest.raises(TrainingError, match="not finite"):
        list(answers._likelihood_choices(made, [Example("t", "q", choices=("a", "b"), answer=1)], 0))


def test_a_task_whose_rows_are_cut_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    likelihood._say_cut.cache_clear()
    made = prepared(LLAMA)
    made.recipe.max_length = 9
    for _ in range(2):
        likelihood.likelihoods(made, ROWS, PROMPTS, ANSWERS)
    assert caplog.messages == [
        "task 't': some prompts with their choices are longer than max_length=9 tokens, and are cut at their start"
    ]
