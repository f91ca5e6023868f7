"""Configs and adapter folders that cannot be right: one typed error with one clear line, before anything is changed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import moesaic
from moesaic.errors import AdapterError, ConfigError, MissingRouterWeights, MoesaicError
from moesaic.lora import METHODS
from tests.tiny import batch, llama, mixtures, small, wrap


def one_line(error: pytest.ExceptionInfo[MoesaicError]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


# -- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"num_expert": 4}, "num_experts"),
        ({"lora_alhpa": 4}, "lora_alpha"),
        ({"zzz": 1}, "zzz"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"r": -1}, "r=-1"),
        ({"r": 2.5}, "r=2.5"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"bias": "all"}, "bias"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
    ],
)
def test_bad_setting_is_named(setting: dict[str, Any], said: str, method: str) -> None:
    with pytest.raises(ConfigError) as error:
        METHODS[method](**setting)
    assert said in one_line(error)


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        ("hotmoe", {"top_k": 5, "num_experts": 4}, "top_k=5"),
        ("mola", {"top_k": 9}, "top_k=9"),
        ("mola", {"top_k": 4, "experts_per_layer": [2, 4]}, "top_k=4"),
        ("hotmoe", {"top_k": 0}, "top_k=0"),
        ("hotmoe", {"ee_fraction": 1.5}, "ee_fraction=1.5"),
        ("hotmoe", {"gate_temperature": 0.0}, "temperature"),
    ],
)
def test_bad_setting_of_a_method_is_named(name: str, setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        METHODS[name](**setting)
    assert said in one_line(error)


@pytest.mark.parametrize("name", ["0", "mlp", "layers", "weight", "self_attn", "q_proj", "", "a.b", "moe_lora_A"])
def test_adapter_name_that_peft_would_strip_is_refused(name: str) -> None:
    base = llama()
    with pytest.raises(ConfigError) as error:
        get_peft_model(base, small("hotmoe"), adapter_name=name)  # type: ignore[arg-type]
    assert repr(name) in one_line(error)
    assert not mixtures(base)
    model = wrap(base, small("hotmoe"))
    with pytest.raises(ConfigError):
        model.add_adapter(name, small("hotmoe"))  # type: ignore[arg-type]


# -- adapter folders -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    llama().save_pretrained(folder / "base")
    wrap(type(llama()).from_pretrained(folder / "base"), small("hotmoe")).save_pretrained(folder / "adapter")
    return folder


def base_of(good: Path) -> nn.Module:
    return type(llama()).from_pretrained(good / "base").eval()


def set_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def keep_tensors(wanted: Callable[[str], bool]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if wanted(k)}, file, metadata={"format": "pt"})

    return change


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def poison(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(k for k in tensors if k.endswith("layers.1.mlp.up_proj.moe_lora_B.weight"))][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def lora(folder: Path) -> None:
    shutil.rmtree(folder)
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[MoesaicError], str]] = {
    "truncated": (truncate, AdapterError, "truncated"),
    "empty weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), AdapterError, "damaged"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), AdapterError, "adapter_model.safetensors"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), AdapterError, "adapter_config.json"),
    "broken config": (lambda f: (f / "adapter_config.json").write_text("{"), AdapterError, "adapter_config.json"),
    "not a mapping": (lambda f: (f / "adapter_config.json").write_text("[1]"), AdapterError, "list"),
    "a LoRA": (lora, AdapterError, "LORA"),
    "no such method": (set_config(peft_type="MOESAIC_NOSUCH"), AdapterError, "MOESAIC_NOSUCH"),
    "another method": (set_config(peft_type="MOESAIC_MOLA"), MoesaicError, ""),
    "another base": (set_config(base_model_name_or_path="/models/other"), AdapterError, "other"),
    "another rank": (set_config(r=2), AdapterError, "rank"),
    "more experts": (set_config(num_experts=8), AdapterError, "number of experts"),
    "more targets": (set_config(target_modules=["q_proj", "lm_head"]), AdapterError, "lm_head"),
    "impossible top_k": (set_config(top_k=9), AdapterError, "adapter_config.json: top_k=9"),
    "a rank_pattern of texts": (
        set_config(rank_pattern={"q_proj": "x"}),
        AdapterError,
        "adapter_config.json: rank_pat",
    ),
    "a rank_pattern of nothing": (set_config(rank_pattern={"nope": 2}), MoesaicError, "rank_pattern: 'nope'"),
    "not finite": (poison, AdapterError, "layers.1.mlp.up_proj.moe_lora_B.weight holds numbers that are not finite"),
    "no routers": (keep_tensors(lambda k: ".moe_lora_router." not in k), MissingRouterWeights, "router"),
    "one router gone": (
        keep_tensors(lambda k: not (".moe_lora_router." in k and "layers.1.mlp.up_proj" in k)),
        MissingRouterWeights,
        "router",
    ),
    "no experts": (keep_tensors(lambda k: ".moe_lora_router." in k), AdapterError, "no experts"),
    "one expert gone": (
        keep_tensors(lambda k: not k.endswith("layers.0.mlp.up_proj.moe_lora_B.weight")),
        AdapterError,
        "moe_lora_B",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_or_foreign_folder_is_refused_in_one_line(kind: str, good: Path, tmp_path: Path) -> None:
    damage, expected, said = DAMAGE[kind]
    folder = tmp_path / "adapter"
    shutil.copytree(good / "adapter", folder)
    damage(folder)
    model = base_of(good)
    with pytest.raises(expected) as error:
        moesaic.from_pretrained(model, folder)
    assert said in one_line(error)
    assert kind != "not finite" or not mixtures(model)
    restored = moesaic.from_pretrained(model, good / "adapter", adapter_name="second")
    inputs = batch(model, labels=False)
    expected_logits = moesaic.from_pretrained(base_of(good), good / "adapter")(**inputs).logits
    assert torch.equal(restored(**inputs).logits, expected_logits), "nothing of the failed attempt is left"


def test_folder_for_a_larger_base_is_refused(good: Path) -> None:
    with pytest.raises(AdapterError) as error:
        moesaic.from_pretrained(llama(hidden_size=32), good / "adapter")
    assert "another base model" in one_line(error)


@pytest.mark.parametrize("folder", [3, None, ["a"]])
def test_a_folder_that_is_no_path_is_refused(folder: Any) -> None:
    with pytest.raises(AdapterError, match="must be the path of an adapter folder"):
        moesaic.from_pretrained(llama(), folder)


def test_two_mixtures_have_no_weighted_sum() -> None:
    model = wrap(llama(), small("mola"))
    model.add_adapter("other", small("mola"))
    with pytest.raises(ConfigError, match="two mixtures have no sum: keep both"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as error:
        moesaic.from_pretrained(llama(), tmp_path / "nowhere")
    assert "nowhere" in one_line(error)


@pytest.mark.parametrize("kind", ["no routers", "one router gone", "one expert gone", "another rank", "more experts"])
def test_peft_itself_does_not_load_it_either(kind: str, good: Path, tmp_path: Path) -> None:
    """PEFT alone would leave what is missing at random values, with a warning."""
    damage, expected, _ = DAMAGE[kind]
    folder = tmp_path / "adapter"
    shutil.copytree(good / "adapter", folder)
    damage(folder)
    with pytest.raises(expected) as error:
        PeftModel.from_pretrained(base_of(good), folder)
    one_line(error)


# -- values of the wrong kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"r": True}, "r=True must be a whole number"),
        ({"num_experts": "4"}, "num_experts='4' must be a whole number"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_k": "2"}, "top_k='2'"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a finite number"),
        ({"lora_dropout": "x"}, "lora_dropout='x'"),
        ({"use_rslora": "no"}, "use_rslora='no' must be true or false"),
        ({"aux_weight": -1}, "aux_weight=-1"),
        ({"aux_weight": float("inf")}, "aux_weight=inf"),
        ({"aux_weight": 1e300}, "aux_weight=1e+300"),
        ({"lora_alpha": 1e300}, "lora_alpha=1e+300 must be above 0, and at most 1e+06"),
        ({"backend": "foo"}, "backend='foo' must be one of auto, reference, rank, grouped"),
        ({"task_type": "FOO"}, "FOO"),
        ({"trainable_token_indices": "x"}, "trainable_token_indices='x' must be a list of whole numbers or lists"),
        ({"trainable_token_indices": {"embed_tokens": ["x"]}}, "trainable_token_indices="),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"exclude_modules": "*"}, "is not a regular expression"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": 5}, "must be a list of names"),
        ({"modules_to_save": "lm_head"}, "must be a list of names"),
        ({"layers_to_transform": [0]}, "needs target_modules as a list"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_at_once(setting: dict[str, Any], said: str, method: str) -> None:
    if not setting.keys() <= {f.name for f in dataclasses.fields(METHODS[method])}:
        said = f"unknown setting {next(iter(setting))!r}"
    with pytest.raises(ConfigError) as error:
        METHODS[method](**setting)
    assert said in one_line(error)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("hotmoe", {"expert_dim": 0}),
        ("hotmoe", {"attention_dim": -1}),
        ("hotmoe", {"ee_layers": 1}),
        ("hotmoe", {"ee_layers": [0.5]}),
        ("hotmoe", {"gate_temperature": float("nan")}),
        ("mola", {"experts_per_layer": 4}),
        ("mola", {"experts_per_layer": [2.5, 4]}),
        ("mola", {"top_k": None}),
        ("topiclora", {"encoder": 3}),
        ("topiclora", {"topics": ""}),
        ("oracle", {"num_experts": 5, "num_tasks": 2}),
        ("lora-mixer", {"num_tasks": -1}),
        ("loramoe", {"knowledge_tasks": [-1]}),
        ("loramoe", {"knowledge_tasks": [2], "num_tasks": 2}),
        ("mixlora", {"top_p": 1.5}),
        ("custom", {"num_tasks": 0}),
        ("custom", {"losses_of": 0}),
        ("custom", {"losses_of": False}),
    ],
)
def test_a_methods_value_of_the_wrong_kind_is_refused_at_once(name: str, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        METHODS[name](**setting)
    assert next(iter(setting)) in one_line(error)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"modules_to_save": ["nope"]}, "'nope' matches no module"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 99]}, "layer 99"),
        ({"target_modules": ["q_proj"], "exclude_modules": ".*"}, "All modules were excluded"),
        ({"experts_per_layer": [2, 4, 8]}, "this model has 2 layers"),
        ({"trainable_token_indices": [-1]}, "-1 is no token"),
        ({"trainable_token_indices": {"embed_tokens": [10**6]}}, "1000000 is no token"),
        ({"trainable_token_indices": []}, "is empty"),
        ({"trainable_token_indices": {"nope": [1]}}, "'nope' is no module"),
        ({"target_modules": ["q_proj"], "lora_target_modules": ["q_proj"]}, "no module is left for experts"),
    ],
)
def test_a_setting_that_this_model_cannot_follow_is_refused(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        get_peft_model(llama(), METHODS["mola"](r=2, num_experts=4, **setting))  # type: ignore[arg-type]
    assert said in one_line(error)


@pytest.mark.parametrize("change", [{"peft_type": ["x"]}, {"peft_type": {}}, {"modules_to_save": ["lm_head"]}])
def test_an_edited_config_is_an_adapter_error(change: dict[str, Any], good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(good / "adapter", folder)
    set_config(**change)(folder)
    with pytest.raises(AdapterError) as error:
        moesaic.from_pretrained(base_of(good), folder)
    one_line(error)


@pytest.mark.parametrize("pattern", [3, [1], {"q_proj": "x"}, {"q_proj": None}, {"q_proj": 2.5}, {3: 4}])
def test_rank_patterns_of_the_wrong_kind_are_refused(pattern: Any) -> None:
    with pytest.raises(ConfigError, match="rank_pattern"):
        METHODS["mola"](rank_pattern=pattern)


def test_a_rank_pattern_must_name_something_and_the_longest_name_wins() -> None:
    with pytest.raises(ConfigError, match="rank_pattern: 'nope' is neither"):
        wrap(llama(), small("mola", rank_pattern={"nope": 64}))
    model = wrap(llama(), small("mola", rank_pattern={"q_proj": 6, "layers.0.self_attn.q_proj": 2}))
    ranks = {layer.name: len(layer.moe_lora_B["default"]) // 4 for layer in mixtures(model).values()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 2
    assert ranks["model.layers.1.self_attn.q_proj"] == 6
    assert ranks["model.layers.1.self_attn.k_proj"] == 4


@pytest.mark.parametrize("first", ["mola", "lora"])
def test_a_second_mixture_by_the_same_name_leaves_the_first_as_it_was(first: str, tmp_path: Path) -> None:
    base = llama()
    config = LoraConfig(r=2, target_modules=["q_proj"]) if first == "lora" else small(first)
    model = get_peft_model(base, config)
    before = model.peft_config["default"]
    with pytest.raises(ConfigError, match="has an adapter 'default' already: add_adapter"):
        get_peft_model(base, small("mola", num_experts=3))
    with pytest.raises(ConfigError, match="'nope'"):
        get_peft_model(base, small("mola", target_modules=["nope"]), adapter_name="second")
    assert model.peft_config == {"default": before}
    model.save_pretrained(str(tmp_path / "saved"))
    PeftModel.from_pretrained(llama(), str(tmp_path / "saved"))


def test_a_refused_adapter_can_be_given_again() -> None:
    model = get_peft_model(llama(), small("mola"))
    with pytest.raises(ConfigError, match="is no token"):
        model.add_adapter("b", small("mola", trainable_token_indices=[10**6]))
    model.add_adapter("b", small("mola"))


def test_plain_targets_keep_to_the_layers_and_exclusions_of_the_rest() -> None:
    def adapted(**settings: Any) -> set[str]:
        config = METHODS["mola"](r=2, target_modules=["q_proj"], lora_target_modules=["v_proj"], **settings)
        return {name.removeprefix("base_model.model.") for name in mixtures(wrap(llama(), config))}

    assert adapted(layers_to_transform=[0]) == {f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")}
    assert not any("v_proj" in name for name in adapted(exclude_modules=["v_proj"]))


def test_rows_of_several_adapters_are_refused() -> None:
    model = wrap(llama(), small("mola"))
    with pytest.raises(ConfigError, match="adapter_names"):
        model(**batch(model), adapter_names=["default", "__base__", "default"])
