"""The engine answers as `generate` does, whatever is in memory, and outlives what cannot be read."""

from __future__ import annotations

import copy
import errno
import itertools
import os
import random
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

from moesaic import ffn
from moesaic.errors import AdapterError, ConfigError
from moesaic.ffn.masks import Masks
from moesaic.ffn.serving.engine import Engine
from moesaic.ffn.serving.files import BLOCK, ExpertFiles, write_checksums
from moesaic.ffn.smoe_dropout import SMoEDropout
from moesaic.routing.residency import replay
from tests.test_ffn import made
from tests.test_read_me import converted, masks_of

EXPERT = 3 * 32 * 32 * 4
"""Bytes of one: gate, up and down projections of 32 neurons of 32 inputs."""


def read_me(base: PreTrainedModel, *, scale: float = 3, same: bool = False, **settings: Any) -> PreTrainedModel:
    """Converted, its weights so large that what it writes varies; `same`: all domains have the first one's neurons."""
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    found: Masks = masks_of(base)
    if same:
        found = {name: mask[:1].expand_as(mask).clone() for name, mask in found.items()}
    made_of = converted(base, found, **settings)
    made_of.generation_config.eos_token_id = 2
    return made_of


def saved(model: PreTrainedModel, place: Path) -> Path:
    model.save_pretrained(place)
    write_checksums(place, banks(model))
    return place


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return read_me(made("llama"))


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(model, tmp_path_factory.mktemp("read-me"))


def banks(model: PreTrainedModel) -> list[str]:
    return [f"{name}.experts" for name in ffn.expert_layers(model)]


def prompts(number: int = 10) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (number,), generator=draw).tolist()
    return [torch.randint(3, 50, (length,), generator=draw).tolist() for length in lengths]


def answer(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    asked = torch.tensor([prompt])
    how = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(asked)}
    return model.generate(asked, **how)[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def answers(model: PreTrainedModel) -> list[list[int]]:
    return [answer(model, prompt) for prompt in prompts()]


def watched(engine: Engine) -> set[Any]:
    """Hold an engine to its budget at every moment, and to what it reads ahead; returns what of that is unused yet."""
    use, unused = engine.residency.use, set()

    def held_to(key: Any, size: int, *, count: bool = True, **how: Any) -> list[Any]:
        assert engine.store._held.keys() == engine.residency.sizes.keys()
        left = use(key, size, count=count, **how)
        assert engine.residency.held <= engine.residency.limit
        assert not unused & {*left}, "read ahead for nothing"
        (unused.discard if count else unused.add)(key)
        return left

    engine.residency.use = held_to
    return unused


def served(folder: Path, asked: Sequence[list[int]] = (), **settings: Any) -> tuple[list[Any], Engine]:
    engine = Engine(folder, **settings)
    unused = watched(engine)
    requests = [engine.add(prompt, max_new_tokens=9) for prompt in asked or prompts()]
    ended = list(engine.run())
    engine.close()
    assert sorted(r.name for r in ended) == [r.name for r in requests]
    assert not unused
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
        assert engine.residency.limit == (budget or 6 * EXPERT)
        assert (engine.store.loads.ahead > 0) is prefetch
        if budget is None:
            assert engine.store.loads.ahead == 6 * prefetch, "each is read before it is needed, and once"
        assert max(batch.tokens for batch in engine.batches) <= max(16, *map(len, prompts()))


@pytest.mark.parametrize("policy", ["lru", "fifo", "random"])
def test_answers_do_not_hang_on_the_policy(folder: Path, answers: list[list[int]], policy: Any) -> None:
    requests, _ = served(folder, budget=3 * EXPERT, policy=policy, direct=False)
    assert [r.written for r in requests] == answers


@pytest.mark.parametrize("slots", [2, 3, 4, 5])
def test_9_who_leaves_is_decided_by_the_tokens_that_wait(folder: Path, slots: int) -> None:
    hits, recent = 0, 0
    for seed in (0, 8):
        engine = Engine(folder, budget=slots * EXPERT, order="fcfs", batch_tokens=1, prefetch=False)
        experts = random.Random(seed).choices(range(3), k=9)
        for expert in experts:
            engine.add([token_of(engine, expert)], max_new_tokens=1)
        list(engine.run())
        trace = [(layer, expert) for expert in experts for layer in range(2)]
        assert engine.residency.hits == replay(trace, slots, "belady").hits
        hits, recent = hits + engine.residency.hits, recent + replay(trace, slots, "lru").hits
    assert hits > recent


def token_of(engine: Engine, expert: int) -> int:
    """One that begins a prompt at this expert."""
    routes = engine.router(torch.arange(3, 50)[:, None])[0].argmax(-1).flatten().tolist()
    return routes.index(expert) + 3


@pytest.mark.parametrize(("max_wait", "batches"), [(1, 2), (3, 4), (64, 7)])
def test_who_waits_for_a_rare_expert_is_served_after_max_wait_batches(
    folder: Path, max_wait: int, batches: int
) -> None:
    engine = Engine(folder, batch_tokens=1, max_wait=max_wait)
    engine.add([token_of(engine, 0)], max_new_tokens=6)
    rare = engine.add([token_of(engine, 2)], max_new_tokens=1)
    while not rare.written:
        engine.step()
    assert len(engine.batches) == batches


LLAMA = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (lambda: made("llama"), {"residual": "separate"}),
        (lambda: made("llama"), {"residual": "separate", "same": True}),
        (lambda: made("gpt2"), {"scale": 40}),
        (lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=4)), {}),
        (
            lambda: Qwen2ForCausalLM(
                Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=1)
            ),
            {},
        ),
    ],
    ids=["separate", "nothing of their own", "gpt2", "mistral", "qwen2"],
)
def test_other_models_are_served_as_generate_answers(
    base: Callable[[], PreTrainedModel], settings: dict[str, Any], tmp_path: Path
) -> None:
    model = read_me(base().eval(), **{"scale": 10, **settings})
    asked = [*prompts(5), [*itertools.chain(*prompts())][:60]]
    wanted = [answer(model, prompt) for prompt in asked]
    assert len({token for written in wanted for token in written}) > 9
    requests, engine = served(saved(model, tmp_path), asked, batch_tokens=6)
    assert [r.written for r in requests] == wanted
    widths = model.config.moesaic["shared_widths"]
    assert all(widths)
    own = [32 - width if "residual" in settings else 32 for width in widths]
    assert [bank.width for bank in (layer.experts for layer in ffn.expert_layers(engine.model).values())] == own


def test_a_folder_in_half_precision_is_served_in_it(model: PreTrainedModel, tmp_path: Path) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    requests, engine = served(saved(half, tmp_path))
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert [r.written for r in requests] == [answer(half, prompt) for prompt in prompts()]


def test_settings_of_generate_that_have_no_effect_are_told(
    model: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = copy.deepcopy(model)
    other.generation_config.do_sample, other.generation_config.temperature = True, 0.7
    other.generation_config.repetition_penalty = 1.5
    Engine(saved(other, tmp_path)).close()
    assert "do_sample, repetition_penalty in " in caplog.text
    assert "has no effect" in caplog.text


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
NOT_SERVED: dict[str, Callable[[], PreTrainedModel]] = {
    "DiffLlamaForCausalLM: its attention": lambda: DiffLlamaForCausalLM(
        DiffLlamaConfig(**LLAMA | {"num_key_value_heads": 2})
    ),
    "XGLMForCausalLM: its attention": lambda: XGLMForCausalLM(
        XGLMConfig(vocab_size=50, d_model=32, ffn_dim=64, num_layers=2, attention_heads=2)
    ),
    "models with positions of the kind longrope": lambda: LlamaForCausalLM(
        LlamaConfig(**LLAMA, rope_parameters=LONG | {"original_max_position_embeddings": 16})
    ),
}


def test_attention_of_another_kind_and_experts_in_float64_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    saved(read_me(Gemma2ForCausalLM(Gemma2Config(**LLAMA)).eval()), tmp_path / "gemma2")
    with pytest.raises(ConfigError, match="the engine does not serve models with scores that are capped"):
        Engine(tmp_path / "gemma2")
    for number, (kind, base) in enumerate(NOT_SERVED.items()):
        place = saved(read_me(base().eval()), tmp_path / f"{number}")
        with pytest.raises(ConfigError, match=f"the engine does not serve {kind}"):
            Engine(place)
    copy.deepcopy(model).double().save_pretrained(tmp_path / "double")
    with pytest.raises(AdapterError, match="has experts in F64: save the model in float32, bfloat16 or float16"):
        Engine(tmp_path / "double")


def test_experts_are_read_out_of_the_models_own_file(model: PreTrainedModel, folder: Path) -> None:
    files = ExpertFiles(folder, banks(model))
    assert files.keys == [(layer, expert) for layer in range(2) for expert in range(3)]
    for number, layer in enumerate(ffn.expert_layers(model).values()):
        for expert in range(3):
            found = files.read(number, expert)
            assert files.size(number, expert) == EXPERT
            assert torch.equal(found["gate_up_proj"], layer.experts.gate_up_proj[expert])
            assert torch.equal(found["down_proj"], layer.experts.down_proj[expert])


def test_files_beside_the_models_own_are_not_read(model: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model_before.safetensors")
    (tmp_path / "zz.safetensors").mkdir()
    requests, _ = served(saved(model, tmp_path))
    assert [r.written for r in requests] == [answer(model, prompt) for prompt in prompts()]
    shutil.rmtree(tmp_path / "zz.safetensors")
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    requests, _ = served(tmp_path)
    assert [r.written for r in requests] == [answer(model, prompt) for prompt in prompts()]


@pytest.mark.parametrize("refused", ["nothing", "open", "read", "all"])
def test_reads_go_past_the_page_cache_unless_that_is_refused(
    model: PreTrainedModel, folder: Path, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, flag = ExpertFiles(folder, banks(model)), getattr(os, "O_DIRECT", 1 << 30)
    wanted, opened, real_open, real_read = files.read(1, 2), [], os.open, os.preadv

    def open_(file: Path, flags: int) -> int:
        opened.append(bool(flags & flag))
        if refused == "open" and opened[-1]:
            raise OSError(errno.EINVAL, "no direct reads here")
        return real_open(file, flags & ~flag)

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if opened[-1]:
            assert offset % BLOCK == len(buffers[0]) % BLOCK == 0
        if refused == "all" or (refused == "read" and opened[-1]):
            raise OSError(errno.EIO if refused == "all" else errno.EINVAL, "refused")
        return real_read(descriptor, [buffers[0][:BLOCK]], offset)

    monkeypatch.setattr(os, "O_DIRECT", flag, raising=False)
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    if refused == "all":
        with pytest.raises(AdapterError, match=r"expert 2 of layer 1 cannot be read from .*: .*refused"):
            files.read(1, 2)
        assert opened == [True]
        return
    for direct in (True, False):
        opened.clear()
        files.direct = direct
        found = files.read(1, 2)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert opened == ([direct] if refused == "nothing" or not direct else [True, False]) * len(wanted)


def copied(folder: Path, place: Path) -> Path:
    place.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


def damage(place: Path, model: PreTrainedModel, expert: int, how: str) -> None:
    """Of the last layer, an expert that cannot be read."""
    piece = ExpertFiles(place, banks(model))._pieces[1, expert][0]
    content = bytearray(piece.file.read_bytes())
    content[piece.start + 5] ^= 0xFF
    piece.file.write_bytes(content[: piece.start + piece.size // 2] if how == "cut off" else content)


@pytest.mark.parametrize(("budget", "turns"), [(None, [2]), (EXPERT, [2, 1])])
def test_a_damaged_expert_fails_its_requests_and_no_other(
    model: PreTrainedModel, folder: Path, tmp_path: Path, budget: int | None, turns: list[int]
) -> None:
    place = copied(folder, tmp_path / "bad")
    asked = [*prompts(3), *([token] for token in range(3, 50, 3))]
    wanted = [answer(model, prompt) for prompt in asked]
    engine = Engine(place, budget=budget, batch_tokens=64)
    for bad in turns:
        damage(place, model, bad, "flipped")
        requests = [engine.add(prompt, max_new_tokens=9) for prompt in asked]
        assert {r.name for r in engine.run()} == {r.name for r in requests}
        whole = []
        for request, answered in zip(requests, wanted, strict=True):
            ran = torch.tensor([request.prompt + answered[:-1]])
            routes = engine.router(ran)[0][0].argmax(-1).tolist()
            if bad in routes:
                assert f"expert {bad} of layer 1 is damaged in" in request.error
                assert request.written == answered[: max(0, routes.index(bad) + 1 - len(request.prompt))]
            else:
                assert (request.error, request.written) == (None, answered)
                whole.append(request)
        assert 0 < len(whole) < len(asked)
        assert {len(r.written) for r in requests if r.error} > {0, 1}, "at their prompts and as they write"
        again = engine.add(whole[0].prompt, max_new_tokens=9)
        assert list(engine.run()) == [again]
        assert (again.error, again.written) == (None, whole[0].written), "the engine lives"
        copied(folder, place)
    requests = [engine.add(prompt, max_new_tokens=9) for prompt in asked]
    assert len(list(engine.run())) == len(asked)
    assert [(r.error, r.written) for r in requests] == [(None, answered) for answered in wanted]


def test_a_file_that_is_cut_off_is_one_clear_line(model: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    cut = copied(folder, tmp_path / "cut")
    damage(cut, model, 2, "cut off")
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
        (lambda e: e.add([3], name=[1]), r"name=\[1\] must be a text or a number"),
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


def test_a_read_ahead_that_failed_is_forgotten(model: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path / "bad")
    engine = Engine(place)
    for expert in (1, 2):
        damage(place, model, expert, "flipped")
    failed = engine.add(prompts()[0], max_new_tokens=1)
    assert {1, 2} <= {*failed.experts}
    assert [r.error is None for r in engine.run()] == [False]
    copied(folder, place)
    for expert in range(3):
        engine.add([token_of(engine, expert)], max_new_tokens=1)
    assert [r.error for r in engine.run()] == [None] * 3


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_no_more_bytes_are_alive_than_the_budget(folder: Path, slots: int) -> None:
    engine, alive, peaks = Engine(folder, budget=slots * EXPERT), [0], [0]
    read = engine.store.files.read

    def counted(*key: int) -> dict[str, Tensor]:
        found = read(*key)
        for tensor in found.values():
            alive[0] += tensor.nbytes
            weakref.finalize(tensor, lambda size=tensor.nbytes: alive.__setitem__(0, alive[0] - size))
        peaks.append(alive[0])
        return found

    engine.store.files.read = counted
    for prompt in prompts():
        engine.add(prompt, max_new_tokens=9)
    list(engine.run())
    assert max(peaks) <= slots * EXPERT
