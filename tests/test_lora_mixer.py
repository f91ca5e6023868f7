"""LoRA-Mixer: the two stages against plain LoRA, the two losses against their formulas, theta_0 through checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import moesaic
from moesaic import RoutedTrainerMixin
from moesaic.errors import ConfigError
from moesaic.host import find_host
from moesaic.lora.methods.lora_mixer import LoRAMixerConfig, Preserve, RoutingSpecialization
from moesaic.routing import Record, Routing, Site
from tests import loops, tiny

pytestmark = pytest.mark.filterwarnings("ignore:the training loss is computed", "ignore:the optimizer stepped")

F64 = torch.float64
R = 4
TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "mamba": ["in_proj", "out_proj"]}


def mixer(name: str = "llama", *, progress: float | None = None, seed: int = 1, **settings: Any) -> Any:
    """A wrapped float64 model in training mode, `progress` of its training done."""
    config = tiny.small("lora-mixer", **{"target_modules": TARGETS[name], **settings})
    model = tiny.wrap(tiny.MODELS[name](), config, seed=seed).to(F64).train()
    if progress is not None:
        moesaic.set_training_progress(model, progress)
    return model


def plain_lora(model: Any, expert: int, *, scale: float = 1.0) -> Any:
    """PEFT's LoRA on a fresh base of the same kind, with the weights of one expert of every layer."""
    config = model.peft_config["default"]
    base = tiny.MODELS[model.config.model_type]().to(F64)
    twin = get_peft_model(
        base, LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules)
    ).to(F64)
    rows = slice(expert * config.r, (expert + 1) * config.r)
    with torch.no_grad():
        for name, layer in tiny.mixtures(model).items():
            twin.get_submodule(name).lora_A["default"].weight.copy_(layer.moe_lora_A["default"][rows])
            twin.get_submodule(name).lora_B["default"].weight.copy_(scale * layer.moe_lora_B["default"][rows].T)
    return twin.train()


def with_tasks(inputs: dict[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
    return {**inputs, "routing_task_ids": torch.tensor(ids)}


def experts(model: Any) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if ".moe_lora_A." in n or ".moe_lora_B." in n]


def weights_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad(), moesaic.trace(model, keep_weights=True) as trace:
        model(**inputs)
    return {name: trace.weights(name)[0] for name in trace.modules}


# -- stage 1 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["llama", "mamba"])
@pytest.mark.parametrize("task", [0, 3])
def test_stage_1_with_task_d_is_plain_lora_d_and_leaves_all_else_alone(task: int, name: str, fused: bool) -> None:
    model = mixer(name, progress=0.0, target_modules=[*TARGETS[name][:1]])  # PEFT's LoRA refuses Mamba's out_proj
    twin, inputs = plain_lora(model, task), tiny.batch(model)
    for layer in () if fused else tiny.mixtures(model).values():  # a router with a hook reads its input by itself
        layer.moe_lora_router["default"].register_forward_hook(lambda *_: None)
    output, wanted = model(**with_tasks(inputs, [task] * 3)), twin(**inputs)
    torch.testing.assert_close(output.logits, wanted.logits, atol=1e-12, rtol=1e-10)
    cotangent = torch.randn_like(wanted.logits)
    ((output.logits * cotangent).sum() + output.router_aux_loss).backward()
    (wanted.logits * cotangent).sum().backward()
    for path, layer in tiny.mixtures(model).items():
        lora = twin.get_submodule(path)
        for ours, theirs in ((layer.moe_lora_A, lora.lora_A), (layer.moe_lora_B, lora.lora_B)):
            grad = ours["default"].grad.unflatten(0, (4, R))
            plain = theirs["default"].weight.grad
            torch.testing.assert_close(
                grad[task], plain if ours is layer.moe_lora_A else plain.T, atol=1e-12, rtol=1e-8
            )
            assert grad[[e for e in range(4) if e != task]].count_nonzero() == 0
        (router,) = layer.moe_lora_router["default"].parameters()
        assert router.grad is not None, "data-parallel training waits for every gradient"
        assert router.grad.count_nonzero() == 0


def test_stage_1_gives_each_sequence_of_a_batch_its_own_expert() -> None:
    model = mixer(progress=0.0)
    inputs = tiny.batch(model, rows=4, labels=False)
    together = model(**with_tasks(inputs, [2, 0, 3, 2])).logits
    for row, task in enumerate([2, 0, 3, 2]):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        torch.testing.assert_close(model(**with_tasks(alone, [task])).logits[0], together[row], atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(plain_lora(model, task)(**alone).logits[0], together[row], atol=1e-12, rtol=1e-10)
    for weights in weights_of(model, with_tasks(inputs, [2, 0, 3, 2])).values():
        assert torch.equal(weights, torch.eye(4, dtype=F64)[[2, 0, 3, 2]][:, None].expand_as(weights))


def test_stage_1_under_checkpointing_equals_stage_1() -> None:
    grads = []
    for checkpointing in (False, True):
        model = mixer(progress=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**with_tasks(tiny.batch(model), [0, 1, 3]), use_cache=False).loss.backward()
        grads.append([p.grad for p in experts(model)])
    torch.testing.assert_close(grads[1], grads[0], atol=1e-14, rtol=1e-12)


def test_stage_1_has_no_auxiliary_loss_and_does_not_take_theta_0() -> None:
    model = mixer(progress=0.4, hard_fraction=0.5)
    assert model(**with_tasks(tiny.batch(model), [0, 1, 2])).router_aux_loss == 0
    assert not any(layer.moe_lora_router["default"].anchored for layer in tiny.mixtures(model).values())


def test_the_stage_follows_the_training_and_evaluation_is_always_soft() -> None:
    model = mixer(hard_fraction=0.5, num_experts=5, top_k=3)
    inputs = with_tasks(tiny.batch(model), [0, 1, 2])

    def used() -> set[int]:
        return {int(n) for w in weights_of(model, inputs).values() for n in (w > 0).sum(-1).unique()}

    assert used() == {5}, "where nobody tells how far the training is, it is soft"
    for progress, count in ((0.0, 1), (0.49, 1), (0.5, 5), (1.0, 5)):
        moesaic.set_training_progress(model.train(), progress)
        assert used() == {count}, progress
        model.eval()
        assert used() == {3}, progress


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 4, 1], r"task id 4 is not below num_experts=4"),
        ([0, -1, 1], r"task id -1 is not below num_experts=4"),
        (None, r"hard_fraction=0\.9: stage 1 picks the expert by task id, so give routing_task_ids in the batch"),
    ],
)
def test_stage_1_refuses_tasks_without_an_expert(ids: list[int] | None, message: str) -> None:
    model = mixer(progress=0.0)
    inputs = tiny.batch(model) if ids is None else with_tasks(tiny.batch(model), ids)
    with pytest.raises(ConfigError, match=message) as caught:
        model(**inputs)
    assert "\n" not in str(caught.value)
    moesaic.set_training_progress(model, 1.0)
    assert model(**inputs).loss.isfinite(), "stage 2 needs none"


# -- stage 2 and inference ----------------------------------------------------------------------------------------


def test_stage_2_mixes_all_experts_by_their_probability() -> None:
    model = mixer(progress=1.0)
    layer = tiny.mixtures(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    x = torch.randn(5, 16, dtype=F64)
    A, B = (parts["default"].unflatten(0, (4, R)) for parts in (layer.moe_lora_A, layer.moe_lora_B))
    p = torch.softmax(x @ layer.moe_lora_router["default"].linear.weight.T, dim=-1)
    wanted = layer.base_layer(x)
    for e in range(4):
        wanted = wanted + 8 / 4 * p[:, e : e + 1] * (x @ A[e].T @ B[e])
    torch.testing.assert_close(layer(x), wanted, atol=1e-12, rtol=1e-12)
    model.eval()
    top, index = p.topk(2, dim=-1)
    wanted = layer.base_layer(x)
    for token in range(5):
        for share, e in zip(top[token] / top[token].sum(), index[token], strict=True):
            wanted[token] += 8 / 4 * share * (x[token] @ A[e].T @ B[e])
    torch.testing.assert_close(layer(x), wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_inference_uses_exactly_top_k_experts_and_all_of_them_are_stage_2(k: int) -> None:
    model = mixer(progress=1.0, top_k=k)
    inputs = tiny.batch(model, labels=False)
    soft = model(**inputs).logits
    sparse = model.eval()(**inputs).logits
    for weights in weights_of(model, inputs).values():
        assert ((weights > 0).sum(-1) == k).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert torch.allclose(sparse, soft, atol=1e-12, rtol=1e-10) is (k == 4)


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_one_expert_is_plain_lora_in_both_stages(progress: float) -> None:
    model = mixer(progress=progress, num_experts=1, top_k=1)
    inputs = tiny.batch(model, labels=False)
    twin = plain_lora(model, 0)
    for mode in (True, False):
        got = model.train(mode)(**with_tasks(inputs, [0, 0, 0])).logits
        torch.testing.assert_close(got, twin(**inputs).logits, atol=1e-12, rtol=1e-10)


# -- the routing specialization loss ------------------------------------------------------------------------------

UNIFORM = torch.full((8, 4), 0.25, dtype=F64)
BALANCED = torch.eye(4, dtype=F64).repeat(2, 1)
COLLAPSED = torch.eye(4, dtype=F64)[[0] * 8]
SKEWED = torch.softmax(torch.tensor([[1.0, 0.0, -1.0, 0.5], [0.2, 2.0, 0.0, 0.0]], dtype=F64), -1).repeat(4, 1)


def record(p: Tensor, mask: Tensor | None = None, progress: float = 1.0) -> Record:
    return Record(Site("a", 1, 1), Routing(p, p, p.clamp(min=1e-30).log()), mask, progress=progress)


def rsl(sign: Any = "as_written", f_mode: Any = "argmax", *, balance: float = 2.0, entropy: float = 0.5) -> Any:
    settings = {"entropy_sign": sign, "f_mode": f_mode, "top_k": 2}
    return RoutingSpecialization(1.0, balance_coef=balance, entropy_coef=entropy, **settings)


def naive_rsl(p: Tensor, *, sign: str, f_mode: str, k: int, balance: float, entropy: float) -> Tensor:
    """Of one router's real tokens p (n, E), expert by expert."""
    n, E = p.shape
    f = [0.0] * E
    for row in p.detach():
        order = sorted(range(E), key=lambda e: -row[e].item())
        for e in order[: 1 if f_mode == "argmax" else k]:
            f[e] += 1.0 if f_mode == "argmax" else row[e].item()
    total = sum(f)
    term = sum((p[:, e].sum() / n * f[e] / total for e in range(E)), torch.zeros((), dtype=F64))
    h = -(p * p.log()).sum() / n
    return balance * term + (-entropy if sign == "as_written" else entropy) * h


@pytest.mark.parametrize("f_mode", ["argmax", "mass"])
@pytest.mark.parametrize(("sign", "s"), [("as_written", 1), ("sharpen", -1)])
def test_values_of_the_limits(sign: str, s: int, f_mode: str) -> None:
    loss = rsl(sign, f_mode)
    for p, wanted in (
        (UNIFORM, 2.0 / 4 - s * 0.5 * math.log(4)),
        (BALANCED, 2.0 / 4),
        (COLLAPSED, 2.0),
    ):
        assert loss([record(p)]).item() == pytest.approx(wanted, abs=1e-7)


def test_which_routing_each_sign_prefers() -> None:
    written, sharpen = (
        {name: rsl(sign)([record(p)]).item() for name, p in (("u", UNIFORM), ("b", BALANCED), ("c", COLLAPSED))}
        for sign in ("as_written", "sharpen")
    )
    assert written["u"] < written["b"] < written["c"]
    assert sharpen["b"] < sharpen["u"]
    assert sharpen["b"] < sharpen["c"]


@pytest.mark.parametrize(("sign", "rises"), [("as_written", True), ("sharpen", False)])
def test_the_entropy_term_rests_at_uniform_and_elsewhere_moves_by_its_sign(sign: str, rises: bool) -> None:
    loss = rsl(sign, balance=0.0)

    def descend(p: Tensor) -> tuple[Tensor, float, float]:
        logits = p.log().requires_grad_()
        (grad,) = torch.autograd.grad(loss([record(torch.softmax(logits, -1))]), logits)
        after = torch.softmax(logits.detach() - 0.5 * grad, -1)
        return grad, float(-(p * p.log()).sum(-1).mean()), float(-(after * after.log()).sum(-1).mean())

    assert descend(UNIFORM)[0].abs().max() < 1e-9
    grad, before, after = descend(SKEWED)
    assert grad.abs().max() > 1e-3
    assert (after > before) is rises


@pytest.mark.parametrize("f_mode", ["argmax", "mass"])
@pytest.mark.parametrize("sign", ["as_written", "sharpen"])
def test_the_loss_equals_its_formula_for_each_router_then_the_mean(sign: str, f_mode: str) -> None:
    settings = {"sign": sign, "f_mode": f_mode, "balance": 2.0, "entropy": 0.5}
    mask = torch.tensor([True, True, False, True, True, False, True])
    logits = [torch.randn(7, E, dtype=F64, requires_grad=True) for E in (4, 4, 3)]
    probs = [torch.softmax(x, -1) for x in logits]
    got = rsl(**settings)([record(p, mask) for p in probs])
    wanted = sum(naive_rsl(p[mask], k=2, **settings) for p in probs) / 3
    torch.testing.assert_close(got, wanted, atol=1e-8, rtol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got, logits, retain_graph=True), torch.autograd.grad(wanted, logits), atol=1e-7, rtol=0
    )


def test_how_often_an_expert_is_used_is_a_constant() -> None:
    p = SKEWED.clone().requires_grad_()
    (grad,) = torch.autograd.grad(rsl(f_mode="mass", entropy=0.0)([record(p)]), p)
    top = SKEWED.topk(2, dim=-1)
    f = torch.zeros_like(SKEWED).scatter(-1, top.indices, top.values).sum(0)
    torch.testing.assert_close(grad, (2.0 * f / f.sum() / 8).expand_as(grad), atol=1e-12, rtol=1e-12)


def test_a_models_loss_is_its_weights_times_both_terms() -> None:
    settings = {"aux_weight": 0.5, "rsl_weight": 3.0, "balance_coef": 2.0, "entropy_coef": 0.7, "preserve_coef": 0.1}
    model = mixer(progress=1.0, **settings)
    inputs = tiny.batch(model)
    inputs["attention_mask"][1, 4:] = 0
    inputs["labels"][1, 4:] = -100
    real = inputs["attention_mask"].bool()
    model(**inputs)  # takes theta_0
    drift = torch.zeros((), dtype=F64)
    with torch.no_grad():
        for p in experts(model):
            moved = 0.1 * torch.randn_like(p)
            p.add_(moved)
            drift = drift + moved.square().sum()
    got = model(**inputs).router_aux_loss
    values = {"sign": "as_written", "f_mode": "argmax", "k": 2, "balance": 2.0, "entropy": 0.7}
    terms = [naive_rsl(w[real], **values) for w in weights_of(model, inputs).values()]
    assert len(terms) == 8
    torch.testing.assert_close(got, 0.5 * (3.0 * sum(terms) / 8 + 0.1 * drift), atol=1e-7, rtol=0)


# -- the preserve term --------------------------------------------------------------------------------------------


def test_preserve_is_zero_at_theta_0_and_pulls_back_to_it() -> None:
    model = mixer(progress=1.0, rsl_weight=0.0, preserve_coef=0.25, aux_weight=2.0)
    inputs = tiny.batch(model)
    loss = model(**inputs).router_aux_loss
    assert loss == 0
    grads = torch.autograd.grad(loss, experts(model))
    assert all(grad.count_nonzero() == 0 for grad in grads)
    moves = [torch.randn_like(p) for p in experts(model)]
    with torch.no_grad():
        for p, move in zip(experts(model), moves, strict=True):
            p.add_(move)
    loss = model(**inputs).router_aux_loss
    torch.testing.assert_close(loss, 0.5 * sum(move.square().sum() for move in moves))
    grads = torch.autograd.grad(loss, experts(model))
    torch.testing.assert_close(list(grads), [2 * 0.5 * move for move in moves], atol=1e-12, rtol=1e-9)


def test_theta_0_is_taken_once_as_stage_2_begins() -> None:
    model = mixer(progress=0.0, hard_fraction=0.5)
    inputs = with_tasks(tiny.batch(model), [0, 1, 2])
    router = next(iter(tiny.mixtures(model).values())).moe_lora_router["default"]

    def move() -> Tensor:
        with torch.no_grad():
            for p in experts(model):
                p.add_(torch.randn_like(p))
        return experts(model)[0].detach().clone()

    model(**inputs)
    move()
    model(**inputs)
    start = move()
    moesaic.set_training_progress(model, 0.5)
    model(**inputs)
    assert torch.equal(router.anchor_A.flatten(0, 1), start)
    move()
    model(**inputs)
    assert torch.equal(router.anchor_A.flatten(0, 1), start)
    model.eval()(**inputs)
    assert torch.equal(router.anchor_A.flatten(0, 1), start)


def anchors(model: Any) -> list[Tensor]:
    """theta_0 as (E*r, d), in the order of `experts`."""
    routers = [layer.moe_lora_router["default"] for layer in tiny.mixtures(model).values()]
    return [anchor.flatten(0, 1) for router in routers for anchor in (router.anchor_A, router.anchor_B)]


@pytest.mark.parametrize(
    ("base", "low_memory"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)],
)
def test_theta_0_survives_a_checkpoint_to_the_bit(base: torch.dtype, low_memory: bool, tmp_path: Path) -> None:
    model = tiny.wrap(tiny.llama().to(base), tiny.small("lora-mixer")).train()
    inputs = tiny.batch(model)
    model(**inputs)
    theta_0 = [p.detach().clone() for p in experts(model)]
    with torch.no_grad():
        for p in experts(model):
            p.add_(torch.randn_like(p))
    model.save_pretrained(tmp_path)
    fresh = tiny.llama().to(base)
    resumed = PeftModel.from_pretrained(fresh, str(tmp_path), is_trainable=True, low_cpu_mem_usage=low_memory).train()
    for anchor, wanted in zip(anchors(resumed), theta_0, strict=True):
        assert anchor.dtype == torch.float32
        assert torch.equal(anchor, wanted)
    assert torch.equal(resumed(**inputs).router_aux_loss, model(**inputs).router_aux_loss)


def test_a_checkpoint_of_stage_1_takes_theta_0_after_it_is_resumed(tmp_path: Path) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("lora-mixer", rsl_weight=0.0)).train()
    moesaic.set_training_progress(model, 0.0)
    inputs = with_tasks(tiny.batch(model), [0, 1, 2])
    model(**inputs)
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(tiny.llama(), str(tmp_path), is_trainable=True).train()
    assert resumed(**inputs).router_aux_loss == 0
    assert all(layer.moe_lora_router["default"].anchored for layer in tiny.mixtures(resumed).values())


def test_without_a_preserve_term_nothing_is_kept() -> None:
    model = mixer(preserve_coef=0.0)
    assert not any("anchor" in name for name in model.state_dict())
    assert [type(loss).__name__ for loss in find_host(model).losses["default"]] == ["RoutingSpecialization"]


# -- training -----------------------------------------------------------------------------------------------------


class RoutedTrainer(RoutedTrainerMixin, loops.Trainer):
    """transformers' Trainer, telling how far it is."""


def train(folder: Path, *, resume: str | None = None, **settings: Any) -> Any:
    rows = [{**row, "routing_task_ids": i % 3} for i, row in enumerate(loops.rows([5] * 12))]
    model = tiny.wrap(tiny.llama(), tiny.small("lora-mixer", hard_fraction=0.5))
    trainer = loops.trainer(
        model, folder, cls=RoutedTrainer, train_dataset=rows, max_steps=6, remove_unused_columns=False, **settings
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_trainer_goes_through_both_stages_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    trainer = train(tmp_path, save_strategy="steps", save_steps=4)
    aux = [entry["router_aux_loss"] for entry in trainer.state.log_history if "router_aux_loss" in entry]
    assert [value == 0 for value in aux] == [True] * 3 + [False] * 3
    resumed = train(tmp_path / "again", resume=str(tmp_path / "checkpoint-4"))
    wanted, got = (dict(t.model.named_parameters()) for t in (trainer, resumed))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert anchors(trainer.model)
    assert all(torch.equal(a, b) for a, b in zip(anchors(resumed.model), anchors(trainer.model), strict=True))


def test_mamba_trains_in_both_stages() -> None:
    model = mixer("mamba", progress=0.0)
    assert {name.rpartition(".")[2] for name in tiny.mixtures(model)} == {"in_proj", "out_proj"}
    inputs = with_tasks(tiny.batch(model), [0, 1, 2])
    for progress in (0.0, 1.0):
        moesaic.set_training_progress(model, progress)
        model.zero_grad()
        model(**inputs).loss.backward()
        for name, router in tiny.router_parameters(model).items():
            assert router.grad is not None
            assert bool(router.grad.any()) is (progress == 1.0), name


# -- settings -----------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    config = LoRAMixerConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (64, 128, 0.1)
    assert (config.num_experts, config.top_k, config.hard_fraction) == (6, 3, 0.9)
    assert (config.entropy_sign, config.f_mode) == ("as_written", "argmax")
    kinds = [(type(loss), loss.weight, loss.reduce) for loss in config.losses()]
    assert kinds == [(RoutingSpecialization, 1.0, "mean"), (Preserve, 0.01, "sum")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hard_fraction": 1.5}, "hard_fraction=1.5 must be between 0 and 1"),
        ({"entropy_coef": -0.1}, "entropy_coef=-0.1 must be at least 0"),
        ({"preserve_coef": -1.0}, "preserve_coef=-1.0 must be at least 0"),
        ({"entropy_sign": "minus"}, "entropy_sign='minus' must be one of as_written, sharpen"),
        ({"f_mode": "top1"}, "f_mode='top1' must be one of argmax, mass"),
        ({"top_k": 7}, "top_k=7 must be between 1 and num_experts=6"),
        ({"hard_fractoin": 0.1}, "did you mean 'hard_fraction'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRAMixerConfig(**settings)


def test_more_tasks_than_experts_are_refused_beforehand() -> None:
    with pytest.raises(ConfigError, match=r"num_experts=4 and hard_fraction=0.9 disagree.*there are 6 tasks"):
        LoRAMixerConfig(num_experts=4, num_tasks=6)
    LoRAMixerConfig(num_experts=4, num_tasks=6, hard_fraction=0.0)
