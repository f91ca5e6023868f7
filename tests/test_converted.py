"""Converted models among other models: k, configs, caches, heads, and parts that do not fit."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertModel,
    FalconH1Config,
    FalconH1ForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralModel,
    PhimoeConfig,
    PhimoeForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from moesaic import ffn
from moesaic.errors import ConfigError
from moesaic.ffn import CMoE, KSchedule, ReadMe, RMoE, Schedule, SMoEDropout, set_top_k, top_k
from moesaic.ffn.method import Method
from moesaic.ffn.places import routed_layers
from moesaic.ffn.schedules import apply
from tests.test_ffn import IDS, D, logits, made
from tests.test_read_me import converted, masks_of, pre_gate

TEXT = {name: torch.randint(3, 50, (4, 16), generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}


SIZES = {"vocab_size": 50, "hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def mixtral(**settings: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 50, "hidden_size": D, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**{**sizes, **settings})).eval()


def ks(model: PreTrainedModel) -> list[int]:
    return [layer.top_k for layer in ffn.expert_layers(model).values()]


# -- k -------------------------------------------------------------------------------------------------------------


def test_k_is_saved_with_the_model(tmp_path: Path) -> None:
    model = ffn.convert(made("llama"), SMoEDropout(num_experts=8))
    with top_k(model, 3):
        model.save_pretrained(tmp_path / "inside")
    assert ks(ffn.load(tmp_path / "inside")) == [8, 8], "top_k is for a while"
    set_top_k(model, 3)
    model.save_pretrained(tmp_path / "set")
    assert ks(ffn.load(tmp_path / "set")) == [3, 3]
    stock = mixtral()
    set_top_k(stock, 1)
    stock.save_pretrained(tmp_path / "stock")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "stock").model.layers[0].mlp.gate.top_k == 1


def test_what_is_set_for_a_while_is_undone_however_it_was_set() -> None:
    for model in (ffn.convert(made("llama"), SMoEDropout(num_experts=8)), mixtral()):
        before = [layer.top_k for layer in routed_layers(model)], copy.deepcopy(model.config.to_dict())
        with top_k(model, 3):
            set_top_k(model, 4)
        assert ([layer.top_k for layer in routed_layers(model)], model.config.to_dict()) == before


def test_k_is_saved_where_a_model_of_several_parts_has_it(tmp_path: Path) -> None:
    text = {"vocab_size": 50, "hidden_size": D, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 16}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4}
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": D}
    config = Qwen3VLMoeConfig(text_config=text, vision_config={**eyes, "deepstack_visual_indexes": []})
    model = Qwen3VLMoeForConditionalGeneration(config)
    set_top_k(model, 3)
    model.save_pretrained(tmp_path)
    again = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path)
    assert [layer.top_k for layer in routed_layers(again)] == [3, 3]
    other = mixtral()
    other.config = PretrainedConfig()
    with pytest.raises(ConfigError, match="does not say by num_experts_per_tok"):
        set_top_k(other, 2)


def test_k_is_refused_where_a_router_takes_what_it_always_takes() -> None:
    sizes = {"vocab_size": 50, "hidden_size": D, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_local_experts": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = PhimoeForCausalLM(PhimoeConfig(**sizes))
    with pytest.raises(ConfigError, match="PhimoeTopKRouter always takes 2 experts"):
        set_top_k(model, 1)
    assert model.model.layers[0].mlp.router.top_k == 2


@pytest.mark.parametrize(("kind", "last"), [("linear", 5), ("linear-down", 2), ("elastic", 5)])
def test_a_training_ends_with_the_schedules_last_k(tmp_path: Path, kind: Any, last: int) -> None:
    model = ffn.convert(made("llama"), SMoEDropout(num_experts=8))
    args = TrainingArguments(str(tmp_path), max_steps=3, use_cpu=True, report_to=[], save_strategy="no")
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[KSchedule(Schedule(kind, 2, 5))])
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert ks(model) == ks(ffn.load(tmp_path / "out")) == [last, last]


def test_a_checkpoint_has_the_k_of_its_last_step(tmp_path: Path) -> None:
    for kind, wanted in (("linear", [3, 5, 7]), ("elastic", [7, 7, 7])):
        model = ffn.convert(made("llama"), SMoEDropout(num_experts=8))
        args = TrainingArguments(str(tmp_path / kind), max_steps=6, save_steps=2, use_cpu=True, report_to=[])
        rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
        schedule = Schedule(kind, 2, 7)
        Trainer(model, args, train_dataset=rows, callbacks=[KSchedule(schedule)]).train()
        last = [schedule.at(step - 1, 6) if kind == "linear" else 7 for step in (2, 4, 6)]
        assert last == wanted if kind == "elastic" else last[0] < last[1] < last[2]
        assert [ks(ffn.load(tmp_path / kind / f"checkpoint-{step}"))[0] for step in (2, 4, 6)] == last


def test_a_mixtures_balance_loss_goes_by_the_k_that_is_set() -> None:
    model, one = mixtral(), mixtral(num_experts_per_tok=1)
    one.load_state_dict(model.state_dict())
    set_top_k(model, 1)
    assert torch.equal(model(input_ids=IDS).aux_loss, one(input_ids=IDS).aux_loss)
    apply(Schedule("constant", 1, 2), model, 0, 9)
    assert torch.equal(model(input_ids=IDS).aux_loss, mixtral()(input_ids=IDS).aux_loss)


def test_a_schedule_is_refused_where_it_cannot_be_followed() -> None:
    read_me = converted(made("llama"), masks_of(made("llama")))
    for model, most, said in ((made("llama"), 2, "no layers"), (mixtral(), 9, "between 1 and 4"), (read_me, 3, "read")):
        with pytest.raises(ConfigError, match=said):
            apply(Schedule("linear", 1, most), model, 0, 9)
    assert ks(read_me) == [1, 1]


# -- Read-ME's router and what the cache is used for ---------------------------------------------------------------


@pytest.fixture(scope="module")
def read_me() -> PreTrainedModel:
    base = made("llama")
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model = converted(base, masks_of(base))
    torch.manual_seed(5)
    for parameter in model.pre_gate.parameters():
        nn.init.normal_(parameter, std=0.6)
    return model


def test_beams_take_their_routers_past_along(read_me: PreTrainedModel) -> None:
    how = {"num_beams": 4, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for seed in range(8):
        ids = torch.randint(3, 50, (1, 5), generator=torch.Generator().manual_seed(seed))
        cached, whole = (
            read_me.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use, **how) for use in (True, False)
        )
        assert torch.equal(cached, whole)


def test_packed_rows_are_routed_each_for_itself(read_me: PreTrainedModel) -> None:
    one, two = IDS
    packed, places = torch.cat([one, two])[None], torch.cat([torch.arange(7), torch.arange(7)])[None]
    with torch.no_grad():
        together = read_me(input_ids=packed, position_ids=places, use_cache=False).logits[0, 7:]
        alone = read_me(input_ids=two[None], use_cache=False).logits[0]
        run_on = read_me(input_ids=packed, use_cache=False).logits[0, 7:]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run_on, alone, atol=1e-2)


def test_domains_are_told_by_name() -> None:
    model, method = made("llama"), ReadMe(["a", "b"], router_dim=16, router_heads=2)
    before = torch.get_rng_state()
    in_order, turned = (method.parts(model, {name: TEXT[name] for name in names}) for names in ("ab", "ba"))
    assert torch.equal(before, torch.get_rng_state())
    for name, mask in in_order["masks"].items():
        assert torch.equal(mask, turned["masks"][name])
    with pytest.raises(ConfigError, match="text is of a, c, and the domains are a, b"):
        method.parts(model, {"a": TEXT["a"], "c": TEXT["b"]})


def test_a_method_is_used_for_several_models() -> None:
    method = ReadMe(["a", "b"])
    for d_ff in (64, 128):
        torch.manual_seed(0)
        sizes = {"vocab_size": 50, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=d_ff))
        parts = method.parts(model, TEXT)
        assert ffn.convert(model, method, **parts).config.moesaic["width"] == d_ff // 2
    assert method == ReadMe(["a", "b"])


# -- among other models --------------------------------------------------------------------------------------------


def test_models_that_share_a_config_stay_as_they_were(tmp_path: Path) -> None:
    base = made("llama")
    other = LlamaForCausalLM(base.config)
    ffn.convert(base, SMoEDropout(num_experts=4))
    other.save_pretrained(tmp_path / "other")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "other")) is LlamaForCausalLM
    config = LlamaConfig(**other.config.to_dict())
    ffn.fresh(LlamaForCausalLM, config, SMoEDropout(num_experts=4))
    assert type(config) is LlamaConfig


def test_a_classifier_is_converted_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**made("llama").config.to_dict(), num_labels=3)).eval()
    wanted = logits(model)
    ffn.convert(model, SMoEDropout(num_experts=4, combine="sum")).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(ffn.load(tmp_path).eval()), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="no causal language model"):
        ffn.as_mixtral(ffn.convert(LlamaForSequenceClassification(made("llama").config), SMoEDropout(num_experts=4)))


@dataclass
class Elsewhere(SMoEDropout):
    name: ClassVar[str] = "elsewhere"


@pytest.mark.parametrize(
    "method",
    [
        SMoEDropout(8, 3),
        SMoEDropout(8, 3, router="learned"),
        CMoE(8, 2, 2),
        ReadMe(["a", "b"], residual="separate"),
        RMoE(state_dim=8),
        RMoE(state_dim=8, shared_projector=True, shared_head=True, head="cosine"),
    ],
)
def test_weights_that_are_on_disk_are_brought(method: Method, tmp_path: Path) -> None:
    model = made("llama") if method.dense else mixtral()
    ffn.convert(model, method, **method.parts(model, TEXT))
    model.save_pretrained(tmp_path / "saved")
    away = ffn.load(tmp_path / "saved", device_map={"": "disk"}, offload_folder=str(tmp_path / "away"))
    for _ in range(2):
        torch.testing.assert_close(logits(away).cpu(), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [SMoEDropout(8, 3), ReadMe(["a", "b"]), RMoE(state_dim=8)])
def test_a_model_and_its_config_are_pickled(method: Method) -> None:
    model = made("llama") if method.dense else mixtral()
    ffn.convert(model, method, **method.parts(model, TEXT))
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert type(pickle.loads(pickle.dumps(model.config))) is type(model.config)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(AttributeError, match="MoesaicTrainer"):
        _ = ffn.model.MoesaicTrainer


def test_a_method_of_ones_own_is_loaded_and_not_listed(tmp_path: Path) -> None:
    model = ffn.convert(made("llama"), Elsewhere(num_experts=4))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(ffn.load(tmp_path).eval()), logits(model))
    assert "elsewhere" not in ffn.methods()
    Method.METHODS.pop("elsewhere")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", [LlamaForCausalLM, LlamaModel, BertModel, MixtralForCausalLM, MixtralModel])
def test_states_are_given_as_before_the_conversion(kind: Any, before: bool) -> None:
    base = kind(kind.config_class(**SIZES, attn_implementation="eager")).eval()
    asked = {"input_ids": IDS, "output_hidden_states": True, "output_attentions": True}
    asked |= {"output_router_logits": True} if "Mixtral" in kind.__name__ else {}
    wanted, model = base(**asked), copy.deepcopy(base)
    if before:
        model(**asked)
    found = ffn.convert(model, RMoE(state_dim=8) if "Mixtral" in kind.__name__ else SMoEDropout(4, combine="sum"))(
        **asked
    )
    assert found.keys() == wanted.keys()
    for name in ("hidden_states", "attentions", "router_logits"):
        assert len(found.get(name) or ()) == len(wanted.get(name) or ()), name
    if "Mixtral" not in kind.__name__:
        torch.testing.assert_close(found.hidden_states, wanted.hidden_states, rtol=1e-4, atol=1e-5)


def test_what_a_folder_does_not_keep_is_made_as_the_base_makes_it(tmp_path: Path) -> None:
    sizes = SIZES | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    model = ffn.convert(FalconH1ForCausalLM(FalconH1Config(**sizes)).eval(), SMoEDropout(4))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(ffn.load(tmp_path).eval()), logits(model))


@pytest.mark.parametrize("size", [60, 45])
def test_a_table_of_another_length_is_the_routers_too(size: int, tmp_path: Path) -> None:
    model = converted(made("llama"), masks_of(made("llama")))
    model.resize_token_embeddings(size)
    ids = torch.arange(3, size)[None]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(ffn.load(tmp_path).eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    before = converted(made("llama"), masks_of(made("llama")))
    assert torch.equal(model.pre_gate.embedding.weight[:45], before.pre_gate.embedding.weight[:45])
    dim = model.pre_gate.dim
    assert torch.equal(model.pre_gate.embedding.weight[50:], model.get_input_embeddings().weight[50:, :dim])


# -- what does not fit ---------------------------------------------------------------------------------------------


def test_a_method_that_is_made_of_text_is_not_trained_from_nothing() -> None:
    for method in (CMoE(), ReadMe(["a", "b"])):
        with pytest.raises(ConfigError, match=f"moesaic convert {method.name}"):
            ffn.fresh(LlamaForCausalLM, made("llama").config, method)


def test_models_that_text_alone_does_not_run_through_are_not_cut_by_it() -> None:
    sizes = {"vocab_size": 50, "d_model": D, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64}
    model = BartForConditionalGeneration(BartConfig(**sizes, decoder_ffn_dim=64))
    for method in (CMoE(), ReadMe(["a", "b"])):
        with pytest.raises(ConfigError, match="BartForConditionalGeneration is made of several parts"):
            method.parts(model, TEXT)
        with pytest.raises(ConfigError, match="BartForConditionalGeneration is made of several parts"):
            ffn.convert(model, method, **dict.fromkeys(method.takes))


def test_routers_that_do_more_are_not_stood_in_for_in_an_untrained_model_either() -> None:
    every = {"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0}
    with pytest.raises(ConfigError, match="JambaTopKRouter is no plain top-k router"):
        ffn.fresh(JambaForCausalLM, JambaConfig(**SIZES, **every, num_experts=4), RMoE())


def test_every_weight_of_an_untrained_model_is_drawn() -> None:
    config = ffn.convert(made("llama"), CMoE(), **CMoE().parts(made("llama"), TEXT)).config
    for name, values in AutoModelForCausalLM.from_config(config).named_parameters():
        assert values.isfinite().all(), name
        assert values.abs().max() < 1.1, name


def spoilt(**parts: Any) -> dict[str, Any]:
    base = made("llama")
    return {"masks": masks_of(base), "pre_gate": pre_gate()} | parts


def narrower(found: dict[str, Tensor]) -> dict[str, Tensor]:
    last = [*found][-1]
    return {**found, last: found[last] & (torch.arange(64) > 3)}


def test_parts_that_do_not_fit_are_refused_and_nothing_is_changed() -> None:
    base, method = made("llama"), ReadMe(["a", "b", "c"], router_dim=16, router_heads=2)
    few = pre_gate()
    few.num_experts = 2
    cases: list[tuple[Method, dict[str, Any], str]] = [
        (method, {"masks": masks_of(base)}, r"method.parts"),
        (method, spoilt(groups={}), r"method.parts"),
        (CMoE(), spoilt(), r"method.parts"),
        (CMoE(), {"groups": {}}, "another model"),
        (RMoE(), {"groups": {}}, "takes no groups"),
        (method, spoilt(masks={name.upper(): mask for name, mask in masks_of(base).items()}), "another model"),
        (method, spoilt(masks=narrower(masks_of(base))), "32 of them in each"),
        (method, spoilt(masks={name: mask[:2] for name, mask in masks_of(base).items()}), "of 3 domains"),
        (method, spoilt(pre_gate=few), "to 2 experts"),
        (ReadMe(["a", "b", "c"], 16, router_dim=16, router_heads=2), spoilt(), "16 of them in each"),
    ]
    for tried, parts, said in cases:
        model = copy.deepcopy(base)
        with pytest.raises(ConfigError, match=said):
            ffn.convert(model, tried, **parts)
        assert torch.equal(logits(model), logits(base)), said
        assert type(model) is LlamaForCausalLM


def test_the_routers_heads_are_those_that_it_has(tmp_path: Path) -> None:
    base = made("llama")
    model = ffn.convert(base, ReadMe(["a", "b", "c"], router_heads=4), **spoilt()).eval()
    model.save_pretrained(tmp_path)
    again = ffn.load(tmp_path).eval()
    assert torch.equal(model.pre_gate(IDS)[0], again.pre_gate(IDS)[0])
