"""What PEFT asks of every tuner, of every method, and of its own LoRA as the control: `make peft` after a new release.

Where a method fails and the control does too, PEFT has changed; where the method fails alone, this library has to.
"""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from moesaic.errors import ConfigError, MoesaicError
from moesaic.lora import METHODS
from tests import tiny

ARMS = ["lora", *sorted(METHODS.keys() - {"custom", "lora"})]
LINEARS = ["gate_proj", "up_proj", "down_proj"]
every = pytest.mark.parametrize("arm", ARMS)
from_scratch = pytest.mark.parametrize("arm", [arm for arm in ARMS if arm == "lora" or arm in tiny.FROM_SCRATCH])


def over_adapters(arm: str) -> bool:
    return arm != "lora" and METHODS[arm].kind.needs_adapters


def config_of(arm: str, **settings: Any) -> Any:
    targets = {} if over_adapters(arm) else {"target_modules": LINEARS}
    settings = {"task_type": "CAUSAL_LM", **targets, **settings}
    return LoraConfig(r=4, **settings) if arm == "lora" else tiny.small(arm, **settings)


def ready(model: PeftModel) -> PeftModel:
    """In evaluation, and told what a method cannot do without."""
    return tiny.pin_task(model).eval()


def made(arm: str, *, stirred: bool = True, **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(), config_of(arm, **settings))
    return ready(stir(model) if stirred else model)


@torch.no_grad()
def stir(model: Any, seed: int = 1) -> Any:
    """Experts, routers and LoRA that matter. A mixture over adapters has trained ones; its router is drawn."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_B", "moe_lora_B", "moe_lora_router")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def batch(model: Any, **settings: Any) -> dict[str, Tensor]:
    return tiny.batch(model, labels=False, **settings)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**batch(model)).logits


def base_logits() -> Tensor:
    return logits(tiny.llama())


def own_keys(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if "lora_" in name}


# -- start, training, parameters ---------------------------------------------------------------------------------------


@from_scratch
def test_a_fresh_adapter_changes_nothing(arm: str) -> None:
    if arm == "mixlora":
        assert torch.allclose(logits(made(arm, stirred=False)), base_logits(), atol=1e-6)
        return
    assert torch.equal(logits(made(arm, stirred=False)), base_logits())


@every
def test_only_the_adapter_is_trained(arm: str) -> None:
    model = made(arm).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    if not trained:
        assert METHODS[arm].kind.needs_adapters, "only of adapters there may be nothing left to train"
        assert METHODS[arm].kind.weights != "learned"
        return
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**tiny.batch(model)).loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert changed <= trained
    total, every_one = model.get_nb_trainable_parameters()
    assert 0 < total < every_one


@every
def test_status_and_repr_tell_the_adapter(arm: str) -> None:
    model = made(arm)
    status = get_model_status(model)
    assert status.active_adapters == ["default"]
    assert status.enabled is True
    assert status.merged_adapters == []
    assert status.num_adapter_layers == len(get_layer_status(model)) > 0
    assert repr(model)


@every
def test_checkpointing_gives_the_same_gradients(arm: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = made(arm).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(**tiny.batch(model)).loss
        if not loss.requires_grad:
            return
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4)


# -- files -------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("low", [False, True])
def test_saved_and_loaded_it_answers_the_same(arm: str, low: bool, tmp_path: Path) -> None:
    model = made(arm)
    wanted = logits(model)
    model.save_pretrained(str(tmp_path))
    files = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert all("lora_" in key and ".default" not in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = ready(PeftModel.from_pretrained(tiny.llama(), str(tmp_path), low_cpu_mem_usage=low))
    assert not any(p.is_meta for p in loaded.parameters())
    torch.testing.assert_close(logits(loaded), wanted, atol=1e-6, rtol=0)
    assert not any(p.requires_grad for p in loaded.parameters())
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert type(again) is type(model.peft_config["default"])


@every
def test_loaded_to_be_trained_on(arm: str, tmp_path: Path) -> None:
    model = made(arm)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny.llama(), str(tmp_path), is_trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained


@every
def test_loaded_under_another_name(arm: str, tmp_path: Path) -> None:
    model = made(arm)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny.llama(), str(tmp_path), adapter_name="other")
    loaded.peft_config["default"] = loaded.peft_config["other"]
    ready(loaded)
    del loaded.peft_config["default"]
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=0)


@every
def test_a_state_dict_goes_round(arm: str) -> None:
    model, other = made(arm), ready(stir(made(arm), seed=7))
    state = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    found = set_peft_model_state_dict(other, state)
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if "lora_" in key]
    torch.testing.assert_close(logits(other), logits(model), atol=1e-6, rtol=0)


@every
def test_a_setting_of_a_later_release_is_a_warning(arm: str, tmp_path: Path) -> None:
    model = made(arm)
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_tomorrow": 1}))
    with pytest.warns(UserWarning, match="of_tomorrow"):
        loaded = ready(PeftModel.from_pretrained(tiny.llama(), str(tmp_path)))
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=0)


# -- several adapters --------------------------------------------------------------------------------------------------


@every
def test_several_adapters_answer_one_at_a_time(arm: str, tmp_path: Path) -> None:
    model = made(arm)
    first = logits(model)
    model.add_adapter("second", config_of(arm))
    torch.testing.assert_close(logits(model), first, atol=0, rtol=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second" in name and any(part in name for part in ("lora_B", "moe_lora_B")):
                parameter.normal_(std=0.5)
    model.set_adapter("second")
    assert model.active_adapters == ["second"]
    second = logits(model)
    assert not torch.allclose(second, first, atol=1e-4)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), first, atol=0, rtol=0)
    model.save_pretrained(str(tmp_path), selected_adapters=["second"])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["second"]
    model.load_adapter(str(tmp_path / "second"), "third")
    model.set_adapter("third")
    torch.testing.assert_close(logits(model), second, atol=1e-6, rtol=0)


@every
def test_a_deleted_adapter_is_gone_and_the_others_stay(arm: str) -> None:
    model = made(arm)
    wanted = logits(model)
    model.add_adapter("second", config_of(arm))
    model.set_adapter("second")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert not [name for name in model.state_dict() if ".second" in name]
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), wanted, atol=0, rtol=0)
    with pytest.raises(ValueError, match="nobody"):
        model.delete_adapter("nobody")


@every
def test_disabled_it_is_the_base(arm: str) -> None:
    model, base = made(arm), base_logits()
    wanted = logits(model)
    assert not torch.allclose(wanted, base, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, atol=0, rtol=0)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), base, atol=0, rtol=0)
    torch.testing.assert_close(logits(model), wanted, atol=0, rtol=0)


@every
def test_unloaded_it_is_the_base(arm: str) -> None:
    base = made(arm).unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    torch.testing.assert_close(logits(base), base_logits(), atol=0, rtol=0)


@every
def test_merged_it_answers_the_same_or_says_why_it_cannot(arm: str) -> None:
    model = made(arm)
    wanted = logits(model)
    if arm == "lora":
        torch.testing.assert_close(logits(model.merge_and_unload()), wanted, atol=1e-5, rtol=0)
        return
    for way in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ConfigError) as error:
            way()
        assert "\n" not in str(error.value)
    torch.testing.assert_close(logits(model), wanted, atol=0, rtol=0)


# -- which modules -----------------------------------------------------------------------------------------------------


def wrapped(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@every
@pytest.mark.parametrize("way", ["list", "pattern", "exclude", "layers", "all-linear"])
def test_targets(arm: str, way: str) -> None:
    if over_adapters(arm):
        with pytest.raises(MoesaicError, match="disagree"):
            METHODS[arm](adapters=tiny.adapters("llama"), target_modules=["up_proj"])
        return
    ffn = arm == "mixlora"
    leaves = LINEARS if ffn else ["up_proj", "q_proj"]
    settings: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
        "list": ({"target_modules": leaves}, lambda name: name.endswith(tuple(leaves))),
        "pattern": ({"target_modules": rf".*\.0\..*({'|'.join(leaves)})"}, lambda name: ".0." in name),
        "exclude": ({"target_modules": [*leaves, "v_proj"], "exclude_modules": ["v_proj"]}, lambda n: "v_" not in n),
        "layers": ({"target_modules": leaves, "layers_to_transform": [1]}, lambda name: ".1." in name),
        "all-linear": ({"target_modules": "all-linear"}, lambda name: "lm_head" not in name),
    }
    given, holds = settings[way]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = wrapped(made(arm, **given))
    assert found
    assert all(holds(name) for name in found)
    if way in ("list", "exclude"):
        assert len(found) == 2 * len(leaves)


@every
def test_modules_to_save_are_trained_and_saved(arm: str, tmp_path: Path) -> None:
    model = made(arm, modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"]
    assert head.weight.requires_grad
    with torch.no_grad():
        head.weight.normal_()
    wanted = logits(model)
    model.save_pretrained(str(tmp_path))
    loaded = ready(PeftModel.from_pretrained(tiny.llama(), str(tmp_path)))
    torch.testing.assert_close(logits(loaded), wanted, atol=1e-5, rtol=0)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base_logits(), atol=0, rtol=0)


@every
def test_injected_into_a_bare_model(arm: str) -> None:
    base = tiny.llama()
    torch.manual_seed(0)
    injected = inject_adapter_in_model(config_of(arm), base)
    assert injected is base
    stir(injected)
    found = {name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    assert {name.removeprefix("base_model.model.") for name in wrapped(made(arm))} == found


# -- dtypes, copies, habits --------------------------------------------------------------------------------------------


@every
def test_a_half_base_keeps_an_adapter_in_full_precision(arm: str) -> None:
    torch.manual_seed(0)
    model = ready(stir(get_peft_model(tiny.llama().to(torch.bfloat16), config_of(arm))))
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained <= {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    with disable_input_dtype_casting(model.to(torch.bfloat16)):
        assert logits(model).isfinite().all()


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@every
def test_it_moves_between_dtypes(arm: str) -> None:
    model = made(arm)
    wanted = logits(model)
    torch.testing.assert_close(logits(model.double()).float(), wanted, atol=1e-4, rtol=1e-3)


@every
@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_copies_answer_the_same_and_are_apart(arm: str, way: Callable[[Any], Any]) -> None:
    model = made(arm)
    wanted = logits(model)
    other = way(model)
    torch.testing.assert_close(logits(other), wanted, atol=0, rtol=0)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    torch.testing.assert_close(logits(model), wanted, atol=0, rtol=0)


@every
def test_generation_through_peft_is_through_the_model(arm: str) -> None:
    model = made(arm)
    inputs = {key: value for key, value in batch(model).items() if not key.startswith("routing")}
    asked = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **asked), model.base_model.model.generate(**inputs, **asked))
    assert torch.equal(model.generate(inputs["input_ids"], **asked), model.generate(**inputs, **asked))


@every
def test_configs_go_round_as_dictionaries_and_files(arm: str, tmp_path: Path) -> None:
    config = config_of(arm)
    config.save_pretrained(str(tmp_path))
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert type(again) is type(config)
    told = {key: value for key, value in again.to_dict().items() if key != "inference_mode"}
    assert told == {key: value for key, value in config.to_dict().items() if key != "inference_mode"}
    assert copy.deepcopy(config).to_dict() == config.to_dict()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        h += x
        return self.out(self.act(h))


@from_scratch
def test_what_comes_behind_may_work_in_place(arm: str) -> None:
    if arm == "mixlora":  # such a model has no FFN
        return
    targets = {"target_modules": ["fc"]}
    config = LoraConfig(r=2, **targets) if arm == "lora" else tiny.small(arm, **targets)
    model = tiny.pin_task(get_peft_model(InPlace(), config))
    loss = model(torch.randn(1, 4, 8)).sum()
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
