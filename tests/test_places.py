"""What a layer's input need not be: of the batch's rows, of three axes, on the device of the layer before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
)

import moesaic
from moesaic.errors import ConfigError
from moesaic.host.fitting import by_row, by_token, in_three, shared_out
from moesaic.lora import METHODS
from tests import devices, tiny, zoo

ALL = sorted(METHODS.keys() - {"custom"})


# -- one more axis -------------------------------------------------------------------------------------------------


def minicpm() -> MiniCPM3ForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return tiny._seeded(MiniCPM3ForCausalLM, MiniCPM3Config(**tiny.TOKENS, num_key_value_heads=2, **sizes, **LATENT), 0)


LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}


@pytest.mark.parametrize("build", [zoo.deepseek_v3, minicpm])
@pytest.mark.parametrize(
    "method", sorted(name for name in ALL if not METHODS[name].kind.needs_adapters and name != "mixlora")
)
def test_latent_attention_does_not_lose_the_mask(method: str, build: Any) -> None:
    model = tiny.wrap(build(), tiny.small(method, target_modules=["kv_b_proj", "o_proj"])).train()
    inputs = tiny.batch(model)
    one, two = model(**inputs), model(**tiny.padded(inputs, left=3))
    torch.testing.assert_close(two.logits[:, 3:], one.logits, atol=1e-5, rtol=0)
    if "router_aux_loss" in one:
        torch.testing.assert_close(two.router_aux_loss, one.router_aux_loss, atol=1e-6, rtol=1e-4)
    two.loss.backward()
    layer = next(m for name, m in tiny.mixtures(model).items() if "kv_b_proj" in name)
    assert all(p.grad is not None for p in layer.moe_lora_B.parameters())


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("method", ["sequence", "mola"])
def test_latent_attention_reads_its_cache_anew_with_padding(method: str, cache: str) -> None:
    model = tiny.wrap(zoo.deepseek_v3(), tiny.small(method, target_modules=["kv_b_proj", "q_b_proj"]))
    inputs = tiny.batch(model, rows=1, tokens=9, labels=False)
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}
    kind = {} if cache == "dynamic" else {"cache_implementation": cache}
    plain = model.generate(**inputs, **asked, use_cache=False)[:, -5:]
    assert torch.equal(model.generate(**inputs, **asked, **kind)[:, -5:], plain)
    assert torch.equal(model.generate(**tiny.padded(inputs, left=3), **asked, **kind)[:, -5:], plain)


@pytest.mark.parametrize("shape", [(2, 1, 5), (2, 5, 1), (2, 3, 5), (2, 5, 3)])
def test_axes_beside_rows_and_tokens(shape: tuple[int, ...]) -> None:
    """Each place of an input with four axes has its own row's and token's mask."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    h = torch.zeros(*shape, 4)
    tokens_behind = shape[-1] == 5
    wanted = (mask[:, None, :] if tokens_behind else mask[:, :, None]).expand(shape)
    flat = in_three(h, 5)
    assert flat.dim() == 3
    assert torch.equal(by_token(mask, flat), wanted.reshape(flat.shape[:-1]))
    ids = by_row(torch.tensor([4, 7]), flat, 5, "ids")
    assert ids is not None
    assert torch.equal(
        ids.repeat_interleave(flat.shape[1]), torch.tensor([4, 7]).repeat_interleave(h[0, ..., 0].numel())
    )


# -- rows that are not the batch's ---------------------------------------------------------------------------------


def with_images(counts: tuple[int, ...]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A batch with so many images a row, left-padded; and each row alone."""
    torch.manual_seed(0)
    rows = [[zoo.IMAGE] * 4 * n + [5, 6, 7, 8] for n in counts]
    pixels, longest = [torch.randn(n, 3, 16, 16) for n in counts], max(map(len, rows))
    ids = torch.tensor([[tiny.PAD] * (longest - len(row)) + row for row in rows])
    mask = (ids != tiny.PAD).long()
    alone = [
        {"input_ids": torch.tensor([row])} | ({"pixel_values": p} if len(p) else {})
        for row, p in zip(rows, pixels, strict=True)
    ]
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat(pixels)}, alone


@torch.no_grad()
@pytest.mark.full("counts")
@pytest.mark.parametrize("method", ["oracle", "moelora"])
@pytest.mark.parametrize("counts", [(1, 1), (2, 2), (3, 1), (2, 1), (0, 2), (2, 0)])
def test_an_image_is_routed_as_its_row(counts: tuple[int, ...], method: str) -> None:
    own = {"num_experts": 2, "num_tasks": 2, "r": 2}
    model = get_peft_model(zoo.llava(), METHODS[method](task_type="CAUSAL_LM", **own)).eval()
    tiny.randomize_b(model)
    for parameter in tiny.router_parameters(model).values():
        parameter.normal_()
    batch, alone = with_images(counts)
    tasks = torch.tensor([0, 1])
    together = model(**batch, routing_task_ids=tasks).logits
    for i, row in enumerate(alone):
        single = model(**row, routing_task_ids=tasks[i : i + 1]).logits[0]
        torch.testing.assert_close(together[i, batch["attention_mask"][i].bool()], single, atol=1e-5, rtol=0)


def test_images_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"leave that tower out of target_modules"):
        shared_out(torch.tensor([0, 1]), torch.tensor([3, 2]), 4, "routing_task_ids")
    given = shared_out(torch.tensor([0, 1]), torch.tensor([8, 4]), 36, "routing_task_ids")
    assert given.tolist() == [0] * 24 + [1] * 12, "patches laid flat"


@pytest.mark.parametrize("method", ["oracle", "moelora"])
def test_one_row_a_sequence_has_its_task(method: str) -> None:
    """BERT's pooler, and any module of torch on (batch, features)."""
    settings = {"num_experts": 3, "r": 2, "num_tasks": 3}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    base = BertForSequenceClassification(BertConfig(vocab_size=tiny.VOCAB, **sizes))
    model = get_peft_model(base, METHODS[method](target_modules="all-linear", task_type="SEQ_CLS", **settings)).eval()
    tiny.randomize_b(model)
    ids, tasks = torch.randint(3, tiny.VOCAB, (3, 6)), torch.tensor([0, 1, 2])
    together = model(input_ids=ids, routing_task_ids=tasks).logits
    for i in range(3):
        alone = model(input_ids=ids[i : i + 1], routing_task_ids=tasks[i : i + 1]).logits
        torch.testing.assert_close(together[i : i + 1], alone)
    net = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), METHODS[method](target_modules=["0"], **settings))
    tiny.randomize_b(net.eval())
    x = torch.randn(3, 8)
    with moesaic.routing_tasks(net, task_ids=[0, 1, 2]):
        whole = net(x)
    with moesaic.routing_tasks(net, task_ids=[2]):
        torch.testing.assert_close(net(x[2:]), whole[2:])


def test_tokens_that_experts_were_dealt_are_nobodys() -> None:
    h = torch.zeros(3, 8)
    assert by_row(torch.tensor([0, 1, 2]), h, 5, "ids", dealt=True) is None
    assert by_row(torch.tensor([0, 1, 2]), h, 5, "ids").tolist() == [0, 1, 2]


# -- two devices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", [*ALL, *tiny.COMBINATIONS])
def test_layers_may_lie_on_two_devices(method: str, training: bool) -> None:
    model = tiny.wrap(tiny.llama(layers=4, attn_implementation="eager"), tiny.small(method)).train(training)
    inputs = tiny.padded(tiny.batch(model), left=2)
    plain = model(**inputs, use_cache=False)
    wanted = plain.loss.item()
    inner = model.base_model.model
    devices.lay_module(inner, 0)
    inner._forward_pre_hooks.popitem()
    for name in ("model.layers.2", "model.layers.3", "model.norm", "lm_head"):
        devices.lay_module(inner.get_submodule(name), 1)
    for name in ("model.layers.0", "model.layers.1"):
        devices.lay_module(inner.get_submodule(name), 0)
    inputs = {key: devices.lay(value, 0) for key, value in inputs.items()}
    with devices.TwoDevices():
        found = model(**inputs, use_cache=False)
    assert found.loss.item() == pytest.approx(wanted, rel=1e-5)


def test_the_devices_are_told_apart() -> None:
    a, b = devices.lay(torch.ones(2), 0), devices.lay(torch.ones(2), 1)
    with devices.TwoDevices():
        assert (a + a).device == devices.PLACES[0]
        assert a.to(b.device).device == devices.PLACES[1]
        with pytest.raises(RuntimeError, match="expected all on one device"):
            a + b
