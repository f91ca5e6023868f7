"""Experts cut out of dense feed-forward layers: exact, on Transformers' backends, as ordinary models."""

from __future__ import annotations

import copy
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitNetConfig,
    BitNetForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import moesaic
from moesaic import ffn
from moesaic.errors import AdapterError, ConfigError
from moesaic.ffn.layer import ExpertLayer, GatedExperts, PlainExperts, fits
from moesaic.ffn.schedules import KSchedule, Schedule, apply
from moesaic.ffn.slimming import set_top_k, top_k
from moesaic.ffn.smoe_dropout import FixedRouter, SMoEDropout, dense_of
from moesaic.ffn.split import cut, even, join, read, seats
from moesaic.ffn.stock import as_mixtral

D, WIDE, N = 32, 64, 8


def made(kind: str) -> PreTrainedModel:
    llama = {"vocab_size": 50, "hidden_size": D, "intermediate_size": WIDE, "num_hidden_layers": 2}
    llama |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**llama, **ends)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**llama, **ends)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**llama, **ends)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_embd=D, n_layer=2, n_head=2, n_inner=WIDE, bos_token_id=1, eos_token_id=2)
        ),
        "bert": lambda: BertForSequenceClassification(
            BertConfig(vocab_size=50, hidden_size=D, intermediate_size=WIDE, num_hidden_layers=2, num_attention_heads=2)
        ),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=50, hidden_size=D, word_embed_proj_dim=D, ffn_dim=WIDE, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=64,
            )
        ),
    }  # fmt: skip
    model = models[kind]().eval()
    with torch.no_grad():  # biases start at zero
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


MODELS = ["llama", "qwen3", "mistral", "gpt2", "bert", "opt"]
IDS = torch.arange(14).view(2, 7) % 47 + 3


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", MODELS)
def test_a_layer_is_read_cut_and_joined_bit_for_bit(kind: str) -> None:
    model = made(kind)
    found = seats(model)
    assert [(seat.d_model, seat.d_ff) for seat in found] == [(D, WIDE)] * 2
    for seat in found:
        dense = read(model, seat)
        neurons = torch.randperm(WIDE).view(N, -1)
        back = join(cut(dense, neurons), neurons, bias=dense.bias, activation=dense.activation)
        for name in ("gate", "up", "up_bias", "down", "bias"):
            own, again = getattr(dense, name), getattr(back, name)
            assert (own is None) == (again is None)
            assert own is None or torch.equal(own, again)
        x = torch.randn(3, D)
        torch.testing.assert_close(dense(x), back(x), rtol=1e-6, atol=1e-6)


def test_layers_that_do_more_than_their_matrices_say_are_refused() -> None:
    sizes = {"vocab_size": 50, "hidden_size": D, "intermediate_size": WIDE, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    normed = BitNetForCausalLM(BitNetConfig(**sizes))
    with pytest.raises(ConfigError, match="BitNetMLP does more than"):
        ffn.convert(normed, SMoEDropout(num_experts=N))
    shared = made("llama")
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp is used by several layers"):
        ffn.convert(shared, SMoEDropout(num_experts=N))
    packed = made("llama")
    for layer in packed.model.layers:
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="is quantised"):
        ffn.convert(packed, SMoEDropout(num_experts=N))
    half = made("mistral").to(torch.bfloat16)
    ffn.convert(half, SMoEDropout(num_experts=N))


@pytest.mark.parametrize("kind", MODELS)
def test_all_experts_summed_are_the_dense_model(kind: str) -> None:
    model = made(kind)
    wanted, dense = logits(model), [read(model, seat) for seat in seats(model)]
    ffn.convert(model, SMoEDropout(num_experts=N, combine="sum"))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    layers = ffn.expert_layers(model)
    assert len(layers) == 2
    for layer, own in zip(layers.values(), dense, strict=True):
        back = dense_of(layer)
        assert all(
            torch.equal(a, b)
            for a, b in zip((own.up, own.down, own.bias), (back.up, back.down, back.bias), strict=True)
            if a is not None and b is not None
        )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_mean_with_equal_weights_is_the_dense_model_too(kind: str) -> None:
    model = made(kind)
    wanted = logits(model)
    ffn.convert(model, SMoEDropout(num_experts=N))
    assert not torch.allclose(logits(model), wanted, atol=1e-5), "routed weights are not equal"
    for layer in ffn.expert_layers(model).values():
        layer.gate.weight.zero_()
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


def naive(layer: ExpertLayer, x: Tensor, k: int, combine: str) -> Tensor:
    """SMoE-Dropout's equations, one token after the other."""
    out = []
    for token in x.flatten(0, -2):
        values, index = (layer.gate.weight.to(token) @ token).topk(k)
        weights = values.softmax(-1) if combine == "softmax" else torch.ones_like(values)
        y = sum(w * layer.experts.one(int(e), token[None])[0] for w, e in zip(weights, index, strict=True))
        out.append(y if layer.bias is None else y + layer.bias)
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("combine", ["softmax", "sum"])
@pytest.mark.parametrize(("backend", "k"), [("eager", 3), ("grouped_mm", 3), ("batched_mm", 3), ("grouped_mm", N - 1)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_backend_gives_the_loops_values_and_gradients(kind: str, backend: str, k: int, combine: Any) -> None:
    model = ffn.convert(made(kind), SMoEDropout(num_experts=N, top_k=k, combine=combine))
    model.set_experts_implementation(backend)
    layer = next(iter(ffn.expert_layers(model).values()))
    layer.gate.weight.mul_(50)
    x = torch.randn(2, 9, D, requires_grad=True)
    along = torch.randn(2, 9, D)
    found = []
    for run in (layer, lambda x: naive(layer, x, k, combine)):
        y = run(x)
        found.append([y, *torch.autograd.grad((y * along).sum(), [x, *layer.parameters()], allow_unused=True)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("backend", "k"), [("eager", 2), ("grouped_mm", 2), ("batched_mm", 2), ("grouped_mm", N - 1)])
def test_an_expert_that_no_token_takes_gets_no_gradient(backend: str, k: int) -> None:
    model = ffn.convert(made("llama"), SMoEDropout(num_experts=N, top_k=k))
    model.set_experts_implementation(backend)
    layer = next(iter(ffn.expert_layers(model).values()))
    x = torch.randn(1, 1, D)
    with torch.no_grad():
        chosen = layer.route(x)[1].flatten().tolist()
    layer(x).square().sum().backward()
    left = [e for e in range(N) if e not in chosen]
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[left].any()
        assert all(parameter.grad[e].any() for e in chosen)


@pytest.mark.parametrize(
    ("d_model", "width", "dtype"),
    [
        (D, 6, torch.float32),
        (D, 8, torch.float64),
        (D, 4, torch.bfloat16),
        (30, 8, torch.float32),
        (36, 8, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("bank", [GatedExperts, PlainExperts])
def test_sizes_that_grouped_mm_refuses_take_the_loop(bank: Any, d_model: int, width: int, dtype: torch.dtype) -> None:
    config = LlamaConfig()
    config._experts_implementation_internal = "grouped_mm"
    experts = bank(config, 3, d_model, width, F.silu).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    assert not fits(experts.down_proj)
    x, index = torch.randn(5, d_model, dtype=dtype), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]])
    weights = torch.rand(5, 2, dtype=dtype)
    assert torch.equal(experts(x, index, weights), experts.loop(x, index, weights))


def test_active_sets_are_nested_in_k_and_weights_sum_to_one() -> None:
    model = ffn.convert(made("llama"), SMoEDropout(num_experts=N))
    layer = next(iter(ffn.expert_layers(model).values()))
    x, before = torch.randn(2, 9, D), None
    for k in range(1, N + 1):
        with top_k(model, k), torch.no_grad():
            weights, index = layer.route(x)
        assert index.shape == (2, 9, k)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))
        sets = [set(row.tolist()) for row in index.flatten(0, 1)]
        assert before is None or all(a < b for a, b in zip(before, sets, strict=True))
        before = sets
    assert layer.top_k == N, "k is as it was"


def data(rows: int = 16) -> list[dict[str, Tensor]]:
    torch.manual_seed(3)
    ids = torch.randint(3, 50, (rows, 9))
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(out: Path, schedule: Schedule, *, steps: int = 4, resume: bool = False, save: int = 2) -> Trainer:
    model = ffn.convert(made("llama"), SMoEDropout(num_experts=N, top_k=schedule.k_min))
    args = TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=4, save_steps=save, report_to=[], use_cpu=True,
        disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=data(), callbacks=[KSchedule(schedule)])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_fixed_router_is_no_parameter_and_stays_as_it_is(tmp_path: Path) -> None:
    first = ffn.convert(made("llama"), SMoEDropout(num_experts=N))
    before = {n: layer.gate.weight.clone() for n, layer in ffn.expert_layers(first).items()}
    torch.manual_seed(0)
    trainer = trained(tmp_path, Schedule("linear", 2, N))
    layers = ffn.expert_layers(trainer.model)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(before) == len(layers) == 2
    for layer in layers.values():
        assert isinstance(layer.gate, FixedRouter)
        assert id(layer.gate.weight) not in held
        assert all(id(p) in held for p in layer.experts.parameters())
    reference = ffn.convert(made("llama"), SMoEDropout(num_experts=N, top_k=2))
    moved = [
        not torch.equal(a, b)
        for (_, a), (_, b) in zip(reference.named_parameters(), trainer.model.named_parameters(), strict=True)
    ]
    assert all(moved), "everything else has learned"
    for own, other in zip(layers.values(), ffn.expert_layers(reference).values(), strict=True):
        assert torch.equal(own.gate.weight, other.gate.weight)


def test_k_follows_the_schedule_and_goes_on_after_a_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = ExpertLayer.forward
    monkeypatch.setattr(ExpertLayer, "forward", lambda self, x: (seen.append(self.top_k), forward(self, x))[1])
    whole = trained(tmp_path / "a", Schedule("linear", 2, N), steps=6, save=3)
    wanted = [Schedule("linear", 2, N).at(t, 6) for t in range(6)]
    assert seen == [k for k in wanted for _ in range(2)]
    assert all(layer.top_k == N for layer in ffn.expert_layers(whole.model).values())
    seen.clear()
    checkpoint = tmp_path / "a" / "checkpoint-3"
    again = trained(tmp_path / "a", Schedule("linear", 2, N), steps=6, save=3, resume=str(checkpoint))  # type: ignore[arg-type]
    assert seen == [k for k in wanted[3:] for _ in range(2)]
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["linear", "cosine", "exp", "multi_step"])
@pytest.mark.parametrize(("low", "high"), [(1, 16), (8, 16), (2, 2), (1, 7)])
def test_schedules_climb_from_the_least_to_the_most(kind: Any, low: int, high: int) -> None:
    up, down = Schedule(kind, low, high), Schedule(f"{kind}-down", low, high)  # type: ignore[arg-type]
    ks = [up.at(t, 300) for t in range(301)]
    assert (ks[0], ks[-1]) == (low, high)
    assert ks == sorted(ks)
    assert [down.at(t, 300) for t in range(301)] == [low + high - k for k in ks]


def test_schedules_are_those_of_the_authors_code() -> None:
    ks = [Schedule("linear", 8, 16).at(t, 1600) for t in range(1600)]
    assert sum(ks) / len(ks) == pytest.approx(12.0, abs=0.01)
    assert sum(k == 16 for k in ks) / len(ks) == pytest.approx(0.0625, abs=0.002)
    parts = [Schedule("multi_step", 1, 16).at(t, 500) for t in range(500)]
    assert [parts.count(k) for k in (1, 2, 4, 8, 16)] == [100] * 5
    drawn = [[Schedule("elastic", 1, 4).at(t, 400, layer) for t in range(400)] for layer in (0, 1)]
    assert drawn[0] != drawn[1]
    assert all(80 <= row.count(k) <= 120 for row in drawn for k in (1, 2, 3, 4))
    assert drawn[0] == [Schedule("elastic", 1, 4).at(t, 400) for t in range(400)]


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_gives_the_model_back(kind: str, tmp_path: Path) -> None:
    model = ffn.convert(made(kind), SMoEDropout(num_experts=N, top_k=3))
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    again = ffn.load(tmp_path).eval()
    assert torch.equal(logits(again), wanted)
    set_top_k(again, N)
    assert not torch.equal(logits(again), wanted)
    if kind in ("llama", "gpt2"):
        auto = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(auto) is type(again)
        asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(auto.generate(IDS, **asked), model.generate(IDS, **asked))


def test_every_methods_folder_is_read_in_a_fresh_process(tmp_path: Path) -> None:
    text = {"a": IDS[:1], "b": IDS[1:]}
    shape = {"vocab_size": 50, "hidden_size": D, "intermediate_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    for base, method in (
        (made("llama"), SMoEDropout(num_experts=N, top_k=3)),
        (made("llama"), ffn.ReadMe(["a", "b"], residual="separate", router_dim=16, router_heads=2)),
        (made("gpt2"), ffn.CMoE(N, 2, 3)),
        (MixtralForCausalLM(MixtralConfig(**shape)).eval(), ffn.RMoE(state_dim=8, residual_alpha=0.5, head="cosine")),
    ):
        model = ffn.convert(base, method, **method.parts(base, text))
        model.save_pretrained(tmp_path / method.name)
        torch.save(logits(model), tmp_path / method.name / "wanted.pt")
    code = (
        "import sys, torch; from pathlib import Path; from moesaic.ffn import load\n"
        "ids = torch.arange(14).view(2, 7) % 47 + 3; places = [*Path(sys.argv[1]).iterdir()]\n"
        "for place in places:\n"
        "    found = load(place).eval()(input_ids=ids).logits\n"
        "    assert torch.equal(found, torch.load(place / 'wanted.pt')), place\n"
        "assert len(places) == 4"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_trace_sees_the_experts_and_a_copy_is_its_own() -> None:
    model = ffn.convert(made("llama"), SMoEDropout(num_experts=N, top_k=3))
    again = copy.deepcopy(model)
    with moesaic.trace(model) as trace:
        logits(model)
    with moesaic.trace(again) as other:
        logits(again)
    assert repr(trace) == repr(other)
    assert repr(trace).startswith("RoutingTrace(2 routers, 14 tokens")
    with moesaic.trace(model) as trace:
        logits(again)
    assert "14 tokens" not in repr(trace)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda: ffn.convert(made("llama"), SMoEDropout(num_experts=7)), "d_ff=64 cannot be cut into num_experts=7"),
        (lambda: SMoEDropout(num_experts=4, top_k=5), "top_k=5 must be between 1 and num_experts=4"),
        (lambda: ffn.convert(nn.Sequential(nn.Linear(2, 2)), SMoEDropout()), "Sequential is no Transformers model"),
        (lambda: seats(nn.Sequential(nn.Linear(2, 2))), "Sequential has no feed-forward layer of a known kind"),
        (lambda: set_top_k(made("llama"), 2), "no layers made of experts"),
        (lambda: set_top_k(ffn.convert(made("llama"), SMoEDropout(num_experts=N)), 9), "top_k=9 must be between"),
        (lambda: Schedule("linear", 4, 2), "1 <= k_min <= k_max"),
        (lambda: Schedule("up", 1, 2), "unknown schedule 'up'"),  # type: ignore[arg-type]
        (lambda: ffn.load("nowhere"), "nowhere holds no converted model"),
    ],
)
def test_bad_input_is_one_clear_line(asked: Any, message: str) -> None:
    with pytest.raises((ConfigError, AdapterError), match=message):
        asked()


def test_a_model_is_converted_once_and_is_left_alone_by_what_fails() -> None:
    model = ffn.convert(made("llama"), SMoEDropout(num_experts=N))
    wanted = logits(model)
    with pytest.raises(ConfigError, match="has the layers of smoe-dropout already"):
        ffn.convert(model, SMoEDropout(num_experts=4))
    assert torch.equal(logits(model), wanted)
    dense = made("llama")
    wanted = logits(dense)
    with pytest.raises(ConfigError):
        ffn.convert(dense, SMoEDropout(num_experts=5))
    assert type(dense) is LlamaForCausalLM
    assert torch.equal(logits(dense), wanted)


def test_equal_parts_are_in_order() -> None:
    assert even(8, 4).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("router", ["fixed", "learned"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_stock_layout_is_read_without_us(kind: str, router: Any, tmp_path: Path) -> None:
    model = ffn.convert(made(kind), SMoEDropout(num_experts=N, top_k=3, router=router))
    stock = as_mixtral(model)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-6)
    stock.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "wanted.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "wanted = torch.load(sys.argv[1] + '/wanted.pt'); ids = torch.arange(14).view(2, 7) % 47 + 3\n"
        "torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-6)\n"
        "assert 'moesaic' not in sys.modules"
    )
    if router == "fixed":
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_what_no_stock_model_holds_says_why() -> None:
    for kind, method, why in (
        ("llama", SMoEDropout(num_experts=N, combine="sum"), "combine=sum gives every expert the weight 1"),
        ("qwen3", SMoEDropout(num_experts=N), "qwen3 is no Llama or Mistral"),
    ):
        with pytest.raises(ConfigError, match=f"has no stock layout: {why}"):
            as_mixtral(ffn.convert(made(kind), method))


def test_an_evaluation_leaves_k_as_the_step_before_it_had_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    forward = ExpertLayer.forward

    def watched(self: ExpertLayer, x: Tensor) -> Tensor:
        seen.append(("trained" if self.training else "evaluated", self.top_k))
        return forward(self, x)

    class After(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.extend(("left", layer.top_k) for layer in ffn.expert_layers(model).values())

    monkeypatch.setattr(ExpertLayer, "forward", watched)
    model, schedule = ffn.convert(made("llama"), SMoEDropout(num_experts=N)), Schedule("elastic", 1, N)
    args = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, per_device_eval_batch_size=4, report_to=[],
        eval_strategy="steps", eval_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callbacks = [KSchedule(schedule), After()]
    Trainer(model, args, train_dataset=data(), eval_dataset=data(4), callbacks=callbacks).train()
    ks = [[schedule.at(step, 6, layer) for layer in (0, 1)] for step in range(6)]
    assert any(first != second for first, second in ks), "each layer has its own"
    assert seen == [(when, k) for step in ks for when in ("trained", "evaluated", "left") for k in step]
    apply(schedule, model, 3, 6)
    with top_k(model, N):
        logits(model)
    assert [layer.top_k for layer in ffn.expert_layers(model).values()] == ks[3]


def test_a_sum_takes_the_largest_logits_where_their_weights_vanish() -> None:
    model = ffn.convert(made("llama"), SMoEDropout(num_experts=4, top_k=2, combine="sum"))
    layer = next(iter(ffn.expert_layers(model).values()))
    orders = torch.tensor([*permutations((300.0, 120.0, 10.0, 1.0))])
    layer.gate.weight[:, : len(orders)] = orders.t()
    weights, index = layer.route(torch.eye(len(orders), D))
    assert weights.eq(1).all()
    assert torch.equal(index.sort().values, (orders > 100).nonzero()[:, 1].view(-1, 2))


@pytest.mark.parametrize(
    ("kind", "shared", "dtype"),
    [
        ("llama", False, torch.bfloat16),
        ("llama", True, torch.bfloat16),
        ("gpt2", True, torch.bfloat16),
        ("gpt2", True, torch.float32),
    ],
)
@pytest.mark.parametrize(("backend", "k"), [("eager", 2), ("grouped_mm", 2), ("batched_mm", 2), ("grouped_mm", 6)])
def test_bfloat16_and_shared_experts_are_near_the_loop_over_tokens(
    kind: str, shared: bool, dtype: torch.dtype, backend: str, k: int
) -> None:
    model = made(kind)
    method = ffn.CMoE(N, 2, k) if shared else SMoEDropout(num_experts=N, top_k=k)
    ffn.convert(model, method, **method.parts(model, {"all": IDS}))
    model.to(dtype).set_experts_implementation(backend)
    layer, exact = (next(iter(ffn.expert_layers(m).values())) for m in (model, copy.deepcopy(model).float()))
    if not shared:
        layer.gate.weight.mul_(64)
        exact.gate.weight.mul_(64)
    x, along = torch.randn(2, 9, D).to(dtype), torch.randn(2, 9, D)

    def by_tokens(x: Tensor) -> Tensor:
        weights, index = exact.route(x)
        out = []
        for token, ws, es in zip(x.flatten(0, 1), weights.flatten(0, 1), index.flatten(0, 1), strict=True):
            y = sum(w * exact.experts.one(int(e), token[None])[0] for w, e in zip(ws, es, strict=True))
            y = y + exact.shared.one(0, token[None])[0] if shared else y
            out.append(y if exact.bias is None else y + exact.bias)
        return torch.stack(out).view(x.shape)

    found = []
    for run, own, read_in in ((layer, layer, dtype), (by_tokens, exact, torch.float32)):
        given = x.to(read_in).requires_grad_()
        y = run(given)
        learns = [p for name, p in own.named_parameters() if not name.startswith("gate.")]
        found.append([y, *torch.autograd.grad((y * along.to(y.dtype)).sum(), [given, *learns])])
    share = 0.03 if dtype == torch.bfloat16 else 1e-5
    for got, wanted in zip(*found, strict=True):
        assert got.dtype == dtype
        most = wanted.abs().max().item()
        assert most > 0
        torch.testing.assert_close(got.float(), wanted, rtol=0, atol=share * most)


def test_a_token_uses_the_experts_that_it_takes_and_all_else() -> None:
    model = ffn.convert(made("llama"), SMoEDropout(num_experts=N, top_k=2))
    attention, norms, neuron = 2 * D * D + 2 * D * 16, 2 * D, 3 * D
    outside = 2 * 50 * D + 2 * (attention + norms) + D
    assert ffn.active_parameters(model) == outside + 2 * (WIDE // 4) * neuron
    set_top_k(model, N)
    assert ffn.active_parameters(model) == outside + 2 * WIDE * neuron == sum(p.numel() for p in model.parameters())
    base, method = made("llama"), ffn.CMoE(N, 2, 3)
    model = ffn.convert(base, method, **method.parts(base, {"all": IDS}))
    routers = 2 * 6 * 2 * D
    assert ffn.active_parameters(model) == outside + 2 * (5 * WIDE // N) * neuron + routers


def test_a_stock_layout_keeps_the_window_of_attention() -> None:
    config = made("mistral").config
    config.sliding_window = 3
    torch.manual_seed(0)
    model = ffn.convert(MistralForCausalLM(config).eval(), SMoEDropout(num_experts=N, top_k=3))
    stock = as_mixtral(model)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-6)
    stock.config.sliding_window = None
    assert not torch.allclose(logits(stock)[:, 3:], logits(model)[:, 3:], atol=1e-4), "the window is seen"


SMALL = {"vocab_size": 50, "hidden_size": D, "num_hidden_layers": 1}
OTHERS: dict[str, Any] = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=D, d_ff=WIDE, d_kv=16, num_layers=1, num_heads=2)
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL, intermediate_size=WIDE, num_attention_heads=2, pad_token_id=0)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=D, n_layer=1, n_head=2)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_with_layers_of_another_layout_are_refused(kind: str) -> None:
    model = OTHERS[kind]()
    was = type(model)
    for method in (SMoEDropout(num_experts=N), ffn.CMoE(N)):
        with pytest.raises(ConfigError, match=f"{was.__name__} has no feed-forward layer of a known kind: gate_proj/"):
            ffn.convert(model, method, **method.parts(model, {"all": IDS}))
    assert type(model) is was


def test_mixtures_are_not_cut_again() -> None:
    shape = {"intermediate_size": WIDE, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SMALL, **shape, num_attention_heads=2, num_key_value_heads=1, num_experts=4)
    )
    for asked in (lambda: seats(model), lambda: ffn.convert(model, SMoEDropout(num_experts=N))):
        with pytest.raises(ConfigError, match="Qwen2MoeForCausalLM is a mixture already: `moesaic convert rmoe`"):
            asked()
    assert type(model) is Qwen2MoeForCausalLM


@pytest.mark.parametrize("neurons", [[[0, 1], [1, 2]], [[0, 1], [3, 4]], [[1, 2], [3, 4]]])
def test_experts_that_do_not_part_the_neurons_are_not_joined(neurons: list[list[int]]) -> None:
    dense = read(made("gpt2"), seats(made("gpt2"))[0])
    which = torch.tensor(neurons)
    with pytest.raises(ConfigError, match="these experts do not part the neurons between them"):
        join(cut(dense, which), which, bias=None, activation=F.gelu)
