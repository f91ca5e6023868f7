"""MixLoRA against its equations, and FFNs as experts on every kind of model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

import moesaic
from moesaic.errors import ConfigError, TrainingError
from moesaic.lora.methods.mixlora import MixLoRAConfig
from tests import tiny

F64 = torch.float64
FFN: dict[str, Any] = {
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "qwen3": ["gate_proj", "up_proj", "down_proj"],
    "gpt2": ["mlp.c_fc", "mlp.c_proj"],
    "t5": ["wi", "wo"],
    "gated t5": ["wi_0", "wi_1", "wo"],
    "bert": r".*\d\.(intermediate|output)\.dense",  # attention.output.dense ends like the FFN's last linear
}
ROUTED = {"llama": 2, "qwen3": 2, "gpt2": 2, "t5": 4, "gated t5": 4, "bert": 2}


def make(name: str, **overrides: Any) -> Any:
    if name == "gated t5":
        return tiny.t5(feed_forward_proj="gated-gelu", **overrides)
    return tiny.MODELS[name](**overrides)


def small(name: str = "llama", **overrides: Any) -> Any:
    return tiny.small("mixlora", **{"target_modules": FFN[name], **overrides})


def owners(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in tiny.mixtures(model).items() if len(layer.moe_lora_router)}


# -- the equations, one token and one expert at a time -----------------------------------------------------------------


def weight_and_bias(linear: Any) -> tuple[Tensor, Tensor | None]:
    base = linear.base_layer
    weight = base.weight.T if type(base).__name__ == "Conv1D" else base.weight
    return weight, base.bias


def naive_ffn(
    first: list[Any],
    last: Any,
    act: Callable[[Tensor], Tensor],
    x: Tensor,
    choose: Callable[[Tensor], dict[int, Tensor]],
) -> Tensor:
    """Sum over the chosen experts of the whole FFN with the expert's own weights, for x (..., d)."""
    router = first[0].moe_lora_router["default"].linear.weight
    num_experts = len(router)

    def linear(layer: Any, e: int, h: Tensor) -> Tensor:
        weight, bias = weight_and_bias(layer)
        A, B = (m["default"].chunk(num_experts)[e] for m in (layer.moe_lora_A, layer.moe_lora_B))
        return F.linear(h, weight + layer.scaling["default"] * B.T @ A, bias)

    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        y = torch.zeros_like(linear(last, 0, torch.zeros(weight_and_bias(last)[0].shape[1], dtype=x.dtype)))
        for e, w in choose(torch.softmax(router @ token, dim=0)).items():
            inner = act(linear(first[0], e, token))
            if len(first) == 2:
                inner = inner * linear(first[1], e, token)
            y = y + w * linear(last, e, inner)
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)


def after_attention(norm: nn.Module, ffn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """BERT's way to end a layer."""
    out: Tensor = norm(ffn(x) + x)
    return out


def top_k(k: int) -> Callable[[Tensor], dict[int, Tensor]]:
    def choose(p: Tensor) -> dict[int, Tensor]:
        chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[:k]
        total = sum(p[e] for e in chosen)
        return {e: p[e] / total for e in chosen}

    return choose


def top_p(mass: float) -> Callable[[Tensor], dict[int, Tensor]]:
    def choose(p: Tensor) -> dict[int, Tensor]:
        chosen: list[int] = []
        for e in sorted(range(len(p)), key=lambda e: -p[e].item()):
            chosen.append(e)
            if sum(p[c].item() for c in chosen) >= mass:
                break
        return {e: p[e] for e in chosen}

    return choose


def switch(p: Tensor) -> dict[int, Tensor]:
    best = int(p.argmax())
    return {best: p[best]}


def naive(name: str, model: PeftModel, choose: Callable[[Tensor], dict[int, Tensor]]) -> Any:
    """The base model with every FFN's forward replaced by `naive_ffn` on the mixture's own parameters."""
    plain = make(name).to(F64)
    inside = model.get_base_model()
    for path, module in plain.named_modules():
        kind = type(module).__name__
        if kind not in ("LlamaMLP", "Qwen3MLP", "GPT2MLP", "T5DenseActDense", "T5DenseGatedActDense", "BertLayer"):
            continue
        ffn = inside.get_submodule(path)
        if kind == "BertLayer":
            first, last, act = [ffn.intermediate.dense], ffn.output.dense, ffn.intermediate.intermediate_act_fn
            mixed = partial(naive_ffn, first, last, act, choose=choose)
            module.feed_forward_chunk = partial(after_attention, module.output.LayerNorm, mixed)
            continue
        *first, last = [getattr(ffn, leaf.rpartition(".")[2]) for leaf in FFN[name]]
        module.forward = partial(
            naive_ffn, first, last, ffn.act_fn if hasattr(ffn, "act_fn") else ffn.act, choose=choose
        )
    return plain


GATES: dict[str, tuple[dict[str, Any], Callable[[Tensor], dict[int, Tensor]]]] = {
    "top-1": ({"top_k": 1}, top_k(1)),
    "top-2": ({"top_k": 2}, top_k(2)),
    "all": ({"top_k": 4}, top_k(4)),
    "top-p": ({"routing": "top_p", "top_p": 0.8}, top_p(0.8)),
    "switch": ({"routing": "switch"}, switch),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("name", "gate"), [(name, "top-2") for name in FFN] + [("llama", g) for g in GATES] + [("bert", "switch")]
)
def test_model_equals_the_equations_in_value_and_every_gradient(name: str, gate: str, backend: str) -> None:
    settings, choose = GATES[gate]
    config = small(name, aux_weight=0.0, router_init_std=0.3, backend=backend, **settings)
    model = tiny.wrap(make(name).to(F64), config, autocast_adapter_dtype=False).to(F64)
    inputs = tiny.batch(model, rows=2, tokens=5)
    wanted = naive(name, model, choose)(**inputs)
    got = model(**inputs)
    torch.testing.assert_close(got.logits, wanted.logits, atol=1e-12, rtol=1e-10)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(owners(model)) == ROUTED[name]
    grads = torch.autograd.grad(got.loss, list(parameters.values()))
    naive_grads = torch.autograd.grad(wanted.loss, list(parameters.values()))
    for n, grad, wanted_grad in zip(parameters, grads, naive_grads, strict=True):
        assert gate == "top-1" or wanted_grad.abs().sum() > 0, n
        torch.testing.assert_close(grad, wanted_grad, atol=1e-12, rtol=1e-8, msg=n)


def test_the_auxiliary_loss_is_the_switch_loss_once_an_ffn() -> None:
    model = tiny.wrap(tiny.llama(), small(aux_weight=0.5)).to(F64).train()
    inputs = tiny.batch(model)
    inputs["attention_mask"][2, 4:] = 0
    real = inputs["attention_mask"].bool()
    with moesaic.trace(model, keep_weights=True) as trace:
        seen: list[Tensor] = []
        hooks = [
            layer.moe_lora_router["default"].register_forward_hook(lambda m, a, out: seen.append(out.softmax(-1)))
            for layer in owners(model).values()
        ]
        got = model(**inputs).router_aux_loss
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(trace.modules) == 2
    total = torch.zeros((), dtype=F64)
    for name, probs in zip(trace.modules, seen, strict=True):
        chosen = trace.weights(name)[0][real] > 0
        total = total + 4 * (chosen.to(F64).mean(0) / 2 * probs[real].mean(0)).sum()
    torch.testing.assert_close(got, 0.5 * total)


def test_the_z_loss_comes_with_switch_routing_only() -> None:
    kinds = {
        routing: [type(x).__name__ for x in MixLoRAConfig(routing=routing).losses()] for routing in ("top_k", "switch")
    }
    assert kinds == {"top_k": ["SwitchBalance"], "switch": ["SwitchBalance", "ZLoss"]}
    assert len(MixLoRAConfig(routing="switch", z_weight=0.0).losses()) == 1


# -- which linears do what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FFN))
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_by_default_ffns_are_experts_and_the_rest_is_plain_lora(name: str, targets: Any) -> None:
    model = tiny.wrap(make(name), tiny.small("mixlora", target_modules=targets))
    assert len(owners(model)) == ROUTED[name]
    for layer in tiny.mixtures(model).values():
        rows = len(layer.moe_lora_B["default"])
        assert rows == (16 if "default" in layer.blocks else 4), layer.name
    plain = [layer.name for layer in tiny.mixtures(model).values() if "default" not in layer.blocks]
    assert plain
    assert not [n for n in plain if re.search(r"mlp|DenseReluDense|intermediate|\d\.output", n)]


def test_plain_lora_targets_are_as_asked() -> None:
    model = tiny.wrap(tiny.llama(), small(lora_target_modules=["q_proj"]))
    plain = {layer.name for layer in tiny.mixtures(model).values() if "default" not in layer.blocks}
    assert plain == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}


def test_layers_to_transform_adapts_the_ffns_of_those_layers() -> None:
    model = tiny.wrap(tiny.llama(), small(layers_to_transform=[1]))
    assert {layer.name.split(".")[2] for layer in tiny.mixtures(model).values()} == {"1"}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {"target_modules": ["gate_proj", "up_proj"]}, "leaves out model.layers.0.mlp.down_proj"),
        ("llama", {"lora_target_modules": ["up_proj"]}, "leaves out model.layers.0.mlp.up_proj"),
        ("llama", {"exclude_modules": ["gate_proj"]}, "leaves out model.layers.0.mlp.gate_proj"),
        (
            "llama",
            {"target_modules": ["q_proj"]},
            "target_modules={'q_proj'} names none of this model's: add gate_proj, up_proj, down_proj",
        ),
        (
            "mamba",
            {"target_modules": None},
            "this model has none that is known: known ones end in down_proj, ",
        ),
    ],
)
def test_targets_that_are_no_whole_ffn_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    model = tiny.MODELS[name]()
    with pytest.raises(ConfigError) as error:
        tiny.wrap(model, tiny.small("mixlora", **{"target_modules": FFN["llama"], **settings}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not tiny.mixtures(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 9}, "top_k=9 must be between 1 and num_experts=8"),
        ({"routing": "top-k"}, "unknown routing 'top-k'"),
        ({"routing": "top_p", "top_p": 0.0}, "top_p=0.0"),
        ({"router_init_std": -1.0}, "router_init_std=-1.0"),
        ({"z_weight": -1.0}, "z_weight=-1.0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixLoRAConfig(**settings)


# -- how the linears work together -------------------------------------------------------------------------------------


def test_frozen_products_are_made_once_a_token_and_the_activation_once_a_pair() -> None:
    model = tiny.wrap(tiny.llama(layers=1), small())
    rows: dict[str, int] = {}
    mlp = model.get_base_model().model.layers[0].mlp
    for leaf in FFN["llama"]:
        base = getattr(mlp, leaf).base_layer
        base.register_forward_hook(lambda m, a, out, leaf=leaf: rows.__setitem__(leaf, out[..., 0].numel()))
    mlp.act_fn.register_forward_hook(lambda m, a, out: rows.__setitem__("act", out[..., 0].numel()))
    model(**tiny.batch(model, rows=3, tokens=7))
    assert rows == {"gate_proj": 21, "up_proj": 21, "act": 42, "down_proj": 21}


class UpFirst(nn.Module):
    """Llama's MLP with its first linears called in the other order."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * up)


def test_the_first_linears_may_run_in_any_order() -> None:
    base = tiny.llama()
    model = tiny.wrap(copy.deepcopy(base), small())
    for layer in base.model.layers:
        layer.mlp = UpFirst(layer.mlp)
    other = tiny.wrap(base, small())
    other.load_state_dict(model.state_dict())
    inputs = tiny.batch(model)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)


def test_an_ffn_that_runs_in_chunks_equals_one_that_does_not() -> None:
    inputs = tiny.batch(tiny.bert(), tokens=8)
    outputs = [tiny.wrap(tiny.bert(chunk_size_feed_forward=size), small("bert"))(**inputs).logits for size in (0, 2)]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-6, rtol=1e-5)


def test_a_layer_called_outside_of_its_model_says_so() -> None:
    model = tiny.wrap(tiny.llama(), small())
    mlp = model.get_base_model().model.layers[0].mlp
    with pytest.raises(TrainingError, match=r"model.layers.0.mlp.gate_proj was called outside") as error:
        mlp(torch.randn(2, 3, 16))
    assert "\n" not in str(error.value)
    with model.disable_adapter():
        assert mlp(torch.randn(2, 3, 16)).shape == (2, 3, 16)


class SkipsUp(UpFirst):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)))


def test_an_ffn_that_leaves_out_a_linear_says_so() -> None:
    base = tiny.llama()
    base.model.layers[1].mlp = SkipsUp(base.model.layers[1].mlp)
    model = tiny.wrap(base, small())
    with pytest.raises(TrainingError, match=r"layers.1.mlp.down_proj ran before the other linears"):
        model(**tiny.batch(model))


class DropsRows(UpFirst):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj((F.silu(self.gate_proj(x)) * self.up_proj(x))[:, 1:])


def test_an_ffn_that_changes_the_rows_says_so() -> None:
    base = tiny.llama()
    base.model.layers[0].mlp = DropsRows(base.model.layers[0].mlp)
    model = tiny.wrap(base, small())
    with pytest.raises(ConfigError, match=r"layers.0.mlp changed the number of rows between its linears \(42 to 41\)"):
        model(**tiny.batch(model))


def test_two_active_adapters_are_refused() -> None:
    model = tiny.wrap(tiny.llama(), small())
    model.add_adapter("second", small(num_experts=3))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="default, second cannot be active together") as error:
        model(**tiny.batch(model))
    assert "\n" not in str(error.value)


def test_a_deleted_adapter_leaves_the_base() -> None:
    base = tiny.llama().requires_grad_(False)
    inputs = tiny.batch(base)
    wanted = base(**inputs).logits
    model = tiny.wrap(base, small())
    model.add_adapter("second", small(num_experts=3))
    model.set_adapter("second")
    model.delete_adapter("default")
    assert all(set(layer.blocks) == {"second"} for layer in tiny.mixtures(model).values())
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, wanted)
    assert torch.equal(model(**inputs).logits, wanted)  # the second adapter's B is zero


@pytest.mark.parametrize("gate", list(GATES))
def test_recomputed_layers_give_the_same_gradients(gate: str) -> None:
    model = tiny.wrap(tiny.llama(), small(lora_dropout=0.3, aux_weight=0.1, **GATES[gate][0])).train()
    inputs = tiny.batch(model)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        # Two forwards before their backwards: the first is recomputed under its own frame.
        losses = [model(**part, use_cache=False).loss for part in (inputs, tiny.batch(model, seed=1))]
        sum(losses).backward()  # type: ignore[union-attr]
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-7, rtol=1e-5, msg=name)


@pytest.mark.parametrize("routing", ["top_k", "top_p"])
def test_autocast_trains_in_its_dtype(routing: str) -> None:
    model = tiny.wrap(tiny.llama(), small(routing=routing)).train()
    inputs = tiny.batch(model)
    wanted = model(**inputs).loss
    seen = []
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.act_fn.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert seen == [torch.bfloat16]
    torch.testing.assert_close(loss, wanted, atol=0.05, rtol=0.02)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.abs().sum() > 0, name
