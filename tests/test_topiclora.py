"""TopicLoRA's third stage against its equations, its loss, and how prototypes and targets get where they belong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

import moesaic
from moesaic.data import examples as data
from moesaic.data.causal import CausalCollator, question
from moesaic.errors import ConfigError
from moesaic.host import TARGETS
from moesaic.host.masks import given
from moesaic.lora.methods.topiclora import PrototypeRouter, TopicAlignment, TopicLoRAConfig, divergence
from moesaic.lora.methods.topics import encoders
from moesaic.lora.methods.topics.artefact import build
from moesaic.lora.methods.topics.settings import TopicSettings
from moesaic.models.encoder import EncoderCollator, Layout
from moesaic.routing import LinearRouter, Record, Routing, Site, TopK
from moesaic.runs.recipe import load_recipe
from moesaic.training.prepared import prepare
from moesaic.training.run import build_trainer, train
from tests import tiny
from tests.tiny_folders import save_model, tokenizer, write_tasks

F64 = torch.float64


def double(**settings: Any) -> Any:
    """A tiny Llama with a float64 TopicLoRA."""
    return tiny.wrap(tiny.llama(), tiny.small("topiclora", **settings)).to(F64)


def batch(model: Any, rows: int = 3) -> dict[str, Tensor]:
    """Prompts of different lengths, padding on the right, targets for every row."""
    inputs = tiny.batch(model, rows=rows)
    inputs["labels"][:, :3] = -100
    inputs["labels"][1, :5] = -100
    inputs["labels"][2, 5:] = -100
    inputs["attention_mask"][2, 5:] = 0
    return inputs | {TARGETS: torch.randn(rows, 4).softmax(dim=-1)}


def record(probs: Tensor, **known: Any) -> Record:
    return Record(Site("x", 4, 4), Routing(probs, probs, probs.log()), **known)


# -- the layer -----------------------------------------------------------------------------------------------------


def by_hand(layer: Any, x: Tensor, *, k: int, scaling: float, tau: float = 0.1) -> Tensor:
    """Output of one layer for x (N, d_in), token by token and expert by expert."""
    A, B = layer.moe_lora_A["default"], layer.moe_lora_B["default"]
    router = layer.moe_lora_router["default"]
    r = len(A) // router.num_experts
    rows = []
    for token in x:
        u = router.read.weight @ token
        scores = torch.stack([u @ c / (u.norm() * c.norm()) for c in router.prototypes])
        p = torch.exp(scores / tau) / torch.exp(scores / tau).sum()
        chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[:k]
        y = layer.base_layer(token)
        for e in chosen:
            share = p[e] / sum(p[f] for f in chosen)
            y = y + scaling * share * (B[e * r : (e + 1) * r].T @ (A[e * r : (e + 1) * r] @ token))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_layer_equals_the_equations_in_value_and_gradient(k: int, tau: float) -> None:
    model = double(top_k=k, router_temperature=tau)
    layer = tiny.mixtures(model)["base_model.model.model.layers.0.mlp.up_proj"]
    router = layer.moe_lora_router["default"]
    router.prototypes.data = F.normalize(router.prototypes, dim=-1)  # unit in float32 only
    parameters = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(6, 16, dtype=F64)
    got, wanted = layer(x), by_hand(layer, x, k=k, scaling=8 / 4, tau=tau)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    cotangent = torch.randn_like(got)
    got_grads = torch.autograd.grad((got * cotangent).sum(), parameters, allow_unused=k == 1)
    wanted_grads = torch.autograd.grad((wanted * cotangent).sum(), parameters, allow_unused=k == 1)
    torch.testing.assert_close(got_grads, wanted_grads, atol=1e-11, rtol=1e-8)


def test_a_learnt_temperature_starts_as_the_fixed_one_and_learns() -> None:
    fixed, learnt = double(), double(learn_temperature=True).train()
    inputs = batch(fixed)
    torch.testing.assert_close(learnt.eval()(**inputs).logits, fixed(**inputs).logits, atol=1e-6, rtol=1e-6)
    learnt.train()(**inputs).loss.backward()
    for name, p in tiny.router_parameters(learnt).items():
        assert p.grad is not None, name
        assert p.grad.any(), name
    assert len(tiny.router_parameters(learnt)) == 2 * len(tiny.router_parameters(fixed))


def test_the_ablation_routes_by_a_plain_linear_router() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("topiclora", prototype_router=False)).train()
    routers = [layer.moe_lora_router["default"] for layer in tiny.mixtures(model).values()]
    assert all(type(router) is LinearRouter for router in routers)
    assert model.peft_config["default"].prototypes is None, "no topics were needed for it"
    model(**batch(model)).router_aux_loss.backward()
    assert all(router.linear.weight.grad.any() for router in routers)


def test_a_token_of_zeros_has_a_finite_gradient() -> None:
    router = PrototypeRouter(4, F.normalize(torch.randn(3, 5), dim=-1))
    h = torch.zeros(2, 4, requires_grad=True)
    logits = router(h)
    assert not logits.any()
    logits.square().sum().backward()
    assert h.grad is not None
    assert h.grad.isfinite().all()


# -- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_the_divergence_is_zero_only_where_both_agree_and_always_finite(direction: Any) -> None:
    g = torch.randn(50, 5, dtype=F64).softmax(dim=-1)
    p = torch.randn(50, 5, dtype=F64).softmax(dim=-1)
    assert divergence(g, g, direction).abs().max() < 1e-12
    assert (divergence(g, p, direction) > 1e-6).all()
    one_hot = torch.eye(5, dtype=F64)
    floored = 0.95 * one_hot.roll(1, 0) + 0.01
    for first, second in ((floored, one_hot), (one_hot, floored)):
        distance = divergence(first, second, direction)
        assert distance.isfinite().all()
        assert (distance > 0).all()
    if direction == "js":
        torch.testing.assert_close(divergence(g, p, "js"), divergence(p, g, "js"))
        assert (divergence(g, p, "js") <= math.log(2)).all()
    else:
        wanted = torch.distributions.kl_divergence(
            *(torch.distributions.Categorical(q) for q in ((g, p) if direction == "forward" else (p, g)))
        )
        torch.testing.assert_close(divergence(g, p, direction), wanted)


def test_the_gradient_through_one_softmax_is_p_minus_g() -> None:
    logits = torch.randn(4, 6, dtype=F64, requires_grad=True)
    g = torch.randn(4, 6, dtype=F64).softmax(dim=-1)
    divergence(g, logits.softmax(dim=-1)).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, logits.detach().softmax(dim=-1) - g, atol=1e-12, rtol=1e-9)


def naive_alignment(probs: Tensor, g: Tensor, taken: Tensor) -> Tensor:
    """KL(g || mean of p over the tokens taken), mean over rows; loops, for probs (B, T, E)."""
    rows = []
    for row in range(len(probs)):
        chosen = [probs[row, t] for t in range(probs.shape[1]) if taken[row, t]]
        mean = sum(chosen) / len(chosen)
        rows.append(sum(g[row, e] * torch.log(g[row, e] / mean[e]) for e in range(len(mean))))
    return sum(rows) / len(rows)  # type: ignore[return-value]


@pytest.mark.parametrize("tokens", ["prompt", "all"])
def test_the_auxiliary_loss_is_the_mean_divergence_over_routers_and_rows(tokens: str) -> None:
    model = double(aux_weight=0.5, kl_tokens=tokens).train()
    inputs = batch(model)
    moesaic.set_training_progress(model, 0.5)
    got = model(**inputs).router_aux_loss
    logits: list[Tensor] = []
    for layer in tiny.mixtures(model).values():
        layer.moe_lora_router["default"].register_forward_hook(lambda m, a, out: logits.append(out))
    model(**inputs)
    assert len(logits) == 14
    taken = inputs["attention_mask"].bool()
    if tokens == "prompt":
        taken = taken & (inputs["labels"] == -100)
        assert taken.sum(dim=1).tolist() == [3, 5, 3]
    g = inputs[TARGETS].to(F64)
    wanted = sum(naive_alignment(u.softmax(dim=-1), g, taken) for u in logits) / 14
    torch.testing.assert_close(got, 0.5 * wanted, atol=1e-10, rtol=1e-10)
    parameters = list(tiny.router_parameters(model).values())
    got_grads = torch.autograd.grad(got, parameters, retain_graph=True)
    wanted_grads = torch.autograd.grad(0.5 * wanted, parameters)  # type: ignore[arg-type]
    torch.testing.assert_close(got_grads, wanted_grads, atol=1e-10, rtol=1e-7)


def test_the_loss_sees_the_dense_probabilities_before_the_gate() -> None:
    probs = torch.randn(2, 3, 4, dtype=F64).softmax(dim=-1)
    g = torch.randn(2, 4, dtype=F64).softmax(dim=-1)
    routing = TopK(1)(probs.log())
    (value,) = TopicAlignment(1.0).per_router([Record(Site("x", 4, 4), routing, targets=g)], None)
    torch.testing.assert_close(value[0], naive_alignment(probs, g, torch.ones(2, 3, dtype=torch.bool)))


def test_rows_without_a_prompt_count_all_their_tokens_and_rows_of_padding_none() -> None:
    probs = torch.randn(3, 4, 5, dtype=F64).softmax(dim=-1)
    g = torch.randn(3, 5, dtype=F64).softmax(dim=-1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    prompt = given(torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).bool(), mask, None, labels=True)
    (value,) = TopicAlignment(1.0).per_router([record(probs, mask=mask, prompt=prompt, targets=g)], None)
    taken = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    torch.testing.assert_close(value[0], naive_alignment(probs[:2], g[:2], taken))


def test_an_input_without_a_sequence_axis_counts_each_token() -> None:
    probs = torch.randn(4, 5, dtype=F64).softmax(dim=-1)
    g = torch.randn(4, 5, dtype=F64).softmax(dim=-1)
    mask = torch.tensor([True, True, False, True])
    (value,) = TopicAlignment(1.0).per_router([record(probs, mask=mask, targets=g)], None)
    torch.testing.assert_close(value[0], divergence(g[mask], probs[mask]).mean())


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.7, 1.0), (1.0, 1.0)])
def test_the_loss_rises_over_the_first_tenth(progress: float, factor: float) -> None:
    probs, g = torch.randn(2, 3, 4).softmax(dim=-1), torch.randn(2, 4).softmax(dim=-1)
    values = [
        torch.cat(list(TopicAlignment(1.0, warmup=w).per_router([record(probs, targets=g, progress=progress)], None)))
        for w in (0.1, 0.0)
    ]
    assert values[1] > 0
    torch.testing.assert_close(values[0], factor * values[1])


def test_gradient_reaches_the_reading_and_neither_prototypes_nor_targets() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("topiclora")).train()
    inputs = batch(model)
    inputs[TARGETS].requires_grad_()
    model(**inputs).router_aux_loss.backward()
    assert inputs[TARGETS].grad is None
    for layer in tiny.mixtures(model).values():
        router = layer.moe_lora_router["default"]
        assert router.read.weight.grad.any()
        assert not router.prototypes.requires_grad
        assert router.prototypes.grad is None


def test_without_the_kl_the_loss_is_the_language_models() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("topiclora", aux_weight=0.0)).train()
    inputs = batch(model)
    output = model(**inputs)
    assert getattr(output, "router_aux_loss", None) is None
    del inputs[TARGETS]
    assert torch.equal(output.loss, model(**inputs).loss)
    assert model.peft_config["default"].targets(["a prompt"]) is None, "and nothing is encoded for it"


def test_a_batch_without_targets_has_no_kl_and_one_warning() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("topiclora")).train()
    inputs = batch(model)
    del inputs[TARGETS]
    with pytest.warns(UserWarning, match="KL term is 0: the batch has no routing_targets.*config.targets"):
        output = model(**inputs)
    assert output.router_aux_loss == 0
    plain = tiny.wrap(tiny.llama(), tiny.small("topiclora", aux_weight=0.0)).train()
    assert torch.equal(output.loss, plain(**inputs).loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs).loss.backward()


def test_targets_that_do_not_fit_are_refused() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("topiclora")).train()
    inputs = batch(model)
    with pytest.raises(ConfigError, match=r"routing_targets is \(3, 5\) for 3 rows and num_experts=4"):
        model(**{**inputs, TARGETS: torch.full((3, 5), 0.2)})


def test_the_balance_loss_is_an_option() -> None:
    plain = tiny.wrap(tiny.llama(), tiny.small("topiclora")).train()
    balanced = tiny.wrap(tiny.llama(), tiny.small("topiclora", balance_weight=2.0)).train()
    inputs = batch(plain)
    assert [type(loss).__name__ for loss in TopicLoRAConfig().losses()] == ["TopicAlignment"]
    extra = balanced(**inputs).router_aux_loss - plain(**inputs).router_aux_loss
    assert extra > 0.1 * 2.0 * 0.9, "balanced routing gives about one"


@pytest.mark.parametrize(("temperature", "lr", "left"), [(0.3, 1e-2, 1e-4), (0.1, 3e-3, 0.02)])
def test_a_fixed_target_can_be_learnt(temperature: float, lr: float, left: float) -> None:
    """The KL alone goes to about 0 within 200 steps; slower at the default temperature, where tokens commit early."""
    settings: dict[str, Any] = {"topic_dim": 32, "router_temperature": temperature, "target_modules": ["up_proj"]}
    base = tiny.llama(layers=1, hidden_size=64, intermediate_size=32)
    model = tiny.wrap(base, tiny.small("topiclora", aux_weight=1.0, kl_tokens="all", **settings)).train()
    inputs = tiny.batch(model, rows=2)
    inputs[TARGETS] = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.6, 0.2]])
    optimizer = torch.optim.Adam(tiny.router_parameters(model).values(), lr=lr)
    values = []
    for _ in range(200):
        loss = model(**inputs).router_aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[0] > 0.1
    assert values[-1] < left * values[0]


# -- prototypes ----------------------------------------------------------------------------------------------------


def test_every_router_starts_from_the_topics_prototypes() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("topiclora"))
    made = build(TopicSettings(num_experts=4, topic_dim=8))
    for layer in tiny.mixtures(model).values():
        assert torch.equal(layer.moe_lora_router["default"].prototypes, made.prototypes)
    assert torch.equal(model.peft_config["default"].expert_prototypes(), made.prototypes)


def test_prototypes_stay_float32_on_a_bf16_base_and_follow_to_float64() -> None:
    model = tiny.wrap(tiny.llama().to(torch.bfloat16), tiny.small("topiclora"))
    wanted = model.peft_config["default"].expert_prototypes()
    for layer in tiny.mixtures(model).values():
        assert torch.equal(layer.moe_lora_router["default"].prototypes, wanted)
    layer = next(iter(tiny.mixtures(model.to(F64)).values()))
    assert torch.equal(layer.moe_lora_router["default"].prototypes, wanted.double())


_LOAD = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, moesaic, moesaic.lora.methods.topics
from moesaic.lora.methods import topiclora
from moesaic.lora.methods.topics import artefact, encoders
def refuse(*args, **kwargs):
    raise RuntimeError("asked for")
encoders.encoder = encoders.TransformerEncoder = artefact.build = topiclora.build = topiclora.Topics.load = refuse
from peft import PeftModel
from tests import tiny
torch.set_num_threads(1)
for trainable in (False, True):
    model = PeftModel.from_pretrained(tiny.llama(), sys.argv[1], is_trainable=trainable).eval()
    torch.save(model(**tiny.batch(tiny.llama())).logits.detach(), f"{sys.argv[1]}/{trainable}.pt")
"""


def test_a_fresh_process_loads_without_encoder_graph_or_topics_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    build(TopicSettings(encoder="hashing", num_experts=4, topic_dim=8, steps=5)).save(file)
    model = tiny.wrap(tiny.llama(), tiny.small("topiclora", topics=str(file)))
    wanted = model(**tiny.batch(tiny.llama())).logits
    model.save_pretrained(tmp_path / "adapter")
    file.unlink()
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "adapter")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    for trainable in (False, True):
        assert torch.equal(torch.load(tmp_path / "adapter" / f"{trainable}.pt", weights_only=True), wanted)


def test_training_goes_on_only_with_the_topics_it_began_with(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    settings = TopicSettings(encoder="hashing", num_experts=4, topic_dim=8, steps=5)
    build(settings).save(file)
    model = tiny.wrap(tiny.llama(), tiny.small("topiclora", topics=str(file)))
    wanted = model.peft_config["default"].targets(["add 2 and 3"])
    assert wanted is not None
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(loaded.peft_config["default"].targets(["add 2 and 3"]), wanted)
    build(settings, seed=1).save(file)
    with pytest.raises(ConfigError, match="gives other prototypes than this adapter was trained with"):
        loaded.peft_config["default"].targets(["add 2 and 3"])


def test_the_checkpoints_prototypes_win_over_the_configs(tmp_path: Path) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("topiclora"))
    order = torch.tensor([2, 0, 3, 1])
    layer = tiny.mixtures(model)["base_model.model.model.layers.0.mlp.up_proj"]
    layer.moe_lora_router["default"].permute_experts_(order)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    got = tiny.mixtures(loaded)["base_model.model.model.layers.0.mlp.up_proj"].moe_lora_router["default"].prototypes
    assert torch.equal(got, model.peft_config["default"].expert_prototypes()[order])


def test_targets_come_from_the_prompt_alone() -> None:
    """No leak: rows that differ in their answers alone have the same targets, those that differ in the prompt not."""
    config = TopicLoRAConfig(encoder="hashing", num_experts=4, topic_dim=8)
    rows = [
        data.Example("t", "add 2 and 3", completion="5"),
        data.Example("t", "add 2 and 3", completion="a poem about spring"),
        data.Example("t", "add 2 and 3", choices=("4", "5"), answer=1),
        data.Example("t", messages=(("user", "add 2 and 3"), ("assistant", "who knows"))),
        data.Example("t", messages=(("user", "hello"), ("assistant", "hi"), ("user", "add"), ("assistant", "yes"))),
    ]
    assert [question(row) for row in rows] == ["add 2 and 3"] * 4 + ["hello\nhi\nadd"]
    targets = config.targets([question(row) for row in rows])
    assert targets is not None
    assert torch.equal(targets[:4], targets[:1].expand(4, -1))
    assert not torch.equal(targets[3], targets[4])
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_direction": "backward"}, "kl_direction='backward' must be one of forward, reverse, js"),
        ({"kl_tokens": "answer"}, "kl_tokens='answer' must be one of prompt, all"),
        ({"aux_reduce": "max"}, "aux_reduce='max' must be one of sum, mean"),
        ({"topics": 3}, "topics=3 must be a text"),
        ({"topic_dim": 0}, "topic_dim=0 must be at least 1"),
        ({"router_temperature": 0.0}, "router_temperature=0.0 must be above 0"),
        ({"kl_warmup": 1.5}, "kl_warmup=1.5 must be between 0 and 1"),
        ({"balance_weight": 0.1, "aux_weight": 0.0}, "balance_weight=0.1 must be at least 0, and needs aux_weight"),
        ({"top_k": 9}, "top_k=9 must be between 1 and num_experts=8"),
        ({"kl_dirction": "js"}, "did you mean 'kl_direction'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TopicLoRAConfig(**settings)


def test_topics_that_do_not_fit_the_adapter_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    build(TopicSettings(encoder="hashing", num_experts=4, topic_dim=8, steps=0)).save(file)
    for settings, message in (
        ({"num_experts": 5}, "has 4 experts of size 8, but num_experts=5 and topic_dim=8: set these to it, or build"),
        ({"encoder": "minilm"}, "encoder=minilm, but .* was made with hashing: leave encoder out"),
        ({"topics": "gone.safetensors"}, "no topics file gone.safetensors: make one with `moesaic topics build"),
        ({"prototypes": "AAAA"}, "prototypes do not hold num_experts=4 times topic_dim=8 numbers: leave them out"),
        ({"prototypes": "?"}, "prototypes do not hold num_experts=4"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny.wrap(tiny.llama(), tiny.small("topiclora", **{"topics": str(file), **settings}))


def test_defaults_are_the_reconstructions() -> None:
    config = TopicLoRAConfig()
    assert (config.num_experts, config.top_k, config.r, config.scaling) == (8, 2, 8, 2.0)
    assert (config.topic_dim, config.router_temperature, config.aux_weight, config.kl_warmup) == (64, 0.1, 0.1, 0.1)
    router = config.router(Site("x", 512, 4))
    assert isinstance(router, PrototypeRouter)
    assert router.read.weight.shape == (64, 512)
    assert float(router.read.weight.detach().std()) == pytest.approx(0.02, rel=0.02)


# -- the training layer --------------------------------------------------------------------------------------------


def test_collators_emit_the_targets_they_are_given() -> None:
    rows = [{"input_ids": [5, 6], "labels": [-100, 6], "task": 0, "targets": [0.25, 0.75]}] * 2
    torch.testing.assert_close(CausalCollator(0)(rows)[TARGETS], torch.tensor([[0.25, 0.75]] * 2))
    examples = [data.Example("t", p, choices=("no", "yes"), answer=0) for p in ("a b", "c", "a b")]
    tok, layout = tokenizer(encoder=True), Layout.of(examples)
    taught = {"a b": [0.5, 0.5], "c": [0.0, 1.0]}
    got = EncoderCollator(tok, layout, targets=taught)(examples)[TARGETS]
    torch.testing.assert_close(got, torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.5, 0.5]]))
    assert TARGETS not in EncoderCollator(tok, layout)(examples)


def settings_of(root: Path, kind: str, *more: str) -> list[str]:
    save_model(root / "model", kind)
    write_tasks(root / "data", kind)
    return [
        f"model={root / 'model'}",
        f"data={root / 'data'}",
        f"out={root / 'run'}",
        "steps=4",
        "batch_size=4",
        "warmup=1",
        "adapter.encoder=hashing",
        "adapter.num_experts=4",
        "adapter.topic_dim=8",
        *more,
    ]


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_training_encodes_each_prompt_that_it_draws_once_and_logs_the_kl(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(texts: Any) -> Tensor:
        seen.extend(texts)
        return encoders.hashing(texts)

    settings = settings_of(tmp_path, kind)
    TopicLoRAConfig(encoder="hashing", num_experts=4, topic_dim=8).made_topics()  # encodes the topics themselves
    monkeypatch.setattr(encoders, "encoder", lambda name: spy)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*KL term is 0")
        train(load_recipe("topiclora", settings))
    files = (tmp_path / "data").glob("*/train.jsonl")
    prompts = [json.loads(line)["prompt"] for file in files for line in file.read_text().splitlines()]
    drawn = 4 * 4  # steps x rows, fewer than there are
    assert len(seen) == len(set(seen)) == drawn < len(set(prompts))
    assert set(seen) <= set(prompts)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = [line["router_aux_loss"] for line in lines]
    assert values[0] == 0, "the KL rises from 0"
    assert all(value > 0 for value in values[1:])


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_a_batch_of_the_trainer_carries_each_rows_own_targets(tmp_path: Path, kind: str) -> None:
    from moesaic.runs.folder import RunFolder
    from moesaic.training.prepared import training_rows

    recipe = load_recipe("topiclora", settings_of(tmp_path, kind))
    examples = data.load(recipe.data)
    prepared = prepare(recipe, examples)
    rows = training_rows(prepared, examples)
    trainer = build_trainer(prepared, examples, rows, RunFolder(tmp_path / "run"), progress=False)
    order = list(trainer.run_sampler)
    chosen = [order[0], order[-1], order[3]]
    got = trainer.data_collator([trainer.train_dataset[i] for i in chosen])[TARGETS]
    wanted = prepared.model.peft_config["default"].targets([examples[i].prompt for i in chosen])
    torch.testing.assert_close(got, wanted)
    assert not torch.equal(got[0], got[1])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.full((2, 4), 0.25), "has 2 entries for a batch of 3 rows"),
        (torch.full((3, 4), -0.25), "not negative, and each row adding up to 1"),
        (torch.full((3, 4), float("nan")), "not negative, and each row adding up to 1"),
        (torch.full((3,), 0.25), "a float tensor"),
        ([[0.25] * 4] * 3, "a float tensor"),
    ],
)
def test_targets_that_are_no_shares_are_refused(targets: Any, message: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("topiclora")).train()
    with pytest.raises(ConfigError, match=message):
        model(**{**batch(model), TARGETS: targets})
