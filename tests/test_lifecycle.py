"""Making, saving, loading, switching and removing a mixture with stock PEFT and Transformers."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import moesaic
from moesaic.errors import ConfigError
from moesaic.host import find_host
from moesaic.lora import METHODS
from tests.tiny import MODELS, batch, llama, mixtures, randomize_b, router_parameters, small, wrap

CAUSAL = ["llama", "qwen3", "gpt2", "mamba"]


@dataclass
class Saved:
    """A base and an adapter on disk, and what they compute."""

    kind: type[PreTrainedModel]
    base: Path
    adapter: Path
    inputs: dict[str, Tensor]
    logits: Tensor

    def fresh(self) -> Any:
        return self.kind.from_pretrained(self.base).eval()


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model.eval()(**inputs).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    folder, made = tmp_path_factory.mktemp("saved"), {}
    for name, build in MODELS.items():
        base = build()
        base.save_pretrained(folder / name)
        loaded = type(base).from_pretrained(folder / name)
        model = wrap(loaded, small("hotmoe"))
        model.save_pretrained(folder / f"{name}-hotmoe")
        inputs = batch(base, labels=False)
        inputs["attention_mask"][0, -2:] = 0
        made[name] = Saved(type(base), folder / name, folder / f"{name}-hotmoe", inputs, logits(model, inputs))
        assert not torch.equal(made[name].logits, logits(base, inputs))
        save_file({**inputs, "logits": made[name].logits}, folder / f"{name}.safetensors")
    return made


@pytest.fixture(params=MODELS)
def one(request: pytest.FixtureRequest, saved: dict[str, Saved]) -> Saved:
    return saved[request.param]


# -- loading -------------------------------------------------------------------------------------------------------

FRESH_PROCESS = """
import sys
from pathlib import Path
import torch
import moesaic
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
import transformers

torch.set_num_threads(1)
folder = Path(sys.argv[1])
for name, kind in (pair.split("=") for pair in sys.argv[2:]):
    inputs = load_file(folder / f"{name}.safetensors")
    expected = inputs.pop("logits")
    base = getattr(transformers, kind).from_pretrained(folder / name)
    models = [PeftModel.from_pretrained(base, folder / f"{name}-hotmoe")]
    if "CausalLM" in kind or "LMHead" in kind:
        models.append(AutoPeftModelForCausalLM.from_pretrained(folder / f"{name}-hotmoe"))
    for model in models:
        with torch.no_grad():
            assert torch.equal(model.eval()(**inputs).logits, expected), (name, type(model).__name__)
        print(name, type(model).__name__)
"""


def test_fresh_process_restores_all_models_bit_for_bit(saved: dict[str, Saved]) -> None:
    folder = saved["llama"].base.parent
    pairs = [f"{name}={one.kind.__name__}" for name, one in saved.items()]
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(folder), *pairs], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    restored = done.stdout.split("\n")[:-1]
    assert {line.split()[0] for line in restored} == set(MODELS)
    assert len(restored) == len(MODELS) + len(CAUSAL)


def test_checkpoint_does_not_hold_the_adapter_name(one: Saved) -> None:
    keys = list(load_file(one.adapter / "adapter_model.safetensors"))
    assert any(".moe_lora_router." in key for key in keys)
    assert not [key for key in keys if "default" in key]


def test_loads_under_another_adapter_name(one: Saved) -> None:
    model = PeftModel.from_pretrained(one.fresh(), one.adapter, adapter_name="second")
    assert torch.equal(logits(model, one.inputs), one.logits)


def test_strict_loader_and_low_memory_loading(one: Saved) -> None:
    assert torch.equal(logits(moesaic.from_pretrained(one.fresh(), one.adapter), one.inputs), one.logits)
    model = PeftModel.from_pretrained(one.fresh(), one.adapter, low_cpu_mem_usage=True)
    assert torch.equal(logits(model, one.inputs), one.logits)


def test_transformers_load_adapter_keeps_routers(one: Saved) -> None:
    """Transformers loads adapters with its own code, without PeftModel."""
    model = one.fresh()
    model.load_adapter(str(one.adapter), adapter_name="mine")
    assert torch.equal(logits(model, one.inputs), one.logits)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_auto_model_of_an_adapter_folder(name: str, saved: dict[str, Saved]) -> None:
    one = saved[name]
    for auto in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        assert torch.equal(logits(auto.from_pretrained(one.adapter), one.inputs), one.logits)


def test_modules_to_save_travel_with_the_mixture(saved: dict[str, Saved], tmp_path: Path) -> None:
    one = saved["llama"]
    model = wrap(one.fresh(), small("hotmoe", modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
    expected = logits(model, one.inputs)
    model.save_pretrained(tmp_path)
    restored = PeftModel.from_pretrained(one.fresh(), tmp_path)
    assert torch.equal(logits(restored, one.inputs), expected)


def test_continues_training_after_loading(saved: dict[str, Saved]) -> None:
    one = saved["llama"]
    frozen = PeftModel.from_pretrained(one.fresh(), one.adapter)
    assert not [n for n, p in frozen.named_parameters() if p.requires_grad]
    model = PeftModel.from_pretrained(one.fresh(), one.adapter, is_trainable=True)
    model.train()(**one.inputs, labels=one.inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in router_parameters(model).values())


# -- switching and removing ----------------------------------------------------------------------------------------


def test_disabled_mixture_equals_base(one: Saved) -> None:
    base = one.fresh()
    expected = logits(base, one.inputs)
    model = PeftModel.from_pretrained(base, one.adapter)
    with model.disable_adapter():
        assert torch.equal(logits(model, one.inputs), expected)
    assert torch.equal(logits(model, one.inputs), one.logits)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_unload_gives_the_base_back_and_hooks_do_not_double(one: Saved) -> None:
    base = one.fresh()
    expected, before = logits(base, one.inputs), hooks(base)
    model = PeftModel.from_pretrained(base, one.adapter)
    attached = hooks(base)
    assert attached > before
    bare: Any = model.unload()
    assert bare is base
    assert hooks(bare) == before
    assert not mixtures(bare)
    assert torch.equal(logits(bare, one.inputs), expected)
    again = PeftModel.from_pretrained(bare, one.adapter)
    assert hooks(bare) == attached
    assert torch.equal(logits(again, one.inputs), one.logits)


@pytest.mark.filterwarnings("error:this model keeps experts")
@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj"]])
def test_second_adapter_wraps_and_hooks_nothing_twice(targets: Any, saved: dict[str, Saved]) -> None:
    one = saved["llama"]
    model = PeftModel.from_pretrained(one.fresh(), one.adapter)
    attached, wrapped = hooks(model), set(mixtures(model))
    model.add_adapter("other", small("hotmoe", num_experts=3, r=2, target_modules=targets))  # type: ignore[arg-type]
    assert set(mixtures(model)) == wrapped
    assert hooks(model) == attached
    assert torch.equal(logits(model, one.inputs), one.logits)
    model.set_adapter("other")
    assert torch.equal(logits(model, one.inputs), logits(one.fresh(), one.inputs)), "its B is zero"
    model.set_adapter("default")
    assert torch.equal(logits(model, one.inputs), one.logits)
    model.delete_adapter("other")
    assert torch.equal(logits(model, one.inputs), one.logits)


def test_auxiliary_loss_follows_the_active_adapter() -> None:
    model = wrap(llama(), small("hotmoe"))
    model.add_adapter("other", small("hotmoe", num_experts=3, top_k=1, aux_weight=0.5))  # type: ignore[arg-type]
    inputs = batch(model)
    values = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        values[name] = model.train()(**inputs).router_aux_loss.item()
    alone = wrap(llama(), small("hotmoe")).train()(**inputs).router_aux_loss.item()
    assert values["default"] == pytest.approx(alone, rel=1e-5)
    assert values["other"] > 10 * alone, "fifty times the weight"


def test_deepcopy_is_independent(one: Saved) -> None:
    model = PeftModel.from_pretrained(one.fresh(), one.adapter, is_trainable=True)
    model.train()(**batch(model))
    twin = copy.deepcopy(model)
    assert find_host(twin) is not find_host(model)
    assert torch.equal(logits(twin, one.inputs), one.logits)
    randomize_b(model)
    assert torch.equal(logits(twin, one.inputs), one.logits)
    with moesaic.trace(twin) as t:
        logits(model, one.inputs)
        assert not t.modules
        logits(twin, one.inputs)
        assert t.modules


@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter", "safe"])
def test_merge_is_refused(way: str) -> None:
    model: Any = wrap(llama(), small("hotmoe"))
    inputs = batch(model, labels=False)
    before = logits(model, inputs)
    with pytest.raises(ConfigError, match="cannot be merged"):
        model.merge_and_unload(safe_merge=True) if way == "safe" else getattr(model, way)()
    assert torch.equal(logits(model, inputs), before)


# -- generate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CAUSAL, "t5"])
@pytest.mark.parametrize("mode", ["greedy", "sampling", "beam"])
def test_generate_with_cache_equals_generate_without(name: str, mode: str, saved: dict[str, Saved]) -> None:
    """Left-padded prompts; every way of decoding gives the same tokens with the cache and by recomputing."""
    one = saved[name]
    model = PeftModel.from_pretrained(one.fresh(), one.adapter)
    ids = batch(model, labels=False)["input_ids"]
    mask = torch.ones_like(ids)
    if name != "mamba":
        ids[0, :2], mask[0, :2] = 0, 0
    settings = {"greedy": {}, "sampling": {"do_sample": True}, "beam": {"num_beams": 3}}[mode]
    answers = []
    for cache in (True, False):
        torch.manual_seed(0)
        config = GenerationConfig(
            max_new_tokens=6, use_cache=cache, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, **settings
        )
        answers.append(model.generate(input_ids=ids, attention_mask=mask, generation_config=config))
    assert torch.equal(*answers)
    with model.disable_adapter():
        torch.manual_seed(0)
        base = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    assert base.shape != answers[0].shape or not torch.equal(base, answers[0]), "the mixture makes a difference"


def test_generate_without_task_type_goes_around_the_tuner() -> None:
    """PeftModel without a task type hands positional arguments to the base model; hooks there see them all the same."""
    model = wrap(llama(), small("hotmoe"))
    assert type(model) is PeftModel
    inputs = batch(model, labels=False)
    inputs["attention_mask"][0, :3] = 0
    by_name = model(**inputs).logits
    assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"]).logits, by_name)
    typed = get_peft_model(llama(), small("hotmoe", task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    assert typed(**inputs).logits.shape == by_name.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_for_inference_trains_nothing(method, dtype, tmp_path):
    """PEFT makes frozen bf16 entries trainable when it casts them up."""
    get_peft_model(llama().to(dtype), small(method)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().to(dtype), tmp_path)
    assert not [name for name, p in loaded.named_parameters() if p.requires_grad]
    loaded.add_adapter("second", small(method))
    loaded.set_adapter("second")
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained or (METHODS[method].kind.needs_adapters and not METHODS[method].kind.learns_routing)
    assert all(".second" in name for name in trained)
