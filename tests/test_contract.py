"""What every method keeps, on every backend, over fp32 and bf16 bases. A new method is found by its registration.

Tolerances: "bit for bit" where the same kernels run on the same numbers; else 1e-5 of the largest entry in fp32, where
only the shape of a product differs; 3e-2 in bf16 (8 bits of mantissa through two layers).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.errors import ConfigError
from moesaic.host import TARGETS, find_host
from moesaic.lora import METHODS, MixtureConfig
from tests import tiny

BACKENDS = ["reference", "rank", "grouped"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}

EVERY = [*sorted(METHODS), *tiny.COMBINATIONS]
WITH_LOSSES = [name for name in EVERY if tiny.small(name).losses()]
FROM_SCRATCH = [name for name in EVERY if not tiny.config_class(name).kind.needs_adapters]
LEARNERS = [name for name in EVERY if name in FROM_SCRATCH or tiny.config_class(name).kind.learns_routing]
LINEAR_LEVEL = [name for name in EVERY if tiny.small(name).level == "linear"]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_base = pytest.mark.parametrize("base", list(DTYPES))
every_model = pytest.mark.parametrize("name", list(tiny.MODELS))


def linear_in_the_batch(method: str, **overrides: Any) -> MixtureConfig:
    """A small config without losses that reach over several micro-batches."""
    windows = {f.name: False for f in dataclasses.fields(tiny.config_class(method)) if f.name.endswith("_window")}
    return tiny.small(method, **{**windows, **overrides})


def fewer(method: str) -> int:
    """Experts of a second adapter: other than the first one's, but where the pinned scores are for as many."""
    return 4 if "texts" in {f.name for f in dataclasses.fields(tiny.config_class(method))} else 3


def wrapped(method: str, backend: str = "auto", base: str = "fp32", *, name: str = "llama", **overrides: Any) -> Any:
    random_b = overrides.pop("random_b", True)
    model = tiny.MODELS[name]().to(DTYPES[base])
    config = linear_in_the_batch(method, model=name, backend=backend, **overrides)
    return tiny.wrap(model, config, random_b=random_b)


def frozen(name: str = "llama", base: str = "fp32") -> Any:
    """A base model as it is inside a mixture. Frozen, since PyTorch may pick other kernels for trainable weights."""
    return tiny.MODELS[name]().to(DTYPES[base]).requires_grad_(False)


def close(got: Tensor, wanted: Tensor, tolerance: float, what: str = "") -> None:
    got, wanted = got.detach().double(), wanted.detach().double()
    error = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)
    assert error <= tolerance, f"{what} relative error {error:.2e} above {tolerance:.0e}"


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(
    model: Any, inputs: dict[str, Tensor], *, parts: int = 1, **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of `parts` accumulated passes over the same inputs."""
    model.zero_grad()
    for _ in range(parts):
        torch.manual_seed(5)
        loss = model(**inputs, **kwargs).loss
        loss.backward()
    return loss.detach(), gradients(model)


def ragged(model: Any, *, lengths: tuple[int, ...] = (7, 4, 6)) -> dict[str, Tensor]:
    """A batch of sequences of different lengths, padded on the right."""
    inputs = tiny.batch(model, rows=len(lengths))
    for row, length in enumerate(lengths):
        inputs["attention_mask"][row, length:] = 0
        inputs["input_ids"][row, length:] = tiny.PAD
        inputs["labels"][row, length:] = -100
    return inputs


# -- one forward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LINEAR_LEVEL)
@every_base
@every_backend
def test_outputs_have_the_bases_shape_and_dtype(method: str, backend: str, base: str) -> None:
    model = wrapped(method, backend, base)
    for layer in list(tiny.mixtures(model).values())[:2]:
        if getattr(layer.router("default"), "owner", None) is not None:
            continue  # it takes another's logits, of the same forward
        site = layer.sites["default"]
        for leading in ((2, 5), (1, 1), (3,), (2, 2, 3)):
            x = torch.randn(*leading, site.d_in, dtype=DTYPES[base])
            out = layer(x)
            assert out.shape == (*leading, site.d_out)
            assert out.dtype == DTYPES[base]


def aux_of(method: str, output: Any) -> Tensor:
    """The reported auxiliary loss, which is there if and only if the method has any; 0 without."""
    reported = getattr(output, "router_aux_loss", None)
    assert (reported is not None) == (method in WITH_LOSSES)
    return torch.zeros(()) if reported is None else reported


def routed(model: Any) -> dict[str, Any]:
    """The layers that hold a router, by their place in the base model."""
    return {layer.sites["default"].name: layer for layer in tiny.mixtures(model).values() if layer.router("default")}


@every_base
@every_backend
def test_rows_of_weights_keep_the_gates_promise(method: str, backend: str, base: str) -> None:
    model = wrapped(method, backend, base)
    gates = {name: layer.eval_gates["default"] for name, layer in routed(model).items()}
    with moesaic.trace(model, keep_weights=True) as trace, torch.no_grad():
        model(**tiny.batch(model))
    assert trace.modules.keys() == gates.keys()
    for name, gate in gates.items():
        (weights,) = trace.weights(name)
        assert weights.dtype == torch.float32
        if gate.signed:
            continue
        assert (weights >= 0).all()
        sums = weights.sum(-1)
        assert (sums <= 1 + 1e-5).all()
        assert (sums > 0).all()
        assert not gate.sums_to_one or (sums >= 1 - 1e-5).all()
        if gate.top_k is not None:
            assert ((weights > 0).sum(-1) == gate.top_k).all()


@pytest.mark.full("backend", "base")
@every_base
@every_backend
def test_backends_agree_with_the_reference(method: str, backend: str, base: str) -> None:
    model, reference = wrapped(method, backend, base), wrapped(method, "reference", base)
    inputs = tiny.batch(model)
    if method not in LEARNERS:
        close(model(**inputs).loss, reference(**inputs).loss, TOLERANCE[base], "loss")
        return
    loss, grads = backward(model.train(), inputs)
    wanted_loss, wanted_grads = backward(reference.train(), inputs)
    close(loss, wanted_loss, TOLERANCE[base], "loss")
    assert grads.keys() == wanted_grads.keys()
    if base == "fp32":  # in bf16 a rounded hidden state may choose another expert, and its gradient with it
        for name, grad in grads.items():
            close(grad, wanted_grads[name], 1e-4, name)


@pytest.mark.parametrize("method", FROM_SCRATCH)
@every_base
@every_backend
def test_a_zero_b_is_the_base_bit_for_bit(method: str, backend: str, base: str) -> None:
    plain = frozen(base=base)
    inputs = tiny.batch(plain)
    wanted = plain(**inputs).logits
    model = wrapped(method, backend, base, random_b=False)
    assert torch.equal(model(**inputs).logits, wanted)
    assert torch.equal(model.train()(**inputs).logits, wanted)


@every_base
@every_backend
def test_a_disabled_mixture_equals_the_base_bit_for_bit(method: str, backend: str, base: str) -> None:
    plain = frozen(base=base)
    inputs = tiny.batch(plain)
    wanted = plain(**inputs).logits
    model = wrapped(method, backend, base)
    enabled = model(**inputs).logits
    assert not torch.equal(enabled, wanted)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, wanted)
    assert torch.equal(model(**inputs).logits, enabled)


def refused(method: str, name: str) -> bool:
    """Whether the method cannot be had on this model, and says so: Mamba has no feed-forward block."""
    if method in LINEAR_LEVEL or name != "mamba":
        return False
    with pytest.raises(ConfigError, match="target_modules"):
        wrapped(method, name=name)
    return True


@pytest.mark.parametrize("method", FROM_SCRATCH)
@every_model
def test_every_architecture_starts_as_its_base(method: str, name: str) -> None:
    if refused(method, name):
        return
    plain = frozen(name)
    inputs = tiny.batch(plain)
    wanted = plain(**inputs).logits
    model = tiny.wrap(plain, tiny.small(method), random_b=False)
    assert torch.equal(model(**inputs).logits, wanted)
    tiny.randomize_b(model)
    assert not torch.equal(model(**inputs).logits, wanted)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, wanted)


# -- gradients ----------------------------------------------------------------------------------------------------


def assert_only_the_mixture_learns(model: Any) -> None:
    stored, routers = model.peft_config["default"].experts is not None, tiny.router_parameters(model)
    for name, parameter in model.named_parameters():
        if name in routers or (".moe_lora_" in name and ".moe_lora_router." not in name and not stored):
            assert parameter.requires_grad, name
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, f"no gradient reaches {name}"
        else:
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name


@pytest.mark.parametrize("method", LEARNERS)
@every_base
@every_backend
def test_the_task_loss_reaches_every_router_parameter_and_no_frozen_one(method: str, backend: str, base: str) -> None:
    model = wrapped(method, backend, base, aux_weight=0.0).train()
    model(**tiny.batch(model, rows=6)).loss.backward()
    assert_only_the_mixture_learns(model)


@pytest.mark.parametrize("method", LEARNERS)
@every_model
def test_gradients_reach_every_router_of_every_architecture(method: str, name: str) -> None:
    if refused(method, name):
        return
    model = wrapped(method, name=name).train()
    output = model(**tiny.batch(model, rows=6))
    assert aux_of(method, output).isfinite()
    output.loss.backward()
    assert_only_the_mixture_learns(model)


@pytest.mark.parametrize("method", WITH_LOSSES)
def test_the_auxiliary_loss_alone_reaches_routers_and_is_added_once(method: str) -> None:
    model, without = wrapped(method, aux_weight=0.5).train(), wrapped(method, aux_weight=0.0).train()
    inputs = tiny.batch(model)
    output, task = model(**inputs), without(**inputs).loss
    close(output.loss, task, 1e-6, "the loss is the task's")
    task.backward()
    alone = tiny.router_parameters(without)
    by_task = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in alone.items()}
    output.loss.backward(retain_graph=True)
    both = {name: p.grad for name, p in tiny.router_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    output.router_aux_loss.backward()
    found = {name: p.grad for name, p in tiny.router_parameters(model).items() if p.grad is not None}
    for name, grad in found.items():
        close(both[name], by_task[name] + grad, 1e-4, name)
    reached = [name for name, grad in found.items() if grad.any()]
    layers = {name.partition(".moe_lora_router.")[0] for name in tiny.router_parameters(model)}
    assert {name.partition(".moe_lora_router.")[0] for name in reached} == layers


@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_carries_no_auxiliary_loss(method: str, grad: bool) -> None:
    model, without = wrapped(method), wrapped(method, aux_weight=0.0)
    inputs = tiny.batch(model)
    with torch.set_grad_enabled(grad):  # kernels without gradients may round otherwise
        evaluated, plain = model(**inputs), without(**inputs)
    assert getattr(evaluated, "router_aux_loss", None) is None
    assert torch.equal(evaluated.loss, plain.loss)


@pytest.mark.parametrize("method", LEARNERS)
@every_backend
def test_accumulated_copies_of_a_micro_batch_equal_one(method: str, backend: str) -> None:
    model = wrapped(method, backend, aux_weight=0.3).train()
    inputs = ragged(model)
    _, one = backward(model, inputs)
    _, four = backward(model, inputs, parts=4)
    for name, grad in four.items():
        close(grad / 4, one[name], 1e-5, name)


@pytest.mark.parametrize("method", LEARNERS)
def test_accumulation_counted_by_labels_keeps_the_auxiliary_weight(method: str) -> None:
    """Trainers divide by the labels of the whole step: `num_items_in_batch`."""
    model = wrapped(method, aux_weight=0.3).train()
    inputs = ragged(model)
    items = (inputs["labels"][:, 1:] != -100).sum()
    _, one = backward(model, inputs)
    _, four = backward(model, inputs, parts=4, num_items_in_batch=4 * items)
    assert one.keys() == four.keys()
    for name, grad in four.items():
        close(grad, one[name], 1e-5, name)


@pytest.mark.parametrize("method", LEARNERS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@every_backend
def test_checkpointing_on_equals_off(method: str, backend: str, dropout: float) -> None:
    model = wrapped(method, backend, lora_dropout=dropout, aux_weight=0.3).train()
    inputs = ragged(model)
    loss, grads = backward(model, inputs, use_cache=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, recomputed = backward(model, inputs, use_cache=False)
    assert torch.equal(loss, again)
    assert grads.keys() == recomputed.keys()
    for name, grad in grads.items():
        close(recomputed[name], grad, 1e-6, name)


# -- batches, padding, caches -------------------------------------------------------------------------------------


@every_backend
def test_batched_equals_one_by_one(method: str, backend: str) -> None:
    model = wrapped(method, backend)
    inputs = tiny.batch(model, rows=4, labels=False)
    together = model(**inputs).logits
    for row in range(4):
        alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits
        close(alone[0], together[row], 1e-5, f"row {row}")


@pytest.mark.parametrize("method", LEARNERS)
@pytest.mark.parametrize(("left", "right"), [(0, 3), (3, 0), (1, 2)])
@every_backend
def test_padding_changes_neither_outputs_nor_losses(method: str, backend: str, left: int, right: int) -> None:
    model = wrapped(method, backend, aux_weight=0.5).train()
    inputs = tiny.batch(model)
    inputs["labels"][:, 0] = -100  # never a target without padding; on its right, the padding would predict it
    loss, grads = backward(model, inputs)
    wide = tiny.padded(inputs, left=left, right=right)
    plain, padded = model(**inputs), model(**wide)
    close(padded.logits[:, left : left + 7], plain.logits, 1e-5, "logits")
    close(aux_of(method, padded), aux_of(method, plain), 1e-5, "auxiliary loss")
    wide_loss, wide_grads = backward(model, wide)
    close(wide_loss, loss, 1e-5, "loss")
    for name, grad in grads.items():
        close(wide_grads[name], grad, 1e-4, name)


def test_padding_on_the_right_changes_nothing_in_an_encoder(method: str) -> None:
    model = wrapped(method, name="bert", aux_weight=0.5).train()
    inputs = tiny.batch(model)
    plain, padded = model(**inputs), model(**tiny.padded(inputs, right=4))
    close(padded.logits, plain.logits, 1e-5, "logits")
    close(aux_of(method, padded), aux_of(method, plain), 1e-5, "auxiliary loss")


@every_backend
@torch.no_grad()
def test_prefill_and_decoding_equal_the_full_forward(method: str, backend: str) -> None:
    model = wrapped(method, backend)
    inputs = tiny.padded(tiny.batch(model, tokens=8, labels=False), left=2)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = ids.clone()
    labels[:, :6] = -100  # what is read before decoding is the prompt
    full = model(**inputs, labels=labels).logits
    step = model(input_ids=ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
    close(step.logits[:, 2:], full[:, 2:6], 1e-5, "prefill")
    for t in range(6, 10):
        step = model(
            input_ids=ids[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            position_ids=torch.full((len(ids), 1), t),
            past_key_values=step.past_key_values,
            use_cache=True,
        )
        close(step.logits[:, 0], full[:, t], 1e-5, f"token {t}")


# -- copies, checkpoints, several adapters ------------------------------------------------------------------------


@every_base
def test_a_bf16_base_keeps_routers_and_experts_in_fp32(method: str, base: str) -> None:
    model = wrapped(method, "auto", base).train()
    output = model(**tiny.batch(model))
    assert output.logits.dtype == DTYPES[base]
    assert aux_of(method, output).dtype == torch.float32
    if method in LEARNERS:
        output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".moe_lora_" in name else DTYPES[base]), name
        assert parameter.grad is None or parameter.grad.isfinite().all()


@every_backend
@torch.no_grad()
def test_renumbering_the_experts_changes_nothing(method: str, backend: str) -> None:
    model = wrapped(method, backend)
    inputs = tiny.batch(model)
    with moesaic.trace(model, keep_weights=True) as trace:
        before = model(**inputs).logits
    parted = any((w != w[..., :1]).any() for name in trace.modules for w in trace.weights(name))
    order = torch.tensor([2, 0, 3, 1])
    for layer in tiny.mixtures(model).values():
        A, B = layer.moe_lora_A["default"], layer.moe_lora_B["default"]
        for part in (A, B) if len(A) == len(B) else (B,):
            part.copy_(part.unflatten(0, (4, -1))[order].flatten(0, 1))
    moved = (model(**inputs).logits - before).abs().max() > 1e-3
    assert moved == parted, "experts without their router must not fit, unless all weigh alike"
    for layer in routed(model).values():
        layer.moe_lora_router["default"].permute_experts_(order)
    scores = find_host(model).pinned_scores
    find_host(model).pinned_scores = None if scores is None else scores[:, order]
    close(model(**inputs).logits, before, 1e-5, "logits")


@every_backend
def test_a_deep_copy_answers_alike_and_lives_alone(method: str, backend: str) -> None:
    model = wrapped(method, backend)
    inputs = tiny.batch(model)
    wanted = model(**inputs).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, wanted)
    assert find_host(twin) is not find_host(model)
    with moesaic.trace(model) as trace:
        twin(**inputs)
    assert not trace.modules, "the copy's hooks must not report to the original"
    tiny.randomize_b(twin)
    assert torch.equal(model(**inputs).logits, wanted)
    assert not torch.equal(twin(**inputs).logits, wanted)
    assert aux_of(method, twin.train()(**inputs)).isfinite()


@every_backend
def test_two_adapters_of_different_sizes_live_side_by_side(method: str, backend: str) -> None:
    model = wrapped(method, backend)
    inputs = tiny.batch(model)
    first = model(**inputs).logits
    model.add_adapter("second", linear_in_the_batch(method, num_experts=fewer(method), r=2, backend=backend))
    assert torch.equal(model(**inputs).logits, first), "an adapter that is not active changes nothing"
    tiny.randomize_b(model)
    model.set_adapter("default")
    first = model(**inputs).logits
    model.set_adapter("second")
    second = model(**inputs).logits
    assert not torch.equal(first, second)
    if method in LEARNERS:
        model.train()
        inputs.pop(TARGETS, None)  # they are for as many experts as the first adapter has
        model(**inputs).loss.backward()
        learnt = {name for name, p in model.named_parameters() if p.grad is not None}
        assert learnt
        assert all(".second" in name for name in learnt)
        model.eval()
    model.set_adapter("default")
    assert torch.equal(model(**inputs).logits, first)
    model.delete_adapter("second")
    assert torch.equal(model(**inputs).logits, first)


@pytest.mark.parametrize("targets", [None, "all-linear", "some"])
def test_a_second_adapter_finds_the_models_own_linears_without_a_warning(method: str, targets: Any) -> None:
    some = ["q_proj"] if method in LINEAR_LEVEL else ["gate_proj", "up_proj", "down_proj"]
    targets = some if targets == "some" else targets
    model = wrapped(method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.add_adapter("second", tiny.small(method, r=2, target_modules=targets))
        model.set_adapter("second")
        model(**tiny.batch(model))
    holders = {name for name, layer in tiny.mixtures(model).items() if "second" in layer.moe_lora_A}
    assert len(holders) == (2 * len(some) if targets is some else 14)
    assert not any("moe_lora" in name for name in holders)


@pytest.mark.parametrize("method", LINEAR_LEVEL)
def test_two_active_adapters_add_up(method: str) -> None:
    model = wrapped(method)
    model.add_adapter("second", linear_in_the_batch(method, num_experts=fewer(method), r=2))
    tiny.randomize_b(model)
    layer = next(iter(tiny.mixtures(model).values()))
    x = torch.randn(2, 5, layer.sites["default"].d_in)
    deltas = []
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        deltas.append(layer(x) - layer.base_layer(x))
    close(deltas[2], deltas[0] + deltas[1], 1e-5, "sum of adapters")
    model.train()
    inputs = tiny.batch(model)
    inputs.pop(TARGETS, None)  # they are for as many experts as the first adapter has
    assert aux_of(method, model(**inputs)).isfinite()


_LOAD = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, moesaic
from peft import PeftModel
from tests import tiny
torch.set_num_threads(1)
for job in json.load(open(sys.argv[1])):
    for load, name in ((PeftModel.from_pretrained, "peft"), (moesaic.from_pretrained, "moesaic")):
        base = tiny.llama().to(getattr(torch, job["dtype"]))
        model = tiny.pin_task(load(base, job["folder"])).eval()
        torch.save(model(**tiny.batch(base)).logits.detach(), job["out"] + name)
"""


def test_a_fresh_process_loads_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    jobs, wanted = [], {}
    for method in EVERY:
        for base, dtype in DTYPES.items():
            model = wrapped(method, base=base)
            folder = tmp_path / f"{method}-{base}"
            model.save_pretrained(folder)
            out = str(folder / "logits.pt")
            jobs.append({"folder": str(folder), "out": out, "dtype": str(dtype).removeprefix("torch.")})
            wanted[out] = model(**tiny.batch(model)).logits
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", _LOAD, str(tmp_path / "jobs.json")], check=True, cwd=root)
    for out, logits in wanted.items():
        for name in ("peft", "moesaic"):
            assert torch.equal(torch.load(out + name, weights_only=True), logits), (out, name)


def test_a_saved_config_is_read_back_as_it_was(method: str, tmp_path: Path) -> None:
    config = tiny.small(method, num_experts=3, lora_dropout=0.25, aux_weight=0.125)
    config.save_pretrained(tmp_path)
    for key in ("adapters", "texts"):  # what they were read from is not kept
        if hasattr(config, key):
            setattr(config, key, None)
    assert tiny.config_class(method).from_pretrained(tmp_path) == config


COMPILED = ("rmoe", "mixlora")
"""State between layers, and experts that are blocks."""


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m in COMPILED else pytest.mark.slow) for m in EVERY])
def test_compiled_equals_eager(method: str, mode: str) -> None:
    targets = ["v_proj"] if method in LINEAR_LEVEL else None
    model = tiny.wrap(tiny.llama(layers=2), linear_in_the_batch(method, target_modules=targets, aux_weight=0.5))
    inputs = ragged(model)
    mode = mode if method in LEARNERS else "eval"
    model.train(mode == "train")
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if mode == "train":
            loss, grads = backward(model, inputs)
            compiled_loss, compiled_grads = backward(torch.compile(model, backend="aot_eager"), inputs)
            close(compiled_loss, loss, 1e-6, "loss")
            for name, grad in grads.items():
                close(compiled_grads[f"_orig_mod.{name}"], grad, 1e-5, name)
        else:
            with torch.no_grad():
                eager = model(**inputs).logits
                close(torch.compile(model, backend="aot_eager")(**inputs).logits, eager, 1e-6, "logits")
