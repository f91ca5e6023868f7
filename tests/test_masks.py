"""Masks of every shape, and sequences that share a row: a loss or an answer is what each sequence alone would have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import MistralConfig, MistralForCausalLM

import moesaic
from moesaic.host import masks
from moesaic.lora import METHODS
from tests import tiny

A, B = torch.randint(3, tiny.VOCAB, (1, 6)), torch.randint(3, tiny.VOCAB, (1, 9))
PACKED = torch.cat([A, B], dim=1)
POSITIONS = torch.cat([torch.arange(6), torch.arange(9)])[None]
SEEN = torch.block_diag(torch.ones(6, 6).tril(), torch.ones(9, 9).tril()).bool()
ADDED = torch.zeros(1, 1, 15, 15).masked_fill(~SEEN, torch.finfo(torch.float32).min)
INDEX = torch.tensor([0] * 6 + [1] * 9)[None]
PACKINGS: dict[str, dict[str, Any]] = {
    "positions": {"position_ids": POSITIONS},
    "positions from one": {"position_ids": POSITIONS + 1},
    "mask": {"position_ids": POSITIONS, "attention_mask": ADDED},
    "mask without positions": {"attention_mask": ADDED},
    "boolean mask": {"position_ids": POSITIONS, "attention_mask": SEEN[None, None]},
    "by kind": {"position_ids": POSITIONS, "attention_mask": {"full_attention": ADDED}},
}


def rows() -> dict[str, Tensor]:
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    ids[0, :6], ids[1], mask[0, 6:] = A, B, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.full("packing")
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"custom", "topiclora", "loramoe"}))
@pytest.mark.parametrize("packing", ["positions", "mask", "mask without positions", "boolean mask", "by kind"])
def test_auxiliary_losses_of_packed_rows_are_those_of_the_rows(method: str, packing: str) -> None:
    """Save for those whose unit is the row: TopicLoRA's targets and LoRAMoE's balance."""
    attention = "sdpa" if packing == "boolean mask" else "eager"
    model = tiny.wrap(tiny.qwen3(attn_implementation=attention), tiny.small(method)).train()
    if packing == "mask without positions":
        model.config.rope_theta = 1e30  # the same positions for all, nearly
    apart = model(**rows(), labels=rows()["input_ids"], use_cache=False)
    together = model(input_ids=PACKED, labels=PACKED, use_cache=False, **PACKINGS[packing])
    if "router_aux_loss" not in apart:
        assert "router_aux_loss" not in together
        return
    tolerance = 2e-2 if packing == "mask without positions" else 1e-5
    assert together.router_aux_loss.item() == pytest.approx(apart.router_aux_loss.item(), rel=tolerance)


def prompt(ids: Tensor) -> Tensor:
    return torch.cat([torch.full_like(ids[:, :3], -100), ids[:, 3:]], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("packing", ["positions", "positions from one", "mask"])
def test_packed_sequences_answer_as_alone(training: bool, labelled: bool, packing: str) -> None:
    model = tiny.wrap(tiny.llama(attn_implementation="eager"), tiny.small("sequence")).train(training)
    alone = [model(input_ids=t, labels=prompt(t) if labelled else None, use_cache=False).logits for t in (A, B)]
    labels = torch.cat([prompt(A), prompt(B)], dim=1) if labelled else None
    together = model(input_ids=PACKED, labels=labels, use_cache=False, **PACKINGS[packing]).logits
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("left", [0, 3])
def test_a_static_cache_of_a_sliding_window_shows_the_whole_prompt(left: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = MistralForCausalLM(MistralConfig(**tiny.TOKENS, num_hidden_layers=2, sliding_window=4, **sizes)).eval()
    model = tiny.wrap(base, tiny.small("sequence", model="llama"))
    inputs = tiny.padded(tiny.batch(model, tokens=14, labels=False), left=left)
    asked = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**inputs, **asked)
    assert torch.equal(plain, model.generate(**inputs, **asked, cache_implementation="static"))


def test_prepared_masks_are_read_along_their_diagonal() -> None:
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    causal = torch.ones(5, 5).tril().bool() & padding[:, None, None, :]
    window = causal & torch.ones(5, 5).triu(-1).bool()
    block = create_block_mask(lambda b, h, q, k: padding[b, k] & (q >= k), 2, 1, 5, 5, device="cpu")
    wide = torch.cat([causal, torch.zeros(2, 1, 5, 3, dtype=torch.bool)], dim=-1)
    added = torch.zeros(2, 1, 5, 5).masked_fill(~causal, -torch.inf)
    finite = torch.zeros(2, 1, 5, 5).masked_fill(~causal, -1e4)
    keys = padding[:, None, None]
    prepared = (causal, causal.long(), added, added.half(), finite, window, block, wide, keys, keys.float().log())
    for mask in (*prepared, {"sliding_attention": window}):
        assert torch.equal(masks.two_d(mask, 5), padding)
        assert masks.packed_sequences({"attention_mask": mask, "input_ids": padding}, training=False) is None
    assert torch.equal(masks.two_d(torch.cat([padding, torch.zeros(2, 4)], dim=1), 5), padding), "a static cache's"
    step = torch.cat([torch.ones(2, 1, 1, 6), torch.zeros(2, 1, 1, 4)], dim=-1).bool()
    assert masks.two_d(step, 1, past=5).all()
    assert not masks.two_d(step, 1, past=6).any()


def test_one_mask_for_all_rows_is_each_rows() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("mola"))
    inputs = tiny.batch(model, labels=False)
    tokens = inputs["input_ids"].shape[1]
    shared = torch.ones(tokens, tokens).tril().bool()[None, None]
    shared[..., 0] = False
    with moesaic.trace(model) as one, torch.no_grad():
        model(input_ids=inputs["input_ids"], attention_mask=shared)
    with moesaic.trace(model) as each, torch.no_grad():
        model(input_ids=inputs["input_ids"], attention_mask=shared.expand(3, 1, -1, -1))
    for name, module in one.modules.items():
        torch.testing.assert_close(one.utilisation()[name], each.utilisation()[name])
        assert module.tokens == each.modules[name].tokens == 3 * (tokens - 1)


def test_sequences_by_index_and_rows_of_one_each() -> None:
    ids = torch.zeros(1, 15, dtype=torch.long)
    for training in (True, False):
        found = masks.packed_sequences({"input_ids": ids, "seq_idx": INDEX}, training=training)
        assert torch.equal(found, INDEX)
    plain = {"input_ids": ids, "position_ids": torch.arange(15)[None]}
    assert masks.packed_sequences(plain, training=False) is None
