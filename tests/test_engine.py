"""The engine answers as `generate` does, whatever is in memory, and outlives what cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moesaic import ffn
from moesaic.errors import AdapterError, ConfigError
from moesaic.ffn.serving.engine import Engine
from moesaic.ffn.serving.files import ExpertFiles, write_checksums
from moesaic.ffn.smoe_dropout import SMoEDropout
from tests.test_ffn import made
from tests.test_read_me import converted, masks_of

EXPERT = 3 * 32 * 32 * 4
"""Bytes of one: gate, up and down projections of 32 neurons of 32 inputs."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    base = made("llama")
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    made_of = converted(base, masks_of(base))
    made_of.generation_config.eos_token_id = 2
    return made_of


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("read-me")
    model.save_pretrained(place)
    write_checksums(place, banks(model))
    return place


def banks(model: PreTrainedModel) -> list[str]:
    return [f"{name}.experts" for name in ffn.expert_layers(model)]


def prompts(number: int = 10) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (number,), generator=draw).tolist()
    return [torch.randint(3, 50, (length,), generator=draw).tolist() for length in lengths]


@pytest.fixture(scope="module")
def answers(model: PreTrainedModel) -> list[list[int]]:
    found = []
    for prompt in prompts():
        asked = torch.tensor([prompt])
        how = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(asked)}
        found.append(model.generate(asked, **how)[0, len(prompt) :].tolist())
    return found


def served(folder: Path, **settings: Any) -> tuple[list[Any], Engine]:
    engine = Engine(folder, **settings)
    requests = [engine.add(prompt, max_new_tokens=9) for prompt in prompts()]
    ended = list(engine.run())
    engine.close()
    assert sorted(r.name for r in ended) == [r.name for r in requests]
    return requests, engine


@pytest.mark.parametrize("budget", [None, EXPERT, 2 * EXPERT, 4 * EXPERT])
@pytest.mark.parametrize("order", ["experts", "fcfs", "decode-first", "prefill-first"])
def test_answers_are_those_of_generate_at_every_budget(
    folder: Path, answers: list[list[int]], budget: int | None, order: Any
) -> None:
    for prefetch in (True, False):
        requests, engine = served(folder, budget=budget, order=order, prefetch=prefetch)
        assert [r.written for r in requests] == answers
        assert all(len(r.times) == len(r.written) and r.times == sorted(r.times) for r in requests)
        assert engine.residency.held <= (budget or 6 * EXPERT)
        assert max(batch.tokens for batch in engine.batches) <= max(16, *map(len, prompts()))


@pytest.mark.parametrize("policy", ["lru", "fifo", "random"])
def test_answers_do_not_hang_on_the_policy(folder: Path, answers: list[list[int]], policy: Any) -> None:
    requests, _ = served(folder, budget=3 * EXPERT, policy=policy, direct=False)
    assert [r.written for r in requests] == answers


def test_experts_are_read_out_of_the_models_own_file(model: PreTrainedModel, folder: Path) -> None:
    files = ExpertFiles(folder, banks(model))
    assert files.keys == [(layer, expert) for layer in range(2) for expert in range(3)]
    for number, layer in enumerate(ffn.expert_layers(model).values()):
        for expert in range(3):
            found = files.read(number, expert)
            assert files.size(number, expert) == EXPERT
            assert torch.equal(found["gate_up_proj"], layer.experts.gate_up_proj[expert])
            assert torch.equal(found["down_proj"], layer.experts.down_proj[expert])


def damaged(folder: Path, place: Path, how: str, model: PreTrainedModel) -> Path:
    """A copy whose last expert of the last layer cannot be read."""
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    files = ExpertFiles(place, banks(model))
    piece = files._pieces[1, 2][0]
    content = bytearray(piece.file.read_bytes())
    if how == "cut off":
        piece.file.write_bytes(content[: piece.start + piece.size // 2])
    else:
        content[piece.start + 5] ^= 0xFF
        piece.file.write_bytes(content)
    return place


def test_a_damaged_expert_fails_its_requests_and_no_other(
    model: PreTrainedModel, folder: Path, answers: list[list[int]], tmp_path: Path
) -> None:
    place = damaged(folder, tmp_path / "bad", "flipped", model)
    requests, engine = served(place, batch_tokens=64)
    failed = [r for r in requests if r.error]
    assert len(failed) > 0
    for request, wanted in zip(requests, answers, strict=True):
        if request.error:
            assert "expert 2 of layer 1 is damaged in" in request.error
            assert request.written == wanted[: len(request.written)]
        else:
            assert request.written == wanted
    assert not engine.open
    again = Engine(place)
    fine = next((p for p, r in zip(prompts(), requests, strict=True) if not r.error), None)
    if fine is not None:
        again.add(fine, max_new_tokens=9)
        assert [r.error for r in again.run()] == [None], "the engine lives"
    cut = damaged(folder, tmp_path / "cut", "cut off", model)
    with pytest.raises(AdapterError, match=r"expert 2 of layer 1 cannot be read from .*: it ends 2,048 bytes early"):
        ExpertFiles(cut, banks(model)).read(1, 2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda e: e.add([]), "a request needs a prompt, a list of one token id at least"),
        (lambda e: e.add([3], max_new_tokens=1.5), "and room for one more"),
        (lambda e: e.add([3, 1000]), "1000 is no token id of the model"),
        (lambda e: e.add([3, -1]), "-1 is no token id of the model"),
        (lambda e: e.add([3.5]), "3.5 is no token id of the model"),
        (lambda e: Engine(e.folder, budget=1.5), "budget=1.5 must be a whole number"),
        (lambda e: Engine(e.folder, max_wait=-1), "max_wait=-1 must be at least 1"),
        (lambda e: e.add([3] * 3000), "are more than the model's 2048 positions"),
        (lambda e: (e.add([3], name="a"), e.add([3], name="a")), "a request 'a' is open already"),
        (lambda e: Engine(e.folder, budget=10), "budget=10 bytes hold no expert: one takes 12,288"),
        (lambda e: Engine(e.folder, order="best"), "unknown order 'best'"),
    ],
)
def test_bad_requests_are_one_clear_line_and_others_survive(
    folder: Path, answers: list[list[int]], asked: Any, message: str
) -> None:
    engine = Engine(folder)
    request = engine.add(prompts()[0], max_new_tokens=9)
    with pytest.raises(ConfigError, match=message):
        asked(engine)
    assert request in list(engine.run())
    assert request.written == answers[0]


def test_only_models_whose_experts_are_known_beforehand_are_served(tmp_path: Path) -> None:
    ffn.convert(made("llama"), SMoEDropout(num_experts=8)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is no Read-ME model"):
        Engine(tmp_path)
    with pytest.raises(AdapterError, match="nowhere holds no converted model"):
        Engine("nowhere")
