"""What only a CUDA device can show: `make gpu`."""

import asyncio
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic import ffn
from moesaic.cli.main import main
from moesaic.evaluation.opening import load, open_adapter
from moesaic.ffn import CMoE, ReadMe, RMoE, SMoEDropout
from moesaic.ffn.tune import Rounds
from moesaic.lora.mix import mix
from moesaic.models.embedded import load_model
from moesaic.serving.asking import Asked
from moesaic.serving.engine import Batched, OneByOne, opened
from tests import tiny
from tests.composing import asked as composing
from tests.composing import make
from tests.test_converted import TEXT, mixtral
from tests.test_ffn import IDS, D, N, made

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("backend", ["rank", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_with_the_loop_on_cuda(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, A, B = (torch.randn(s, device="cuda", dtype=dtype) for s in ((100, 64), (32, 64), (32, 48)))
    weights = torch.rand(100, 4, device="cuda")
    weights[weights < 0.4] = 0
    wanted = mix(x.float(), A.float(), B.float(), weights, backend="reference")
    got = mix(x, A, B, weights, backend=backend).float()
    assert (got - wanted).abs().max() < (1e-3 if dtype == torch.float32 else 2**-6) * wanted.abs().max()


def stepped(model: Any, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients, on the CPU."""
    loss = model(**inputs).loss
    if loss.requires_grad:  # some learn nothing by gradients
        loss.backward()
    return loss.item(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


def test_a_training_step_on_cuda_equals_the_cpus(method: str) -> None:
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        model = tiny.wrap(tiny.llama(), tiny.small(method, lora_dropout=0.0), seed=0).to(device).train()
        inputs = {k: v.to(device) for k, v in tiny.batch(model, rows=3, tokens=9, seed=0, labels=True).items()}
        loss, found = stepped(model, inputs)
        losses.append(loss)
        gradients.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        assert torch.allclose(gradients[1][name], wanted, rtol=1e-2, atol=1e-5), name


@pytest.mark.parametrize(("backend", "k"), [("eager", 3), ("grouped_mm", 3), ("batched_mm", 3), ("grouped_mm", N - 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_experts_on_cuda_equal_the_loop_gradients_included(kind: str, dtype: torch.dtype, backend: str, k: int) -> None:
    model = ffn.convert(made(kind), SMoEDropout(num_experts=N, top_k=k)).to("cuda")
    model.set_experts_implementation(backend)
    bank = next(iter(ffn.expert_layers(model).values())).experts
    torch.manual_seed(0)
    x, along = torch.randn(2, 40, D, device="cuda")
    weights, index = torch.rand(40, N, device="cuda").topk(k, dim=-1)

    def run(call: Any, dtype: torch.dtype) -> list[Tensor]:
        bank.to(dtype)
        own = x.to(dtype).requires_grad_()
        y = call(own, index, weights.to(dtype))
        return [y, *torch.autograd.grad((y * along.to(dtype)).sum(), [own, *bank.parameters()])]

    wanted = run(bank.loop, torch.float32)
    for got, right in zip(run(bank, dtype), wanted, strict=True):
        assert (got.float() - right).abs().max() < (1e-3 if dtype == torch.float32 else 2**-5) * right.abs().max()


METHODS: dict[str, Any] = {
    "smoe-dropout": lambda: SMoEDropout(num_experts=N, top_k=3),
    "read-me": lambda: ReadMe(list(TEXT), router_dim=16, router_heads=2),
    "cmoe": lambda: CMoE(N, 2, 2),
    "rmoe": lambda: RMoE(state_dim=8),
}


@pytest.mark.parametrize("name", METHODS)
def test_models_are_converted_run_and_trained_on_cuda(name: str) -> None:
    method = METHODS[name]()
    model = (mixtral() if name == "rmoe" else made("llama")).to("cuda")
    model = ffn.convert(model, method, **method.parts(model, TEXT))
    there = copy.deepcopy(model).cpu()
    losses, gradients = [], []
    for each in (model, there):
        ids = IDS.to(each.device)
        loss, found = stepped(each, {"input_ids": ids, "labels": ids})
        losses.append(loss)
        gradients.append(found)
    assert gradients[0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, wanted in gradients[1].items():
        torch.testing.assert_close(gradients[0][parameter], wanted, rtol=1e-2, atol=1e-4)
    ids = IDS.to("cuda")
    how = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    assert torch.equal(model.generate(ids, use_cache=True, **how), model.generate(ids, use_cache=False, **how))


@pytest.mark.parametrize("loss", ["paper", "released"])
def test_read_mes_rounds_on_cuda_are_the_cpus(loss: Any) -> None:
    steps = []
    for device in ("cpu", "cuda"):
        model, method = made("llama").to(device), METHODS["read-me"]()
        parts, said = method.parts(model, TEXT), []
        batches = iter([{"input_ids": torch.cat([*TEXT.values()]).to(device)}] * 6)
        rounds = Rounds(rounds=1, router_steps=3, expert_steps=3, loss=loss)
        assert list(method.tune(model, parts, batches, rounds, say=lambda *step: said.append(step[2]))) == [0]  # noqa: B023
        steps.append(said)
    assert steps[1] == pytest.approx(steps[0], rel=1e-3)


async def answers(engine: Any, prompts: list[tuple[int, ...]], at_once: bool) -> list[list[int]]:
    """Tokens of each prompt's answer."""

    async def one(ids: tuple[int, ...]) -> list[int]:
        return [token async for token in engine.tokens(Asked(ids, max_tokens=12))]

    return await asyncio.gather(*map(one, prompts)) if at_once else [await one(ids) for ids in prompts]


@pytest.mark.parametrize("method", ["mola", "dynmole", "hotmoe", "retrieval"])
def test_requests_that_share_forwards_on_cuda_answer_as_alone(method: str, tmp_path: Path) -> None:
    """In float32, as bf16's rounding may turn a token; `serve` itself tries the model out when it starts."""
    if method == "retrieval":
        given = ("method=retrieval", f"data={make(tmp_path / 'parts') / 'data'}", "adapter.encoder=hashing")
        assert main(composing(tmp_path / "parts", tmp_path / method, *given)) == 0
    else:
        base = load_model("nano")
        model = tiny.wrap(base.model, tiny.small(method, target_modules=["q_proj"]), seed=0)
        model.peft_config["default"].base_model_name_or_path = "nano"
        model.save_pretrained(str(tmp_path / method))
    there = open_adapter(tmp_path / method)
    prepared = load(replace(there, recipe=replace(there.recipe, precision="fp32")))
    texts = [f"{i} 4 2 {i + 1} {word} =" for i in range(4) for word in ("up", "back", "sum", "down")]
    prompts = [tuple(prepared.base.tokenizer(text).input_ids) for text in texts]

    async def run() -> list[list[list[int]]]:
        engine = await opened(prepared)
        assert isinstance(engine, Batched)
        found = [await answers(engine, prompts, at_once) for at_once in (True, False)]
        engine.close()
        return [*found, await answers(OneByOne(prepared), prompts, False)]

    at_once, in_turn, alone = asyncio.run(run())
    assert at_once == in_turn == alone
    assert len({tuple(ids) for ids in alone}) > 4
