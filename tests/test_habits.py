"""What PEFT, TRL and models expect of any adapted layer, and do to it; plain LoRA is the control."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from trl.trainer.utils import disable_dropout_in_model

import moesaic
from moesaic.errors import ConfigError
from moesaic.lora import METHODS, MixtureLinear
from tests import tiny, zoo


class Net(nn.Module):
    """Reads the sizes of its own linear, and works in place on what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin0(x.view(-1, self.lin0.in_features))
        y += 1
        return self.lin1(nn.functional.relu(y, inplace=True)).view(-1, self.lin1.out_features)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=2, **settings)


def mola(**settings: Any) -> Any:
    return moesaic.MoLAConfig(r=2, num_experts=4, **settings)


kinds = pytest.mark.parametrize("kind", [lora, mola])


@kinds
def test_a_wrapped_linear_has_its_sizes_and_is_worked_on_in_place(kind: Any) -> None:
    model = get_peft_model(Net(), kind(target_modules=["lin0", "lin1"])).train()
    model(torch.randn(3, 2, 4)).sum().backward()
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("backend", ["reference", "rank", "grouped"])
def test_what_follows_a_mixture_may_work_in_place(method: str, backend: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(method, backend=backend)).train()
    for layer in tiny.mixtures(model).values():
        if layer.name.endswith("q_proj"):
            layer.register_forward_hook(lambda m, args, out: out.mul_(1.0))
    loss = model(**tiny.batch(model)).loss
    if loss.requires_grad:  # some methods have nothing to train
        loss.backward()


@kinds
def test_input_casting_is_turned_off_by_pefts_helper(kind: Any) -> None:
    model = get_peft_model(Net(), kind(target_modules=["lin0"]))
    layer: Any = model.base_model.model.lin0
    with disable_input_dtype_casting(model):
        assert not layer.cast_input_dtype_enabled
        model(torch.randn(3, 8))
    assert layer.cast_input_dtype_enabled


@kinds
def test_exclusions_that_work_are_not_said_to_have_failed(kind: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(Net(), kind(target_modules=["lin0", "lin1"], exclude_modules=["lin1"]))
    assert model.targeted_module_names == ["lin0"]
    for nothing in ({"exclude_modules": ["lin0"]}, {"modules_to_save": ["lin0"]}):
        with pytest.raises(ValueError, match="No modules were targeted"):
            get_peft_model(Net(), kind(target_modules=["lin0"], **nothing))


@kinds
def test_a_setting_of_tomorrow_is_a_warning_in_a_file(kind: Any, tmp_path: Path) -> None:
    get_peft_model(Net(), kind(target_modules=["lin0"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "setting_of_tomorrow": None}))
    with pytest.warns(UserWarning, match="setting_of_tomorrow"):
        PeftModel.from_pretrained(Net(), str(tmp_path))


def test_and_an_error_in_a_constructor() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'num_expert'.*did you mean 'num_experts'"):
        mola(num_expert=3)


def test_configs_and_models_are_pickled(method: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(method))
    config = model.peft_config["default"]
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    inputs = tiny.batch(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("method", [m for m in METHODS if m in tiny.FROM_SCRATCH])
def test_dropout_is_turned_off_where_others_look_for_it(method: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(method, lora_dropout=0.5)).train()
    inputs = tiny.batch(model)
    noisy = [model(**inputs).logits for _ in range(2)]
    assert not torch.equal(*noisy)
    disable_dropout_in_model(model)
    still = [model(**inputs).logits for _ in range(2)]
    assert torch.equal(*still)


def test_a_layer_that_runs_three_times_is_counted_three_times() -> None:
    model = tiny.wrap(zoo.albert(num_hidden_layers=3), tiny.small("mola", aux_weight=0.5))
    name = next(m.name for m in model.modules() if isinstance(m, MixtureLinear) and "ffn" in m.name)
    inputs = {"input_ids": torch.randint(3, tiny.VOCAB, (2, 7))}
    with moesaic.trace(model, keep_weights=True) as trace, torch.no_grad():
        model(**inputs)
    assert trace.modules[name].tokens == 3 * 14
    assert len(trace.weights(name)) == 3


@pytest.mark.parametrize("gate", ["top_k", "top_p"])
def test_a_number_that_is_none_shows_in_the_loss(gate: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("mixlora", routing=gate, target_modules=None)).train()
    embeddings = torch.randn(2, 5, model.config.hidden_size)
    embeddings[0, 2] = float("nan")
    loss = model(inputs_embeds=embeddings, labels=torch.randint(3, 60, (2, 5))).loss
    assert loss.isnan()
    assert copy.deepcopy(model)(**tiny.batch(model)).loss.isfinite()
